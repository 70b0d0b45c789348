"""`RunReport`: what a run leaves behind: the adapter, the curve, and accuracy before and after."""

import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from grpo_lightning.errors import hinted

CURVES = ("reward", "val/pass@1", "val/reward")


@hinted
class RunReport(Callback):
    """At the end of a fit saves what was trained in Hugging Face's format and draws the reward curve.

    Writes into trainer.default_root_dir: `adapter/` (or `model/` for full fine-tuning) and `reward.png`.

    Args:
        curve: file name of the picture; null draws none.
    """

    def __init__(self, curve: str | None = "reward.png") -> None:
        self.curve = curve
        self.history: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}

    def state_dict(self) -> dict[str, Any]:
        """Returns the curves, so that a resumed run draws them whole."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the curves."""
        self.history = {name: [tuple(p) for p in points] for name, points in state_dict["history"].items()}

    def note(self, step: int, metrics: Any) -> None:
        """Adds the points that `metrics` has for this step; a later value for the same step replaces it."""
        for name, points in self.history.items():
            if name in metrics:
                if points and points[-1][0] == step:
                    points.pop()
                points.append((step, float(metrics[name])))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes everything; rank 0 only."""
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        policy: Any = pl_module.policy
        folder = root / ("adapter" if policy.is_lora else "model")
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        print(f"saved {folder}")
        for name, points in self.history.items():
            if len(points) > 1:
                print(
                    f"{name}: {points[0][1]:.3f} (step {points[0][0]}) -> {points[-1][1]:.3f} (step "
                    f"{points[-1][0]})"
                )
        if self.curve is not None:
            self._draw(root / self.curve)

    def _draw(self, path: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            print(f'{path.name} was not drawn: pip install "grpo-lightning[demo]"')
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        for name, points in self.history.items():
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="o" if name.startswith("val/") else None
                )
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path)
        print(f"saved {path}")
