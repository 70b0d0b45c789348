"""What a checkpoint holds besides Lightning's own state: what trains, and what it belongs to."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from grpo_lightning.checkpoints.resume import describe, take_over_optimizer
from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.policy.finite_checks import check_loaded_numbers, check_saved_numbers
from grpo_lightning.policy.lora import lora_identity
from grpo_lightning.policy.model_files import of_module
from grpo_lightning.policy.weight_dtypes import check_saved

if TYPE_CHECKING:
    from grpo_lightning.modules.policy_module import PolicyModule

FORMAT = 4


def save(module: "PolicyModule", checkpoint: dict[str, Any]) -> None:
    """Keeps what trains, and says what it belongs to; refuses weights that are half updated."""
    if module.half_updated:
        raise GRPOError(
            "an optimizer step failed half way: nothing is saved; resume from the last checkpoint"
        )
    trained = {f"policy.{name}" for name in module.policy.trainable()}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
    ours = checkpoint.setdefault("grpo_lightning", {})
    ours.update(
        {
            "format": FORMAT,
            **_identity(module),
            **_remembered(module, "_described", describe),
            "contents": _remembered(module, "_contents", of_module),
            **module.loss_state(),
            "reference": _reference_weights(module),
            "skipped_steps": module.skipped.state_dict(),
        }
    )
    check_saved_numbers(module, checkpoint, ours["reference"])
    if module.policy.is_lora:
        ours["adapter_config"] = module.policy.adapter_config()
        ours["adapter_names"] = module.policy.adapter_names()


def load(module: "PolicyModule", checkpoint: dict[str, Any]) -> None:
    """Takes over what `save` kept; refuses a checkpoint of another model or adapter, naming what differs."""
    theirs = checkpoint.get("grpo_lightning")
    if theirs is None:
        raise ConfigError("--ckpt_path: not a checkpoint of grpo-lightning")
    if theirs.get("format") != FORMAT:
        raise ConfigError(
            f"--ckpt_path: the checkpoint has format {theirs.get('format')}, this release reads {FORMAT}; "
            "resume with the release that wrote it"
        )
    for key, value in _identity(module).items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"--ckpt_path: {key} is {theirs.get(key)!r} in the checkpoint and {value!r} in this run; "
                "set it as in the checkpoint"
            )
    check_loaded_numbers(checkpoint["state_dict"])
    _check_contents(theirs["contents"], _remembered(module, "_contents", of_module))
    module.load_loss_state(theirs)
    module.skipped.load_state_dict(theirs.get("skipped_steps", module.skipped.state_dict()))
    module.configure_model()
    trained = {f"policy.{name}" for name in module.policy.trainable()}
    if missing := trained ^ set(checkpoint["state_dict"]):
        raise ConfigError(
            f"--ckpt_path: weights do not match, e.g. {sorted(missing)[0]}; same model and lora?"
        )
    if module._trainer is not None and module.trainer.state.fn == "fit":  # an evaluation may round
        check_saved(checkpoint["state_dict"], module.policy.trainable())
        take_over_optimizer(module, checkpoint, theirs)
    for name, w in (_reference_weights(module) or {}).items():
        if not theirs["reference"]:
            raise ConfigError(
                "--ckpt_path: the checkpoint holds no reference policy; set model.loss.kl_coef as it was: 0"
            )
        w.copy_(theirs["reference"][name])


def _remembered(module: "PolicyModule", name: str, make: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `make` says of the module, as it was when first asked."""
    known = module.__dict__
    if name not in known:
        known[name] = make(module)
    return known[name]


def _check_contents(theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Raises ConfigError naming a file of model or tokenizer that is another than in the checkpoint."""
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            state = "missing" if name not in ours else "new" if name not in theirs else "another one"
            raise ConfigError(
                f"--ckpt_path: the checkpoint was written over other files: {name} of model.model_name or "
                f"model.tokenizer is {state} here; give the model that it was trained from"
            )


def _reference_weights(module: "PolicyModule") -> dict[str, Tensor] | None:
    """Returns the reference's weights where loading the model again would not give them."""
    copy = module.policy.reference_copy
    if copy is None or (module.lora is None and module.reference is None):
        return None
    return copy.weights


def _identity(module: "PolicyModule") -> dict[str, Any]:
    return {
        "model.quantization": module.quantization,
        "model.reference": None if module.reference is None else asdict(module.reference),
        "model.lora": lora_identity(module.lora),
    }
