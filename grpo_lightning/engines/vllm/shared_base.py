"""One copy of a frozen base for trainer and engine: vLLM's parameters become views of the trainer's memory.

vLLM stacks q, k and v, and gate and up, in one tensor each. The trainer lays these weights one after another
in memory (`ops.lora_linear.lay_together`), which is the same tensor. What is shared is compared first, bit by
bit, so a name that is mapped wrongly is a copy that is kept, never a wrong weight.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.engines.vllm.compat import packed_modules, renamed
from grpo_lightning.errors import EngineError
from grpo_lightning.ops.lora_linear import adjoining, lay_together
from grpo_lightning.policy.policy import Policy

_offered: ContextVar["SharedBase | None"] = ContextVar("shared_base", default=None)


@dataclass(slots=True)
class SharedBase:
    """The frozen weights that a trainer offers to an engine of its process, and those that were taken."""

    weights: Mapping[str, torch.nn.Parameter]
    """by the checkpoint's names; nothing that trains"""
    taken: dict[str, Tensor]
    """the engine's parameters that are views of the trainer's memory, by vLLM's names"""
    kept: int = 0
    """bytes of the engine's other parameters"""
    checksum: int = 0

    @classmethod
    def of(cls, policy: Policy) -> "SharedBase":
        """Returns an offer of all that never changes in `policy`."""
        from peft.utils import ModulesToSaveWrapper

        causal = policy.causal
        replaced = tuple(f"{n}." for n, m in causal.named_modules() if isinstance(m, ModulesToSaveWrapper))
        frozen = {
            name.replace(".base_layer.", "."): p
            for name, p in causal.named_parameters()
            if not p.requires_grad and not (replaced and name.startswith(replaced))
        }
        return cls(frozen, {})

    @property
    def report(self) -> str:
        """How much exists once instead of twice, for people to read."""
        shared = sum(t.nbytes for t in self.taken.values())
        return f"{shared / 2**30:.2f} GiB of the base shared, {self.kept / 2**30:.2f} GiB of its own"

    def check(self) -> None:
        """Raises EngineError if a weight that both sides read has been written to."""
        if self.checksum != _checksum(self.taken):
            raise EngineError(
                "a base weight that trainer and engine share has changed: it has been written to; resume "
                "with rollout.engine.share_base off"
            )


@contextmanager
def offered(base: SharedBase | None) -> Iterator[None]:
    """Lets an engine that loads its model inside take `base`."""
    token = _offered.set(base)
    try:
        yield
    finally:
        _offered.reset(token)


def take_offered(model: Any) -> None:
    """Makes parameters of vLLM's loaded `model` views of the trainer's, where they are equal to the bit."""
    base = _offered.get()
    if base is None:
        return
    own = dict(model.named_parameters())
    for name, parts in _by_engine_name(model, base.weights).items():
        mine = own.get(name)
        if mine is not None and _same(mine.data, parts):
            if adjoining(parts) is None:
                lay_together(parts)
            view = adjoining(parts)
            assert view is not None
            mine.data = view.view(mine.shape)
            base.taken[name] = mine.data
    base.kept = sum(p.nbytes for name, p in own.items() if name not in base.taken)
    base.checksum = _checksum(base.taken)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _by_engine_name(model: Any, weights: Mapping[str, torch.nn.Parameter]) -> dict[str, list[Tensor]]:
    """Returns for each parameter of vLLM's `model` the weights it stacks, in order; complete stacks only."""
    stacks = {p: (stack, i) for stack, parts in packed_modules(model).items() for i, p in enumerate(parts)}
    counts = {stack: len(parts) for stack, parts in packed_modules(model).items()}
    found: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = renamed(model, module).rpartition(".")
        stack, i = stacks.get(leaf, (leaf, 0))
        found.setdefault(".".join(filter(None, (parent, stack, kind))), {})[i] = weight
    whole = {name: parts for name, parts in found.items() if len(parts) == counts.get(name.split(".")[-2], 1)}
    return {name: [parts[i] for i in sorted(parts)] for name, parts in whole.items()}


def _same(mine: Tensor, parts: list[Tensor]) -> bool:
    """Returns whether `mine` holds the `parts` one after another, to the bit."""
    alike = all(p.dtype == mine.dtype and p.device == mine.device and p.is_contiguous() for p in parts)
    if not alike or not mine.is_contiguous() or sum(p.numel() for p in parts) != mine.numel():
        return False
    pieces = mine.reshape(-1).split([p.numel() for p in parts])
    return all(torch.equal(piece, p.detach().reshape(-1)) for piece, p in zip(pieces, parts, strict=True))


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Returns a sum over all bits; another order of the same numbers has another one."""
    total = 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for t in tensors.values():
        bits = t.detach().reshape(-1).view(kinds[t.element_size()])
        # rows weighed by their place, so that an exchange shows
        rows = bits.view(-1, bits.numel() // len(t)).sum(1, dtype=torch.int64)
        total += int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())
    return total
