"""Run by test_vllm_stop.py: trains beside the real vLLM; in rollout AT it decodes on and on."""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fits import data, module, rollout, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from grpo_lightning.engines import VLLMEngine

CALLS = 0


class Long(VLLMEngine):
    def generate(self, requests, sampling):
        global CALLS
        CALLS += 1
        if int(os.environ.get("AT", "0")) != CALLS:
            return super().generate(requests, sampling)
        stops, self._stop_ids = self._stop_ids, []
        try:
            for _ in range(100_000):
                super().generate(requests, replace(sampling, max_tokens=200))
                Path("here").write_text("x")
        finally:
            self._stop_ids = stops
        raise AssertionError("nobody has stopped it")


if __name__ == "__main__":
    folder, *ckpt = sys.argv[1:]
    torch.manual_seed(0)
    m = module(folder)
    engine = Long(max_num_seqs=32, max_model_len=256)
    t = trainer(
        Path.cwd(), rollout(engine=engine), ModelCheckpoint("ckpt", every_n_train_steps=100), max_steps=4
    )
    t.fit(m, data(), ckpt_path=ckpt[0] if ckpt else None)
    torch.save(weights(m), "weights.pt")
