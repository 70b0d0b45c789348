"""`PolicyModule`: a LightningModule with a language model to train; what is minimised is a subclass's."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from grpo_lightning.checkpoints.contents import load, save
from grpo_lightning.checkpoints.resume import AsksForCheckpoints
from grpo_lightning.errors import ConfigError
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.metrics.logging import gradient_norm, gradient_scale, log_numbers
from grpo_lightning.modules.trainer_support import TrainerSupport
from grpo_lightning.policy.finite_checks import SkippedSteps, build_optimizer, check_options, check_weights
from grpo_lightning.policy.lora import check_quantization, lora_config, starts_as_base
from grpo_lightning.policy.model_source import loading_options, named, resolve_model
from grpo_lightning.policy.probe import settle_forward
from grpo_lightning.policy.reference import ReferenceConfig
from grpo_lightning.policy.weight_dtypes import WeightsChanged, check_precision, check_trained

if TYPE_CHECKING:
    from grpo_lightning.policy.policy import Policy


def adamw(params: Any) -> torch.optim.Optimizer:
    """Returns the default optimizer."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


class PolicyModule(TrainerSupport, AsksForCheckpoints):
    """Loads a causal language model, trains all of it or an adapter, and keeps what trains in checkpoints.

    A subclass adds `training_step`; `self.policy` scores tokens. `configure_model` loads weights, after data
    and options have been checked.

    Args:
        model_name: hub id, folder, .gguf file, or `package:file.gguf` inside an installed package.
        lora: fields of peft's LoraConfig, e.g. {r: 16, lora_alpha: 32}; null trains all weights.
        optimizer: any torch optimizer by class path, e.g. torch.optim.AdamW or bitsandbytes.optim.AdamW8bit.
        scheduler: any learning-rate scheduler by class path; it steps once per optimizer step.
        reference: lets the reference policy follow; null keeps the policy of the start.
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
        *,
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
        super().__init__()
        self.model_name = model_name
        self._lora = lora
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.reference = reference
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.disable_dropout = disable_dropout
        self.trust_remote_code = trust_remote_code
        self.model_kwargs = loading_options(model_name, model_kwargs, trust_remote_code)
        self.tokenizer_name = tokenizer
        self.logprob_chunk_rows = logprob_chunk_rows
        self.kernels = kernels
        self.policy: Policy = cast("Policy", None)
        self.strict_loading = False  # checkpoints hold only what trains; `on_load_checkpoint` checks the rest
        self._changed = WeightsChanged({})
        self.skipped = SkippedSteps()
        self._tokenizer: Any = None
        self._model_path: str | None = None

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return False

    @cached_property
    def lora(self) -> Any:
        """peft's LoraConfig, or None; made on first use, since importing peft takes a while."""
        return lora_config(self._lora)

    def setup(self, stage: str) -> None:
        """Checks options before weights are loaded."""
        if self.gradient_checkpointing not in (True, False, "offload"):
            raise ConfigError(
                f"model.gradient_checkpointing is {self.gradient_checkpointing!r}; "
                "it must be true, false or offload"
            )
        if self.reference is not None and not self.uses_reference:
            raise ConfigError(
                f"model.reference is set, but {type(self).__name__} compares with no reference policy "
                "(uses_reference is False); remove model.reference"
            )
        check_quantization(self.quantization, self.lora)
        if stage == "fit" and self._trainer is not None:
            check_options(self)
            check_precision(self.trainer.precision, self.lora, self.model_kwargs)
            self.kernels.chosen(self.trainer.strategy.root_device)

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes; converts a GGUF file on first use."""
        if self._model_path is None:
            self._model_path = resolve_model(self.model_name)
        return self._model_path

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use and without the weights."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            key = "model.tokenizer" if self.tokenizer_name else "model.model_name"
            source = self.tokenizer_name or self.model_path
            with named(key, source):
                self._tokenizer = AutoTokenizer.from_pretrained(
                    source, trust_remote_code=self.trust_remote_code
                )
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        """Most tokens the model takes, prompt and completion; None where its config does not say."""
        from transformers import AutoConfig

        with named("model.model_name", self.model_path):
            config = AutoConfig.from_pretrained(self.model_path, trust_remote_code=self.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def configure_model(self) -> None:
        """Loads the weights, in the dtype of the Trainer's precision."""
        if self.policy is None:
            self.policy = self._load()
        if self._trainer is not None:
            self.policy.precision = self._trainer.precision_plugin.forward_context

    def _load(self) -> "Policy":
        from grpo_lightning.policy.loading import load_policy

        return load_policy(
            self.model_path,
            self.tokenizer,
            lora=self.lora,
            model_kwargs={"trust_remote_code": self.trust_remote_code, **self.model_kwargs},
            gradient_checkpointing=self.gradient_checkpointing,
            disable_dropout=self.disable_dropout,
            quantization=self.quantization,
            keep_reference=self.uses_reference
            and (self.reference is not None or not starts_as_base(self.lora)),
            reference_dtype=None if self.reference is None else torch.float32,
            chunk_rows=self.logprob_chunk_rows,
        )

    def configure_optimizers(self) -> Any:
        """Returns the optimizer over what trains, and the scheduler, stepped once per optimizer step."""
        trained = self.policy.trainable()
        check_trained(trained, self.model_kwargs)
        self._changed = WeightsChanged(trained)
        optimizer, scheduler = build_optimizer(self.make_optimizer, self.make_scheduler, trained.values())
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Checks that this library computes what the model does, and exchanges layers for speed."""
        settle_forward(self.policy)
        self.policy.prepare(self.kernels, self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the gradient's norm before it is clipped, and the learning rate; skips what is not finite."""
        norm = gradient_norm(self.parameters()) / gradient_scale(self.trainer, optimizer)
        skipped, rate = self.skipped.judge(self, optimizer, norm), float(optimizer.param_groups[0]["lr"])
        log_numbers(self, {"grad_norm": norm, "learning_rate": rate, "train/skipped_steps": skipped})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and lets the reference follow; here, so that a checkpoint of this step holds both."""
        with self._changed.step(self.trainer.optimizers) as found:
            super().optimizer_step(*args, **kwargs)
            check_weights(self)
        log_numbers(self, found)
        if self.reference is not None and (self.global_step + 1) % self.reference.ema_every == 0:
            assert self.policy.reference_copy is not None
            self.policy.reference_copy.mix(self.policy.trainable(), self.reference.ema_alpha)

    def loss_state(self) -> dict[str, Any]:
        """Returns what a subclass keeps in checkpoints beside weights: plain types."""
        return {}

    def load_loss_state(self, state: dict[str, Any]) -> None:
        """Takes over what `loss_state` returned."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what trains, and says what it belongs to."""
        save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or adapter, naming what differs."""
        load(self, checkpoint)
