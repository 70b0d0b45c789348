"""Run by test_vllm_ranks.py: two ranks of Lightning's own launcher, each with a vLLM."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fits import data, module, rollout, rows_of, trainer, weights
from lightning.pytorch.callbacks import Callback

from grpo_lightning.engines import VLLMEngine


class Keeps(Callback):
    """Saves what every rank has learned, while they can still wait for each other."""

    def on_train_end(self, trainer, pl_module):
        torch.save(weights(pl_module), root / f"weights-{trainer.global_rank}.pt")
        trainer.strategy.barrier()


if __name__ == "__main__":
    folder, out, sync = sys.argv[1:]
    root, engine = Path(out), VLLMEngine(sync=sync, max_num_seqs=16, max_model_len=64)
    t = trainer(root, rollout(engine=engine), Keeps(), max_steps=3, devices=2, strategy="ddp")
    t.fit(module(folder), data())
    if t.is_global_zero:
        parity = [float(r["sampling/parity_mean"]) for r in rows_of(root) if r["loss"]]
        both = [torch.load(root / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]
        torch.save({"parity": parity, "weights": both}, root / "result.pt")
