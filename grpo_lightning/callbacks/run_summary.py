"""What a run is going to do, said before its first step."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl

if TYPE_CHECKING:
    from grpo_lightning.callbacks.rollout import RolloutCallback


def plan(rollout: "RolloutCallback", trainer: pl.Trainer) -> dict[str, str]:
    """Returns the numbers of one rollout and of the run, ready to be read."""
    data = getattr(trainer, "datamodule", None)
    prompts = getattr(data, "prompts_per_rollout", None)
    completions = None if prompts is None else prompts * rollout.num_generations
    steps = rollout.updates_per_rollout * rollout.num_iterations
    k, w = trainer.accumulate_grad_batches, trainer.world_size
    rollouts = int(trainer.num_training_batches) // rollout.micro_batches_per_rollout(trainer)
    degree = (
        "on-policy: every step trains on fresh samples"
        if steps == 1
        else f"off-policy by up to {steps - 1} optimizer steps"
    )
    out = {
        "engine": type(rollout.engine).__name__,
        "rewards": ", ".join(rollout.rewards.names),
        "optimizer steps per rollout": f"{steps} ({degree})",
        "micro-batches per optimizer step": f"{k} x {w} rank{'s' if w > 1 else ''} "
        f"(rollout.micro_batches: {rollout.micro_batches})",
        "rollouts per epoch": str(rollouts),
        "optimizer steps in all": str(trainer.estimated_stepping_batches),
    }
    if completions is None:
        return out
    most = completions * rollout.sampling.max_tokens
    return {
        "rollout": f"{prompts} prompts x {rollout.num_generations} completions = {completions}, "
        f"<= {rollout.sampling.max_tokens} tokens each, <= {most:,} in all",
        **out,
    }


def print_plan(rollout: "RolloutCallback", trainer: pl.Trainer) -> None:
    """Prints the plan as a table, once for all ranks."""
    if not trainer.is_global_zero:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="batch plan", show_header=False, title_justify="left")
    for key, value in plan(rollout, trainer).items():
        table.add_row(key, value)
    Console().print(table)
