"""Attention modules of transformers that turn q and k in one kernel, where a forward is packed."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.ops.rotary import rotary


def is_rotary_attention(module: Any) -> bool:
    """Returns whether a module has what the exchanged forward reads."""
    names = {name for name, _ in module.named_children()}
    reads = ("config", "head_dim", "scaling", "attention_dropout")
    return {"q_proj", "k_proj", "v_proj", "o_proj"} <= names and all(hasattr(module, n) for n in reads)


@cache
def one_kernel_rotary(stock: type[Any]) -> type:
    """Returns attention with one kernel for the rotary embeddings; compiled layers have one already."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        attend: Any = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if args or attend is None or not _covered(self, hidden_states, kwargs):
            return stock.forward(self, hidden_states, *args, **kwargs)
        cos, sin = kwargs.pop("position_embeddings")
        kwargs.pop("past_key_values", None)
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self._modules:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, k, cos, sin)
        out, weights = attend(
            self,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            kwargs.pop("attention_mask", None),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=vars(self).get("sliding_window"),
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), weights

    return type(f"Rotary{stock.__name__}", (stock,), {"forward": forward})


def _covered(module: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
    """Returns whether a call is one row of packed tokens, of which all of a head is turned."""
    packed = kwargs.get("layout") is not None and kwargs.get("past_key_values") is None
    if not packed or torch.compiler.is_compiling():
        return False
    cos, _ = kwargs["position_embeddings"]
    return len(hidden_states) == 1 and cos.shape == (1, hidden_states.shape[1], module.head_dim)
