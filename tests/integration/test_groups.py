"""Rewards beside decoding, and prompts that stand in for groups without signal."""

import threading

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, vowels, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from grpo_lightning import PromptDataModule
from grpo_lightning.data.encode import EncodedPrompt
from grpo_lightning.data.loader import PromptLoader
from grpo_lightning.engines import HFEngine
from grpo_lightning.errors import ConfigError, RewardError


def fit(folder, root, *callbacks, steps=3, rows=None, ckpt_path=None, **options):
    m = module(folder)
    datamodule = data() if rows is None else PromptDataModule(rows, prompts_per_rollout=4, seed=5)
    trainer(root, rollout(**options), *callbacks, max_steps=steps).fit(m, datamodule, ckpt_path=ckpt_path)
    return weights(m)


def test_overlap_changes_nothing_but_the_calls(model_folder, tmp_path):
    calls = []

    def counted(completions, prompts, **_):
        calls.append((len(completions), len(set(prompts)), threading.current_thread().name))
        return vowels(completions)

    whole = fit(model_folder, tmp_path / "whole", reward_funcs=[counted])
    assert {c[0] for c in calls} == {16}
    calls.clear()
    by_group = fit(model_folder, tmp_path / "groups", reward_funcs=[counted], overlap_rewards=True)
    assert same_bits(whole, by_group)
    assert {c[:2] for c in calls} == {(4, 1)}
    assert all(c[2].startswith("rewards") for c in calls)
    for name in ("reward", "rewards/counted/mean", "reward_std", "completions/mean_length"):
        a, b = ([r[name] for r in rows_of(tmp_path / run)] for run in ("whole", "groups"))
        assert a == b


class OneByOneEngine(HFEngine):
    """Ends its groups one by one; with `asked`, each once the rewards of the one before were called."""

    def __init__(self, asked=None):
        super().__init__()
        self.asked = asked

    def session(self, sampling):
        return OneByOne(self, sampling)


class OneByOne:
    def __init__(self, engine, sampling):
        self.engine, self.sampling, self.waiting, self.ended = engine, sampling, [], 0

    @property
    def busy(self):
        return bool(self.waiting)

    def add(self, requests):
        self.waiting += requests

    def step(self):
        if self.ended and self.engine.asked is not None:
            assert self.engine.asked.acquire(timeout=60), "no reward was called while a group was decoded"
        self.ended += 1
        request = self.waiting.pop()
        return [(request, self.engine.generate([request], self.sampling)[0])]

    def abort(self):
        self.waiting.clear()


def test_rewards_run_while_other_groups_are_decoded(model_folder, tmp_path):
    asked = threading.Semaphore(0)

    def signals(completions, **_):
        asked.release()
        return vowels(completions)

    options = {"reward_funcs": [signals], "overlap_rewards": True, "steps": 1}
    first = fit(model_folder, tmp_path / "a", **options)
    asked = threading.Semaphore(0)
    second = fit(model_folder, tmp_path / "b", engine=OneByOneEngine(asked), **options)
    assert first.keys() == second.keys()
    for k in first:
        torch.testing.assert_close(first[k], second[k], atol=1e-4, rtol=0)


def picky(prompts, completions, **_):
    """Only prompts with an even number say anything."""
    number = [int(p.rsplit(" ", 1)[1].split("\n")[0]) for p in prompts]
    return [len(c) if n % 2 == 0 else 1.0 for n, c in zip(number, completions, strict=True)]


EVENS = [{"prompt": f"say {i}"} for i in range(40)]


def test_groups_without_signal_are_replaced(model_folder, tmp_path):
    plain = tmp_path / "plain"
    fit(model_folder, plain, reward_funcs=[picky], rows=EVENS)
    fit(model_folder, tmp_path / "dynamic", reward_funcs=[picky], rows=EVENS, dynamic_sampling=4)

    def dead(root):
        return [float(r["frac_reward_zero_std"]) for r in rows_of(root) if r["reward"]]

    replaced = [float(r["rollout/replaced_groups"]) for r in rows_of(tmp_path / "dynamic") if r["reward"]]
    assert sum(dead(plain)) > 1.0
    assert sum(dead(tmp_path / "dynamic")) < 0.5 * sum(dead(plain))
    assert sum(replaced) >= 4 * (sum(dead(plain)) - sum(dead(tmp_path / "dynamic")))


def test_replacement_is_bounded(model_folder, tmp_path):
    calls = []

    def never(completions, **_):
        calls.append(len(completions))
        return [0.0] * len(completions)

    fit(model_folder, tmp_path, reward_funcs=[never], rows=EVENS, dynamic_sampling=2, steps=1)
    assert calls == [4] * 4 * 3
    (row,) = [r for r in rows_of(tmp_path) if r["reward"]]
    assert float(row["rollout/replaced_groups"]) == 8
    assert float(row["frac_reward_zero_std"]) == 1.0


TAKEN = {}


@pytest.mark.parametrize("engine", [HFEngine, OneByOneEngine])
def test_a_rollout_does_not_depend_on_which_group_ends_first(model_folder, tmp_path, engine):
    options = {
        "reward_funcs": [picky],
        "rows": EVENS,
        "dynamic_sampling": 3,
        "record_to": str(tmp_path / "r"),
    }
    fit(model_folder, tmp_path / "run", steps=2, engine=engine(), **options)
    import pyarrow.parquet as pq

    rows = [row for f in sorted((tmp_path / "r").glob("*.parquet")) for row in pq.read_table(f).to_pylist()]
    prompts = [(r["rollout_index"], r["uid"], r["sample"]) for r in rows]
    assert prompts == sorted(set(prompts), key=prompts.index)
    taken = [tuple(r["prompt_ids"]) for r in rows]
    TAKEN[engine] = taken
    assert len(set(map(tuple, TAKEN.values()))) == 1


def test_a_resumed_run_is_the_run(model_folder, tmp_path):
    options = {"reward_funcs": [picky], "rows": EVENS, "dynamic_sampling": 3, "updates_per_rollout": 2}
    saver = ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(model_folder, tmp_path / "a", saver, steps=4, **options)
    for step in (1, 2):
        ckpt = str(tmp_path / "a" / f"step={step}.ckpt")
        resumed = fit(model_folder, tmp_path / f"b{step}", steps=4, ckpt_path=ckpt, **options)
        assert same_bits(whole, resumed)


def test_a_failing_reward_stops_the_run_and_says_so(model_folder, tmp_path):
    def broken(completions, **_):
        raise KeyError("gold")

    with pytest.raises(RewardError, match="'broken' raised KeyError: 'gold'"):
        fit(model_folder, tmp_path, reward_funcs=[broken], overlap_rewards=True)


def test_spares_are_a_function_of_seed_and_rollout():
    def prompts(n):
        return [EncodedPrompt(prompt=str(i), prompt_ids=[i], columns={}, uid=i) for i in range(n)]

    def batches(**options):
        loader = PromptLoader(prompts(40), prompts_per_rollout=4, spares=3, **options)
        return [b for _, b in zip(range(12), loader, strict=False)]

    first, again, plain = batches(), batches(), PromptLoader(prompts(40), prompts_per_rollout=4)
    assert [[s.uids for s in b.spares] for b in first] == [[s.uids for s in b.spares] for b in again]
    assert [b.uids for b in first[:10]] == [b.uids for _, b in zip(range(10), plain, strict=False)]
    for batch in first:
        spares = [uid for s in batch.spares for uid in s.uids]
        assert len(set(spares)) == len(spares) == 12
        assert not set(spares) & set(batch.uids)
        assert {s.rollout_index for s in batch.spares} == {batch.rollout_index}
    assert first[0].spares[0].uids != first[1].spares[0].uids
    ranks = [batches(rank=r, world_size=2) for r in range(2)]
    for a, b, whole in zip(*ranks, first, strict=True):
        for x, y, z in zip(a.spares, b.spares, whole.spares, strict=True):
            assert x.uids + y.uids == z.uids
    few = PromptLoader(prompts(7), prompts_per_rollout=4, spares=3)
    assert next(iter(few)).spares == []  # 3 others are fewer than one for each


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout.dynamic_sampling is -1; it must be at least 0"):
        rollout(dynamic_sampling=-1)
