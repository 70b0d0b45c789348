"""Metrics over ranks, and the statistics of a rollout under TRL's names."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.errors import GRPOError
from grpo_lightning.metrics.reduce import Stat, combine, mean, mean_of, reduced, std_stat, values
from grpo_lightning.types import Completion


def distributed() -> bool:
    """Returns whether there is more than one rank."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and _world() > 1


def _world() -> int:
    return torch.distributed.get_world_size()


def gather(item: Any) -> list[Any]:
    """Returns `item` of every rank, in rank order."""
    if not distributed():
        return [item]
    items: list[Any] = [None] * _world()
    torch.distributed.all_gather_object(items, item)
    return items


def any_rank(flag: Tensor) -> bool:
    """Returns whether `flag`, [] bool on this rank's device, holds on any rank; waits for the device."""
    if distributed():
        flag = flag.to(torch.int32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def raise_together(error: GRPOError | None, all_ranks: bool = True) -> None:
    """Raises the first rank's error on all ranks, so that none waits for one that has ended.

    Args:
        error: of this rank, or None.
        all_ranks: whether all of them come here; else this rank raises alone.
    """
    for found in gather(error) if all_ranks else [error]:
        if found is not None:
            raise found


def all_sum(x: Tensor) -> Tensor:
    """Returns the sum of a small host tensor over ranks; exact in float64 and int64, in rank order."""
    return torch.stack(gather(x)).sum(0)


def over_ranks(stats: Mapping[str, Stat]) -> dict[str, float]:
    """Returns the metrics of all ranks together: global sums over global counts."""
    return values(all_ranks(stats))


def all_ranks(stats: Mapping[str, Stat]) -> dict[str, Stat]:
    """Returns the parts of all ranks together, as fp64 on the host."""
    numbers = iter(on_host([x for s in stats.values() for x in (s.value, s.weight)]))
    host = {k: Stat(s.kind, next(numbers), next(numbers)) for k, s in stats.items()}
    return combine(gather(host))


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns small tensors as fp64 on the host; one trip for all of a device, since each waits for it."""
    places: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(t.device, []).append(i)
    out = list(tensors)
    for own in places.values():
        flat = torch.cat([tensors[i].double().reshape(-1) for i in own]).cpu()
        for i, part in zip(own, flat.split([tensors[i].numel() for i in own]), strict=True):
            out[i] = part.view(tensors[i].shape)
    return out


def log_numbers(module: Any, numbers: Mapping[str, float | Tensor], shown: Collection[str] = ()) -> None:
    """Logs numbers of this step, those `shown` in the progress bar too; loggers get each value once.

    Lightning would write the last value of a name again at every step of the epoch; `callback_metrics` and
    the progress bar keep it. Plain numbers become tensors of the host: they would go to the GPU, and come
    back for the logger. A tensor stays on its device until a logger reads it.
    """
    results, row = module.trainer._results, _row(module.trainer)
    for result in results.values():
        if getattr(result, "row", row) != row:
            result.has_reset = True  # as if its epoch had ended
    for name, value in numbers.items():
        number = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        module.log(name, number, prog_bar=name in shown, batch_size=1)
        if (result := results.get(f"{module._current_fx_name}.{name}")) is not None:
            result.row = row


def _row(trainer: Any) -> int:
    """Returns which row the loggers write next: there is one for `log_every_n_steps` optimizer steps."""
    every = trainer.log_every_n_steps
    return trainer.fit_loop.epoch_loop._batches_that_stepped // every if every else 0


def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, [], in fp32 or wider, on their device."""
    return norm_of([p.grad for p in params if p.grad is not None])


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Returns the norm of all tensors together, [], in fp32 or wider, on the device of the first."""
    if not tensors:
        return torch.zeros(())
    # The squares of 16-bit numbers neither fit into their type nor are precise in it.
    wide = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    norms = torch._foreach_norm(tensors, 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([n.to(norms[0].device) for n in norms]).norm()


def gradient_scale(trainer: Any, optimizer: Any) -> float:
    """Returns what gradients are multiplied by: a fused optimizer takes fp16's scale off while it steps."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler.get_scale() if fused and scaler is not None else 1.0


def length_stats(groups: Sequence[Sequence[Completion]], prompt_tokens: int) -> dict[str, Stat]:
    """Returns completion lengths in tokens, the share cut at the limit, and tokens seen; TRL's names."""
    flat = [c for g in groups for c in g]
    lengths = [len(c.token_ids) for c in flat]
    ended = [len(c.token_ids) for c in flat if c.finish_reason != "length"]
    stats = {
        "completions/mean_length": mean_of(lengths),
        "completions/clipped_ratio": mean_of([c.finish_reason == "length" for c in flat]),
        "completions/mean_terminated_length": mean_of(ended),
        "num_tokens": reduced("sum", float(sum(lengths) + prompt_tokens)),
    }
    kinds: tuple[tuple[str, Sequence[int]], ...] = (("", lengths), ("terminated_", ended))
    for prefix, known in kinds:
        if known:
            stats[f"completions/min_{prefix}length"] = reduced("min", float(min(known)))
            stats[f"completions/max_{prefix}length"] = reduced("max", float(max(known)))
    return stats


def reward_stats(
    names: Sequence[str], by_function: Tensor, total: Tensor, group_ids: Tensor, num_groups: int
) -> dict[str, Stat]:
    """Returns reward means and spreads, TRL's names.

    A group with fewer than two scored completions has no spread: it counts as one without signal in
    `frac_reward_zero_std`, and not at all in `reward_std`.

    Args:
        names: K reward functions.
        by_function: [S, K] float64, NaN where a function does not apply.
        total: [S] float64, NaN where none applies.
        group_ids: [S] int64.
        num_groups: P.
    """
    stats: dict[str, Stat] = {}
    for k, name in enumerate(names):
        known = by_function[:, k][~by_function[:, k].isnan()]
        stats[f"rewards/{name}/mean"] = mean(known.sum(), known.numel())
        stats[f"rewards/{name}/std"] = std_stat(known)
    known = total[~total.isnan()]
    stats["reward"] = mean(known.sum(), known.numel())
    spreads = [total[(group_ids == g) & ~total.isnan()] for g in range(num_groups)]
    stats["reward_std"] = mean_of(float(x.std()) for x in spreads if x.numel() > 1)
    dead = [x.numel() < 2 or bool(x.min() == x.max()) for x in spreads]
    stats["frac_reward_zero_std"] = mean_of(dead)
    stats["rewards/unscorable_frac"] = mean(float(total.isnan().sum()), total.numel())
    return stats
