"""Validation metrics are torchmetrics; a user's own stand beside ours, from Python and from YAML."""

import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from fits import data, module, rollout, trainer
from models import save_tiny
from torchmetrics import MeanMetric, Metric, MetricCollection

from grpo_lightning import SamplingParams
from grpo_lightning.callbacks import PassAtK, ValidationConfig
from grpo_lightning.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(k):
    rows = {0: [1, 0, 0, 1, 0], 1: [0, 0, 0, 0, 0], 2: [1, 1, 1, 1, 1], 3: [1, math.nan, 0, 0, 0]}
    exact = []
    for own in rows.values():
        known = [x for x in own if x == x]
        if len(known) >= k:
            chosen = list(combinations(known, k))
            exact.append(sum(any(c) for c in chosen) / len(chosen))
    metric = PassAtK(k)
    for group in (rows[0] + rows[1], rows[2] + rows[3]):  # two batches
        metric.update(passed=torch.tensor(group), group_ids=torch.arange(2).repeat_interleave(5))
    assert float(metric.compute()) == pytest.approx(sum(exact) / len(exact))
    with pytest.raises(ConfigError, match=r"PassAtK\.k is 0"):
        PassAtK(0)


def test_metrics_that_cannot_be_updated_are_refused_before_anything_is_sampled():
    with pytest.raises(
        ConfigError, match=r"validation\.metrics\.x \(MeanMetric\): its update asks for 'value'"
    ):
        rollout(validation=sampled(x=MeanMetric()))
    with pytest.raises(ConfigError, match=r"PassAtK\.k is 8, but rollout\.validation\.num_generations is 4"):
        rollout(validation=sampled(x=PassAtK(8)))
    with pytest.raises(ConfigError, match=r"metrics\.x is a MetricCollection; it must be"):
        rollout(validation=sampled(x=MetricCollection([PassAtK(1)])))


class Longest(Metric):
    """Asks for the lengths alone."""

    def __init__(self):
        super().__init__()
        self.add_state("most", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, lengths):
        self.most = torch.maximum(self.most, lengths.max())

    def compute(self):
        return self.most


def sampled(**metrics):
    return ValidationConfig(
        num_generations=4, sampling=SamplingParams(max_tokens=8), metrics=metrics, pass_threshold=0.1
    )


def test_a_metric_of_your_own_is_logged_beside_ours(folder, tmp_path):
    config = sampled(longest=Longest(), **{"pass@4": PassAtK(4)})
    t = trainer(
        tmp_path, rollout(validation=config), max_steps=2, val_check_interval=1, check_val_every_n_epoch=None
    )
    t.fit(module(folder), data(validation_split=4))
    found = {k: float(v) for k, v in t.logged_metrics.items() if k.startswith("val/")}
    assert 0 < found["val/completions/mean_length"] <= found["val/longest"] <= 8
    assert 0 < found["val/pass@1"] <= found["val/pass@4"] <= 1


def test_names_of_ours_and_metrics_of_many_numbers_are_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"metrics has 'pass@1', a name of ours; take another, e.g. 'my/pass@1'"
    ):
        rollout(validation=sampled(**{"pass@1": PassAtK(1)}))

    class Both(MeanMetric):
        def update(self, lengths):
            super().update(lengths)

        def compute(self):
            return torch.zeros(2)

    t = trainer(tmp_path, rollout(validation=sampled(both=Both())))
    with pytest.raises(ConfigError, match=r"'both' \(Both\) does not compute one number"):
        t.validate(module(folder), data(validation_split=4))


def test_from_yaml(folder, tmp_path):
    metric = {"class_path": "grpo_lightning.callbacks.PassAtK", "init_args": {"k": 2}}
    validation = {"num_generations": 2, "sampling": {"max_tokens": 8}, "metrics": {"pass@2": metric}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"rollout": {"validation": validation}}))
    command = [sys.executable, "-m", "grpo_lightning", "validate", "--config", "configs/quickstart.yaml"]
    command += ["--config", str(tmp_path / "own.yaml"), "--model.model_name", folder]
    command += ["--trainer.limit_val_batches", "1", "--trainer.default_root_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "val/pass@2" in done.stdout
