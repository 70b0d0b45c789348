"""Pages made from the tables are in step with them."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from grpo_lightning.losses import RECIPES, CorrectionConfig, LossConfig
from grpo_lightning.losses.corrections import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


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


def documented(name, cell):
    """Whether a cell of docs/metrics.md, such as `a/{b,c}`, `/d` or `<name>/*`, stands for a metric."""
    for written in re.findall("`([^`]+)`", cell):
        form = re.escape(written.replace("<name>", "*")).replace(r"\*", ".+")
        form = re.sub(r"\\\{([^}]*)\\\}", lambda m: f"(?:{m[1].replace(',', '|')})", form)
        if re.fullmatch(f".+{form}" if written.startswith("/") else form, name):
            return True
    return False


def test_every_metric_is_in_the_table_of_metrics(model_folder, tmp_path):
    from fits import data, module, rollout, rows_of, trainer

    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": 2}
    loss = LossConfig("cispo", kl_coef=0.1, entropy_coef=0.01, off_policy_threshold=0.5)
    t = trainer(tmp_path, rollout(updates_per_rollout=2), **settings)
    t.fit(module(model_folder, loss=loss), data(validation_split=4))
    names = [n for n in rows_of(tmp_path)[0] if n not in ("epoch", "step")]
    rows = (ROOT / "docs" / "metrics.md").read_text().split("## Where")[0].splitlines()
    cells = [line.split("|")[1] for line in rows if line.startswith("| `")]
    assert len(names) > 30
    assert [n for n in names if not any(documented(n, c) for c in cells)] == []


def test_every_fault_is_on_the_page_of_reliability_with_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {f.stem for f in files} | {n for f in files for n in re.findall(r"def (test_\w+)", f.read_text())}
    named = set(re.findall(r"\btest_\w+", page))
    assert len(named) > 150
    assert not named - known
    rows = [line for line in page.splitlines() if re.match(r"\| [FS\u00a7L]", line)]
    assert not [f"F{i:02}" for i in range(1, 61) if not any(f"F{i:02}" in row.split("|")[1] for row in rows)]
    assert not [row for row in rows if row.startswith("| F") and "test_" not in row and "`K`" not in row]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_results_name_no_folder_of_a_machine(path):
    assert not re.findall(r"/(?:home|root|tmp|work|opt|var|Users)/", path.read_text())
