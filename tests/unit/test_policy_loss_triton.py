"""The loss kernel against its twin in fp64; under Triton's interpreter where there is no GPU."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from losses import REQUIRED, assert_as_twin, micro_batch

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    RECIPES,
    SURROGATES,
    CorrectionConfig,
    LossConfig,
    fused,
    register_surrogate,
)
from grpo_lightning.losses.corrections import LEVELS, MODES
from grpo_lightning.metrics.reduce import combine, values

kernel = pytest.importorskip("grpo_lightning.losses.fused.launch_triton", reason="Triton is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COVERED = [name for name in SURROGATES if name in kernel.SURROGATE_RULES]


@pytest.fixture(autouse=True)
def poisoned():
    """Outputs are full of NaN before they are written: torch fills what it leaves empty in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(**changes):
    made = micro_batch(**changes)
    return {k: x.to(DEVICE) for k, x in made.items()}


@pytest.mark.parametrize("name", [n for n in RECIPES if RECIPES[n].surrogate in COVERED])
def test_recipes(name):
    """As published, then with everything on; levels, estimators and corrections are drawn."""
    required = REQUIRED.get(name, {})
    got = assert_as_twin(LossConfig(name, **required), **case())
    assert got.dlogprobs.abs().max() > 0
    draw = random.Random(name)
    for _ in range(2):
        surrogate = SURROGATES[RECIPES[name].surrogate]
        levels = [x for x in LEVELS if LEVELS[x].per_token or not surrogate.folds_correction]
        mode, low, high = draw.choice(sorted(MODES)), draw.choice((None, 0.7)), draw.choice((1.4, 3.0))
        config = LossConfig(
            name,
            ratio_level=draw.choice(surrogate.levels),
            kl_coef=0.04,
            kl_estimator=draw.choice(sorted(KL_ESTIMATORS)),
            entropy_coef=0.01,
            correction=CorrectionConfig(level=draw.choice(levels), mode=mode, low=low, high=high),
            **required,
        )
        assert_as_twin(config, **case(seed=draw.randrange(9)), kl_coef=0.3, entropy_coef=0.2)


def of_tokens(made):
    """Returns the case with an advantage for each token."""
    b = made["batch"]
    own = torch.randn(len(b.target_ids), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {**made, "batch": replace(b, advantages=own, token_advantages=True)}


@pytest.mark.parametrize("name", [n for n in RECIPES if RECIPES[n].surrogate in COVERED])
def test_advantages_of_tokens_or_a_refusal(name):
    """A loss of whole completions has no use for several advantages in one."""
    config, made = LossConfig(name, **REQUIRED.get(name, {}), off_policy_threshold=0.1), of_tokens(case())
    reason = config.resolve().needs_completion_advantages
    assert (reason is not None) == (name in {"gspo", "luspo", "vespo", "gmpo"})
    if reason is None:
        assert_as_twin(config, **made)
    else:
        with pytest.raises(ConfigError, match="one advantage for each completion"):
            fused.policy_loss_grad(made["logprobs"], made["batch"], config, made["entropy"], backend="triton")


PAIRS = [(s, level) for s in COVERED for level in SURROGATES[s].levels]


@pytest.mark.parametrize(("surrogate", "level"), PAIRS)
@pytest.mark.parametrize("clip", [0.1, 0.4])
def test_surrogates_and_levels(surrogate, level, clip):
    required = dict.fromkeys(SURROGATES[surrogate].required, 0.1)
    config = LossConfig(
        "grpo", surrogate=surrogate, ratio_level=level, kl_coef=0.1, clip_low=clip, clip_high=clip,
        dppo_low=clip, dppo_high=clip, log_clip_low=clip, log_clip_high=clip,
        **{k: v for k, v in required.items() if "dppo" not in k},
    )  # fmt: skip
    assert_as_twin(config, **case())


DIVERGENCES = [
    (k, c) for k in KL_ESTIMATORS for c in (False, True) if c or not KL_ESTIMATORS[k].needs_correction
]


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize(("estimator", "corrected"), DIVERGENCES)
def test_divergences(level, estimator, corrected):
    changes = {"kl_estimator": estimator, "kl_bias_correction": corrected, "kl_coef": 0.1}
    assert_as_twin(LossConfig("grpo", ratio_level=level, **changes), **case())


CORRECTIONS = [
    (name, level, mode)
    for name in ("dapo", "gspo", "vespo")  # vespo takes none of a whole completion
    for level in LEVELS
    for mode in MODES
    if name != "vespo" or mode == "off" or LEVELS[level].per_token
]


@pytest.mark.parametrize(("name", "level", "mode"), CORRECTIONS)
def test_corrections(name, level, mode):
    correction = CorrectionConfig(level=level, mode=mode, low=0.7, high=1.6)
    config = LossConfig(name, correction=correction, clip_low=0.2, clip_high=0.2)
    made = case()
    assert_as_twin(config, **made)
    odd = made["batch"].sampler_logprobs.clone()
    odd[::3], odd[1::5], odd[2::7] = torch.nan, -torch.inf, torch.inf
    assert_as_twin(config, **{**made, "batch": replace(made["batch"], sampler_logprobs=odd)})


@pytest.mark.parametrize("name", ["dapo", "gspo", "gmpo"])
def test_what_an_engine_may_leave_out(name):
    made = case()
    for changes in (
        {"sampler_logprobs": None},
        {"old_logprobs": None},
        {"sampler_logprobs": None, "old_logprobs": None, "selected": None, "entropy_keep": None},
        {"sampler_logprobs": torch.full_like(made["logprobs"], torch.nan)},
    ):
        assert_as_twin(LossConfig(name), **{**made, "batch": replace(made["batch"], **changes)})


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_aggregations(aggregation, level):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_as_twin(LossConfig("grpo", aggregation=aggregation, ratio_level=level), **case())


OPTIONS = {
    "bypass": {"correction": CorrectionConfig(bypass=True)},
    "off-policy": {"off_policy_threshold": 0.05},
    "off-policy, bypass": {"off_policy_threshold": 0.05, "correction": CorrectionConfig(bypass=True)},
    "top entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "dual clip": {"dual_clip": 1.3, "clip_low": 0.1, "clip_high": 0.1},
    "KL in the reward": {"kl_coef": 0.1, "kl_in": "reward"},
    "integers": {"kl_coef": 1, "entropy_coef": 1, "sapo_tau_pos": 2, "cispo_weight_max": 1, "clip_low": 0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["dapo", "gspo", "vespo"])
def test_options(options, name):
    assert_as_twin(LossConfig(name, **options), **case())


def test_the_bonus_is_over_all_tokens_where_none_is_left_out():
    made = case()
    b = replace(made["batch"], entropy_keep=None)
    assert_as_twin(LossConfig("dapo", entropy_coef=0.1), **{**made, "batch": b})


BLOCK = kernel.BLOCK
SIZES = [(0, 1, 2, 0), (BLOCK - 1, BLOCK, BLOCK + 1, 0), (2 * BLOCK + 37, 0, 0, 1), (0, 0, 0, 0, 0, 5, 1, 0)]


@pytest.mark.parametrize("lengths", SIZES, ids=str)
@pytest.mark.parametrize("name", ["dapo", "gspo", "gmpo"])
def test_lengths(lengths, name):
    made = case(lengths=lengths, spread=0.02)
    assert_as_twin(LossConfig(name, kl_coef=0.1, entropy_coef=0.1, clip_low=0.01, clip_high=0.01), **made)


@pytest.mark.parametrize("lengths", [(), (0, 0, 0, 0)])
def test_nothing_to_train(lengths):
    got = assert_as_twin(LossConfig("gspo", kl_coef=0.1, entropy_coef=0.1), **case(lengths=lengths))
    assert got.loss == 0


@pytest.mark.parametrize("name", ["dapo", "gspo", "gmpo", "vespo", "cispo", "sapo", "dro"])
def test_log_ratios_beyond_the_clamp(name):
    made = case(lengths=(1, 6, 3, 2))
    b, logprobs = made["batch"], made["logprobs"].clone()
    n = len(logprobs)
    logprobs[: n // 2] = (logprobs[: n // 2] * 8).round() / 8
    old = b.old_logprobs.clone()
    old[:5] = logprobs[:5] + torch.tensor([20.0, -20.0, 25.0, -25.0, 20.5], device=DEVICE)  # at it: a slope
    ref = b.ref_logprobs.clone()
    ref[:4] = logprobs[:4] + torch.tensor([0.0, 0.0, 2.0, -30.0], device=DEVICE)
    b = replace(b, old_logprobs=old, ref_logprobs=ref, sampler_logprobs=None)
    for level in LossConfig(name, dro_coef=1.0).surrogate_row.levels:
        config = LossConfig(name, dro_coef=1.0, ratio_level=level, kl_coef=1e-6, aggregation="sequence_mean")
        assert_as_twin(config, **{**made, "batch": b, "logprobs": logprobs})


def test_a_small_divergence_keeps_its_digits():
    made = case(spread=1e-4)
    got = fused.policy_loss_grad(
        made["logprobs"], made["batch"], LossConfig("grpo", kl_coef=1.0, kl_bias_correction=False),
        backend="triton",
    )  # fmt: skip
    x = made["batch"].ref_logprobs.double() - made["logprobs"].double()
    assert values(got.stats)["kl"] == pytest.approx((torch.expm1(x) - x).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in RECIPES if RECIPES[n].surrogate in COVERED])
def test_without_movement_every_token_is_pushed_by_its_advantage(name):
    if not SURROGATES[RECIPES[name].surrogate].still_at_zero:
        pytest.skip("moves without signal")
    made = case()
    b, logprobs = made["batch"], made["logprobs"]
    b = replace(b, old_logprobs=None, sampler_logprobs=None, selected=torch.zeros_like(b.selected))
    b = replace(b, advantages=b.advantages * b.sequence_ids.remainder(3))
    config = LossConfig(name, **REQUIRED.get(name, {}))
    got = assert_as_twin(config, b, logprobs, None)
    still = b.advantages == 0
    assert still.any()
    assert (got.dlogprobs[still] == 0).all()
    signs = -b.advantages.sign()
    assert torch.equal(got.dlogprobs.sign(), signs)


def test_a_loss_that_is_not_a_number_stays_so():
    made = case()
    made["logprobs"][3] = torch.nan
    for name in ("dapo", "gspo", "cispo", "gmpo", "vespo", "dppo_tv"):
        got = fused.policy_loss_grad(made["logprobs"], made["batch"], LossConfig(name), backend="triton")
        assert got.loss.isnan(), name
        assert "loss" not in values(got.stats)


def test_parts_add_up():
    config = LossConfig("gspo", kl_coef=0.1, entropy_coef=0.1)
    made = case(lengths=(5, 0, 3, 2, 4, 1, 6, 2))
    whole = assert_as_twin(config, **made)
    parts = []
    for ids in (range(4), range(4, 8)):
        at = torch.isin(made["batch"].sequence_ids, torch.tensor(list(ids), device=DEVICE))
        part = made["batch"].take(list(ids))
        parts.append(
            fused.policy_loss_grad(made["logprobs"][at], part, config, made["entropy"][at], backend="triton")
        )
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat([p.dlogprobs for p in parts]), whole.dlogprobs)
    together = values(combine(p.stats for p in parts))
    for name, value in values(whole.stats).items():
        assert together[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_the_loss_is_attached():
    made = case()
    config = LossConfig("gspo", entropy_coef=0.1)
    logprobs, entropy = made["logprobs"].requires_grad_(), made["entropy"].requires_grad_()
    out = fused.policy_loss(logprobs, made["batch"], config, entropy, backend="triton")
    (3 * out.loss).backward()
    want = fused.policy_loss_grad(logprobs, made["batch"], config, entropy, backend="triton")
    torch.testing.assert_close(logprobs.grad, 3 * want.dlogprobs)
    torch.testing.assert_close(entropy.grad, 3 * want.dentropy)


def test_strided_vectors_and_slices():
    made = case()
    twice = {k: torch.stack([made[k]] * 2, 1)[:, 0] for k in ("logprobs", "entropy")}
    assert not twice["logprobs"].is_contiguous()
    assert_as_twin(LossConfig("gspo", entropy_coef=0.1), **{**made, **twice})
    later = {k: torch.cat([made[k][:1], made[k]])[1:] for k in ("logprobs", "entropy")}
    assert kernel._plain(later["entropy"]).data_ptr() % 16 == 0 != later["entropy"].data_ptr() % 16
    assert_as_twin(LossConfig("gspo", entropy_coef=0.1), **{**made, **later})


def test_what_is_not_covered_runs_in_torch_and_says_so_once():
    made = case()

    @register_surrogate("thrice")
    def thrice(advantages, logprobs):
        return -3 * advantages * logprobs

    try:
        with pytest.warns(UserWarning, match="does not cover surrogate 'thrice'"):
            assert_as_twin(LossConfig("dapo", surrogate="thrice"), covered=False, **made)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_as_twin(LossConfig("dapo", surrogate="thrice"), covered=False, **made)
    finally:
        del SURROGATES["thrice"]
    assert "surrogate 'real'" in kernel.why_not(LossConfig("real").resolve())
    assert kernel.why_not(LossConfig("dapo").resolve()) is None
    with pytest.warns(UserWarning, match=r"log-probabilities in torch\.float64"):
        fused.policy_loss_grad(made["logprobs"].double(), made["batch"], LossConfig("dapo"), backend="triton")


def test_a_surrogate_put_in_place_of_the_librarys_is_not_covered(monkeypatch):
    mine = replace(SURROGATES["ppo_clip"], function=lambda ratio: ratio, wants=("ratio",))
    monkeypatch.setitem(SURROGATES, "ppo_clip", mine)
    assert "not the library's own" in kernel.why_not(LossConfig("dapo").resolve())


def test_what_is_missing_is_named_by_the_twin():
    made = case()
    for config, missing, match in (
        (LossConfig("clip_cov"), "selected", "selection"),
        (LossConfig("dapo", kl_coef=0.1), "ref_logprobs", "carries no ref_logprobs"),
        (LossConfig("dapo", top_entropy_quantile=0.5), "entropy_keep", "old entropies"),
    ):
        b = replace(made["batch"], **{missing: None})
        with pytest.raises(ValueError, match=match):
            fused.policy_loss_grad(made["logprobs"], b, config, backend="triton")
    with pytest.raises(ValueError, match="no entropy was given"):
        fused.policy_loss_grad(
            made["logprobs"], made["batch"], LossConfig("dapo", entropy_coef=1.0), backend="triton"
        )


def test_all_that_the_tables_hold_is_covered():
    """Or stands here: a new row says which."""
    assert set(SURROGATES) - set(kernel.SURROGATE_RULES) <= {"real", "fipo", "thrice", "twice"}
    assert set(kernel.LEVELS) == set(RATIO_LEVELS)
    assert set(kernel.ESTIMATORS) == set(KL_ESTIMATORS)
    assert set(kernel.SPANS) == set(LEVELS)
    assert set(kernel.MODES) == set(MODES)


def test_nobody_watches_a_launch(monkeypatch):
    """Triton 3.6 fails to tell a watcher, and vLLM is one, about a kernel that takes functions."""
    from triton import knobs

    def watcher(**kwargs):
        raise AssertionError("told")

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", watcher)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", watcher)
    seen, launch = [], kernel.loss_kernel

    class Launch:
        def __getitem__(self, grid):
            seen.append((knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook))
            return launch[grid]

    monkeypatch.setattr(kernel, "loss_kernel", Launch())
    assert_as_twin(LossConfig("dapo"), **case())
    assert seen == [(None, None)]
    assert knobs.runtime.jit_post_compile_hook is watcher
