"""Matrix products of half types whose results keep fp32."""

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b in fp32, without rounding the product to a half type; fp64 for fp64 inputs."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def wide_product_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Returns a @ b in `out`, which is at least fp32: not rounded to a half type on the way."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
