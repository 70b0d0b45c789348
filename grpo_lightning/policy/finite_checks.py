"""Numbers that must be finite while a run trains.

| what | when | then |
|---|---|---|
| loss, log-probabilities, gradient, learning rate | before a step | it is skipped; 3 in a row stop the run |
| weights | after it, before anything is saved | the run stops: a step cannot be undone |
| weights, optimizer state, reference | when a checkpoint is made | it is not written |

All ranks decide alike. The norm of the gradient is waited for before the step, where logging it waits after.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.metrics.logging import any_rank, gather, norm_of
from grpo_lightning.utils.ranges import check_numbers

if TYPE_CHECKING:
    from grpo_lightning.modules.policy_module import PolicyModule

IN_A_ROW = 3
"""skipped optimizer steps in a row that stop a run"""
GRADIENT = "gradient"
BAD_LOGPROBS = "not finite: log-probabilities"
"""the statistic of a micro-batch that counts them; it is not logged"""


class SkippedSteps:
    """Skips optimizer steps whose numbers are not finite; the optimizer then sees no gradient at all.

    The scheduler, `global_step` and the prompts go on as if the step had been taken. Gradients that a
    GradScaler (16-mixed) throws away while it looks for its scale are its own business.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self._found: list[str] = []

    def look(self, metrics: dict[str, float]) -> bool:
        """Takes in the metrics of an optimizer step, over all ranks; returns whether they are sound.

        Args:
            metrics: of `stats.values`, which leaves out what is not finite; `BAD_LOGPROBS` is taken out.
        """
        bad = metrics.pop(BAD_LOGPROBS, 0.0)
        self._found = [] if "loss" in metrics else ["loss"]
        self._found += [f"{bad:.0f} of the trainer's log-probabilities"] if bad else []
        return not self._found

    def judge(self, module: "PolicyModule", optimizer: torch.optim.Optimizer, norm: Tensor) -> float:
        """Takes the gradients away where the step must not be taken; returns the steps skipped so far.

        Args:
            module: whose optimizer is about to step.
            optimizer: has its gradients, of all micro-batches and ranks.
            norm: of the gradient, [].

        Raises:
            GRPOError: it is the third in a row.
        """
        found, self._found = self._found, []
        rates = [group["lr"] for group in optimizer.param_groups if not isinstance(group["lr"], Tensor)]
        found += [] if all(map(math.isfinite, rates)) else [f"learning rate ({rates[0]})"]
        if not any_rank(~norm.isfinite().to(module.device) | bool(found)):
            self.in_a_row = 0
            return self.total
        found += [] if found or norm.isfinite() else [GRADIENT]
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        everywhere = gather((found, _scaler_lowers(scaler, optimizer)))
        _withhold(optimizer, scaler)
        everything = list(dict.fromkeys(name for names, _ in everywhere for name in names))
        if everything != [GRADIENT] or not any(lowers for _, lowers in everywhere):
            self._count(module, everything)
        return self.total

    def _count(self, module: "PolicyModule", found: list[str]) -> None:
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        step, what = module.global_step, f"not finite: {', '.join(found)}"
        if self.in_a_row < IN_A_ROW:
            rank_zero_warn(
                f"optimizer step {step} is skipped and changes no weight; {what} "
                f"(train/skipped_steps {self.total}; {IN_A_ROW} in a row stop the run)"
            )
            return
        raise GRPOError(
            f"{IN_A_ROW} optimizer steps in a row were skipped, the last is step {step}; {what}. Lower the "
            "learning rate (model.optimizer), clip harder (trainer.gradient_clip_val), or inspect the "
            f"rollouts with rollout.record_to. {last_checkpoint(module.trainer)}"
        )

    def state_dict(self) -> dict[str, int]:
        """Returns the counts, for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes over what `state_dict` returned."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _scaler_lowers(scaler: Any, optimizer: Any) -> bool:
    """Whether a GradScaler sees these gradients, throws them away, and can still lower its scale."""
    if scaler is None:
        return False
    seen = scaler._found_inf_per_device(optimizer).values()  # empty for what takes the scale off in its step
    return (not seen or any(map(bool, seen))) and scaler.get_scale() > 1


def _withhold(optimizer: Any, scaler: Any) -> None:
    """Leaves nothing to step with; a fused optimizer under a scaler has to find something to throw away."""
    fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        p.grad = p.grad.fill_(math.nan) if fused else None


def check_weights(module: "PolicyModule") -> None:
    """Raises GRPOError, on all ranks together, if an optimizer step has left weights that are not finite."""
    trained = module.policy.trainable()
    if any_rank(torch.tensor(not finite(trained.values()), device=module.device)):
        name = next((n for n, p in trained.items() if not p.isfinite().all()), "a weight of another rank")
        rates = [float(g["lr"]) for o in module.trainer.optimizers for g in o.param_groups]
        raise GRPOError(
            f"{name} is not finite after optimizer step {module.global_step}, which the gradients before it "
            f"were (learning rate {max(rates):g}); lower it (model.optimizer), and look at callbacks that "
            f"change gradients or weights. Nothing is saved. {last_checkpoint(module.trainer)}"
        )


def finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all floating-point numbers of `tensors` are finite; waits for their device.

    Subclasses of Tensor, in which some optimizers pack their state, are left out.
    """
    plain = (Tensor, torch.nn.Parameter)
    known = [t.detach() for t in tensors if type(t) in plain and t.is_floating_point()]
    known = [t.float() if t.dtype.itemsize < 2 else t for t in known]
    # The norm is the cheapest look at all of them; where it overflows, each is looked at.
    return bool(norm_of(known).isfinite()) or all(bool(t.isfinite().all()) for t in known)


def check_saved_numbers(
    module: "PolicyModule", checkpoint: Mapping[str, Any], reference: Mapping[str, Tensor] | None
) -> None:
    """Raises GRPOError if what a checkpoint would hold is not finite; an older one then stays.

    Args:
        module: whose checkpoint it is.
        checkpoint: Lightning's, with weights and optimizer states.
        reference: weights of the reference policy.
    """
    states = [s for o in checkpoint.get("optimizer_states", ()) for s in o.get("state", {}).values()]
    kept = {
        "the weights": checkpoint["state_dict"].values(),
        "the optimizer's state": _tensors(states),
        "the reference policy": (reference or {}).values(),
    }
    for name, tensors in kept.items():
        if not finite(tensors):
            older = "" if module._trainer is None else f". {last_checkpoint(module.trainer)}"
            raise GRPOError(f"no checkpoint is written, because {name} would not be finite in it{older}")


def check_loaded_numbers(state_dict: Mapping[str, Tensor]) -> None:
    """Raises ConfigError if the weights of a checkpoint are not finite."""
    if not finite(state_dict.values()):
        name = next(n for n, t in state_dict.items() if not t.isfinite().all())
        raise ConfigError(f"--ckpt_path: {name} is not finite in the checkpoint; take an older one")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for x in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(x)


def last_checkpoint(trainer: Any) -> str:
    """Returns a sentence that names the newest checkpoint of this run, or the one it was resumed from."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    saved = [(c._last_global_step_saved, c._last_checkpoint_saved) for c in savers]
    newest = max((x for x in saved if x[1] and Path(x[1]).exists()), default=(0, trainer.ckpt_path))[1]
    if newest is None:
        return "No checkpoint has been saved"
    return f"The last good checkpoint is {newest}: go on with --ckpt_path {newest}"


def build_optimizer(
    make: Callable[..., torch.optim.Optimizer],
    make_scheduler: Callable[..., Any] | None,
    params: Iterable[Any],
) -> tuple[torch.optim.Optimizer, Any]:
    """Returns optimizer and scheduler, or None for the latter.

    Raises:
        ConfigError: either refuses its options, or a number of a parameter group cannot work.
    """
    key = "model.optimizer"
    try:
        optimizer = make(params)
        key = "model.scheduler"
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{key}: {error}") from error
    for group in optimizer.param_groups:
        numbers = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        bounds = [(k, numbers.get(k, 0) >= 0, ">= 0") for k in ("lr", "initial_lr", "weight_decay")]
        check_numbers("model.optimizer", numbers, bounds)
    return optimizer, scheduler


def check_options(module: "PolicyModule") -> None:
    """Raises ConfigError for numbers of the Trainer and of the module that cannot work."""
    clip, rows = module.trainer.gradient_clip_val, module.logprob_chunk_rows
    allowed = (clip is None or clip >= 0, ">= 0; 0 and null do not clip")
    limits = ("gradient_clip_val",)
    check_numbers("trainer", {limits[0]: clip}, [(limits[0], *allowed)], may_be_infinite=limits)
    at_least = (rows is None or rows >= 1, "null or at least 1")
    check_numbers("model", {"logprob_chunk_rows": rows}, [("logprob_chunk_rows", *at_least)])
