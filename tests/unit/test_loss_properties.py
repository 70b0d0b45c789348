"""What holds for every recipe, at every ratio level it takes, whatever the numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo_lightning.advantages import ADVANTAGES, RewardTable, compute_advantages
from grpo_lightning.losses import AGGREGATIONS, RECIPES, SURROGATES, CorrectionConfig, LossConfig
from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.fused import policy_loss
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

REQUIRED = {"dro": {"dro_coef": 0.1}}
CASES = [(n, level) for n, r in RECIPES.items() for level in SURROGATES[r.surrogate].levels]
TOKEN_CASES = [(n, level) for n, level in CASES if not SURROGATES[RECIPES[n].surrogate].whole_groups]
STILL = [(n, level) for n, level in CASES if SURROGATES[RECIPES[n].surrogate].still_at_zero]
FEW = settings(max_examples=10, deadline=None)
SEEDS = st.integers(0, 2**31)
CORRECTIONS = [
    {"mode": "off"},
    {"level": "token", "mode": "truncate", "high": 1.5},
    {"level": "sequence", "mode": "mask", "low": 0.3, "high": 3.0},
    {"level": "geometric", "mode": "gate", "low": 0.7, "high": 1.4},
    {"bypass": True},
]


def fits(name, correction):
    """vespo takes weights by token alone, real none but the default, which it does not use."""
    objective = SURROGATES[RECIPES[name].surrogate]
    weighs = correction.get("mode") != "off" and not correction.get("bypass")
    by_token = not objective.folds_correction or correction.get("level", "token") == "token"
    return not weighs or (by_token and not objective.whole_groups)


def config_of(name, level, **changes):
    return LossConfig(name, **{"ratio_level": level, **REQUIRED.get(name, {}), **changes}).resolve()


class Case:
    """Completions with all their numbers, which can be packed in any order."""

    def __init__(self, seed, lengths=None, advantages=None):
        self.g = torch.Generator().manual_seed(seed)
        self.lengths = lengths or [self.draw_int(0, 5) for _ in range(9)]
        self.groups = [s // 3 for s in range(len(self.lengths))]
        self.advantages = advantages or torch.randn(len(self.lengths), generator=self.g).tolist()
        names = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "old_entropies")
        self.numbers = {n: [self.draw(length) for length in self.lengths] for n in names}
        self.selected = [self.draw(length) < -0.8 for length in self.lengths]
        self.kept = [self.draw(length) < -0.4 for length in self.lengths]

    def draw_int(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def draw(self, n):
        return -torch.rand(n, generator=self.g, dtype=torch.float64) * 1.5

    def pack(self, order=None):
        """Returns the rollout with the completions in `order`, and their log-probabilities."""
        order = list(range(len(self.lengths))) if order is None else order
        seen = list(dict.fromkeys(self.groups[s] for s in order))
        batch = RolloutBatch.pack(
            prompt_ids=[[1] * (g + 1) for g in seen],
            completions=[Completion(token_ids=[5] * self.lengths[s]) for s in order],
            group_ids=[seen.index(self.groups[s]) for s in order],
            advantages=torch.tensor([self.advantages[s] for s in order]),
            max_tokens=8,
        )
        fields = {n: torch.cat([x[s] for s in order]) for n, x in self.numbers.items()}
        lp = fields.pop("logprobs")
        keep = torch.cat([self.kept[s] for s in order])
        normalizers = replace(batch.normalizers, entropy_tokens=int(keep.sum()))
        selected = torch.cat([self.selected[s] for s in order])
        return replace(batch, normalizers=normalizers, selected=selected, entropy_keep=keep, **fields), lp

    def tokens(self, order):
        """Returns where the tokens of `order` stand in the original order."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        starts = [e - n for e, n in zip(ends, self.lengths, strict=True)]
        return [t for s in order for t in range(starts[s], ends[s])]


def loss_and_gradient(batch, config, logprobs, entropy=None):
    lp = logprobs.clone().requires_grad_()
    out = policy_loss(lp, batch, config, entropy)
    (g,) = torch.autograd.grad(out.loss, lp)
    return out.loss.item(), g


@pytest.mark.parametrize(("name", "level"), TOKEN_CASES)
@FEW
@given(seed=SEEDS)
def test_ratio_one_gives_the_gradient_of_reinforce(name, level, seed):
    b, lp = Case(seed).pack()
    config = config_of(name, level, correction=CorrectionConfig(mode="off"))
    b = replace(b, old_logprobs=lp, selected=torch.zeros_like(b.selected))
    weights = AGGREGATIONS[config.aggregation].weights(Segments.of(b), b.normalizers)
    want = -weights * b.advantages.double()
    torch.testing.assert_close(loss_and_gradient(b, config, lp)[1], want, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("name", "level"), CASES)
@FEW
@given(seed=SEEDS, correction=st.sampled_from(CORRECTIONS))
def test_order_of_groups_and_of_completions_changes_nothing(name, level, seed, correction):
    """The packing order: groups in any order, completions in any order inside them."""
    assume(fits(name, correction))
    case = Case(seed)
    order = [3 * g + int(i) for g in torch.randperm(3, generator=case.g).tolist()
             for i in torch.randperm(3, generator=case.g)]  # fmt: skip
    config = config_of(name, level, kl_coef=0.1, correction=CorrectionConfig(**correction))
    (loss, gradient), (again, permuted) = (
        loss_and_gradient(b, config, lp) for b, lp in (case.pack(), case.pack(order))
    )
    assert again == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(permuted, gradient[case.tokens(order)], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "level"), CASES)
@FEW
@given(seed=SEEDS, m=st.integers(1, 9), correction=st.sampled_from(CORRECTIONS))
def test_splits_change_nothing(name, level, seed, m, correction):
    assume(fits(name, correction))
    b, lp = Case(seed).pack()
    masks = {} if config_of(name, level).surrogate_row.whole_groups else {
        "top_entropy_quantile": 0.5, "off_policy_threshold": 0.2}  # fmt: skip
    correction = CorrectionConfig(**correction)
    config = config_of(name, level, kl_coef=0.1, entropy_coef=0.01, correction=correction, **masks)
    entropy = -b.old_entropies
    if not AGGREGATIONS[config.aggregation].split_invariant:
        return
    loss, gradient = loss_and_gradient(b, config, lp, entropy)
    start, total, parts = 0, 0.0, []
    for part in b.split(m, whole_groups=config.surrogate_row.whole_groups):
        here = slice(start, start := start + len(part.target_ids))
        value, g = loss_and_gradient(part, config, lp[here], entropy[here])
        total += value
        parts.append(g)
    assert total == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.cat(parts), gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "level"), STILL)
@FEW
@given(seed=SEEDS, reward=st.floats(-3, 3), advantage=st.sampled_from(sorted(ADVANTAGES)))
def test_equal_rewards_give_exactly_nothing(name, level, seed, reward, advantage):
    """Bitwise 0: a mean that is rounded must not leave a residue."""
    if not ADVANTAGES[advantage].zero_variance_is_zero:
        return
    case = Case(seed)
    table = RewardTable(
        by_function=torch.full((9, 1), reward, dtype=torch.float64),
        weights=torch.tensor([0.7], dtype=torch.float64),
        group_ids=torch.tensor(case.groups),
        num_groups=3,
        lengths=torch.tensor(case.lengths),
    )
    case.advantages = compute_advantages(advantage, table).tolist()
    b, lp = case.pack()
    assert loss_and_gradient(b, config_of(name, level), lp)[1].abs().sum().item() == 0.0


@pytest.mark.parametrize("name", [n for n, s in SURROGATES.items() if not s.still_at_zero and "." not in n])
def test_what_moves_without_advantage_is_not_called_still(name):
    """Groups without signal may be left out only where they have no gradient; these have, or have no flag."""
    b, lp = Case(3, advantages=[0.0] * 9).pack()
    config = config_of("dapo", "token", surrogate=name, dro_coef=0.1)
    moves = loss_and_gradient(b, config, lp)[1].abs().max().item() > 0
    assert moves == (name in ("dro", "kl_cov"))
    assert not config.zero_variance_groups_have_no_gradient


@pytest.mark.parametrize(("name", "level"), CASES)
@pytest.mark.parametrize("lengths", [[0] * 9, [1] * 9, [0, 1, 0, 0, 0, 0, 5, 0, 0], [1, 0, 0]])
def test_empty_and_one_token_completions(name, level, lengths):
    case = Case(1, lengths=lengths)
    b, lp = case.pack()
    loss, g = loss_and_gradient(b, config_of(name, level, kl_coef=0.1), lp)
    assert torch.tensor(loss).isfinite()
    assert g.isfinite().all()
    if not sum(lengths):
        assert loss == 0.0


MASKS = [
    {"correction": CorrectionConfig(mode="mask", low=1e6, high=1e7)},
    {"correction": CorrectionConfig(level="sequence", mode="gate", low=1e8, high=1e9)},
    {"top_entropy_quantile": 0.5},
    {"off_policy_threshold": -1e9},
]


@pytest.mark.parametrize(("name", "level"), TOKEN_CASES)
@pytest.mark.parametrize("mask", range(len(MASKS)))
def test_everything_masked_is_zero(name, level, mask):
    if mask < 2 and SURROGATES[RECIPES[name].surrogate].folds_correction:
        return  # vespo weighs by the correction instead of multiplying it
    config = config_of(name, level, **MASKS[mask])
    b, lp = Case(2, advantages=[-0.5] * 9).pack()
    loss, g = loss_and_gradient(replace(b, entropy_keep=torch.zeros_like(b.entropy_keep)), config, lp)
    assert loss == 0.0
    assert g.abs().sum().item() == 0.0


@pytest.mark.parametrize(("name", "level"), CASES)
@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs", "sampler_logprobs"])
@pytest.mark.parametrize("gap", [100.0, -100.0, torch.inf, torch.nan])
def test_far_numbers_stay_finite(name, level, field, gap):
    """In fp32, as in training. What an engine reports may be anything; our own numbers are finite."""
    if not torch.tensor(gap).isfinite() and field != "sampler_logprobs":
        return
    b, lp = Case(4).pack()
    b = replace(b, **{n: getattr(b, n).float() for n in ("old_logprobs", "ref_logprobs", "sampler_logprobs")})
    for correction in (c for c in CORRECTIONS if fits(name, c)):
        config = config_of(name, level, kl_coef=0.1, correction=CorrectionConfig(**correction))
        far = replace(b, **{field: getattr(b, field) + gap})
        loss, g = loss_and_gradient(far, config, lp.float())
        assert torch.tensor(loss).isfinite()
        assert g.isfinite().all()
