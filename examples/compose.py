"""GRPO inside your own Lightning pipeline: your Trainer, your loggers, your callbacks.

python examples/compose.py [folder of a model] [steps]
"""

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning import GRPOModule, PromptDataModule, RolloutCallback, SamplingParams
from grpo_lightning.callbacks import RunReport, SampleTable
from grpo_lightning.checkpoints import AdapterCheckpointIO
from grpo_lightning.losses import LossConfig
from grpo_lightning.policy.model_source import EMBEDDED_MODEL
from grpo_lightning.schedulers import WarmupCosine


def even(completions, **kwargs):
    """1 for an answer that ends in an even digit."""
    return [float(c[-1]["content"].strip()[-1:] in tuple("02468")) for c in completions]


class Announce(Callback):
    """Any callback of yours sees GRPO as it sees every other training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(f"step {trainer.global_step}: reward {trainer.callback_metrics['reward']:.3f}")


def main(model_name: str = EMBEDDED_MODEL, steps: int = 5) -> pl.Trainer:
    """Returns the trainer after `steps` optimizer steps."""
    rows = [{"prompt": [{"role": "user", "content": f"Name a number above {i}."}]} for i in range(24)]
    module = GRPOModule(
        model_name,
        loss=LossConfig("dr_grpo"),
        lora={"r": 8, "lora_alpha": 16},
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4),
        scheduler=lambda optimizer: WarmupCosine(optimizer, total_steps=steps, warmup_steps=1),
        gradient_checkpointing=False,
    )
    rollout = RolloutCallback(
        reward_funcs=[even], num_generations=4, sampling=SamplingParams(temperature=1.0, max_tokens=8)
    )
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=CSVLogger("runs/compose"),
        default_root_dir="runs/compose",
        enable_model_summary=False,
        callbacks=[
            rollout,
            ModelCheckpoint(monitor="val/reward", mode="max", save_last=True),
            EarlyStopping("val/reward", mode="max", patience=10, check_on_train_epoch_end=False),
            LearningRateMonitor(),
            SampleTable(every_n_steps=5, rows=2),
            RunReport(),
            Timer(duration="00:01:00:00"),
            Announce(),
        ],
        plugins=[AdapterCheckpointIO()],
    )
    trainer.fit(module, PromptDataModule(rows, prompts_per_rollout=4, validation_split=4))
    return trainer


if __name__ == "__main__":
    model_name = sys.argv[1] if len(sys.argv) > 1 else EMBEDDED_MODEL
    main(model_name, steps=int(sys.argv[2]) if len(sys.argv) > 2 else 5)
