"""`GRPOModule`: the LightningModule. From a rollout to a loss; everything between prompt and rollout is
elsewhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grpo_lightning.errors import ConfigError, hinted
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import Coefficients, LossConfig
from grpo_lightning.losses.custom_check import check_surrogate
from grpo_lightning.losses.fused import policy_loss
from grpo_lightning.losses.policy_loss import Weights
from grpo_lightning.metrics.logging import all_ranks, log_numbers
from grpo_lightning.metrics.reduce import Stat, combine, values
from grpo_lightning.modules.policy_module import PolicyModule, adamw
from grpo_lightning.modules.trainer_support import explains
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.reference import ReferenceConfig
from grpo_lightning.policy.verification import (
    check_normalizers,
    engine_gap,
    first_step_distance,
    rollout_stats,
)
from grpo_lightning.types import PromptBatch


@hinted
class GRPOModule(PolicyModule):
    """Trains a causal language model on rollouts.

    A batch is a `PromptBatch` into which a callback has put a `RolloutBatch`, or one of the micro-batches
    that `RolloutBatch.split` cuts the batch of an optimizer step into, as many on every rank as the Trainer
    accumulates. `configure_model` loads weights, after data and options have been checked.

    Args:
        model_name: hub id, folder, .gguf file, or `package:file.gguf` inside an installed package.
        loss: which loss is minimised.
        lora: fields of peft's LoraConfig, e.g. {r: 16, lora_alpha: 32}; null trains all weights.
        optimizer: any torch optimizer by class path, e.g. torch.optim.AdamW or bitsandbytes.optim.AdamW8bit.
        scheduler: any learning-rate scheduler by class path; it steps once per optimizer step.
        reference: lets the reference policy of the KL term follow; null keeps the policy of the start.
        quantization: nf4 keeps the base in 4 bit (bitsandbytes) and trains an adapter on it: QLoRA.
        gradient_checkpointing: recompute activations in the backward instead of keeping them; `offload` also
            keeps the layers' inputs in host memory (Unsloth's "unsloth").
        disable_dropout: switch the model's dropout off; with dropout the ratio is not 1 on the first pass.
        trust_remote_code: run Python code that comes with the model; the one flag for it, said when it is on.
        model_kwargs: passed to `from_pretrained`, e.g. {dtype: bfloat16, revision: main}; with lora null a
            16-bit dtype loses small updates: see train/weights_changed.
        tokenizer: name or folder of another tokenizer; null takes the model's.
        logprob_chunk_rows: rows that go through the vocabulary at one time; null takes what fits a budget.
        kernels: which fast paths run.
    """

    def __init__(
        self,
        model_name: str,
        loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
        lora: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        reference: ReferenceConfig | None = None,
        quantization: Literal["nf4"] | None = None,
        gradient_checkpointing: bool | Literal["offload"] = True,
        disable_dropout: bool = True,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        logprob_chunk_rows: int | None = None,
        kernels: KernelConfig = KernelConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            model_name,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            reference=reference,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
            disable_dropout=disable_dropout,
            trust_remote_code=trust_remote_code,
            model_kwargs=model_kwargs,
            tokenizer=tokenizer,
            logprob_chunk_rows=logprob_chunk_rows,
            kernels=kernels,
        )
        self.loss = loss.resolve()
        self._verified = False
        self._micro_batch_stats: list[Mapping[str, Stat]] = []
        self.step_metrics: dict[str, float] = {}
        """what the loss of the latest optimizer step logged"""
        self.step_stats: dict[str, Stat] = {}  # the sums that these are made of, over all ranks
        self.step_gaps: list[Tensor | None] = []  # of `engine_gap`, by micro-batch; None: not comparable
        self.coefficients = Coefficients(self.loss)
        if reference is not None and not self.loss.kl_coef:
            raise ConfigError("model.reference is set but model.loss.kl_coef is 0; set kl_coef > 0")
        for caution in self.loss.cautions():
            rank_zero_warn(caution)

    @property
    def uses_reference(self) -> bool:
        """Whether there is a KL term."""
        return self.loss.kl_coef != 0

    def setup(self, stage: str) -> None:
        """Checks options before weights are loaded."""
        check_surrogate(self.loss)
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Checks that this library computes what the model does, and exchanges layers for speed."""
        super().on_fit_start()
        self._verified = False

    def score(self, batch: RolloutBatch, *, old: bool) -> RolloutBatch:
        """Returns the batch with the log-probabilities that are taken without gradient.

        Args:
            batch: a micro-batch on this module's device.
            old: whether the policy's own are needed, because it changes before this batch is used up.
        """
        with self.policy.measuring():
            if old:
                scores = self.policy.logprobs(batch)
                batch = replace(batch, old_logprobs=scores.logprobs, old_entropies=scores.entropies)
                batch = batch if scores.log_kept is None else batch.rescored(scores.log_kept)
            if batch.ref_logprobs is None and (self.loss.kl_loss_coef or (self.loss.kl_coef and old)):
                with self.policy.reference():
                    theirs = self.policy.logprobs(replace(batch, truncation=None))
                batch = replace(batch, ref_logprobs=theirs.logprobs)
        return batch

    @explains("train")
    def training_step(self, batch: RolloutBatch | PromptBatch, batch_idx: int) -> Tensor:
        """Returns this micro-batch's share of the loss, scaled for Lightning's and DDP's averages."""
        rollout = self.score(self._counted(_rollout_of(batch)), old=False)
        if not self._verified:
            self._verify(rollout)
        weights: Weights = {"kl_coef": self.coefficients.kl, "entropy_coef": self.coefficients.entropy}
        logprobs, entropy, log_kept = self.policy.logprobs(rollout, entropy_grad=weights["entropy_coef"] != 0)
        rollout = rollout if log_kept is None else rollout.rescored(log_kept)
        backend = "triton" if self.policy.prepared.chosen["loss"] else "torch"
        out = policy_loss(logprobs, rollout, self.loss, entropy, backend=backend, **weights)
        if not self._micro_batch_stats:
            self.step_gaps = []
        self._micro_batch_stats.append(out.stats | self._rollout_stats(rollout, logprobs.detach()))
        if self._ends_step(batch_idx):
            self._log_step()
        return rollout.normalizers.micro_batches * out.loss

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, list[Any]] | None:
        """Returns the samples of the batch as columns."""
        return batch.samples

    def _verify(self, rollout: RolloutBatch) -> None:
        """Compares a few completions with the model as it was loaded, and logs how far apart they are."""
        found = first_step_distance(self.policy, rollout)
        self._verified = bool(found)
        log_numbers(self, found)

    def _counted(self, rollout: RolloutBatch) -> RolloutBatch:
        """Returns the batch with the number of micro-batches that Lightning and DDP average over."""
        averaged = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return replace(rollout, normalizers=replace(rollout.normalizers, micro_batches=averaged))

    def _rollout_stats(self, rollout: RolloutBatch, logprobs: Tensor) -> dict[str, Stat]:
        lags = [self.global_step - version for version in rollout.policy_versions]
        gap = None if any(lags) else engine_gap(rollout, logprobs)
        self.step_gaps.append(gap)
        return rollout_stats(rollout, logprobs, gap, lags)

    def _ends_step(self, batch_idx: int) -> bool:
        k = self.trainer.accumulate_grad_batches
        return (batch_idx + 1) % k == 0 or batch_idx + 1 == self.trainer.num_training_batches

    def _log_step(self) -> None:
        self.step_stats = all_ranks(combine(self._micro_batch_stats))
        metrics = values(self.step_stats)
        self._micro_batch_stats.clear()
        check_normalizers(metrics, self.global_step)
        metrics |= self.coefficients.metrics()
        if self.policy.graphs is not None:
            metrics["graphs/captures"] = float(self.policy.graphs.captures)
        if self.skipped.look(metrics):
            self.coefficients.step(metrics)
        else:  # the step is skipped, and its numbers are judged no further
            self.step_stats = {}
        self.step_metrics = metrics
        log_numbers(self, metrics, shown=("kl",))

    def loss_state(self) -> dict[str, Any]:
        """Returns the coefficients, which adapt from step to step."""
        return {"coefficients": self.coefficients.state_dict()}

    def load_loss_state(self, state: dict[str, Any]) -> None:
        """Takes over what `loss_state` returned."""
        self.coefficients.load_state_dict(state["coefficients"])


def _rollout_of(batch: RolloutBatch | PromptBatch) -> RolloutBatch:
    rollout = batch.rollout if isinstance(batch, PromptBatch) else batch
    if rollout is None:
        raise ConfigError(
            "GRPOModule got prompts without a rollout: add RolloutCallback to the Trainer's callbacks, "
            "or feed it RolloutBatch objects"
        )
    return rollout
