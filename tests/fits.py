"""Whole runs on the tiny model, in a line each."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning import GRPOModule, PromptDataModule, RolloutCallback, SamplingParams
from grpo_lightning.checkpoints import AdapterCheckpointIO
from grpo_lightning.losses import LossConfig


def vowels(completions, **_):
    """More vowels are better; a signal a random model can follow."""
    return [sum(c in "aeiou" for c in text) / 8 for text in completions]


def long(completions, **_):
    return [len(text) / 8 for text in completions]


ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(12)]


def module(folder, **changes):
    settings = {
        "lora": {"r": 4, "lora_alpha": 8},
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
        "gradient_checkpointing": False,
        "loss": LossConfig("dapo"),
    }
    torch.manual_seed(0)
    return GRPOModule(folder, **{**settings, **changes})


def sgd(params):
    """Adam turns rounding into whole steps where a gradient is nearly 0; SGD shows gradients as they are."""
    return torch.optim.SGD(params, lr=0.5)


def rollout(**changes):
    settings = {
        "reward_funcs": [vowels],
        "num_generations": 4,
        "sampling": SamplingParams(max_tokens=8),
        "seed": 3,
    }
    return RolloutCallback(**{**settings, **changes})


def data(**changes):
    return PromptDataModule(ROWS, **{"prompts_per_rollout": 4, "seed": 5, **changes})


def trainer(root: Path, *callbacks, **changes):
    settings = {
        "max_steps": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(root, name="logs", version=0),
        "default_root_dir": root,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "callbacks": list(callbacks),
        "plugins": [AdapterCheckpointIO()],
    }
    return pl.Trainer(**{**settings, **changes})


def weights(m) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in m.policy.trainable().items()}


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "logs" / "version_0" / "metrics.csv").open() as f:
        return list(csv.DictReader(f))


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
