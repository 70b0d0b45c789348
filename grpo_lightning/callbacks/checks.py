"""What a rollout needs to know of the Trainer around it."""

import math
import os
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.advantages import ADVANTAGES
from grpo_lightning.checkpoints.adapter_io import guard_folders
from grpo_lightning.engines.base import EngineContext, RolloutEngine
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.losses import LossConfig
from grpo_lightning.metrics.reduce import mean_of
from grpo_lightning.rewards.suite import Rewards
from grpo_lightning.rollout.collector import Collector, Rollout
from grpo_lightning.rollout.micro_batch_sizing import check_micro_batches
from grpo_lightning.rollout.phases import profiled
from grpo_lightning.rollout.trained_module import TrainsOnRollouts, check_module
from grpo_lightning.types import PromptBatch, SamplingParams
from grpo_lightning.utils.out_of_memory import explained
from grpo_lightning.utils.ranges import check_numbers


def longest_prompt(trainer: pl.Trainer) -> int:
    """Returns the tokens of the longest prompt the datamodule knows of; 0 if it does not say."""
    return getattr(getattr(trainer, "datamodule", None), "longest_prompt", 0)


def engine_context(
    trainer: pl.Trainer, module: TrainsOnRollouts, sampling: SamplingParams, other: SamplingParams | None
) -> EngineContext:
    """Returns what an engine may know before it starts.

    Args:
        trainer: with its strategy set up.
        module: the policy is loaded.
        sampling: of training.
        other: of validation, which may ask for longer completions.
    """
    from_pretrained = {"trust_remote_code": getattr(module, "trust_remote_code", False)}
    prompt = longest_prompt(trainer)
    return EngineContext(
        policy=module.policy,
        model_path=module.model_path,
        max_model_len=prompt + max(s.max_tokens for s in (sampling, other or sampling)) if prompt else None,
        sampling=sampling,
        model_kwargs={**from_pretrained, **getattr(module, "model_kwargs", {})},
        corrected=module.loss.correction.mode != "off",
        world_size=trainer.world_size,
        rank=trainer.global_rank,
        local_rank=trainer.local_rank,
    )


def start_engine(
    engine: RolloutEngine,
    trainer: pl.Trainer,
    module: TrainsOnRollouts,
    sampling: SamplingParams,
    other: SamplingParams | None,
) -> None:
    """Starts an engine; rotary factors that depend on lengths are fixed as it takes them, by its longest."""
    context = engine_context(trainer, module, sampling, other)
    context.policy.fit_lengths(getattr(engine, "max_model_len", None) or context.max_model_len)
    with explained(trainer, "start"):
        engine.start(context)


def run_seed(seed: int | None) -> int:
    """Returns `seed`, or seed_everything's, or 0."""
    return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))


def check_epoch(trainer: pl.Trainer, micro_batches: int) -> None:
    """Raises ConfigError unless an epoch has a known length of whole rollouts."""
    length = trainer.num_training_batches
    if length == float("inf"):
        raise ConfigError(
            "the train loader has no length, so Lightning reads one batch ahead and every rollout would be "
            "one policy late; give it a __len__"
        )
    if int(length) % micro_batches:
        raise ConfigError(
            f"an epoch has {length} micro-batches, which is not a multiple of the {micro_batches} that one "
            "rollout feeds; change trainer.limit_train_batches or trainer.accumulate_grad_batches"
        )


def check_counts(
    num_generations: int, updates_per_rollout: int, num_iterations: int, dynamic_sampling: int
) -> None:
    """Raises ConfigError if a count of the rollout section is too small."""
    counts = (
        ("num_generations", num_generations, 2, ": a group of one has no signal"),
        ("updates_per_rollout", updates_per_rollout, 1, ""),
        ("num_iterations", num_iterations, 1, ""),
        ("dynamic_sampling", dynamic_sampling, 0, ": how often a group is replaced"),
    )
    bounds = [(key, value >= least, f"at least {least}{why}") for key, value, least, why in counts]
    check_numbers("rollout", {key: value for key, value, _, _ in counts}, bounds)


def check_sampling(
    sampling: SamplingParams,
    advantage: str | None,
    clip: tuple[float | None, float | None] | None = None,
) -> None:
    """Raises ConfigError if training cannot sample like this, or advantages cannot be made or clipped so."""
    low, high = (
        (-math.inf if clip is None or clip[0] is None else clip[0]),
        (math.inf if clip is None or clip[1] is None else clip[1]),
    )
    allowed = (
        "low <= 0 <= high with low < high: a group without signal has the advantage 0; null does not clip"
    )
    given = {"advantage_clip": clip}
    check_numbers("rollout", given, [("advantage_clip", low <= 0 <= high and low < high, allowed)])
    if sampling.temperature == 0:
        raise ConfigError(
            "rollout.sampling.temperature is 0; training needs > 0, e.g. 1.0 (greedy has no variety)"
        )
    if advantage is not None and advantage not in ADVANTAGES:
        raise ConfigError(f"rollout.advantage is {choices(advantage, ADVANTAGES)}")


def check_loss(loss: LossConfig, sampling: SamplingParams, advantage: str) -> None:
    """Raises ConfigError if loss and advantages do not fit; says when sampling rules a correction out."""
    if loss.kl_coef and loss.kl_in == "reward" and not ADVANTAGES[advantage].uses_total:
        raise ConfigError(
            f"model.loss.kl_in is 'reward', but rollout.advantage {advantage!r} normalises each reward by "
            "itself, which leaves no place for it; set model.loss.kl_in to loss"
        )
    corrects = (
        loss.correction.mode != "off" or loss.correction.bypass or loss.off_policy_threshold is not None
    )
    if corrects and sampling.off_policy_options:
        rank_zero_warn(
            f"rollout.sampling.{sampling.off_policy_options[0]} makes the engine sample from something else "
            "than the policy: its log-probabilities are not used, so model.loss.correction is off"
        )


def check_context(trainer: pl.Trainer, module: Any, key: str, sampling: SamplingParams) -> None:
    """Raises ConfigError if the longest prompt and completion do not fit into the model together."""
    context, longest = getattr(module, "context_length", None), longest_prompt(trainer)
    if context is not None and longest + sampling.max_tokens > context:
        raise ConfigError(
            f"{key}.max_tokens is {sampling.max_tokens} and the longest prompt has {longest} tokens, "
            f"but the model "
            f"takes {context} in all: lower {key}.max_tokens to {max(context - longest, 0)}, or "
            "data.max_prompt_tokens"
        )


def check_columns(trainer: pl.Trainer, rewards: Rewards) -> None:
    """Raises ConfigError if a reward function asks for a column that the dataset does not have."""
    columns = getattr(getattr(trainer, "datamodule", None), "columns_of_prompts", None)
    if columns is not None:
        rewards.check_columns(columns)


def check_batch(batch: Any, module: Any) -> None:
    """Raises ConfigError unless the train loader yields prompts that the module can train on."""
    if not isinstance(batch, PromptBatch):
        raise ConfigError(
            f"RolloutCallback got a {type(batch).__name__} from the train loader; use PromptDataModule, "
            "or a loader that yields PromptBatch"
        )
    given = sorted({name for own in batch.model_inputs for name in own})
    if given and not getattr(module, "reads_model_inputs", False):
        raise ConfigError(
            f"the prompts have model_inputs ({', '.join(given)}), but {type(module).__name__} trains on "
            "tokens alone; a module that reads them sets reads_model_inputs = True"
        )
    if batch.model_inputs and (batch.spares or len(batch.model_inputs) != len(batch)):
        raise ConfigError(
            f"{len(batch)} prompts have {len(batch.model_inputs)} model_inputs; give one for each, and leave "
            "rollout.dynamic_sampling at 0, which would exchange prompts behind the module's back"
        )


def check_setup(
    trainer: pl.Trainer,
    module: Any,
    stage: str,
    sampling: SamplingParams,
    validation: SamplingParams | None,
    *,
    advantage: str | None,
    rewards: Rewards,
    micro_batches: int | str,
) -> None:
    """Raises GRPOError unless options, data, model and folders fit together; before weights are loaded.

    Args:
        trainer: of the run.
        module: its LightningModule.
        stage: of the Trainer.
        sampling: of training.
        validation: sampling of validation; None is greedy with training's lengths.
        advantage: how rewards become advantages; None takes the recipe's.
        rewards: the reward functions.
        micro_batches: `rollout.micro_batches`.
    """
    check_module(module)
    check_accumulation(trainer)
    check_micro_batches(micro_batches, trainer.accumulate_grad_batches)
    check_loss(module.loss, sampling, advantage or module.loss.recipe.advantage)
    check_context(trainer, module, "rollout.sampling", sampling)
    if validation is not None:
        check_context(trainer, module, "rollout.validation.sampling", validation)
    check_columns(trainer, rewards)
    guard_folders(trainer, stage)


def check_accumulation(trainer: pl.Trainer) -> None:
    """Raises ConfigError if the number of micro-batches of an optimizer step is going to change."""
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # pyright: ignore
        raise ConfigError(
            "GradientAccumulationScheduler changes how many micro-batches a rollout has; "
            "use trainer.accumulate_grad_batches"
        )


def synchronised(trainer: pl.Trainer, engine: RolloutEngine, policy: Any, version: int) -> float:
    """Makes the engine serve `version` of the policy unless it does; returns the seconds this took."""
    began = perf_counter()
    if engine.policy_version != version:
        with profiled(trainer, "sync"):
            engine.sync(PolicyWeights(policy), version)
    return perf_counter() - began


def collected(
    collector: Collector, prompts: PromptBatch, trainer: pl.Trainer, module: TrainsOnRollouts
) -> Rollout:
    """Synchronises lazily, then collects; a policy's version is its number of optimizer steps."""
    engine, version = collector.engine, trainer.global_step
    moved = engine.policy_version != version
    took = synchronised(trainer, engine, module.policy, version)
    rollout = collector.collect(prompts, version, trainer_state(trainer), {"sync": took})
    arrived = getattr(engine, "sync_metrics", {}) if moved else {}
    return replace(rollout, stats=rollout.stats | {k: mean_of([v]) for k, v in arrived.items()})


def trainer_state(trainer: pl.Trainer) -> SimpleNamespace:
    """Returns what reward functions may read of the run; the names are transformers'."""
    return SimpleNamespace(
        global_step=trainer.global_step,
        max_steps=trainer.max_steps,
        epoch=trainer.current_epoch,
        num_train_epochs=trainer.max_epochs,
        log_history=[
            {k: float(v) for k, v in trainer.logged_metrics.items() if torch.as_tensor(v).numel() == 1}
        ],
    )
