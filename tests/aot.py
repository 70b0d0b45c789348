"""Compiles every kernel for compute capability 9.0 without a GPU; the interpreter does not check types.

Run by test_aot.py in a process of its own, since there the kernels must not be interpreted.
"""

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_lightning.ops import head_triton, rms_norm_triton, swiglu_triton

TARGET = GPUTarget("cuda", 90, 32)
ROWS = {
    "z_ptr": "*fp32", "bias_ptr": "*fp32", "ids_ptr": "*i64", "tau_ptr": "*fp32", "g_ptr": "*fp32",
    "e_ptr": "*fp32", "logp_ptr": "*fp32", "entropy_ptr": "*fp32", "q_ptr": "*bf16", "z_stride": "i32",
    "q_stride": "i32", "vocabulary": "i32", "scale": "fp32", "cap": "fp32",
}  # fmt: skip


def build(kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int = 4) -> bytes:
    """Returns the machine code of one variant."""
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    return triton.compile(source, target=TARGET, options={"num_warps": warps}).asm["cubin"]


def body() -> int:
    """Compiles the kernels of SwiGLU and RMSNorm for every type and for narrow and wide rows."""
    count = 0
    for dtype in ("*bf16", "*fp16", "*fp32"):
        for kernel, tensors in (
            (swiglu_triton._forward, ("g_ptr", "u_ptr", "y_ptr")),
            (swiglu_triton._backward, ("dy_ptr", "g_ptr", "u_ptr", "dg_ptr", "du_ptr")),
        ):
            signature = {**dict.fromkeys(tensors, dtype), "count": "i32"}
            assert build(kernel, signature, {"BLOCK": swiglu_triton.BLOCK})
            count += 1
        for width in (64, 128, 896, 8192):
            tile = rms_norm_triton._tile(width)
            warps = tile.pop("num_warps")
            shared = {"inverse_ptr": "*fp32", "rows": "i32", "width": "i32", "x_stride": "i32"}
            signature = {**dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), dtype), **shared, "eps": "fp32"}
            assert build(rms_norm_triton._forward, signature, tile, warps)
            tensors = dict.fromkeys(("dy_ptr", "x_ptr", "weight_ptr", "dx_ptr"), dtype)
            signature = {**tensors, **shared, "dy_stride": "i32", "tiles": "i32"}
            for weight in (False, True):
                partial = {"partial_ptr": "*fp32" if weight else dtype}
                assert build(
                    rms_norm_triton._backward,
                    {**signature, **partial},
                    {"WANT_WEIGHT": weight, **tile},
                    warps,
                )
            count += 3
    return count


def main() -> None:
    """Compiles all variants and says how many."""
    count = body()
    flags = itertools.product((False, True), (None, "*fp32", "*bf16"), (None, "*fp32", "*bf16", "*fp16"))
    for cap, bias, q in flags:
        for with_entropy in {False, q is not None}:
            signature = {**ROWS, "bias_ptr": bias or "*fp32", "q_ptr": q or "*fp32"}
            constants = {"HAS_CAP": cap, "HAS_BIAS": bias is not None, "WANT_Q": q is not None}
            constants |= {"HAS_E": with_entropy, "BLOCK": 2048}
            assert build(head_triton._rows, signature, constants)
            count += 1
    for dtype in ("*bf16", "*fp16", "*fp32"):
        signature = {"x_ptr": dtype, "g_ptr": "*fp32", "out_ptr": dtype, "stride": "i32", "width": "i32"}
        assert build(head_triton._scale, signature, {"BLOCK": 1024})
        count += 1
    print(f"compiled {count} variants with triton {triton.__version__}")


if __name__ == "__main__":
    main()
