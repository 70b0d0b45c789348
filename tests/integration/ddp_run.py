"""Run by test_ddp.py: one optimizer step (or more) on `ranks` CPU ranks; rank 0 saves gradient and
metrics."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from test_fit import Gradients, LossConfig, ModelCheckpoint, data, module, rollout, trainer, weights


def main(
    folder: str, out: str, ranks: int, k: int, name: str, steps: int, ckpt_path: str | None = None
) -> None:
    seen = Gradients()
    loss, _, changes = name.partition(":")
    m = module(folder, loss=LossConfig(loss, **json.loads(changes or "{}")))
    root = Path(out)
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    t = trainer(
        root,
        rollout(num_generations=8),
        seen,
        saver,
        max_steps=steps,
        accumulate_grad_batches=k,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
    )
    t.fit(m, data(validation_split=3), ckpt_path=ckpt_path)
    if t.is_global_zero:
        metrics = {key: float(v) for key, v in t.callback_metrics.items()}
        torch.save({"gradient": seen.found, "metrics": metrics, "weights": weights(m)}, root / "result.pt")


if __name__ == "__main__":
    folder, out, ranks, k, name, steps, *rest = sys.argv[1:]
    main(folder, out, int(ranks), int(k), name, int(steps), *rest)
