"""Completions of no token, of the end token alone, all of them cut; a tokenizer without padding."""

from dataclasses import replace

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from models import save_tiny
from tiny import tiny_tokenizer

from grpo_lightning import SamplingParams
from grpo_lightning.engines import HFEngine


class Short(HFEngine):
    """Gives the first `share` of each group's completions only these tokens."""

    def __init__(self, tokens, share):
        super().__init__()
        self.tokens, self.share = tokens, share

    def generate(self, requests, sampling):
        groups = super().generate(requests, sampling)
        short = {"token_ids": self.tokens, "logprobs": [-3.0] * len(self.tokens), "finish_reason": "stop"}
        for group in groups:
            for i in range(int(self.share * len(group))):
                group[i] = replace(group[i], **short)
        return groups


def finite(m):
    return all(bool(w.isfinite().all()) for w in weights(m).values())


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("tokens", [[], [1]], ids=["empty", "only eos"])
def test_short_completions(model_folder, tmp_path, tokens, share):
    """F23. The engine's numbers are made up, so that the mismatch is only warned of."""
    m = module(model_folder)
    engine = Short(tokens, share)
    engine.exact = False
    t = trainer(tmp_path, rollout(engine=engine), max_steps=2)
    t.fit(m, data())
    assert t.global_step == 2
    assert finite(m)
    rows = [r for r in rows_of(tmp_path) if r["reward"]]
    assert [float(r["completions/min_length"]) for r in rows] == [len(tokens)] * 2
    assert all(float(r["loss"]) == float(r["loss"]) for r in rows)


def test_all_completions_are_cut_and_masked(tmp_path):
    """F24: nothing trains, the loss is 0, no weight moves."""
    m = module(save_tiny(tmp_path / "endless", eos_token_id=1))
    settings = {"sampling": SamplingParams(max_tokens=1), "mask_truncated_completions": True, "seed": 4}
    m.configure_model()
    before = weights(m)
    trainer(tmp_path, rollout(**settings), max_steps=2).fit(m, data())
    rows = [r for r in rows_of(tmp_path) if r["reward"]]
    assert [float(r["completions/clipped_ratio"]) for r in rows] == [1.0, 1.0]
    assert [float(r["loss"]) for r in rows] == [0.0, 0.0]
    assert same_bits(weights(m), before)


def test_a_tokenizer_without_a_pad_token(model_folder, tmp_path):
    """F29: masks come from lengths; the end token stands in where something has to be written."""
    folder = save_tiny(tmp_path / "padless")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    found = []
    for source in (folder, model_folder):
        m = module(source)
        trainer(tmp_path / str(len(found)), rollout(), max_steps=2).fit(m, data())
        found.append(weights(m))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)
