"""Fits that cut their optimizer steps differently: the same weights, less work, and nothing hidden."""

import pytest
import torch
from fits import data, long, module, rollout, rows_of, same_bits, sgd, trainer, vowels, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from grpo_lightning.errors import ConfigError, OutOfMemory
from grpo_lightning.losses import LossConfig
from grpo_lightning.rollout import micro_batch_sizing as memory

LOSSES = [
    {"name": "dapo"},
    {"name": "grpo", "kl_coef": 0.05},
    {"name": "real"},
    {"name": "clip_cov", "cov_frac": 0.2, "cov_low": -0.5},
]


class Parts(Callback):
    """Keeps which micro-batches of each optimizer step held tokens."""

    def __init__(self):
        self.filled: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.filled.append(bool(len(batch.rollout.target_ids)))

    def counts(self, k):
        return [sum(self.filled[i : i + k]) for i in range(0, len(self.filled), k)]


def fit(folder, root, micro_batches, loss, *callbacks, k=4, **changes):
    settings = {"max_steps": 2, "accumulate_grad_batches": k, **changes.pop("trainer", {})}
    r = rollout(num_generations=8, reward_funcs=[vowels, long], micro_batches=micro_batches, **changes)
    m = module(folder, loss=LossConfig(**loss), optimizer=sgd)
    trainer(root, r, *callbacks, **settings).fit(m, data())
    return weights(m)


def largest_difference(a, b):
    return max((a[n] - w).abs().max().item() for n, w in b.items())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["name"])
@pytest.mark.parametrize("updates", [1, 2])
def test_weights_and_metrics_do_not_depend_on_the_number(model_folder, tmp_path, loss, updates):
    found, rows = {}, {}
    for n in ("all", 1, 2):
        parts, root = Parts(), tmp_path / str(n)
        found[n] = fit(model_folder, root, n, loss, parts, updates_per_rollout=updates)
        rows[n] = [r for r in rows_of(root) if r["loss"]]
        if n != "all":
            assert parts.filled == ([False] * (4 - n) + [True] * n) * 2
    assert max(w.abs().max().item() for name, w in found["all"].items() if "lora_B" in name) > 1e-4
    for n in (1, 2):
        assert largest_difference(found[n], found["all"]) <= 1e-6
        for ours, theirs in zip(rows[n], rows["all"], strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                if "time" not in key and "per_second" not in key:
                    assert float(ours[key] or 0) == pytest.approx(float(theirs[key] or 0), abs=1e-4), key


def test_full_weights_and_several_passes(model_folder, tmp_path):
    """A head that trains, and a rollout used twice."""
    found = []
    for n in ("all", 1):
        m = module(model_folder, lora=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        r = rollout(micro_batches=n, num_iterations=2)
        trainer(tmp_path / str(n), r, max_steps=2, accumulate_grad_batches=4).fit(m, data())
        found.append(weights(m))
    assert largest_difference(*found) <= 1e-6


class Device(Parts):
    """A device whose memory is what the last micro-batch had to run; reads the batch as a callback."""

    def __init__(self, free):
        super().__init__()
        self.free, self.rows, self.begun = free, 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.rows = batch.rollout.num_tokens

    def begin(self):
        self.begun += 1

    def needed(self):
        return (1000 + self.rows) << 20

    def available(self):
        return self.free << 20


@pytest.mark.parametrize(("free", "expected"), [(100_000, [4, 1, 1, 1]), (1, [4, 4, 4, 4])])
def test_auto_learns_from_the_first_step(model_folder, tmp_path, monkeypatch, free, expected):
    device, settings = Device(free), {"trainer": {"max_steps": 4}}
    with monkeypatch.context() as m:
        m.setitem(memory.METERS, "cpu", lambda *_: device)
        ours = fit(model_folder, tmp_path / "auto", "auto", {"name": "dapo"}, device, **settings)
    assert device.counts(4) == expected
    assert device.begun == sum(expected)
    whole = fit(model_folder, tmp_path / "all", "all", {"name": "dapo"}, **settings)
    assert largest_difference(ours, whole) < 1e-5
    rows = [r for r in rows_of(tmp_path / "auto") if r["loss"]]
    peaks = [float(r["memory/peak_gib"]) for r in rows]
    predicted = [float(r["memory/predicted_gib"]) for r in rows]
    # The second step grows by four times before any two sizes are known; the third has seen its size.
    assert all(p >= m for p, m in zip(predicted[1:], peaks[1:], strict=True))
    assert all(p == pytest.approx(m, rel=0.2) for p, m in zip(predicted[2:], peaks[2:], strict=True))


def test_auto_is_all_without_a_meter_and_where_the_number_would_show(model_folder, tmp_path, monkeypatch):
    for name in ("dapo", "bnpo"):
        device = Device(100_000)
        whole = fit(model_folder, tmp_path / f"{name}-all", "all", {"name": name})
        if name == "bnpo":
            monkeypatch.setitem(memory.METERS, "cpu", lambda *_, device=device: device)
        assert same_bits(fit(model_folder, tmp_path / name, "auto", {"name": name}, device), whole)
        assert device.counts(4) == [4, 4]
        assert device.begun == 0


def test_bnpo_is_the_mean_over_micro_batches_with_tokens(model_folder, tmp_path):
    two_of_four = fit(model_folder, tmp_path / "4", 2, {"name": "bnpo"})
    two = fit(model_folder, tmp_path / "2", "all", {"name": "bnpo"}, k=2)
    four = fit(model_folder, tmp_path / "all", "all", {"name": "bnpo"})
    assert largest_difference(two_of_four, two) <= 1e-6
    assert largest_difference(four, two) > 1e-5


def test_bnpo_counts_the_tokens_of_dead_groups(model_folder, tmp_path, monkeypatch):
    from grpo_lightning.packing.batch import RolloutBatch

    def sparse(completions, prompts, **_):
        alive = ["say 1" not in str(p) for p in prompts]
        return [on * c.count("e") / 4 for c, on in zip(completions, alive, strict=True)]

    found = []
    for skip in (True, False):
        if not skip:
            monkeypatch.setattr(RolloutBatch, "zero_variance_groups", lambda self: set())
        m = module(model_folder, loss=LossConfig("bnpo"), optimizer=sgd)
        trainer(tmp_path / str(skip), rollout(reward_funcs=[sparse]), max_steps=2).fit(m, data())
        found.append(weights(m))
    assert same_bits(*found)


def test_more_than_there_are_is_refused_before_weights_are_loaded(model_folder, tmp_path):
    m = module(model_folder)
    t = trainer(tmp_path, rollout(micro_batches=5), accumulate_grad_batches=4)
    with pytest.raises(ConfigError, match=r"rollout\.micro_batches is 5; .*grad_batches is 4"):
        t.fit(m, data())
    assert m.policy is None
    with pytest.raises(ConfigError, match=r"rollout\.micro_batches is 'few'"):
        rollout(micro_batches="few")


def test_running_out_of_memory_is_not_hidden(model_folder, tmp_path, monkeypatch):
    class Full(Device):
        def on_before_backward(self, trainer, pl_module, loss):
            if self.counts(4) == [4, 1]:
                raise torch.OutOfMemoryError("no room")

    device = Full(100_000)
    monkeypatch.setitem(memory.METERS, "cpu", lambda *_: device)
    with pytest.raises(OutOfMemory, match="no room"):
        fit(model_folder, tmp_path, "auto", {"name": "dapo"}, device)


def test_resume_in_the_middle_of_a_rollout_is_bitwise(model_folder, tmp_path):
    def run(root, ckpt_path=None):
        m = module(model_folder, loss=LossConfig("dapo", kl_coef=0.02))
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        r = rollout(updates_per_rollout=2, micro_batches=2)
        t = trainer(root, r, saver, max_steps=4, accumulate_grad_batches=4)
        t.fit(m, data(), ckpt_path=ckpt_path)
        return weights(m)

    whole = run(tmp_path / "whole")
    for step in (1, 2, 3):
        assert same_bits(run(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt"), whole)


def test_auto_goes_on_in_the_middle_of_a_rollout(model_folder, tmp_path, monkeypatch):
    """A resumed run uses up the parts it was saved with, then learns anew; weights agree up to rounding."""

    def run(root, ckpt_path=None):
        device = Device(100_000)
        monkeypatch.setitem(memory.METERS, "cpu", lambda *_: device)
        m = module(model_folder, optimizer=sgd)
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"num_generations": 8, "reward_funcs": [vowels, long], "updates_per_rollout": 2}
        r = rollout(micro_batches="auto", **settings)
        t = trainer(root, r, saver, device, max_steps=6, accumulate_grad_batches=4)
        t.fit(m, data(), ckpt_path=ckpt_path)
        return weights(m), device.counts(4)

    whole, counts = run(tmp_path / "whole")
    assert counts == [4, 4, 1, 1, 1, 1]
    resumed, counts = run(tmp_path / "rest", tmp_path / "whole" / "step=3.ckpt")
    assert counts == [1, 1, 1]  # the saved part is seen before the next rollout is cut
    assert largest_difference(whole, resumed) < 1e-5
