"""Two CPU ranks over gloo against one, where a rank has nothing to evaluate or is fed by hand."""

from pathlib import Path

import pytest
from commands import run_ranks

SCRIPT = Path(__file__).with_name("ddp_uneven_run.py")


def run(folder, out, ranks, k):
    return run_ranks(SCRIPT, out, folder, out, ranks, k, timeout=100)


@pytest.fixture(scope="module")
def results(model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("uneven")
    return run(model_folder, root / "one", 1, 1), run(model_folder, root / "two", 2, 2)


def test_a_rank_without_rows_evaluates_as_one_rank_does(results):
    """Three held-out prompts, two per batch: rank 1 has no prompt in the last one."""
    one, two = (r["evaluated"] for r in results)
    for stage in ("PromptDataModule", "test"):
        assert one[stage].keys() == two[stage].keys()
        assert any("sometimes" in name for name in one[stage])
        for name, value in one[stage].items():
            assert two[stage][name] == pytest.approx(value, abs=1e-6), name
    assert len(one["predict"]) == 6
    assert one["predict"] == two["predict"]


def test_a_rank_with_fewer_batches_does_not_hang(results):
    """Prompts 0 and 2 of three: rank 1, whose second batch is empty, leaves it out."""
    for name, value in results[0]["evaluated"]["PromptDataModule"].items():
        assert results[1]["evaluated"]["Fewer"][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("name", ["dapo", "grpo", "real"])
def test_plain_batches_give_one_gradient_on_two_ranks(results, name):
    one, two = (r[name] for r in results)
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        largest = max(g.abs().max().item() for g in ours.values())
        assert largest > 1e-4
        worst = max((theirs[n] - g).abs().max().item() for n, g in ours.items())
        assert worst <= 1e-6 * max(1.0, largest)
