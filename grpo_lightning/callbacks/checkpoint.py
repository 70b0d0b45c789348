"""`AdapterCheckpointIO`: beside every checkpoint, the same adapter in peft's format."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor


class AdapterCheckpointIO(TorchCheckpointIO):
    """Writes `<name>-adapter/` next to `<name>.ckpt`; peft, vLLM and transformers load it as it is.

    Give it to the Trainer as a plugin; `grpo-lightning` does so by itself.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes the checkpoint and, if it holds an adapter, the adapter's folder."""
        super().save_checkpoint(checkpoint, path, storage_options)
        ours = checkpoint.get("grpo_lightning", {})
        if "adapter_config" in ours:
            trained = checkpoint["state_dict"]
            write_adapter(adapter_folder(path), trained, ours["adapter_config"], ours["adapter_names"])

    def remove_checkpoint(self, path: Any) -> None:
        """Removes both."""
        super().remove_checkpoint(path)
        shutil.rmtree(adapter_folder(path), ignore_errors=True)


def adapter_folder(path: Any) -> Path:
    """Returns where the adapter of a checkpoint lives."""
    file = Path(path)
    return file.with_name(f"{file.stem}-adapter")


def write_adapter(
    folder: Path, state_dict: Mapping[str, Tensor], config: str, names: Mapping[str, str]
) -> None:
    """Writes peft's two files.

    Args:
        folder: is made if it is missing.
        state_dict: of a module; what trains is enough.
        config: peft's adapter_config.json.
        names: peft's name of a tensor -> the policy's: `Policy.adapter_names`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    written = set[str]()
    for name, own in names.items():
        if (tensor := state_dict.get(f"policy.{own}")) is not None:
            tensor = tensor.detach().cpu().contiguous()
            tensors[name] = tensor.clone() if own in written else tensor  # tied: a file holds no aliases
            written.add(own)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(config)
