"""The program of docs/one_step.md runs, and its loss and gradient are the package's."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from grpo_lightning.losses import LossConfig, policy_loss
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.types import Completion

PAGE = Path(__file__).parents[2] / "docs" / "one_step.md"


def test_the_page_computes_what_the_package_computes(model_folder, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert sum(block.count("\n") for block in blocks) <= 150
    blocks[0], count = re.subn(r'MODEL = "[^"]+"', f"MODEL = {str(model_folder)!r}", blocks[0])
    assert count == 1
    page = {}
    run(blocks[:-1], page)
    adapter = {n: p.detach().clone() for n, p in page["policy"].named_parameters() if p.requires_grad}
    run(blocks[-1:], page)
    assert "reward" in capsys.readouterr().out

    batch = RolloutBatch.pack(
        prompt_ids=page["prompt_ids"],
        completions=[Completion(token_ids=c) for c in page["completions"]],
        group_ids=page["group_ids"],
        advantages=page["advantages"],
        max_tokens=page["MAX_TOKENS"],
    )
    assert torch.equal(batch.input_ids, page["input_ids"])
    assert torch.equal(batch.target_ids, page["target_ids"])
    assert batch.target_rows.tolist() == page["target_rows"]

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    policy = load_policy(model_folder, page["tokenizer"], lora=lora, gradient_checkpointing=False)
    ours = dict(policy.model.named_parameters())
    assert adapter.keys() == {n for n, p in ours.items() if p.requires_grad}
    with torch.no_grad():
        for name, value in adapter.items():
            ours[name].copy_(value)
    loss = policy_loss(policy.logprobs(batch).logprobs, batch, LossConfig("dapo")).loss
    loss.backward()
    assert loss.item() == pytest.approx(page["loss"].item(), abs=1e-6)
    assert max(g.abs().max() for g in page["gradients"].values()) > 1e-4
    for name, gradient in page["gradients"].items():
        torch.testing.assert_close(ours[name].grad, gradient, atol=1e-6, rtol=1e-4)


def run(blocks, names):
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
