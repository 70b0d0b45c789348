"""TRL 1.16's own training step on a rollout of ours: its `_compute_loss` and a backward per micro-batch."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.packing.batch import RolloutBatch


def _padded(rows: list[list[int]], width: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    ids, mask = [], []
    for row in rows:
        pad = [0] * (width - len(row))
        ids.append(pad + row if left else row + pad)
        ones = [1] * len(row)
        mask.append(pad + ones if left else ones + pad)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def trl_inputs(batch: RolloutBatch, device: torch.device) -> dict[str, Tensor]:
    """Returns the padded form of a rollout, as TRL's trainer prepares it."""
    starts, flat, targets = batch.row_starts(), batch.input_ids.tolist(), batch.target_ids.tolist()
    prompts, completions, advantages, at = [], [], [], 0
    for g, n in zip(batch.host_groups, batch.lengths, strict=True):
        prompts.append(flat[starts.prompts[g] : starts.prompts[g] + batch.prompt_lengths[g]])
        completions.append(targets[at : at + n])
        advantages.append(float(batch.advantages[at]) if n else 0.0)
        at += n
    prompt_ids, prompt_mask = _padded(prompts, max(map(len, prompts)), True, device)
    completion_ids, completion_mask = _padded(completions, max(batch.lengths), False, device)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages, device=device),
        "num_items_in_batch": completion_mask.sum(),
    }


def trl_step(model: Any, batch: RolloutBatch, parts: int) -> Callable[[], None]:
    """Returns a function that runs TRL's loss and backward over `batch` in `parts` equal micro-batches."""
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import GRPOConfig, GRPOTrainer

    device = next(model.parameters()).device
    size = len(batch.lengths) // parts
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=parts,
        num_generations=min(size, 8),
        max_completion_length=max(batch.lengths),
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 64),
        processing_class=tiny_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = parts
    inputs = trl_inputs(batch, device)
    model = trainer.model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for i in range(parts):
            rows = slice(i * size, (i + 1) * size)
            part = {k: v[rows] if v.dim() else v for k, v in inputs.items()}
            with trainer.compute_loss_context_manager():
                loss = trainer._compute_loss(model, part)
            trainer.accelerator.backward(loss)

    return run
