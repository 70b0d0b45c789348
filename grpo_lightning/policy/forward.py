"""How a packed rollout is laid out for a transformers decoder: packed, or padded where packing is unsafe."""

from typing import Any

import torch
from torch import Tensor

from grpo_lightning.kernels.cuda_graphs import Graphs, decoded
from grpo_lightning.ops.attention.packed import PackedLayout, packed_attention
from grpo_lightning.packing.batch import RolloutBatch

PACKED = "grpo_lightning_packed"
"""our name in transformers' attention registry"""

_FULL_OR_SLIDING = {"full_attention", "sliding_attention"}


def decoder_of(causal: Any) -> Any:
    """Returns what turns token ids into the hidden states that the LM head reads."""
    embeddings, found = causal.get_input_embeddings(), causal.get_decoder()
    if found is not causal and embeddings in found.modules():
        return found
    # some classes name no decoder that transformers finds (Llama 4, Mllama), or their head is called so
    return next((m for m in causal.children() if embeddings is not m and embeddings in m.modules()), found)


def needs_padding(model: Any) -> str | None:
    """Returns why a transformers model cannot run packed as far as one can see, or None.

    What one cannot see, `probe.settle_forward` measures.
    """
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= _FULL_OR_SLIDING:
        return f"it has layers of the kinds {sorted(kinds - _FULL_OR_SLIDING)}"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "its attention caps its scores"
    if any("sink" in name.rpartition(".")[2] for name, _ in model.named_parameters()):
        return "its attention has sinks"
    return None


def register_packed_attention(*, compiled_layers: bool = False) -> None:
    """Registers `PACKED` with transformers; without a mask function of that name it builds no mask.

    Args:
        compiled_layers: keep torch.compile out of it: what it reads of the layout changes with every batch.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, torch.compiler.disable(_attention) if compiled_layers else _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if layout is None or attention_mask is not None:
        raise RuntimeError(
            f"packed attention in {type(module).__name__} got "
            + ("a mask" if layout is not None else "no layout")
            + "; sequences would see each other: run the model inside `policy.generating()` instead"
        )
    if dropout:
        raise RuntimeError(f"packed attention has no dropout; {type(module).__name__} asks for {dropout}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = packed_attention(query, key, value, layout, scale, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def packed_hidden(
    decoder: Any, batch: RolloutBatch, *, segments: bool = False, graphs: Graphs | None = None
) -> Tensor:
    """Returns [N, H] from one row of T tokens in which each prompt stands once.

    Args:
        decoder: of a transformers model.
        batch: P prompts and S completions.
        segments: run attention as segments where the flash kernels cover it.
        graphs: of the decoder, which replay it instead of calling it.
    """
    layout = PackedLayout.of(
        batch.sequence_layout,
        batch.segment_ids,
        batch.position_ids,
        segments=segments,
        filled=graphs is not None,
    )
    ids, positions, targets = batch.input_ids, batch.position_ids, batch.target_rows
    if layout.shared is not None and layout.shared.order is not None and layout.shared.places is not None:
        order = layout.shared.order
        ids, positions, targets = ids[order], positions[order], layout.shared.places[targets]
    if graphs is None:
        return decoded(decoder, ids, positions, layout)[targets]
    return graphs.hidden(ids, positions, layout)[targets]


def padded_hidden(decoder: Any, batch: RolloutBatch, pad_id: int) -> Tensor:
    """Returns [N, H] from one right-padded row per completion, with the architecture's own masks."""
    rows, targets = _padded_rows(batch)
    width = max(len(r) for r in rows)
    index = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=batch.input_ids.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=index.device)
    ids = torch.where(mask.bool(), batch.input_ids[index], pad_id)
    out = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    flat = torch.tensor([s * width + t for s, t in targets], device=index.device, dtype=torch.int64)
    return out.last_hidden_state.flatten(0, 1)[flat]


def _padded_rows(batch: RolloutBatch) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Returns for each completion its rows of T, and for each of N its (completion, column)."""
    layout, starts = batch.sequence_layout, batch.row_starts()
    rows: list[list[int]] = []
    targets: list[tuple[int, int]] = []
    for s, (g, n) in enumerate(zip(layout.host_groups, layout.rows, strict=True)):
        p = layout.prompt_lengths[g]
        own = range(starts.completions[s], starts.completions[s] + n)
        rows.append([*range(starts.prompts[g], starts.prompts[g] + p), *own])
        targets.extend((s, p - 1 + i) for i in layout.loss_positions[s])
    return rows, targets
