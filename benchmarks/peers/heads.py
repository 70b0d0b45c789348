"""Heads of others: (hidden [N, H], weight [V, H], ids [N]) -> (log-probabilities [N], entropies or None).

`IMPORTED` call the library itself; `RETYPED` are designs of others in our words, and say so in every table.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
ROWS = 2048
"""tokens of a completion, where a design works completion by completion"""


def full_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """TRL before 1.11: all logits, a log-softmax per completion, an entropy sweep without gradient."""
    logits = hidden @ weight.T
    picked = [
        z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        for z, y in zip(logits.split(ROWS), ids.split(ROWS), strict=True)
    ]
    with torch.no_grad():
        entropies = []
        for z in logits.split(128):
            p = z.softmax(-1)
            entropies.append(z.logsumexp(-1) - (p * z).sum(-1))
    return torch.cat(picked), torch.cat(entropies)


def _chunk_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    z = (hidden @ weight.T).float()
    return z.gather(-1, ids[:, None])[:, 0] - z.logsumexp(-1)


def chunk_loop(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """A loop over chunks with fp32 logits that the backward makes again; no entropy (Unsloth-like)."""
    parts = [
        checkpoint(_chunk_logprobs, h, weight, y, use_reentrant=False)
        for h, y in zip(hidden.split(ROWS // 2), ids.split(ROWS // 2), strict=True)
    ]
    return torch.cat([p for p in parts if isinstance(p, Tensor)]), None


def trl_chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """TRL 1.16's own function, as its trainer calls it."""
    from trl.kernels import ChunkedLogProbFunction

    out: Any = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 32_768, None, 1.0, ("entropy",))
    return out[0], out[1]


def liger_triton(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Liger's Triton loss on full logits, whose last position per completion it does not use."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    rows = min(ROWS, hidden.shape[0])
    padded = torch.nn.functional.pad(hidden.view(-1, rows, hidden.shape[1]), (0, 0, 0, 1))
    ones = torch.ones(len(padded), device=hidden.device)
    settings = {"temperature": 1.0, "beta": 0.0, "loss_type": "grpo"}
    loss, *_ = triton_grpo_loss(padded @ weight.T, None, None, ids.view(-1, rows), ones, **settings)
    return loss.flatten(), None


def _without_patches() -> None:
    """Lets unsloth_zoo's files be imported; its `__init__` needs all of Unsloth and patches transformers."""
    (root,) = find_spec("unsloth_zoo").submodule_search_locations  # pyright: ignore
    for part in ("", "fused_losses", "temporary_patches"):
        spec = ModuleSpec(f"unsloth_zoo.{part}".rstrip("."), None, is_package=True)
        spec.submodule_search_locations = [f"{root}/{part}".rstrip("/")]
        sys.modules.setdefault(spec.name, module_from_spec(spec))


def unsloth(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Unsloth 2026.10's own function at its defaults; it computes no entropy."""
    _without_patches()
    from unsloth_zoo.fused_losses.chunked_logprob import unsloth_chunked_logprobs

    return unsloth_chunked_logprobs(hidden, weight, ids), None


IMPORTED: dict[str, tuple[str, Head]] = {
    "TRL 1.16 chunked (imported)": ("trl", trl_chunked),
    "Unsloth 2026.10 chunked (imported, no entropy)": ("unsloth_zoo", unsloth),
    "Liger Triton on full logits (imported, loss instead of log-prob)": ("liger_kernel", liger_triton),
}
RETYPED: dict[str, Head] = {
    "full logits, TRL <= 1.10 (re-typed)": full_logits,
    "chunk loop, Unsloth-like (re-typed)": chunk_loop,
}


def installed() -> dict[str, Head]:
    """Returns every peer that can be run here."""
    return RETYPED | {name: f for name, (package, f) in IMPORTED.items() if find_spec(package)}
