"""Run by test_vllm_ranks.py: two ranks of Lightning's own launcher, each with a vLLM."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fits import data, module, rollout, rows_of, trainer, weights

from grpo_lightning.engines import VLLMEngine

if __name__ == "__main__":
    folder, out, sync = sys.argv[1:]
    root, engine = Path(out), VLLMEngine(sync=sync, max_num_seqs=16, max_model_len=64)
    t = trainer(root, rollout(engine=engine), max_steps=3, devices=2, strategy="ddp")
    m = module(folder)
    t.fit(m, data())
    torch.save(weights(m), root / f"weights-{t.global_rank}.pt")
    t.strategy.barrier()
    if t.is_global_zero:
        parity = [float(r["sampling/parity_mean"]) for r in rows_of(root) if r["loss"]]
        both = [torch.load(root / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]
        torch.save({"parity": parity, "weights": both}, root / "result.pt")
