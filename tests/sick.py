"""Engines that sample from something else than the policy that trains, each in its own way; and a sound one
that only rounds in other places."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.engines import HFEngine
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.rounding import random_rounding, rounding_unit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from sick_vllm import changed


class OtherKernels(HFEngine):
    """The policy itself, rounded at random in each forward."""

    def generate(self, requests, sampling):
        policy = self._policy
        eps = rounding_unit(policy.compute_dtype, policy.causal.device)
        with random_rounding(policy.causal.get_decoder(), eps, seed=1000 + self.policy_version):
            return super().generate(requests, sampling)


class Sick(HFEngine):
    """Samples as `sickness` lets it from policy version `since` on."""

    def __init__(self, sickness: Callable[[Policy], Any], since: int) -> None:
        super().__init__()
        self.sickness, self.since = sickness, since

    def generate(self, requests, sampling):
        with ExitStack() as stack:
            if self.policy_version >= self.since:
                stack.enter_context(self.sickness(self._policy))
            return super().generate(requests, sampling)


class Stale(HFEngine):
    """Serves weights that are `behind` versions old, as soon as there are such."""

    def __init__(self, behind: int) -> None:
        super().__init__()
        self.behind, self.known = behind, {}

    def sync(self, source, version):
        super().sync(source, version)
        self.known[version] = {n: p.detach().clone() for n, p in self._policy.trainable().items()}

    def generate(self, requests, sampling):
        old = self.known.get(self.policy_version - self.behind)
        with changed(self._policy.trainable(), lambda n, p: old[n] if old else p):
            return super().generate(requests, sampling)


def adapter_off(policy: Policy):
    return policy.model.disable_adapter()


@contextmanager
def layer_missing(policy: Policy) -> Iterator[None]:
    layers = policy.causal.get_decoder().layers
    handle = layers[len(layers) // 2].register_forward_hook(
        lambda m, args, kwargs, out: args[0] if args else kwargs["hidden_states"], with_kwargs=True
    )
    yield
    handle.remove()


@contextmanager
def _scaled(policy: Policy, factor: Callable[[int], int]) -> Iterator[None]:
    adapted = [m for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict)]
    before = [dict(m.scaling) for m in adapted]
    for m in adapted:
        m.scaling = {name: s * factor(m.r[name]) for name, s in m.scaling.items()}
    yield
    for m, scaling in zip(adapted, before, strict=True):
        m.scaling = scaling


def wrong_scaling(policy: Policy):
    """alpha instead of alpha / r."""
    return _scaled(policy, lambda r: r)


def adapter_twice(policy: Policy):
    """In the base and beside it, as after a resume from a merged checkpoint (ms-swift#8233)."""
    return _scaled(policy, lambda r: 2)


@contextmanager
def q_and_k_exchanged(policy: Policy) -> Iterator[None]:
    attentions = [m for m in policy.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]

    def exchange() -> None:
        for m in attentions:
            m.q_proj, m.k_proj = m.k_proj, m.q_proj

    exchange()
    yield
    exchange()


def rope_base(policy: Policy):
    """500,000 instead of 10,000."""
    power = math.log(5e5) / math.log(1e4)
    buffers = dict(policy.causal.get_decoder().rotary_emb.named_buffers())
    return changed(buffers, lambda n, x: x.pow(power))


def _linears(policy: Policy) -> dict[str, Tensor]:
    decoder = policy.causal.get_decoder()
    found = [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    return {n: m.weight for n, m in found}


def in_fp8(policy: Policy):
    def rounded(n: str, w: Tensor) -> Tensor:
        scale = w.abs().max() / 448
        return ((w / scale).to(torch.float8_e4m3fn).to(w.dtype)) * scale

    return changed(_linears(policy), rounded)


def in_4_bit(policy: Policy):
    def rounded(n: str, w: Tensor) -> Tensor:
        blocks = w.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        return ((blocks / scale).round() * scale).reshape(w.shape)

    return changed(_linears(policy), rounded)


SICKNESSES = {
    f.__name__: f
    for f in (
        adapter_off,
        adapter_twice,
        layer_missing,
        wrong_scaling,
        q_and_k_exchanged,
        rope_base,
        in_fp8,
        in_4_bit,
    )
}
