"""What a run is going to do, said before its first step."""

import lightning.pytorch as pl

from grpo_lightning.rollout.collector import Collector
from grpo_lightning.rollout.micro_batches import Splitting


def plan(collector: Collector, splitting: Splitting, trainer: pl.Trainer) -> dict[str, str]:
    """Returns the numbers of one rollout and of the run, ready to be read."""
    data = getattr(trainer, "datamodule", None)
    prompts = getattr(data, "prompts_per_rollout", None)
    completions = None if prompts is None else prompts * collector.num_generations
    steps = splitting.updates_per_rollout * splitting.num_iterations
    k, w = trainer.accumulate_grad_batches, trainer.world_size
    rollouts = int(trainer.num_training_batches) // (k * steps)
    degree = (
        "on-policy: every step trains on fresh samples"
        if steps == 1
        else f"off-policy by up to {steps - 1} optimizer steps"
    )
    out = {
        "engine": type(collector.engine).__name__,
        "rewards": ", ".join(collector.rewards.names),
        "optimizer steps per rollout": f"{steps} ({degree})",
        "micro-batches per optimizer step": f"{k} x {w} rank{'s' if w > 1 else ''} "
        f"(rollout.micro_batches: {splitting.sizer.wanted})",
        "rollouts per epoch": str(rollouts),
        "optimizer steps in all": str(trainer.estimated_stepping_batches),
    }
    if completions is None:
        return out
    most = completions * collector.sampling.max_tokens
    return {
        "rollout": f"{prompts} prompts x {collector.num_generations} completions = {completions}, "
        f"<= {collector.sampling.max_tokens} tokens each, <= {most:,} in all",
        **out,
    }


def print_plan(collector: Collector, splitting: Splitting, trainer: pl.Trainer) -> None:
    """Prints the plan as a table, once for all ranks."""
    if not trainer.is_global_zero:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="batch plan", show_header=False, title_justify="left")
    for key, value in plan(collector, splitting, trainer).items():
        table.add_row(key, value)
    Console().print(table)
