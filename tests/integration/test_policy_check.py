"""The alarm ends no healthy run, and misses no sick one: whole fits with engines of both kinds."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from models import TINY
from sick import SICKNESSES, OtherKernels, Sick, Stale
from tiny import tiny_tokenizer

from grpo_lightning import SamplingParams
from grpo_lightning.callbacks import policy_check
from grpo_lightning.engines import HFEngine
from grpo_lightning.errors import EngineError, GRPOError
from grpo_lightning.policy.rounding import random_rounding
from grpo_lightning.policy.verification import Distances

PRECISIONS = ("32-true", "bf16-true")


def adamw(lr):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def save(folder, family, **changes):
    """A tiny random model of `family`, with as many heads for keys as for queries."""
    import transformers

    torch.manual_seed(0)
    settings = {**TINY, "num_key_value_heads": 4, "num_hidden_layers": 3, "tie_word_embeddings": True}
    settings |= {"eos_token_id": [1, *range(30, 47)], **changes}
    config = getattr(transformers, f"{family}Config")(**settings)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: save(tmp_path_factory.mktemp(family), family) for family in ("Llama", "Qwen2")}
    # logits of 30 and more, which bf16 keeps to an eighth: an unlikely token is far off by rounding alone
    made["sharp"] = save(tmp_path_factory.mktemp("sharp"), "Llama", initializer_range=0.5)
    made["sure"] = save(tmp_path_factory.mktemp("sure"), "Llama", initializer_range=1.0)
    return made


@pytest.fixture
def examined(monkeypatch):
    """Every step is examined; what was found."""
    monkeypatch.setattr(policy_check, "EVERY", 1)
    found, judge = [], policy_check.judge
    monkeypatch.setattr(policy_check, "judge", lambda d: found.append(judge(d)) or found[-1])
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sickness", SICKNESSES)
def test_a_sick_engine_is_caught_at_its_first_rollout(folders, tmp_path, sickness, precision):
    m = module(folders["Llama"])
    t = trainer(tmp_path, rollout(engine=Sick(SICKNESSES[sickness], 3)), max_steps=5, precision=precision)
    with pytest.raises(EngineError, match=r"Sick does not sample .* another sync does not help"):
        t.fit(m, data())
    assert t.global_step == 3


def test_a_policy_twenty_versions_old_is_caught_as_soon_as_it_is(folders, tmp_path):
    m = module(folders["Llama"], optimizer=adamw(2e-4))
    t = trainer(tmp_path, rollout(engine=Stale(20)), max_steps=25)
    with pytest.raises(EngineError, match="Stale does not sample"):
        t.fit(m, data())
    assert t.global_step == 20


REWARDS = {
    "vowels": lambda completions, **_: [sum(c in "aeiou" for c in text) / 8 for text in completions],
    "one live group": lambda completions, prompts, **_: [
        len(c) * ("say 1" in str(p)) for c, p in zip(completions, prompts, strict=True)
    ],
}
HEALTHY = {
    "small rate": ("Llama", 2e-4, "vowels", {}),
    "large rate": ("Qwen2", 1e-3, "vowels", {}),
    "larger rate": ("Llama", 1e-2, "vowels", {}),
    "one live group": ("Qwen2", 1e-2, "one live group", {}),
    "sharply peaked": ("sharp", 1e-3, "vowels", {}),
    "sharper still": ("sharp", 1e-3, "one live group", {"temperature": 0.3}),
    "temperature": ("Llama", 1e-2, "vowels", {"temperature": 0.7}),
    "top_p": ("Qwen2", 1e-3, "vowels", {"top_p": 0.8}),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_goes_on(folders, tmp_path, examined, case, precision):
    family, rate, reward, sampling = HEALTHY[case]
    settings = {"reward_funcs": [REWARDS[reward]], "sampling": SamplingParams(max_tokens=8, **sampling)}
    t = trainer(tmp_path, rollout(engine=OtherKernels(), **settings), max_steps=8, precision=precision)
    t.fit(module(folders[family], optimizer=adamw(rate)), data())
    assert t.global_step == 8
    assert len(examined) >= 4
    assert not any(v.apart for v in examined)


def test_the_mean_distance_of_a_sure_policy_is_no_measure(folders, tmp_path, examined):
    """0.2 nats ended such a run once."""
    settings = {"sampling": SamplingParams(max_tokens=8, temperature=0.2), "engine": OtherKernels()}
    t = trainer(tmp_path, rollout(**settings), max_steps=4, precision="bf16-true")
    t.fit(module(folders["sure"], optimizer=adamw(1e-3)), data())
    assert t.global_step == 4
    assert max(float(r["sampling/parity_mean"]) for r in rows_of(tmp_path) if r["loss"]) > 0.2


class Liar(HFEngine):
    """Samples well and misreports what it sampled from, as long as it is `lying`."""

    lying = True

    def generate(self, requests, sampling):
        from dataclasses import replace

        return [
            [replace(c, logprobs=[p - 0.3 * self.lying for p in c.logprobs]) for c in group]
            for group in super().generate(requests, sampling)
        ]


class Honest(Liar):
    """Tells the truth once it was synced a second time at one version."""

    def sync(self, source, version):
        self.lying = version != self.policy_version
        super().sync(source, version)


def test_the_run_stops_before_a_weight_changes_with_all_numbers(folders, tmp_path):
    m = module(folders["Llama"])
    t = trainer(tmp_path, rollout(engine=Liar()), max_steps=2)
    numbers = (
        r"KL\(engine \|\| trainer\) is 0\.04\d+ nats a token, KL\(engine \|\| model as loaded\) 0\.04\d+, "
        r"after another sync 0\.04\d+, so another sync does not help; rounding explains 1e-06"
    )
    with pytest.raises(EngineError, match=numbers):
        t.fit(m, data())
    assert t.global_step == 0
    fresh = module(folders["Llama"])
    fresh.configure_model()
    assert same_bits(weights(m), weights(fresh))


def test_a_sync_that_had_not_arrived_is_told_apart(folders, tmp_path):
    with pytest.raises(EngineError, match=r"so the last one had not arrived"):
        trainer(tmp_path, rollout(engine=Honest()), max_steps=2).fit(module(folders["Llama"]), data())


def test_a_run_may_go_on_with_a_warning(folders, tmp_path):
    t = trainer(tmp_path, rollout(engine=Liar(), on_policy_mismatch="warn"), max_steps=2)
    with pytest.warns(UserWarning, match="Liar does not sample"):
        t.fit(module(folders["Llama"]), data())
    assert t.global_step == 2


def test_kernels_that_compute_something_else_are_named(folders, tmp_path, monkeypatch):
    from grpo_lightning import GRPOModule
    from grpo_lightning.policy.policy import Policy

    stock = Policy.logprobs

    def off(self, batch, **options):
        found = stock(self, batch, **options)
        return found._replace(logprobs=found.logprobs * 1.1)

    monkeypatch.setattr(Policy, "logprobs", off)
    monkeypatch.setattr(GRPOModule, "_verify", lambda self, rollout: None)
    monkeypatch.setattr("grpo_lightning.modules.policy_module.settle_forward", lambda policy: None)
    t = trainer(tmp_path, rollout(), max_steps=2)
    with pytest.raises(GRPOError, match=r"the packed forward computes something else .* Kernels: none"):
        t.fit(module(folders["Llama"]), data())
    assert t.global_step == 0


def sums_of(engine, stock, between, rounding, n=32):
    columns = (torch.full((n,), x, dtype=torch.float64) for x in (10.0, engine, stock, between, rounding))
    return Distances(*columns)


@pytest.mark.parametrize(
    ("sums", "apart"),
    [
        ((0.01, 0.01, 0.01, 0.01), set()),
        ((0.03, 0.03, 0.0, 0.01), set()),
        ((0.1, 0.1, 0.01, 0.01), {"engine_trainer", "engine_stock"}),
        ((0.1, 0.01, 0.1, 0.01), {"engine_trainer", "trainer_stock"}),
        (
            (1e-6, 1e-6, 0.0, 1e-12),
            set(),
        ),  # a ten-millionth of a nat a token is nothing, whatever rounding is
    ],
)
def test_the_table_of_verdicts(sums, apart):
    assert policy_check.judge(sums_of(*sums)).apart == apart


@pytest.mark.parametrize(("loud", "apart"), [(2, False), (3, True)])
def test_two_completions_alone_convict_nobody(loud, apart):
    found = sums_of(0.01, 0.01, 0.01, 0.01)
    for sums in (found.engine_trainer, found.engine_stock):
        sums[:loud] = 20.0
    assert bool(policy_check.judge(found).apart) == apart


def test_healthy_steps_are_examined_seldom_and_nothing_is_said(folders, tmp_path, monkeypatch):
    calls, judge = [], policy_check.judge
    monkeypatch.setattr(policy_check, "judge", lambda d: calls.append(1) or judge(d))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounding explains it.*")
        t = trainer(tmp_path, rollout(), max_steps=12)
        t.fit(module(folders["Llama"], optimizer=adamw(1e-3)), data())
    assert len(calls) == 1


@pytest.mark.parametrize("masked", ["all", "masked"])
def test_all_ranks_stop_for_one(folders, tmp_path, masked):
    """Rank 1's engine is sick; rank 0 has a sound one, or no token at all."""
    script = Path(__file__).with_name("ddp_check.py")
    command = [sys.executable, str(script), folders["Llama"], str(tmp_path), masked]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    ends = [Path(tmp_path, rank).read_text() for rank in "01"]
    assert done.returncode == 0, done.stderr[-2000:]
    assert ends[0] == ends[1]
    assert ends[0].startswith("2 Sick does not sample")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_rounding_is_uniform_and_repeats(dtype):
    def noise(seed):
        x = torch.ones(199, 301, dtype=dtype)
        module = torch.nn.Linear(1, 1)
        module.forward = lambda _: x
        decoder = torch.nn.Sequential(module)
        with random_rounding(decoder, 0.5, seed):
            return (decoder(x).double() - 1) / 0.5

    u = noise(1)
    assert u.abs().max() <= 0.5
    assert abs(u.mean()) < 0.01
    assert u.var() == pytest.approx(1 / 12, rel=0.03)
    assert torch.equal(u, noise(1))
    assert not torch.equal(u, noise(2))
