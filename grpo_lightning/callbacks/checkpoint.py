"""`AdapterCheckpointIO`: beside every checkpoint, the same adapter in peft's format."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO


class AdapterCheckpointIO(TorchCheckpointIO):
    """Writes `<name>-adapter/` next to `<name>.ckpt`; peft, vLLM and transformers load it as it is.

    Give it to the Trainer as a plugin; `grpo-lightning` does so by itself.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes the checkpoint and, if it holds an adapter, the adapter's folder."""
        super().save_checkpoint(checkpoint, path, storage_options)
        config = checkpoint.get("grpo_lightning", {}).get("adapter_config")
        if config is not None:
            write_adapter(adapter_folder(path), checkpoint["state_dict"], config)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes both."""
        super().remove_checkpoint(path)
        shutil.rmtree(adapter_folder(path), ignore_errors=True)


def adapter_folder(path: Any) -> Path:
    """Returns where the adapter of a checkpoint lives."""
    file = Path(path)
    return file.with_name(f"{file.stem}-adapter")


def write_adapter(folder: Path, state_dict: dict[str, Any], config: str) -> None:
    """Writes peft's two files from a module's state dict: names lose our prefix and the adapter's name."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.removeprefix("policy.model.").replace(".default", ""): tensor.detach().cpu().contiguous()
        for name, tensor in state_dict.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(config)
