"""Run by test_trainer_support.py: a fit on two ranks that the Trainer starts by itself, then a validation."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fits import data, module, rollout, sgd, trainer, weights

if __name__ == "__main__":
    folder, out, strategy, devices = sys.argv[1:]
    root = Path(out)
    m = module(folder, optimizer=sgd, lora={"r": 4, "lora_alpha": 8} if devices == "2" else None)
    t = trainer(root, rollout(), strategy=strategy, devices=int(devices))
    t.fit(m, data())
    found = t.validate(m, data(validation_split=3))
    torch.save({"weights": weights(m), "reward": float(found[0]["val/reward"])}, root / "result.pt")
