"""Counts the variants that Triton would compile as batches change their lengths, without a GPU.

Run by test_aot.py in a process of its own, since there the kernels must not be interpreted. What is counted
are the keys of Triton's own cache: types, alignment of addresses, integers that are 1 or multiples of 16.
"""

from collections import defaultdict
from contextlib import ExitStack
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
from aot import TARGET
from models import random_rollout
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from grpo_lightning.losses import LossConfig
from grpo_lightning.losses.fused.launch_triton import policy_loss_grad
from grpo_lightning.ops.attention.varlen_triton import merge
from grpo_lightning.ops.lm_head.fused_gemm_triton import finish, multiply, own_logits
from grpo_lightning.ops.lm_head.rows import Head, Inputs
from grpo_lightning.ops.lm_head.rows_triton import scale_rows, score_rows
from grpo_lightning.ops.rotary_triton import turn
from grpo_lightning.ops.swiglu_triton import backward, forward

KERNELS = (
    "ops.attention.varlen_triton._merge",
    "ops.swiglu_triton._forward",
    "ops.swiglu_triton._backward",
    "ops.rotary_triton._turn",
    "ops.lm_head.rows_triton._rows",
    "ops.lm_head.rows_triton._scale",
    "ops.lm_head.fused_gemm_triton._own",
    "ops.lm_head.fused_gemm_triton._multiply",
    "ops.lm_head.fused_gemm_triton._finish",
    "losses.fused.launch_triton.loss_kernel",
)


class Launches:
    """Stands where a kernel stands, and keeps the key of every launch."""

    def __init__(self, kernel: Any) -> None:
        backend = make_backend(TARGET)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys: set[str] = set()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **flags: Any) -> None:
            _, specialization, options = self.bind(*args, **flags)
            self.keys.add(str((specialization, options)))

        return launch


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def body(n: int) -> None:
    """A layer's kernels for n rows, of which the last n // 2 are completions."""
    out, lse = half(n, 4, 64), torch.empty(4, n)
    c = slice(n - n // 2, n)
    merge(out[c], lse[:, c], half(n // 2, 4, 64), torch.empty(4, n // 2))
    both = half(n, 2 * 128)
    g, u = both.split(128, 1)
    forward(g, u)
    backward(half(n, 128), g, u)
    wide = half(n, 4 * 64 + 2 * 2 * 64)  # q, k and v of one product
    q, k = wide[:, :256].view(n, 4, 64), wide[:, 256:384].view(n, 2, 64)
    for back in (False, True):
        turn(q, k, half(n, 64), half(n, 64), back)


def head(n: int) -> None:
    """The head's kernels for a chunk of n rows that begins anywhere in a batch."""
    at = slice(3, 3 + n)
    ids, tau = torch.zeros(n + 3, dtype=torch.int64)[at], torch.empty(n + 3)[at]
    x = Inputs(half(n, 64), half(2000, 64), None, ids, tau, Head(), None)
    scale_rows(half(n, 64), torch.empty(n))
    rows, own, sums = half(n, 2000), own_logits(x), torch.empty(2, 16, n)
    multiply(x, own, rows, sums)
    finish(x, own, sums, rows, tuple(torch.empty(3, n + 3)[:, at]))
    chunk = Inputs(*x[:3], torch.zeros(n, dtype=torch.int64), torch.empty(n), *x[5:])
    score_rows(torch.empty(n, 2000), *chunk[3:6], None, half(n, 2000))


def loss(seed: int) -> None:
    """The loss of a rollout of other numbers of prompts, completions and tokens."""
    batch = random_rollout(seed=seed, prompts=1 + seed % 5, longest=5 + seed)
    logprobs = -torch.rand(len(batch.target_ids))
    policy_loss_grad(logprobs, batch, LossConfig("dapo").resolve(), None, 0.0, 0.0)


def main() -> None:
    """Prints for each kernel how many variants 30 batches need."""
    seen = {name: Launches(resolve_name(f"grpo_lightning.{name}")) for name in KERNELS}
    after: dict[str, set[str]] = defaultdict(set)
    with ExitStack() as patched:
        patched.enter_context(
            patch("grpo_lightning.ops.lm_head.fused_gemm_triton.programs", lambda device: 132)
        )
        for name, launches in seen.items():
            patched.enter_context(patch(f"grpo_lightning.{name}", launches))
        for step in range(30):
            if step == 3:
                after = {name: set(launches.keys) for name, launches in seen.items()}
            body(20 + 7 * step)
            head(50 + 7 * step)
            loss(step)
    for name, launches in seen.items():
        assert launches.keys, f"{name} was not launched"
        print(f"{name.rpartition('.')[2]}: {len(after[name])} then {len(launches.keys)}")
        for key in launches.keys - after[name]:
            print("   ", key)


if __name__ == "__main__":
    main()
