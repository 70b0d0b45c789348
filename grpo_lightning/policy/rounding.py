"""How far a model's results are from themselves through rounding alone, measured by Monte Carlo arithmetic.

Two programs that compute the same function in the same type differ because they round in other places and
orders. Random rounding shows how much that moves the results of this model on these tokens: the output of
every module with weights, and of every decoder layer, is scaled by 1 + eps u with u uniform in [-1/2, 1/2)
(Parker 1997, Monte Carlo arithmetic; CESTAC is of the same kind). Where a policy is sure of a token this is
little, where small changes of the logits decide it is much, so no constant could stand for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.ops.lm_head.logprobs import temperatures
from grpo_lightning.ops.lm_head.rows import Head, parts, rows_in_budget
from grpo_lightning.ops.lm_head.truncation import truncate
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.policy import Policy

TF32 = 2.0**-10
"""eps of what GPUs round the inputs of fp32 products to; engines' kernels may, whatever torch is told"""


def rounding_unit(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the eps that computations in `dtype` on `device` have."""
    eps = torch.finfo(dtype).eps
    return max(eps, TF32) if device.type == "cuda" and dtype == torch.float32 else eps


@contextmanager
def random_rounding(decoder: nn.Module, eps: float, seed: int) -> Iterator[None]:
    """Rounds at random inside; leaves no trace, and draws from a generator of its own.

    Args:
        decoder: of a transformers model.
        eps: of `rounding_unit`.
        seed: of the noise.
    """
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return _noisy(output[0], eps, generator), *output[1:]
        return _noisy(output, eps, generator)

    layers = list(getattr(decoder, "layers", []))
    weighted = [m for m in decoder.modules() if not any(m.children()) and any(True for _ in m.parameters())]
    handles = [m.register_forward_hook(hook) for m in {*layers, *weighted}]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noisy(x: Any, eps: float, generator: torch.Generator) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)  # four numbers of 16 bits each: drawing is what costs
    u = bits.view(torch.int16)[: x.numel()].view(x.shape).to(wide).add_(0.5)
    return torch.addcmul(x.to(wide), x.to(wide), u, value=eps / 2**16).to(x.dtype)


def head_logprobs(policy: Policy, hidden: Tensor, batch: RolloutBatch) -> Tensor:
    """Returns log-probabilities [N] of the distribution sampled from, by logits in the head's own type.

    So engines compute them; a training forward keeps its logits in fp32.

    Args:
        policy: whose head it is.
        hidden: [N, H].
        batch: its tokens, temperature and truncation.
    """
    head, tau = policy.causal.get_output_embeddings(), temperatures(batch.temperature, hidden)
    scale, ids, out = Head(**policy.logit_changes), batch.target_ids, torch.empty_like(tau)
    for at in parts(len(hidden), rows_in_budget(len(hidden), 8 * head.weight.shape[0], hidden.device)):
        x = scale.tempered(head(hidden[at].to(head.weight.dtype)).to(tau.dtype), tau[at])
        own = x.gather(1, ids[at, None])
        kept = x if batch.truncation is None else truncate(x, batch.truncation).scatter(1, ids[at, None], own)
        out[at] = own[:, 0] - kept.logsumexp(1)
    return out
