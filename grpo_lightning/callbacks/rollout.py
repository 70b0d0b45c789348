"""`RolloutCallback`: before a micro-batch trains, it makes sure there is a rollout to train on."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from grpo_lightning.callbacks.checks import (
    check_batch,
    check_counts,
    check_epoch,
    check_sampling,
    check_setup,
    collected,
    run_seed,
    start_engine,
)
from grpo_lightning.callbacks.evaluation import Evaluation, ValidationConfig, validate_before_training
from grpo_lightning.callbacks.policy_check import PolicyCheck
from grpo_lightning.callbacks.recorder import Recorder
from grpo_lightning.callbacks.rollout_metrics import RolloutMetrics
from grpo_lightning.callbacks.rollout_state import batch_state, restore
from grpo_lightning.callbacks.run_summary import print_plan
from grpo_lightning.callbacks.step_timing import Clock
from grpo_lightning.callbacks.stopping import Stopping, together
from grpo_lightning.engines.base import RolloutEngine
from grpo_lightning.engines.hf import HFEngine
from grpo_lightning.engines.process_guard import random_state
from grpo_lightning.errors import ConfigError, hinted
from grpo_lightning.losses import LossConfig
from grpo_lightning.metrics.logging import gather, log_numbers
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.rewards.suite import TIMEOUT_S, Rewards
from grpo_lightning.rollout.collector import Collector, Rollout
from grpo_lightning.rollout.micro_batch_sizing import MicroBatchSizer, check_micro_batches
from grpo_lightning.rollout.micro_batches import Splitting, make_micro_batches
from grpo_lightning.rollout.phases import profiled
from grpo_lightning.types import PromptBatch, SamplingParams
from grpo_lightning.utils.signals import at_once

RewardSpec = str | dict[str, Any] | Callable[..., Any]


@hinted
class RolloutCallback(Callback):
    """Samples, scores and packs completions, and deals them to the module as micro-batches.

    One rollout feeds `accumulate_grad_batches * updates_per_rollout * num_iterations` micro-batches. Works
    with any LightningModule that has the names of `rollout.trained_module.TrainsOnRollouts`.

    Args:
        reward_funcs: reward functions, by import path, as `file.py:func`, or as {class_path, init_args}.
        engine: what samples completions; null is HFEngine.
        reward_weights: one weight per reward function; null weighs all 1.
        num_generations: completions per prompt, the group size; at least 2.
        sampling: how completions are sampled in training.
        updates_per_rollout: optimizer steps per pass over a rollout; 1 is strictly on-policy.
        num_iterations: passes over a rollout.
        dynamic_sampling: how often a group without signal makes way for another prompt's in the same rollout
            (DAPO), drawn at random; 0 keeps it. Rewards are called as with overlap_rewards.
        overlap_rewards: call reward functions group by group while others are still decoded, in a thread of
            their own: a call then has one group's completions.
        reward_timeout_s: seconds a reward function may take for one call; null for no limit.
        reward_workers: processes in which reward functions run, each on whole groups; 0 is this process.
        micro_batches: how many of the `accumulate_grad_batches` micro-batches of an optimizer step hold
            tokens; no gradient but bnpo's depends on it. `auto` is as few as a GPU's memory holds (logged as
            memory/predicted_gib and memory/peak_gib), and `all` on other devices and for bnpo.
        advantage: how rewards become advantages (see docs/losses.md); null takes the recipe's.
        advantage_clip: lowest and highest advantage; null does not clip.
        mask_truncated_completions: completions cut at max_tokens do not train.
        zero_variance_groups: groups whose rewards are all equal `keep` counting in the normalisers, or `drop`
            out of the rollout; null takes the recipe's (drop for scalerl only).
        validation: how validation and test sample; null is greedy, one completion per prompt.
        seed: of the sampling; null takes seed_everything's.
        on_policy_mismatch: `stop` or `warn` if the engine samples from another policy than trains.
        record_to: folder for parquet files of everything sampled; null writes none.
    """

    def __init__(
        self,
        reward_funcs: list[RewardSpec],
        engine: RolloutEngine | None = None,
        reward_weights: list[float] | None = None,
        num_generations: int = 8,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
        updates_per_rollout: int = 1,
        num_iterations: int = 1,
        dynamic_sampling: int = 0,
        overlap_rewards: bool = False,
        reward_timeout_s: float | None = TIMEOUT_S,
        reward_workers: int = 0,
        micro_batches: int | Literal["auto", "all"] = "auto",
        advantage: str | None = None,
        advantage_clip: tuple[float | None, float | None] | None = None,
        mask_truncated_completions: bool = False,
        zero_variance_groups: Literal["keep", "drop"] | None = None,
        validation: ValidationConfig = ValidationConfig(),  # noqa: B008 - frozen
        seed: int | None = None,
        on_policy_mismatch: Literal["stop", "warn"] = "stop",
        record_to: str | None = None,
    ) -> None:
        check_counts(num_generations, updates_per_rollout, num_iterations, dynamic_sampling)
        check_sampling(sampling, advantage, advantage_clip)
        check_micro_batches(micro_batches)
        if engine is not None and not isinstance(engine, RolloutEngine):
            raise ConfigError(f"rollout.engine: {type(engine).__name__} lacks methods of RolloutEngine")
        self.engine: RolloutEngine = engine if engine is not None else HFEngine()
        self.rewards = Rewards(reward_funcs, reward_weights, reward_timeout_s, reward_workers)
        self.num_generations, self.sampling = num_generations, sampling
        self.updates_per_rollout, self.num_iterations = updates_per_rollout, num_iterations
        self.dynamic_sampling, self.overlap_rewards = dynamic_sampling, overlap_rewards
        self.micro_batches, self.micro_batch_sizer = micro_batches, MicroBatchSizer(micro_batches, 1)
        self.advantage, self.advantage_clip = advantage, advantage_clip
        self.mask_truncated_completions = mask_truncated_completions
        self.zero_variance_groups = zero_variance_groups
        self.validation, self.seed, self._given_seed = validation, run_seed(seed), seed
        self.policy_check = PolicyCheck(on_policy_mismatch)
        self.recorder = Recorder(record_to)
        self._micro_batches: list[RolloutBatch] = []
        self._samples: dict[str, list[Any]] | None = None
        self._clock, self._started, self._stopping = Clock(), False, Stopping()
        self._restored: dict[str, Any] | None = None
        self._evaluation = Evaluation(self.validation, self.rewards.names)
        self._metrics = RolloutMetrics(self._clock, self._evaluation.logged)

    def micro_batches_per_rollout(self, trainer: pl.Trainer) -> int:
        """Returns M: how many micro-batches one rollout feeds. The prompt loader asks for it."""
        return trainer.accumulate_grad_batches * self.updates_per_rollout * self.num_iterations

    def spares_per_prompt(self, trainer: pl.Trainer) -> int:
        """Returns how many prompts may stand in for each. The prompt loader asks for it."""
        return self.dynamic_sampling

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Checks, before weights are loaded, that options, data and model fit together."""
        self._stopping.attach(trainer)
        self.seed = run_seed(self._given_seed)  # once: what a reward seeds later on is not the run's
        options = {"advantage": self.advantage, "rewards": self.rewards, "micro_batches": self.micro_batches}
        check_setup(trainer, pl_module, stage, self.sampling, self.validation.sampling, **options)

    def _start(self, trainer: pl.Trainer, module: Any) -> None:
        if not self._started:
            start_engine(self.engine, trainer, module, self.sampling, self.validation.sampling)
        self._started = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends the engine and the workers of rewards."""
        self._stopping.end()
        self.rewards.close()
        if self._started:
            self.engine.close()
            self._started = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: Any) -> None:
        """Ends the engine: Lightning calls no teardown after an error, and its memory would stay taken."""
        self._stopping.on_exception(trainer, exception)
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Says what is going to happen, and puts restored random states in place."""
        check_epoch(trainer, self.micro_batches_per_rollout(trainer))
        self.micro_batch_sizer = MicroBatchSizer.of(self.micro_batches, trainer, pl_module)
        print_plan(self.collector(trainer, pl_module), self._splitting(), trainer)
        if self._restored is not None:
            self._metrics.num_tokens = self._restored["num_tokens"]
            self._micro_batches = restore(self._restored, trainer.global_rank, trainer.world_size)
            self._restored = None
        self._stopping.begin(trainer, self)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validates before the first step, once all callbacks have started."""
        if trainer.global_step == 0 and self.validation.before_training:
            validate_before_training(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts this micro-batch of the rollout into `batch`; the first one makes the rollout."""
        check_batch(batch, pl_module)
        if batch.micro_batch % trainer.accumulate_grad_batches == 0:
            with self._stopping.saving(trainer, self):
                self._stopping.agree(trainer)
                self._clock.begin_step()
                if batch.micro_batch == 0:
                    self._micro_batches = self._roll(trainer, pl_module, batch)
        first = batch.micro_batch - batch.micro_batch % trainer.accumulate_grad_batches
        self.policy_check.micro_batches = self._micro_batches[first : batch.micro_batch + 1]
        self.micro_batch_sizer.begin(self._micro_batches[batch.micro_batch])
        batch.rollout = self._micro_batches[batch.micro_batch].to(pl_module.device)
        batch.samples = self._samples
        self._clock.begin_training()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees how much memory the micro-batch needed."""
        self.micro_batch_sizer.end()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Times the step and lets go of a rollout that is used up."""
        ends_step = (batch.micro_batch + 1) % trainer.accumulate_grad_batches == 0
        self._clock.end_training(pl_module.device if ends_step else None)
        if ends_step:
            log_numbers(pl_module, self._clock.end_step() | self.micro_batch_sizer.metrics())
        if batch.micro_batch + 1 == batch.micro_batches:
            log_numbers(pl_module, self._clock.end_rollout(), shown=("tokens_per_second",))
            self._micro_batches = []
        if ends_step:
            self._stopping.note(trainer, self)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Stops a run whose engine samples from another policy than trains, before a weight changes."""
        self.policy_check.before_step(self.collector(trainer, pl_module), trainer, pl_module)

    def _roll(self, trainer: pl.Trainer, module: Any, prompts: PromptBatch) -> list[RolloutBatch]:
        """Returns the M micro-batches of a new rollout, in the order in which they train."""
        self._start(trainer, module)
        started = perf_counter()
        collector = self.collector(trainer, module)
        rollout = collected(collector, prompts, trainer, module)
        self.engine.sleep()
        self._samples = rollout.samples
        self.recorder.write(trainer, rollout)
        scoring = perf_counter()
        micro_batches, dropped = make_micro_batches(rollout, collector, self._splitting(), trainer, module)
        seconds = {"score": perf_counter() - scoring, "rollout": perf_counter() - started}
        self._metrics.log(trainer, module, rollout, dropped, seconds)
        return micro_batches * self.num_iterations

    def _splitting(self) -> Splitting:
        steps = self.updates_per_rollout, self.num_iterations, self.zero_variance_groups
        return Splitting(*steps, self.micro_batch_sizer, self.seed)

    def _advantage_of(self, loss: LossConfig) -> str:
        return self.advantage or loss.recipe.advantage

    def collector(self, trainer: pl.Trainer, module: Any, **changes: Any) -> Collector:
        """Returns what makes rollouts for this run; `changes` replaces settings."""
        made = Collector(
            engine=self.engine,
            rewards=self.rewards,
            tokenizer=module.tokenizer,
            num_generations=self.num_generations,
            sampling=self.sampling,
            seed=self.seed,
            advantage=self._advantage_of(module.loss),
            advantage_clip=self.advantage_clip,
            mask_truncated=self.mask_truncated_completions,
            by_group=self.overlap_rewards or self.dynamic_sampling > 0,
            phase=partial(profiled, trainer),
            alone=partial(together, trainer),
        )
        return replace(made, **changes)

    def evaluate(self, trainer: pl.Trainer, module: Any, batch: PromptBatch) -> Rollout:
        """Returns a rollout with the sampling of validation; training state is left as it is."""
        self._start(trainer, module)
        sampling = self.validation.sampling or replace(self.sampling, temperature=0.0)
        own = {"sampling": sampling, "num_generations": self.validation.num_generations}
        own |= {"by_group": False, "all_ranks": False, "alone": at_once}
        collector = self.collector(trainer, module, **own)
        batch.rollout_index = -1
        rollout = collected(collector, batch, trainer, module)
        batch.rollout, batch.samples = rollout.batch, rollout.samples
        return rollout

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Samples and scores a validation batch."""
        evaluate = partial(self.evaluate, trainer, pl_module, batch)
        self._stopping.evaluate(trainer, self, lambda: self._evaluation.update(evaluate()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs val/reward, val/pass@1 and the means of the reward functions, over all ranks."""
        self._stopping.after_evaluation(trainer, self)
        self.engine.sleep()
        self._evaluation.log(trainer, pl_module, "val")

    on_test_batch_start = on_validation_batch_start

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs test/reward, test/pass@1 and the means of the reward functions, over all ranks."""
        self.engine.sleep()
        self._evaluation.log(trainer, pl_module, "test")

    def on_predict_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Samples and scores; `predict_step` returns the samples."""
        self.evaluate(trainer, pl_module, batch)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps what a stop before the first step saves again."""
        self._stopping.restore(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Returns random states and the unused rest of the rollout, of every rank; plain types only."""
        parts = gather([batch_state(p) for p in self._micro_batches] if self._micro_batches else None)
        own = {"num_tokens": self._metrics.num_tokens, "policy_check": self.policy_check.state_dict()}
        return {"random": gather(random_state()), "parts": parts, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, as soon as training starts."""
        self._restored = state_dict
        self.policy_check.load_state_dict(state_dict["policy_check"])
