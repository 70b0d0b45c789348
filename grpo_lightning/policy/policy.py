"""The policy: a Hugging Face causal LM, its LoRA adapter or full weights, its reference, and its packed
forward."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grpo_lightning.errors import ConfigError
from grpo_lightning.kernels.config import KernelConfig, PatchedModel
from grpo_lightning.kernels.cuda_graphs import Graphs, make_graphs
from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.lm_head.truncation import kept_logmass
from grpo_lightning.ops.zero_grad import tied
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.packing.geometry import SequenceLayout
from grpo_lightning.policy.dropout import Rates, dropout_rates
from grpo_lightning.policy.dynamic_rope import fix_rope, rope_limit, too_long
from grpo_lightning.policy.forward import (
    PACKED,
    decoder_of,
    needs_padding,
    packed_hidden,
    padded_hidden,
    register_packed_attention,
)
from grpo_lightning.policy.logit_transforms import logit_changes
from grpo_lightning.policy.reference import WeightCopy


class TokenScores(NamedTuple):
    """What a forward says of the completion tokens, fp32, in nats."""

    logprobs: Tensor  # [N]
    entropies: Tensor  # [N]
    log_kept: Tensor | None  # [N] without gradient; of batches with a `truncation`


class Policy(nn.Module):
    """A causal language model that is trained, its reference policy, and what both need to be run.

    Args:
        causal: the model, already wrapped by peft where `lora` is used.
        tokenizer: its tokenizer.
        keep_reference: keep a copy of what trains, as it is now, as reference.
        reference_dtype: type of that copy; None is the type of what trains.
        chunk_rows: rows that go through the vocabulary at one time; None derives them from a memory budget.
    """

    def __init__(
        self,
        causal: nn.Module,
        tokenizer: Any,
        *,
        keep_reference: bool = False,
        reference_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.model = causal
        self.tokenizer = tokenizer
        self.chunk_rows = chunk_rows
        self.reference_copy = WeightCopy(self.trainable(), reference_dtype) if keep_reference else None
        self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        """what the Trainer runs a training step in; hooks, where engines and scores run, are outside of it"""
        self.rope_limit = rope_limit(self.causal.config)
        """tokens that no sequence may outgrow; None where there is no such length"""
        self.logit_changes = logit_changes(self.causal.config)[0]
        """what the architecture does to its logits, as arguments of `fused_linear_logprobs`"""
        self.stock_attention: str = self.causal.config._attn_implementation
        self.padded_reason = needs_padding(self.causal)
        if self.padded_reason is None:
            register_packed_attention()
            if not self._set_attention(PACKED):
                self.run_padded("it does not take attention from outside")
        self.rates: Rates = []
        """what dropout the model was loaded with, where it is switched off"""
        self.kernels = KernelConfig()
        self.prepared = PatchedModel(causal, self.decoder)
        self.graphs: Graphs | None = None

    def prepare(self, kernels: KernelConfig, device: torch.device) -> None:
        """Exchanges what `kernels` chooses for `device`; once, before the first forward that trains."""
        self.prepared.restore()
        self.kernels = kernels
        with self.precision():
            autocast = torch.is_autocast_enabled(device.type)
        self.prepared = PatchedModel(self.model, self.decoder, kernels.chosen(device), autocast)
        if self.padded_reason is None and self.prepared.chosen["compile"]:
            register_packed_attention(compiled_layers=True)
        self.graphs = make_graphs(self, autocast) if self.prepared.chosen["graphs"] else None

    @property
    def causal(self) -> Any:
        """The transformers model, adapters included."""
        return unwrap(self.model)

    @property
    def decoder(self) -> Any:
        """What turns token ids into hidden states."""
        return decoder_of(self.causal)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type a training step computes in, autocast included."""
        device = self.causal.device.type
        with self.precision():
            return (
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.causal.dtype
            )

    @property
    def drops_out(self) -> bool:
        """Whether a training forward is random: dropout is on somewhere."""
        return any(True for _ in dropout_rates(self))

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained and the base is frozen."""
        return hasattr(self.model, "peft_config")

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a completion: the model's, its generation config's and the tokenizer's."""
        found: set[int] = set()
        for owner in (self.causal.config, self.causal.generation_config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        if not found:
            raise ConfigError("neither model nor tokenizer names an end token; set tokenizer.eos_token")
        return sorted(found)

    @property
    def pad_id(self) -> int:
        """Fills rows inside a padded forward; never looked at."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_ids[0]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def adapter_config(self) -> str:
        """Returns peft's adapter_config.json of the adapter being trained."""
        config = self.model.peft_config["default"].to_dict()  # pyright: ignore
        return json.dumps({**config, "inference_mode": True}, default=sorted, indent=2)

    def adapter_names(self) -> dict[str, str]:
        """Returns which of our parameters, by name, every tensor of peft's adapter file holds."""
        from peft import get_peft_model_state_dict

        own = {id(x): name for name, x in (*self.named_parameters(), *self.named_buffers())}
        theirs = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        names: Any = {name: own[id(x)] for name, x in theirs}  # peft looks at the keys alone
        found: Any = get_peft_model_state_dict(self.model, state_dict=names, save_embedding_layers=False)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> "Policy":
        """Keeps in fp32 what `bf16-true` would round: adapters, in whose weights small updates vanish, and
        buffers, since rounded rotary frequencies are other positions than transformers and vLLM have."""
        exact = {**(self.trainable() if self.is_lora else {}), **dict(self.named_buffers())}
        exact = {name: x.data for name, x in exact.items() if x.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, x in (*self.named_parameters(), *self.named_buffers()):
            if name in exact and x.dtype.itemsize < 4:
                x.data = exact[name].to(x.device)
        if self.reference_copy is not None:
            self.reference_copy.follow(self.trainable())
        return self

    def completion_hidden(self, batch: RolloutBatch) -> Tensor:
        """Returns the hidden states [N, H] that predict the completion tokens of `batch`."""
        if not len(batch.target_ids):
            return self._nothing()
        if self.rope_limit is not None:
            longest = max(batch.sequence_layout.unshared().group_rows)
            if longest > self.rope_limit:
                raise ConfigError(too_long(self.causal, longest))
        if self.padded_reason is None:
            segments = self.prepared.chosen["attention"]
            shared = batch if self.kernels.shares(batch.sequence_layout, segments) else batch.unshared()
            replayed = self.graphs if torch.is_grad_enabled() and self.prepared.chosen["graphs"] else None
            return packed_hidden(self.decoder, shared, segments=segments, graphs=replayed)
        return padded_hidden(self.decoder, batch, self.pad_id)

    def sizes(self, shape: SequenceLayout) -> tuple[int, int, int]:
        """Returns what the memory of a micro-batch grows with: rows run, tokens trained, pairs in masks."""
        shared = self.padded_reason is None and self.kernels.shares(shape, self.prepared.chosen["attention"])
        laid = shape if shared else shape.unshared()
        if self.padded_reason is None:
            return laid.num_tokens, sum(shape.lengths), sum(n * n for n in laid.group_rows)
        width, count = max(laid.group_rows, default=0), len(shape.lengths)
        return count * width, sum(shape.lengths), count * width**2

    def logprobs(self, batch: RolloutBatch, *, entropy_grad: bool = False) -> TokenScores:
        """Returns log-probabilities and entropies of the batch's completion tokens."""
        return self.scores(self.completion_hidden(batch), batch, entropy_grad)

    def scores(self, hidden: Tensor, batch: RolloutBatch, entropy_grad: bool) -> TokenScores:
        head = self.causal.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if not len(hidden):  # `_nothing` is tied to a head that trains; no gradient of its size is made here
            weight, bias = weight.detach(), None
        args = (hidden.to(weight.dtype), weight, batch.target_ids, batch.temperature)
        options = {
            "bias": bias,
            "chunk_rows": self.chunk_rows,
            **self.logit_changes,
        }
        backend = "triton" if self.prepared.chosen["head"] else "torch"
        logprobs, entropies = fused_linear_logprobs(
            *args, entropy_grad=entropy_grad, backend=backend, **options
        )
        kept = batch.truncation
        log_kept = None if kept is None else kept_logmass(*args, kept=kept, **options)
        return TokenScores(logprobs, entropies, log_kept)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Runs the reference policy inside: the copy, or the adapter switched off."""
        if self.reference_copy is not None:
            with self.reference_copy.in_place_of(self.trainable()):
                yield
        elif self.is_lora:
            with self.model.disable_adapter():  # pyright: ignore[reportCallIssue]
                yield
        else:
            raise ConfigError("this policy keeps no reference; build it with keep_reference=True")

    @contextmanager
    def measuring(self, *, keep_casts: bool = False) -> Iterator[None]:
        """Runs without gradients, in the precision of a training step.

        Args:
            keep_casts: let autocast keep cast weights until the end. Not around a reference pass, whose
                weights it would take for the policy's, nor inside a training step, whose forward would find
                casts without a graph.
        """
        device = self.causal.device.type
        keep_casts = keep_casts and not torch.is_autocast_enabled(device)
        with torch.no_grad(), self.precision():
            kind, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            with torch.autocast(device, dtype=kind, enabled=on, cache_enabled=keep_casts):
                yield

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """Yields the transformers model with stock attention, in eval mode, `measuring`."""
        training = self.model.training
        self._set_attention(self.stock_attention)
        self.model.eval()
        try:
            with self.measuring(keep_casts=True), self.prepared.eager():
                yield self.causal
        finally:
            self.model.train(training)
            if self.padded_reason is None:
                self._set_attention(PACKED)

    def fit_lengths(self, longest: int | None) -> None:
        """Prepares for sequences of at most `longest` tokens; None is as many as the model takes.

        Raises:
            ConfigError: a token's position would depend on the longest row of a batch.
        """
        limit = self.rope_limit
        longest = longest or int(getattr(self.causal.config.get_text_config(), "max_position_embeddings", 0))
        if limit is not None and longest > limit:
            fix_rope(self.causal, longest)
            self.rope_limit = None
            rank_zero_warn(
                f"{type(self.causal).__name__} takes the rotary factors of sequences over {limit} tokens for "
                f"all, since the longest may have {longest}; lower rollout.sampling.max_tokens to have those "
                "of short ones"
            )

    def run_padded(self, reason: str) -> None:
        """Takes the padded path from now on."""
        self.padded_reason = reason
        self._set_attention(self.stock_attention)

    def _set_attention(self, name: str) -> bool:
        """Returns whether the model took it; some raise, others only log."""
        try:
            self.causal.set_attn_implementation(name)
        except ValueError:
            return False
        return self.decoder.config._attn_implementation == name

    def _nothing(self) -> Tensor:
        """Returns [0, H], tied to every trainable parameter, so that gradient reductions match."""
        head = self.causal.get_output_embeddings().weight
        return tied(head.new_zeros(0, head.shape[1]), list(self.trainable().values()))


def unwrap(model: Any) -> Any:
    """Returns the transformers model inside a peft wrapper; adapters stay in place."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
