from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_rollout

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import (
    AGGREGATIONS,
    RATIO_LEVELS,
    RECIPES,
    SURROGATES,
    CorrectionConfig,
    LossConfig,
    policy_loss,
    register_surrogate,
)
from grpo_lightning.metrics.reduce import combine, values
from grpo_lightning.packing.batch import Normalizers, RolloutBatch
from grpo_lightning.types import Completion

REQUIRED = {"dro": {"dro_coef": 0.1}}
SPLIT_INVARIANT = [n for n, r in RECIPES.items() if AGGREGATIONS[r.aggregation].split_invariant]
PER_TOKEN = [n for n, r in RECIPES.items() if not SURROGATES[r.surrogate].whole_groups]


def recipe(name, **changes):
    return LossConfig(name, **{**REQUIRED.get(name, {}), **changes}).resolve()


def with_selection(b, seed=0):
    """A rollout with everything that some recipe asks of the window."""
    g = torch.Generator().manual_seed(seed)
    return replace(
        b,
        selected=torch.rand(len(b.target_ids), generator=g) < 0.2,
    )


OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.25], dtype=torch.float64)
RATIO = torch.tensor([1.0, 1.5, 0.5, 0.7, 1.25], dtype=torch.float64)
REF = torch.tensor([-1.2, -1.5, -1.0, -1.5, -0.5], dtype=torch.float64)


def fixture(lengths=(3, 2), groups=(0, 0), advantages=(1.0, -0.5), **changes):
    """Fixture F of losses.md."""
    b = RolloutBatch.pack(
        prompt_ids=[[7]] * (max(groups) + 1),
        completions=[Completion(token_ids=[5] * n) for n in lengths],
        group_ids=groups,
        advantages=torch.tensor(advantages),
        max_tokens=4,
    )
    return replace(b, old_logprobs=OLD[: sum(lengths)], **changes)


def value_and_grad(batch, config, logprobs=None, entropy=None):
    lp = (OLD + RATIO.log() if logprobs is None else logprobs).clone().requires_grad_()
    out = policy_loss(lp, batch, config, entropy)
    (grad,) = torch.autograd.grad(out.loss, lp)
    return out.loss.item(), grad, values(out.stats)


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)


GOLDEN = [  # losses.md G1, G2
    (LossConfig("grpo"), -0.19375, [-0.166667, 0, -0.083333, 0, 0.15625]),
    (LossConfig("bnpo"), -0.335, [-0.2, 0, -0.1, 0, 0.125]),
    (LossConfig("dr_grpo"), -0.209375, [-0.125, 0, -0.0625, 0, 0.078125]),
    (LossConfig("dapo"), -0.351, [-0.2, 0, -0.1, 0, 0.125]),
    (LossConfig("dapo", clip_high=0.2), -0.335, [-0.2, 0, -0.1, 0, 0.125]),
    (LossConfig("dapo", clip_high=0.2, aggregation="prompt_mean"), -0.335, [-0.2, 0, -0.1, 0, 0.125]),
    (LossConfig("grpo", ratio_level="sequence"), -0.22042656, [*[-0.151427] * 3, *[0.116927] * 2]),
    (LossConfig("grpo", ratio_level="sequence_token"), -0.22042656, [*[-0.151427] * 3, *[0.116927] * 2]),
    (
        LossConfig("grpo", ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),
        -0.20435515,
        [*[-0.151427] * 3, 0, 0],
    ),
    (
        LossConfig("grpo", ratio_level="sequence", aggregation="sequence_sum"),
        -0.89513327,
        [*[-0.454280] * 3, *[0.233854] * 2],
    ),
]


SELECTED = torch.tensor([False, False, False, True, False])  # the largest covariance of F
GOLDEN_OTHERS = [  # losses.md G3
    (LossConfig("gspo", clip_low=0.2, clip_high=0.2), -0.22042656, [*[-0.151427] * 3, *[0.116927] * 2]),
    (LossConfig("gspo_token", clip_low=0.2, clip_high=0.2), -0.22042656, [*[-0.151427] * 3, *[0.116927] * 2]),
    (LossConfig("gspo"), -0.20435515, [*[-0.151427] * 3, 0, 0]),
    (LossConfig("luspo", clip_low=0.2, clip_high=0.2), -0.89513327, [*[-0.454280] * 3, *[0.233854] * 2]),
    (LossConfig("luspo"), -0.86384044, [*[-0.454280] * 3, 0, 0]),
    (LossConfig("dapo", surrogate="reinforce"), 0.56918328, [*[-0.2] * 3, *[0.1] * 2]),
    (LossConfig("rloo"), 1.42295819, [*[-0.5] * 3, *[0.25] * 2]),
    (LossConfig("cispo"), 0.66435088, [-0.2, -0.3, -0.1, 0.07, 0.125]),
    (LossConfig("cispo", cispo_weight_max=1.2), 0.56881307, [-0.2, -0.24, -0.1, 0.07, 0.12]),
    (LossConfig("sapo"), -0.52993071, [-0.166667, -0.235004, -0.078335, 0.085365, 0.153589]),
    (LossConfig("vespo"), 0.74006309, [*[-0.238162] * 3, *[0.086020] * 2]),
    (LossConfig("gmpo"), -0.21959975, [-0.151151, 0, -0.151151, 0.116927, 0.116927]),
    (LossConfig("dppo_tv", dppo_low=0.05, dppo_high=0.05), 0.31595766, [-0.2, 0, -0.1, 0, 0.125]),
    (LossConfig("dppo_kl", dppo_low=0.01, dppo_high=0.01), 0.31595766, [-0.2, 0, -0.1, 0, 0.125]),
    (LossConfig("dro", dro_coef=0.1), 0.57740193, [-0.2, -0.191891, -0.213863, 0.092867, 0.104463]),
    (LossConfig("kl_cov", cov_frac=0.2), -0.33366501, [-0.2, -0.3, -0.1, -0.13, 0.125]),
    (LossConfig("fipo", clip_high=0.28), -0.326, [-0.2, 0, -0.1, 0, 0.15]),
]


@pytest.mark.parametrize(("config", "loss", "grad"), GOLDEN_OTHERS)
def test_golden_surrogates(config, loss, grad):
    got, g, _ = value_and_grad(fixture(selected=SELECTED), config)
    assert got == pytest.approx(loss, abs=1e-7)
    close(g, grad)


def test_golden_real():
    got, g, _ = value_and_grad(fixture(), LossConfig("real"))
    assert got == pytest.approx(1.42224067, abs=1e-7)
    close(g, [*[-0.365200] * 3, *[0.466667] * 2])


def test_real_is_a_mean_over_all_groups():
    """The authors' code divides by the questions, not by those with both classes."""
    b = replace(fixture(), normalizers=replace(fixture().normalizers, groups=3))
    assert value_and_grad(b, LossConfig("real"))[0] == pytest.approx(1.42224067 / 3, abs=1e-7)


def fipo_on(ratios, advantages, **changes):
    """Returns loss and gradient of one completion of three tokens, and what PPO's clip gives."""
    advantages = torch.tensor(advantages, dtype=torch.float64)
    b = replace(fixture(), advantages=advantages[fixture().sequence_ids])
    logprobs = OLD + torch.tensor([*ratios, 1.0, 1.0], dtype=torch.float64).log()
    return [value_and_grad(b, LossConfig(name, **changes), logprobs)[:2] for name in ("fipo", "dapo")]


def test_fipo_has_its_authors_numbers():
    config = LossConfig("fipo").resolve()
    assert (config.clip_low, config.clip_high, config.dual_clip) == (0.2, 0.28, 10.0)
    assert (config.fipo_range, config.fipo_rho_max) == (0.2, 10.0)
    assert config.fipo_gamma == 2 ** (-1 / 32)


def test_fipo_does_not_look_at_tokens_that_the_dual_clip_has_cut():
    """The second token's ratio of 12 is cut: the first has nothing ahead that would weigh it up."""
    (_, ours), (_, plain) = fipo_on([1.0, 12.0, 1.0], [-1.0, 0.0], dual_clip=10.0)
    torch.testing.assert_close(ours[:1], plain[:1])
    (_, ours), (_, plain) = fipo_on([1.0, 9.0, 1.0], [-1.0, 0.0], dual_clip=10.0)
    torch.testing.assert_close(ours[:1], 1.2 * plain[:1])


def test_fipo_drops_a_completion_on_which_the_dual_clip_acts_twice():
    (_, ours), _ = fipo_on([12.0, 1.0, 1.0], [-1.0, 0.0])
    assert ours[1] != 0
    (loss, ours), _ = fipo_on([12.0, 12.0, 1.0], [-1.0, 0.0])
    assert loss == 0
    assert not ours.any()
    (_, ours), _ = fipo_on([12.0, 12.0, 1.0], [1.0, 0.0])
    assert ours[2] != 0


@pytest.mark.parametrize(("name", "low", "high"), [("dppo_tv", 0.15, 0.15), ("dppo_kl", 0.05, 0.05)])
def test_dppo_has_verls_thresholds(name, low, high):
    assert LossConfig(name).resolve().dppo_range == (low, high)


def test_clip_cov_clips_where_its_authors_do():
    assert LossConfig("clip_cov").resolve().clip_range == (1.0, 1.0)


@pytest.mark.parametrize(("config", "loss", "grad"), GOLDEN)
def test_golden(config, loss, grad):
    got, g, _ = value_and_grad(fixture(), config)
    assert got == pytest.approx(loss, abs=1e-7)
    close(g, grad)


def test_golden_third_empty_completion():
    got, g, _ = value_and_grad(fixture((3, 2, 0), (0, 0, 0), (1.0, -0.5, 3.0)), LossConfig("grpo"))
    assert got == pytest.approx(-0.12916667, abs=1e-7)
    close(g, [x * 2 / 3 for x in (-1 / 6, 0, -1 / 12, 0, 0.15625)])


def test_golden_prompt_mean_two_groups():
    config = LossConfig("grpo", aggregation="prompt_mean")
    assert value_and_grad(fixture(groups=(0, 1)), config)[0] == pytest.approx(-0.19375, abs=1e-7)


@pytest.mark.parametrize(
    ("advantage", "ratio", "cap", "loss", "grad"),
    [(-1, 5, None, 5, 5), (-1, 5, 3, 3, 0), (-1, 2, 3, 2, 2), (1, 5, 3, -1.2, 0)],
)
def test_golden_dual_clip(advantage, ratio, cap, loss, grad):
    b = replace(fixture((1,), (0,), (advantage,)), old_logprobs=torch.zeros(1, dtype=torch.float64))
    lp = torch.tensor([float(ratio)], dtype=torch.float64).log()
    got, g, _ = value_and_grad(b, LossConfig("grpo", dual_clip=cap), lp)
    assert got == pytest.approx(loss)
    assert g.item() == pytest.approx(grad)


SAMPLER = OLD - torch.tensor([0.2, 1.0, -0.7, 0.1, -0.3], dtype=torch.float64)
CORRECTED = [  # losses.md G5
    ({"high": 2.0}, -0.62492313, [-0.244281, 0, -0.049659, 0, 0.092602]),
    ({"mode": "mask", "low": 0.5, "high": 2.0}, -0.06326460, [-0.244281, 0, 0, 0, 0.092602]),
    ({"mode": "mask", "low": 0.5, "high": 5.0}, -0.75914475, [-0.244281, 0, 0, 0, 0.092602]),
    ({"level": "sequence", "high": 1.5}, -0.66616020, [-0.3, 0, -0.15, 0, 0.102341]),
    ({"level": "sequence", "mode": "mask", "high": 1.5}, 0.16783980, [0, 0, 0, 0, 0.102341]),
    ({"level": "geometric", "mode": "gate", "low": 0.9, "high": 1.15}, 0.18101595, [0, 0, 0, 0, 0.092602]),
    ({"level": "geometric", "mode": "gate", "low": 0.95, "high": 1.15}, 0.0, [0, 0, 0, 0, 0]),
    ({"mode": "off"}, -0.351, [-0.2, 0, -0.1, 0, 0.125]),
]


@pytest.mark.parametrize(("correction", "loss", "grad"), CORRECTED)
def test_golden_corrections(correction, loss, grad):
    config = LossConfig("dapo", correction=CorrectionConfig(**correction))
    got, g, _ = value_and_grad(fixture(sampler_logprobs=SAMPLER), config)
    assert got == pytest.approx(loss, abs=1e-7)
    close(g, grad)


def test_golden_effective_sample_size():
    _, _, stats = value_and_grad(fixture(sampler_logprobs=SAMPLER), LossConfig("dapo"))
    assert stats["sampling/ess"] == pytest.approx(0.82459296, abs=1e-7)
    assert stats["sampling/importance_sampling_ratio/max"] == 2.0
    assert stats["sampling/importance_sampling_ratio/min"] == pytest.approx(0.49658530)


def test_logged_weights_are_those_that_act():
    """TRL's meaning of the name: after truncation, and per completion where a completion has one weight."""
    name = "sampling/importance_sampling_ratio"

    def logged(**how):
        config = LossConfig("dapo", correction=CorrectionConfig(**how))
        stats = value_and_grad(fixture(sampler_logprobs=SAMPLER), config)[2]
        return [stats.get(f"{name}/{kind}") for kind in ("min", "mean", "max")]

    assert logged(level="sequence", high=1.5) == pytest.approx([0.81873075, 1.15936538, 1.5], abs=1e-7)
    assert logged(level="sequence", mode="mask", high=1.5) == pytest.approx([0, 0.40936538, 0.81873075])
    assert logged(mode="mask", high=2.0) == pytest.approx([0, 0.71279542, 1.22140276], abs=1e-7)
    assert logged(mode="off") == logged(bypass=True) == [None] * 3


def test_bypass_takes_the_engines_policy_as_the_old_one():
    config = LossConfig("dapo", correction=CorrectionConfig(bypass=True))
    got = value_and_grad(fixture(sampler_logprobs=SAMPLER), config)[0]
    want = value_and_grad(replace(fixture(), old_logprobs=SAMPLER), LossConfig("dapo"))[0]
    assert got == pytest.approx(want, abs=1e-12)


def test_golden_off_policy_mask():
    config = LossConfig("dapo", off_policy_threshold=0.1, correction=CorrectionConfig(mode="off"))
    got, g, stats = value_and_grad(fixture(sampler_logprobs=SAMPLER), config)
    assert got == pytest.approx(-0.556, abs=1e-7)
    close(g, [-0.2, 0, -0.1, 0, 0])
    assert stats["off_policy/dropped_sequence_frac"] == 0.5


def test_golden_top_entropy():
    keep = torch.tensor([True, False, False, False, True])
    b = fixture(entropy_keep=keep)
    b = replace(b, normalizers=replace(b.normalizers, entropy_tokens=2))
    got, g, _ = value_and_grad(b, LossConfig("dapo", top_entropy_quantile=0.4))
    assert got == pytest.approx(-0.075, abs=1e-7)
    close(g, [-0.2, 0, 0, 0, 0.125])
    entropy = torch.tensor([2.0, 0.5, 0.2, 0.3, 1.0], dtype=torch.float64)
    bonus = LossConfig("dapo", top_entropy_quantile=0.4, entropy_coef=0.01)
    assert value_and_grad(b, bonus, entropy=entropy)[0] - got == pytest.approx(-0.015, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mask", "high": None}, "give one of them"),
        ({"low": 3.0, "high": 2.0}, "low < high"),
        ({"level": "word"}, r"correction\.level"),
        ({"mode": "maks"}, "did you mean 'mask'"),
    ],
)
def test_correction_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        CorrectionConfig(**changes)


KL_GOLDEN = [  # losses.md G4
    ({"kl_bias_correction": False}, 0.00422676, [0.003625, -0.001983, -0.004261, -0.008571, 0.007539]),
    ({}, 0.00412329, [0.004, -0.002836, -0.001931, -0.004993, 0.011829]),
    ({"ratio_level": "sequence"}, 0.00393054, [0.003556, -0.001540, -0.003610, -0.006446, 0.008625]),
    ({"ratio_level": "sequence_token"}, 0.00393054, [0.003634, -0.001718, -0.003510, -0.006673, 0.008852]),
    ({"kl_estimator": "k2"}, 0.00437325, [0.004, -0.001891, -0.003863, -0.007134, 0.009463]),
    ({"kl_estimator": "k3_straight"}, 0.00422676, [0.004, -0.001891, -0.003863, -0.007134, 0.009463]),
    ({"kl_estimator": "k1"}, 0.00606762, [0.024, 0.027164, 0.008069, 0.009007, 0.036829]),
]


@pytest.mark.parametrize(("changes", "loss", "grad"), KL_GOLDEN)
def test_golden_kl_alone(changes, loss, grad):
    config = LossConfig("dapo", kl_coef=0.1, **changes)
    got, g, stats = value_and_grad(fixture(advantages=(0.0, 0.0), ref_logprobs=REF), config)
    assert got == pytest.approx(loss, abs=1e-7)
    close(g, grad)
    assert stats["kl"] == pytest.approx(loss * 10, abs=1e-6)


def test_golden_dapo_with_kl():
    got, g, _ = value_and_grad(fixture(ref_logprobs=REF), LossConfig("dapo", kl_coef=0.1))
    assert got == pytest.approx(-0.34687671, abs=1e-7)
    close(g, [-0.196, -0.002836, -0.101931, -0.004993, 0.136829])


def test_golden_entropy_bonus():
    entropy = torch.tensor([2.0, 0.5, 0.2, 0.3, 1.0], dtype=torch.float64)
    config = LossConfig("dapo", entropy_coef=0.01)
    with_bonus = value_and_grad(fixture(), config, entropy=entropy)[0]
    assert with_bonus - value_and_grad(fixture(), LossConfig("dapo"))[0] == pytest.approx(-0.008)


def test_golden_split_returns_what_lightning_averages():
    """G7: two micro-batches, K = 2."""
    b = replace(fixture(), normalizers=replace(fixture().normalizers, micro_batches=2))
    returned = []
    for s, part in enumerate(b.split(2)):
        lp = (OLD + RATIO.log())[:3] if s == 0 else (OLD + RATIO.log())[3:]
        returned.append(2 * policy_loss(lp, part, LossConfig("dapo")).loss.item())
    assert returned == pytest.approx([-1.112, 0.41])


def test_golden_bnpo_depends_on_the_split():
    b = replace(fixture(), normalizers=replace(fixture().normalizers, micro_batches=2))
    lp = OLD + RATIO.log()
    total = sum(
        policy_loss(x, p, LossConfig("bnpo")).loss.item()
        for x, p in zip((lp[:3], lp[3:]), b.split(2), strict=True)
    )
    assert total == pytest.approx(-0.19375)


def gradient(batch, config, logprobs):
    lp = logprobs.clone().requires_grad_()
    (g,) = torch.autograd.grad(policy_loss(lp, batch, config).loss, lp)
    return g


@pytest.mark.parametrize("name", SPLIT_INVARIANT)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 9))
def test_any_split_gives_one_gradient(name, seed, m):
    b = random_rollout(prompts=3, group=3, seed=seed)
    n = len(b.target_ids)
    g = torch.Generator().manual_seed(seed)
    b = replace(
        with_selection(b, seed),
        old_logprobs=-torch.rand(n, generator=g, dtype=torch.float64),
        ref_logprobs=-torch.rand(n, generator=g, dtype=torch.float64),
    )
    lp = -torch.rand(n, generator=g, dtype=torch.float64)
    config = recipe(name, kl_coef=0.1)
    whole = gradient(b, config, lp)
    parts, start = [], 0
    for p in b.split(m, whole_groups=config.surrogate_row.whole_groups):
        parts.append(gradient(p, config, lp[start : start + len(p.target_ids)]))
        start += len(p.target_ids)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)


def levels_of(names):
    """Pairs of a recipe and a ratio level that it takes."""
    levels = {n: SURROGATES[RECIPES[n].surrogate].levels for n in names}
    return [(n, level) for n in names for level in RATIO_LEVELS if level in levels[n]]


@pytest.mark.parametrize(("name", "level"), levels_of(PER_TOKEN))
def test_ratio_one_is_reinforce(name, level):
    b = random_rollout(seed=3)
    b = replace(b, selected=torch.zeros(len(b.target_ids), dtype=torch.bool))
    lp = -torch.rand(len(b.target_ids), dtype=torch.float64)
    config = recipe(name, ratio_level=level)
    g = gradient(b, config, lp)
    from grpo_lightning.losses.completion_sums import Segments

    weights = AGGREGATIONS[str(config.aggregation)].weights(Segments.of(b), b.normalizers).double()
    torch.testing.assert_close(g, -weights * b.advantages.double(), atol=1e-12, rtol=1e-6)


def frozen_difference(loss, lp, monkeypatch, step=1e-6):
    """Central differences of `loss` at `lp` with everything detached held at its value there."""
    held, real = [], torch.Tensor.detach
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: held.append(real(x)) or held[-1])
    loss(lp)

    def at(x):
        values = iter(held)
        monkeypatch.setattr(torch.Tensor, "detach", lambda _: next(values))
        return loss(x)

    slopes = []
    for n in range(len(lp)):
        e = torch.zeros_like(lp)
        e[n] = step
        slopes.append((at(lp + e) - at(lp - e)) / (2 * step))
    monkeypatch.undo()
    return torch.stack(slopes)


@pytest.mark.parametrize(("name", "level"), levels_of(RECIPES))
@pytest.mark.parametrize("kl", ["k1", "k3", "k3_straight"])
def test_gradients_are_differences_with_detached_parts_held(name, level, kl, monkeypatch):
    b = with_selection(random_rollout(seed=5))
    n = len(b.target_ids)
    g = torch.Generator().manual_seed(9)
    b = replace(
        b,
        old_logprobs=-torch.rand(n, dtype=torch.float64, generator=g),
        ref_logprobs=-torch.rand(n, dtype=torch.float64, generator=g),
        sampler_logprobs=-torch.rand(n, dtype=torch.float64, generator=g),
    )
    lp = -torch.rand(n, dtype=torch.float64, generator=g)
    config = recipe(name, ratio_level=level, kl_coef=0.05, kl_estimator=kl)
    want = frozen_difference(lambda x: policy_loss(x, b, config).loss, lp, monkeypatch)
    torch.testing.assert_close(gradient(b, config, lp), want, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("name", "level"), levels_of(RECIPES))
def test_gradcheck(name, level):
    """torch's own, with what is detached held at its value at the point, since it is a constant there."""
    b = with_selection(random_rollout(seed=5))
    n = len(b.target_ids)
    g = torch.Generator().manual_seed(9)
    old, ref, sampler, lp = (-torch.rand(n, dtype=torch.float64, generator=g) for _ in range(4))
    b = replace(b, old_logprobs=old, ref_logprobs=ref, sampler_logprobs=sampler)
    config = recipe(name, ratio_level=level, kl_coef=0.05, kl_in="loss")
    held, real = [], torch.Tensor.detach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", lambda x: held.append(real(x)) or held[-1])
        policy_loss(lp, b, config)

    def loss(x):
        constants = iter(held)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", lambda _: next(constants))
            return policy_loss(x, b, config).loss

    assert torch.autograd.gradcheck(loss, lp.clone().requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_to_train_is_zero_and_differentiable(name):
    b = with_selection(random_rollout()).take([])
    lp = torch.zeros(0, requires_grad=True)
    out = policy_loss(lp, b, recipe(name))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert values(out.stats)["loss"] == 0.0


@pytest.mark.parametrize("name", RECIPES)
def test_only_empty_completions_are_zero_and_differentiable(name):
    b = with_selection(fixture((0, 0), (0, 0)))
    lp = torch.zeros(0, requires_grad=True)
    out = policy_loss(lp, replace(b, old_logprobs=None), recipe(name))
    out.loss.backward()
    assert out.loss.item() == 0.0


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gap", [100.0, -100.0])
def test_far_ratios_are_finite(name, gap):
    b = replace(with_selection(fixture()), old_logprobs=OLD)
    loss, g, _ = value_and_grad(b, recipe(name), OLD + gap)
    assert torch.isfinite(torch.tensor(loss))
    assert torch.isfinite(g).all()
    if (
        SURROGATES[RECIPES[name].surrogate].wants
        and "logprobs" not in SURROGATES[RECIPES[name].surrogate].wants
    ):
        assert g.tolist() == [0.0] * 5


ZERO_AT_ZERO = [n for n in PER_TOKEN if RECIPES[n].surrogate not in ("dro", "kl_cov")]


@pytest.mark.parametrize("name", ZERO_AT_ZERO)
def test_dead_group_has_gradient_exactly_zero(name):
    b = with_selection(fixture(advantages=(0.0, 0.0)))
    g = gradient(b, recipe(name), OLD + RATIO.log())
    assert g.tolist() == [0.0] * 5


def test_permuting_completions_permutes_gradients():
    a = gradient(fixture((3, 2), (0, 0), (1.0, -0.5)), LossConfig("grpo"), OLD + RATIO.log())
    order = [3, 4, 0, 1, 2]
    b = replace(fixture((2, 3), (0, 0), (-0.5, 1.0)), old_logprobs=OLD[order])
    torch.testing.assert_close(
        gradient(b, LossConfig("grpo"), (OLD + RATIO.log())[order]), a[order], atol=1e-15, rtol=0
    )


def test_clip_fractions():
    _, _, stats = value_and_grad(fixture(), LossConfig("grpo"))
    assert stats["clip_ratio/high_mean"] == pytest.approx(0.2)  # token 1
    assert stats["clip_ratio/low_mean"] == pytest.approx(0.2)  # token 3
    assert stats["clip_ratio/region_mean"] == pytest.approx(0.4)
    assert stats["clip_ratio/high_max"] == pytest.approx(1 / 3)
    assert stats["clip_ratio/low_min"] == pytest.approx(0.0)


def test_sequence_level_clip_fractions_count_completions():
    config = LossConfig("grpo", ratio_level="sequence", clip_low=3e-4, clip_high=4e-4)
    _, _, stats = value_and_grad(fixture(), config)
    assert stats["clip_ratio/low_mean"] == pytest.approx(0.5)


def test_sampler_gap_skips_what_is_missing():
    smp = torch.tensor([-1.5, -torch.inf, torch.nan, -1.5, -0.25])
    _, _, stats = value_and_grad(fixture(sampler_logprobs=smp), LossConfig("grpo"))
    assert stats["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5 / 3)
    assert stats["sampling/sampling_logp_difference/max"] == pytest.approx(0.5)


def test_stats_of_parts_are_those_of_the_whole():
    b = random_rollout(seed=11)
    n = len(b.target_ids)
    b = replace(b, old_logprobs=-torch.rand(n, generator=torch.Generator().manual_seed(1)))
    lp = -torch.rand(n, generator=torch.Generator().manual_seed(2))
    whole = values(policy_loss(lp, b, LossConfig("grpo"), lp.abs()).stats)
    parts, start = [], 0
    for p in b.split(4):
        x = lp[start : (start := start + len(p.target_ids))]
        parts.append(policy_loss(x, p, LossConfig("grpo"), x.abs()).stats)
    assert values(combine(parts)) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dapoo"}, "did you mean 'dapo'"),
        ({"surrogate": "ppo"}, r"model\.loss\.surrogate is 'ppo'"),
        ({"aggregation": "mean"}, r"model\.loss\.aggregation"),
        ({"ratio_level": "word"}, r"model\.loss\.ratio_level"),
        ({"dual_clip": 1.2}, r"above 1 \+ clip_high = 1\.28"),
        ({"clip_low": 1.1}, r"in \[0, 1\]"),
        ({"kl_coef": -1.0}, "kl_coef is -1"),
        ({"kl_estimator": "k9"}, "kl_estimator"),
        ({"name": "no_such_module.loss"}, "no_such_module"),
    ],
)
def test_config_errors_name_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**changes)


def test_missing_reference_and_entropy_raise():
    lp = OLD.clone()
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(lp, fixture(), LossConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(lp, fixture(), LossConfig(entropy_coef=0.1))


def test_a_surrogate_may_ask_for_nothing_unknown():
    with pytest.raises(ConfigError, match="'rtaio'"):
        register_surrogate("broken")(lambda rtaio: rtaio)
    assert "broken" not in SURROGATES


def test_a_surrogate_of_ones_own_leaves_the_table_alone(tmp_path):
    (tmp_path / "mine.py").write_text("def half(advantages, ratio):\n    return -0.5 * ratio * advantages\n")
    before, path = dict(SURROGATES), f"{tmp_path / 'mine.py'}:half"
    config = LossConfig(path)
    assert config.surrogate_row.wants == ("advantages", "ratio")
    assert (config.resolve().aggregation, config.resolve().surrogate) == ("token_mean", path)
    assert value_and_grad(fixture(), config)[0] == pytest.approx(
        0.5 * value_and_grad(fixture(), LossConfig("dapo", clip_low=1.0, clip_high=9.0))[0]
    )
    assert before == SURROGATES


def test_loss_totals_do_not_depend_on_local_counts():
    t = Normalizers(tokens=10, sequences=4, groups=2, max_tokens=4)
    b = replace(fixture(), normalizers=t)
    assert value_and_grad(b, LossConfig("dapo"))[0] == pytest.approx(-0.351 / 2)


@pytest.mark.parametrize("key", ["name", "surrogate"])
def test_a_path_that_leads_nowhere_is_named_by_its_key(key):
    with pytest.raises(ConfigError, match=rf"model\.loss\.{key} 'nowhere\.function'"):
        LossConfig(**{key: "nowhere.function"})
