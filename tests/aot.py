"""Compiles every kernel for compute capability 9.0 without a GPU; the interpreter does not check types.

Run by test_aot.py in a process of its own, since there the kernels must not be interpreted.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from models import random_rollout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_lightning.losses import KL_ESTIMATORS, RECIPES, CorrectionConfig, LossConfig
from grpo_lightning.losses.corrections import LEVELS, MODES
from grpo_lightning.losses.fused import launch_triton as policy_loss_triton
from grpo_lightning.ops import rotary_triton, swiglu_triton
from grpo_lightning.ops.attention import varlen_triton
from grpo_lightning.ops.lm_head import fused_gemm_triton as head_gemm_triton
from grpo_lightning.ops.lm_head import rows_triton as head_triton

TARGET = GPUTarget("cuda", 90, 32)
ROWS = {
    "z_ptr": "*fp32", "bias_ptr": "*fp32", "ids_ptr": "*i64", "tau_ptr": "*fp32", "g_ptr": "*fp32",
    "e_ptr": "*fp32", "logp_ptr": "*fp32", "entropy_ptr": "*fp32", "q_ptr": "*bf16", "z_stride": "i32",
    "q_stride": "i32", "vocabulary": "i32", "scale": "fp32", "cap": "fp32",
}  # fmt: skip


POINTERS = {torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}
REQUIRED = {"dro": {"dro_coef": 0.1}}


def build(
    kernel: Any, signature: dict[str, Any], constants: dict[Any, Any], warps: int = 4, shared: int = 48 << 10
) -> bytes:
    """Returns the machine code of one variant; constants by name, or by place for those inside a tuple."""
    types = {**signature, **{name: "constexpr" for name in constants if isinstance(name, str)}}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    made = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": 3})
    assert made.metadata.shared <= shared
    return made.asm["cubin"]


def head_gemm() -> int:
    """Compiles the kernels of the head's own GEMM: sums, sums and rows, gradient rows."""
    k, count = head_gemm_triton, 0
    described = {"h": (k.ROWS, k.DEPTH), "w": (k.COLUMNS, k.DEPTH), "out": (k.ROWS, k.COLUMNS // 2)}
    descriptors = {name: f"tensordesc<bf16[{a},{b}]>" for name, (a, b) in described.items()}
    scalars = {"rows": "i32", "vocabulary": "i32", "width": "i32", "factor": "fp32", "inner": "fp32"}
    tile = {"ROWS": k.ROWS, "COLUMNS": k.COLUMNS, "DEPTH": k.DEPTH, "PROGRAMS": 132}
    for cap, bias in itertools.product((False, True), (None, "*bf16")):
        flags = {"HAS_CAP": cap, "HAS_BIAS": bias is not None}
        shared = {"bias_ptr": bias, "ids_ptr": "*i64", "tau_ptr": "*fp32"}
        for sums, write in ((True, False), (True, True), (False, True)):
            names = ("total_ptr", "moment_ptr") if sums else ("a_ptr", "b_ptr", "mine_ptr")
            given = {**descriptors, **shared, **dict.fromkeys(("reference_ptr", *names), "*fp32"), **scalars}
            given |= {} if write else {"out": None}
            signature = {name: given.get(name) for name in k._multiply.arg_names if name.islower()}
            constants = {name: None for name, kind in signature.items() if kind is None}
            constants |= {**flags, "SUMS": sums, "WRITE": write, **tile}
            assert build(k._multiply, signature, constants, warps=8, shared=k.SHARED_BYTES)
            if sums:
                names = ("total_ptr", "moment_ptr", "own_ptr", "logp_ptr", "entropy_ptr", "odds_ptr")
                signature = {**dict.fromkeys(names, "*fp32"), "e_ptr": "*bf16", **shared, **scalars}
                signature |= {"e_stride": "i32", "tiles": "i32"}
                signature = {n: signature[n] for n in k._finish.arg_names if n.islower()}
                constants = {"HAS_CAP": cap, "WRITE": write, "ROWS": 8, "TILES": 128}
                assert build(k._finish, signature, constants | ({} if write else {"e_ptr": None}))
                count += 1
            count += 1
        signature = {"h_ptr": "*bf16", "w_ptr": "*bf16", "own_ptr": "*fp32", **shared, **scalars}
        signature |= {"h_stride": "i32", "w_stride": "i32"}
        signature = {n: signature[n] for n in k._own.arg_names if n.islower()}
        assert build(k._own, signature, {**flags, "BLOCK": 1024} | ({} if bias else {"bias_ptr": None}))
        count += 1
    return count


def body() -> int:
    """Compiles the kernels of a decoder layer for every type and for narrow and wide rows."""
    count = 0
    for dtype in ("*bf16", "*fp16", "*fp32"):
        for kernel in (swiglu_triton._forward, swiglu_triton._backward):
            names = [n for n in kernel.arg_names if n != "BLOCK"]
            signature = {n: dtype if n.endswith("_ptr") else "i32" for n in names}
            assert build(kernel, signature, {"BLOCK": swiglu_triton.BLOCK})
            count += 1
        tensors = {"out_ptr": dtype, "lse_ptr": "*fp32", "more_ptr": dtype, "mass_ptr": "*fp32"}
        integers = dict.fromkeys(("rows", "heads", "width", "lse_stride", "mass_stride"), "i32")
        assert build(
            varlen_triton._merge, {**tensors, **integers}, {"ROWS": varlen_triton.ROWS, "WIDTH": 64}, 1
        )
        count += 1
        tensors = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
        numbers = ("rows", "q_row", "q_head", "k_row", "k_head")
        signature = {**dict.fromkeys(tensors, dtype), **dict.fromkeys(numbers, "i32")}
        for heads, back in itertools.product(((14, 2, 64), (40, 8, 128), (32, 32, 80)), (False, True)):
            tile = dict(rotary_triton._tile(*heads))
            warps = tile.pop("num_warps")
            assert build(rotary_triton._turn, signature, {"BACK": back, **tile}, warps)
            count += 1
    return count


class Recorder:
    """Stands where a kernel stands, and keeps what it is called with."""

    def __init__(self, kernel: Any) -> None:
        self.names = kernel.arg_names
        self.calls: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, num_warps, **flags: self.calls.append(
            {**dict(zip(self.names, args, strict=False)), **flags}
        )


def described(x: Any, place: tuple[int, ...], constants: dict[Any, Any]) -> Any:
    """Returns the type of an argument as Triton's launcher takes it; collects what is compiled in."""
    if isinstance(x, torch.Tensor):
        return POINTERS[x.dtype]
    if isinstance(x, tuple):
        kinds = [described(y, (*place, i), constants) for i, y in enumerate(x)]
        return type(x)(*kinds) if hasattr(x, "_fields") else tuple(kinds)
    if isinstance(x, float):
        return "fp32"
    constants[place] = x
    return "constexpr"


def loss_configs() -> Iterator[tuple[LossConfig, bool]]:
    """Yields configs that take together every part of the loss kernel, and whether all is known."""
    for name in RECIPES:
        yield LossConfig(name, **REQUIRED.get(name, {})), True
        yield LossConfig(name, kl_coef=0.1, entropy_coef=0.1, **REQUIRED.get(name, {})), True
    yield LossConfig("grpo"), False
    yield LossConfig("gspo", correction=CorrectionConfig(bypass=True)), True
    yield LossConfig("grpo", top_entropy_quantile=0.5, off_policy_threshold=0.1, dual_clip=3.0), True
    yield LossConfig("grpo", kl_coef=0.1, kl_in="reward"), True
    for level, mode in itertools.product(LEVELS, MODES):
        yield LossConfig("dapo", correction=CorrectionConfig(level=level, mode=mode)), True
    for estimator in KL_ESTIMATORS:
        for level in ("token", "sequence", "sequence_token"):
            yield LossConfig("grpo", kl_coef=0.1, kl_estimator=estimator, ratio_level=level), True


def loss_call(config: LossConfig, complete: bool, seed: int = 0) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Returns signature and constants of the launch for a random rollout."""
    b = random_rollout(seed=seed, prompts=2 + seed, longest=5 + 3 * seed)
    n = len(b.target_ids)
    x, mask = -torch.rand(n), torch.rand(n) < 0.5
    if complete:
        b = replace(b, old_logprobs=x, ref_logprobs=x, sampler_logprobs=x, selected=mask, entropy_keep=mask)
    recorder = Recorder(policy_loss_triton.loss_kernel)
    policy_loss_triton.loss_kernel, kernel = recorder, policy_loss_triton.loss_kernel
    try:
        config = config.resolve()
        policy_loss_triton.policy_loss_grad(
            x, b, config, x if complete else None, config.kl_coef, config.entropy_coef
        )
    finally:
        policy_loss_triton.loss_kernel = kernel
    (call,) = recorder.calls
    constants: dict[Any, Any] = {}
    return {name: described(call[name], (i,), constants) for i, name in enumerate(recorder.names)}, constants


def loss_variants() -> int:
    """Compiles every variant of the loss kernel once; lengths make no other."""
    seen = set()
    for config, complete in loss_configs():
        if policy_loss_triton.why_not(config.resolve()) is not None:
            continue
        calls = [loss_call(config, complete, seed) for seed in range(3)]
        keys = {str((s, {k: getattr(v, "__name__", v) for k, v in c.items()})) for s, c in calls}
        assert len(keys) == 1, keys
        if not keys <= seen:
            assert build(policy_loss_triton.loss_kernel, *calls[0])
        seen |= keys
    return len(seen)


def main() -> None:
    """Compiles all variants and says how many."""
    count = body() + head_gemm()
    flags = itertools.product((False, True), (None, "*fp32", "*bf16"), (None, "*fp32", "*bf16", "*fp16"))
    for cap, bias, q in flags:
        for with_entropy in {False, q is not None}:
            signature = {**ROWS, "bias_ptr": bias or "*fp32", "q_ptr": q or "*fp32"}
            constants = {"HAS_CAP": cap, "HAS_BIAS": bias is not None, "WANT_Q": q is not None}
            constants |= {"HAS_E": with_entropy, "BLOCK": head_triton.BLOCK}
            assert build(head_triton._rows, signature, constants, warps=8)
            count += 1
    for dtype in ("*bf16", "*fp16", "*fp32"):
        signature = {"x_ptr": dtype, "g_ptr": "*fp32", "out_ptr": dtype, "stride": "i32", "width": "i32"}
        assert build(head_triton._scale, signature, {"BLOCK": 1024})
        count += 1
    count += loss_variants()
    print(f"compiled {count} variants with triton {triton.__version__}")


if __name__ == "__main__":
    main()
