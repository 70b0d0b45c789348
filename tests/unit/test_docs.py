"""Pages made from the tables are in step with them."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from grpo_lightning.losses import RECIPES, CorrectionConfig, LossConfig
from grpo_lightning.losses.corrections import PRESETS

ROOT = Path(__file__).parents[2]


def maker():
    spec = importlib.util.spec_from_file_location("make_losses", ROOT / "docs" / "make_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_losses_is_that_of_the_tables():
    assert (ROOT / "docs" / "losses.md").read_text() == maker().page(), "run: python docs/make_losses.py"


def test_every_recipe_has_an_overlay_and_a_reason():
    overlays = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "configs" / "loss").glob("*.yaml")}
    assert set(overlays) == set(RECIPES)
    for name, overlay in overlays.items():
        assert overlay["model"]["loss"]["name"] == name
        assert LossConfig(**overlay["model"]["loss"]).resolve().surrogate == RECIPES[name].surrogate
        assert RECIPES[name].note


def test_every_correction_with_a_name_has_an_overlay():
    overlays = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "configs/correction").glob("*.yaml")}
    assert {n: CorrectionConfig(**o["model"]["loss"]["correction"]) for n, o in overlays.items()} == {
        name: config for name, (config, _) in PRESETS.items()
    }


@pytest.mark.parametrize("name", ["ppo_clip", "sapo"])
def test_curves_pass_through_minus_a_at_ratio_one(name):
    import torch

    values, slopes = maker().curve(name, 1.0, torch.tensor([1.0]))
    assert slopes == pytest.approx([-1.0])
    assert len(values) == 1
