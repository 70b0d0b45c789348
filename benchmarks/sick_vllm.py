"""vLLM engines that sample from something else than the policy that trains, from one policy version on.

What reaches the engine is spoiled on the trainer's side of `sync` (adapter, scaling, old weights), or its own
weights and tables are, in place, after each sync that has written them anew. On a CPU vLLM packs its weights,
so there only the rotary tables can be.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.engines import VLLMEngine
from grpo_lightning.engines.base import WeightSource
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.policy.policy import Policy

Tensors = dict[str, Tensor]


@contextmanager
def changed(tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Puts other values into `tensors` inside."""
    before = {n: p.detach().clone() for n, p in tensors.items()}
    with torch.no_grad():
        for n, p in tensors.items():
            p.copy_(change(n, before[n]))
        try:
            yield
        finally:
            for n, p in tensors.items():
                p.copy_(before[n])


def _of_b(factor: Callable[[str, Policy], float]) -> Callable[[Policy, Any], Any]:
    def sent(policy: Policy, old: Tensors | None) -> Any:
        found = {n: p for n, p in policy.trainable().items() if "lora_B" in n}
        return changed(found, lambda n, x: x * factor(n, policy))

    return sent


def _middle(policy: Policy) -> str:
    return f".layers.{policy.causal.config.get_text_config().num_hidden_layers // 2}."


def _old(policy: Policy, old: Tensors | None) -> Any:
    return nullcontext() if old is None else changed(policy.trainable(), lambda n, x: old[n])


SENT: dict[str, Callable[[Policy, Tensors | None], Any]] = {
    "adapter off": _of_b(lambda n, p: 0.0),
    "a layer's adapter missing": _of_b(lambda n, p: float(_middle(p) not in n)),
    "wrong scaling": _of_b(lambda n, p: float(p.model.peft_config["default"].r)),  # pyright: ignore
    "20 versions old": _old,
}
"""what is sent in place of the policy's weights"""


def _weights(model: Any) -> Tensors:
    return {
        n: p.data
        for n, p in model.named_parameters()
        if n.endswith("weight") and p.ndim == 2 and ".layers." in n and "lora" not in n
    }


def _layer_missing(model: Any, name: str, w: Tensor) -> Tensor | None:
    layers = sorted({int(n.split(".layers.")[1].split(".")[0]) for n in _weights(model)})
    last = name.endswith(("o_proj.weight", "o_proj.base_layer.weight"))
    last |= name.endswith(("down_proj.weight", "down_proj.base_layer.weight"))
    return torch.zeros_like(w) if last and f".layers.{layers[len(layers) // 2]}." in name else None


def _q_and_k(model: Any, name: str, w: Tensor) -> Tensor | None:
    if "qkv_proj" not in name:
        return None
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, k = config.num_attention_heads * head, config.num_key_value_heads * head
    out = w.clone()
    out[:k], out[q : q + k] = w[q : q + k], w[:k]
    return out


def _fp8(model: Any, name: str, w: Tensor) -> Tensor:
    scale = w.float().abs().max() / 448
    return ((w.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(w.dtype)


def _4_bit(model: Any, name: str, w: Tensor) -> Tensor:
    blocks = w.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / 7
    return ((blocks / scale).round() * scale).reshape(w.shape).to(w.dtype)


def _rope(model: Any, name: str, table: Tensor) -> Tensor:
    """A table of a base 50 times as large."""
    positions, width = table.shape
    parameters = getattr(model.config, "rope_parameters", None) or {}
    base = 50 * float(parameters.get("rope_theta") or getattr(model.config, "rope_theta", None) or 1e4)
    power = torch.arange(0, width, 2, device=table.device, dtype=torch.float32) / width
    angles = torch.arange(positions, device=table.device)[:, None] * torch.exp(-math.log(base) * power)
    return torch.cat([angles.cos(), angles.sin()], 1).to(table.dtype)


HELD: dict[str, Callable[[Any, str, Tensor], Tensor | None]] = {
    "a layer missing": _layer_missing,
    "q and k exchanged": _q_and_k,
    "wrong rope base": _rope,
    "in fp8": _fp8,
    "in 4 bit": _4_bit,
}
"""what the engine's own weights become, or its rotary tables"""
SICKNESSES = (*SENT, *HELD)


def spoil(worker: Any, sickness: str, spoiled: Tensors) -> int:
    """Run inside vLLM: spoils what is not as it was left last time; returns how many tensors that were."""
    model = worker.model_runner.model
    if sickness == "wrong rope base":
        found = {n: b for n, b in model.named_buffers() if n.endswith("cos_sin_cache")}
    else:
        found = _weights(model)
    count = 0
    for name, x in found.items():
        if name in spoiled and torch.equal(x, spoiled[name]):
            continue
        new = HELD[sickness](model, name, x)
        if new is not None:
            x.copy_(new)
            spoiled[name] = x.clone()
            count += 1
    return count


class SickVLLM(VLLMEngine):
    """vLLM with `sickness` from policy version `since` on."""

    def __init__(self, sickness: str, since: int, **options: Any) -> None:
        super().__init__(**options)
        self.sickness, self.since = sickness, since
        self._known: dict[int, Tensors] = {}
        self._spoiled: Tensors = {}

    def sync(self, source: WeightSource, version: int) -> None:
        assert isinstance(source, PolicyWeights)
        policy = source.policy
        if self.sickness == "20 versions old":
            self._known[version] = {n: p.detach().clone() for n, p in policy.trainable().items()}
            self._known.pop(version - 21, None)
        if version < self.since:
            super().sync(source, version)
            return
        sent = SENT.get(self.sickness)
        with nullcontext() if sent is None else sent(policy, self._known.get(version - 20)):
            super().sync(source, version)
        if sent is None:
            (count,) = self._awake().collective_rpc(spoil, args=(self.sickness, self._spoiled))
            if not self._spoiled:
                raise RuntimeError(f"{self.sickness}: the engine has no weights of these names")
            print(f"version {version}: {self.sickness}, {count} tensors", flush=True)
