"""What reward functions do to the process does not reach training, wherever they run."""

import os
import random
import time

import numpy as np
import pytest
import torch
from fits import data, module, rollout, same_bits, trainer, vowels, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from grpo_lightning.errors import RewardError


def reseeds(completions, prompts, **_):
    """Vowels, and everything that could go wrong beside them."""
    rewards = vowels(completions)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    os.environ.clear()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    prompts.clear()
    completions.clear()
    return rewards


def draws(completions, **_):
    """Its rewards hang on random numbers."""
    noise = [random.random(), np.random.rand(), torch.rand(1).item()]
    return [v + 0.01 * sum(noise) * random.random() for v in vowels(completions)]


class Draws:
    """Training draws random numbers as well: at the end, they tell whether anyone has moved them."""

    @staticmethod
    def after():
        return random.random(), np.random.rand(), torch.rand(1).item()


def fit(folder, root, *callbacks, steps=3, ckpt_path=None, validate=False, **options):
    m = module(folder)
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None} if validate else {}
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    t = trainer(root, rollout(**options), *callbacks, max_steps=steps, **settings)
    t.fit(m, data(validation_split=4) if validate else data(), ckpt_path=ckpt_path)
    return weights(m), Draws.after()


@pytest.mark.parametrize(
    "options", [{}, {"validate": True}, {"overlap_rewards": True}, {"reward_workers": 2}], ids=str
)
def test_a_vandal_changes_nothing(model_folder, tmp_path, options):
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    tame, wild = (
        fit(model_folder, tmp_path / name, reward_funcs=[f], **options)
        for name, f in (("tame", vowels), ("wild", reseeds))
    )
    assert same_bits(tame[0], wild[0])
    assert tame[1] == wild[1]
    assert (environment, dtype, torch.is_grad_enabled()) == (os.environ, torch.get_default_dtype(), True)


def test_a_run_whose_rewards_draw_random_numbers_resumes_as_it_was(model_folder, tmp_path):
    saver = ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = fit(model_folder, tmp_path / "a", saver, reward_funcs=[draws])
    again, _ = fit(model_folder, tmp_path / "b", reward_funcs=[draws])
    assert same_bits(whole, again)
    ckpt = str(tmp_path / "a" / "step=1.ckpt")
    resumed, _ = fit(model_folder, tmp_path / "c", reward_funcs=[draws], ckpt_path=ckpt)
    assert same_bits(whole, resumed)
    assert not same_bits(whole, fit(model_folder, tmp_path / "d", reward_funcs=[vowels])[0])


@pytest.mark.parametrize("options", [{}, {"overlap_rewards": True}], ids=str)
def test_a_reward_that_hangs_ends_the_run(model_folder, tmp_path, options):
    def hangs(completions, **_):
        time.sleep(1000)

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'hangs' did not return within .* 1 s"):
        fit(model_folder, tmp_path, reward_funcs=[hangs], reward_timeout_s=1.0, **options)
    assert time.monotonic() - began < 30


def test_workers_of_a_run_end_with_it(model_folder, tmp_path):
    callback = rollout(reward_funcs=["reward_cases.lengths"], reward_workers=2)
    pids = []

    class Look(ModelCheckpoint):
        def on_train_batch_end(self, *_):
            pids.extend(callback.rewards._workers.pids)

    t = trainer(tmp_path, callback, Look(tmp_path), max_steps=1)
    t.fit(module(model_folder), data())
    assert len(set(pids)) == 2
    assert None not in pids
    assert callback.rewards._workers.pids == [None, None]
