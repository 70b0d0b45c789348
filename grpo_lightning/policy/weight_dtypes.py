"""What trains is kept in fp32: weights of 16 bits lose every update below half a unit in their last place.

At a learning rate of 1e-6 that is most of them. Who asks for such weights by name, with
`model.model_kwargs.dtype`, gets them: there are optimizers that round stochastically. `train/weights_changed`
says what each step then does.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grpo_lightning.errors import ConfigError

TRUE_16 = {"bf16-true": "bf16-mixed", "16-true": "16-mixed"}
"""the Trainer's precisions that convert every weight, and what keeps them in fp32 and computes alike"""
NAMES_16 = ("bfloat16", "float16", "torch.bfloat16", "torch.float16")
WATCHED_TENSORS, WATCHED_WEIGHTS = 8, 1 << 16
"""tensors whose change is measured, and how many weights of each"""
MOST_CHANGE = 0.9
"""share of weights that a step changes below which it is said"""


def asked_for_16_bits(model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a user names a 16-bit type for the weights."""
    return str(model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))) in NAMES_16


def check_precision(precision: Any, lora: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Raises ConfigError, before weights are loaded, if the only ones that train would have 16 bits."""
    if lora is None and precision in TRUE_16 and not asked_for_16_bits(model_kwargs):
        raise ConfigError(
            f"trainer.precision is {precision!r} and model.lora is null: the only weights would be kept in "
            "16 bits, where small updates vanish (at a learning rate of 1e-6 nearly all of them); "
            f"set trainer.precision to {TRUE_16[precision]}, which computes in 16 bits on fp32 weights"
        )


def check_trained(trained: Mapping[str, Tensor], model_kwargs: Mapping[str, Any]) -> None:
    """Raises ConfigError if a weight that trains has 16 bits and nobody asked for it."""
    name = next((name for name, p in trained.items() if p.dtype.itemsize < 4), None)
    if name is not None and not asked_for_16_bits(model_kwargs):
        raise ConfigError(
            f"{name} trains in {trained[name].dtype}, where small updates vanish; what trains must be fp32: "
            "set trainer.precision to bf16-mixed, and model.model_kwargs.dtype to float32"
        )


def check_saved(saved: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Raises ConfigError if a resume would round what a checkpoint holds."""
    for name, p in trained.items():
        kept = saved[f"policy.{name}"].dtype
        if kept.itemsize > p.dtype.itemsize:
            raise ConfigError(
                f"--ckpt_path: {name} is {kept} in the checkpoint and {p.dtype} in this run, which would "
                "round it; set trainer.precision and model.model_kwargs.dtype as they were"
            )


class WeightsChanged:
    """Measures which share of 16-bit weights an optimizer step changes, on a few tensors.

    Args:
        params: what trains, by name; those in fp32 are not looked at.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        short = [p for p in params.values() if p.dtype.itemsize < 4]
        self.watched = short[:: -(-len(short) // WATCHED_TENSORS) or 1]
        self._said = False

    @contextmanager
    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[dict[str, float]]:
        """Yields what to log after the step inside: of weights with a gradient, the share that changed."""
        before, found = [_head(p).clone() for p in self.watched], dict[str, float]()
        yield found
        moving = changed = 0
        for p, old in zip(self.watched, before, strict=True):
            if p.grad is not None:
                live = _head(p.grad) != 0
                moving += int(live.sum())
                changed += int((live & (_head(p) != old)).sum())
        if moving and any(group["lr"] for o in optimizers for group in o.param_groups):
            found["train/weights_changed"] = changed / moving
            self._warn(changed / moving)

    def _warn(self, share: float) -> None:
        if share < MOST_CHANGE and not self._said:
            self._said = True
            rank_zero_warn(
                f"train/weights_changed is {share:.2g}: weights of {self.watched[0].dtype} "
                "(model.model_kwargs.dtype) lose updates below half a unit in the last place, unless the "
                "optimizer rounds stochastically; set trainer.precision to bf16-mixed and leave the dtype out"
            )


def _head(x: Tensor) -> Tensor:
    return x.detach().flatten()[:WATCHED_WEIGHTS]


def keep_copies_in_fp32(model: nn.Module) -> None:
    """Casts the whole modules that train beside an adapter (`modules_to_save`) to fp32.

    peft copies them in the base's type. They compute in fp32, and what goes in and out is cast where the base
    has 16 bits.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                copy.float()
                _cast_around(copy, wrapper.original_module)


def _cast_around(copy: nn.Module, original: nn.Module) -> None:
    def short() -> torch.dtype | None:
        kind = next((p.dtype for p in original.parameters() if p.is_floating_point()), torch.float32)
        return kind if kind.itemsize < 4 else None

    def cast(x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, tuple):
            return tuple(cast(y, dtype) for y in x)
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if short() is None:
            return None
        return cast(args, torch.float32), {k: cast(v, torch.float32) for k, v in kwargs.items()}

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        kind = short()
        return None if kind is None else cast(out, kind)

    copy.register_forward_pre_hook(before, with_kwargs=True)
    copy.register_forward_hook(after)
