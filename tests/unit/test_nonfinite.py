"""A number that is not finite could pass for a token, a zero or a mean: it is an error that names it."""

import math
from dataclasses import dataclass, fields

import pytest
import torch
from models import hf_engine, random_rollout, tiny_llama
from tiny import tiny_tokenizer

from grpo_lightning.advantages import ADVANTAGES, RewardTable, compute_advantages
from grpo_lightning.engines import HFEngine
from grpo_lightning.engines.base import Request
from grpo_lightning.errors import ConfigError, EngineError, GRPOError, RewardError
from grpo_lightning.losses import RECIPES, LossConfig, policy_loss, register_surrogate
from grpo_lightning.losses.config import OPTIONS
from grpo_lightning.losses.custom_check import check_surrogate
from grpo_lightning.losses.surrogate_table import SURROGATES
from grpo_lightning.losses.surrogates import ClipOptions
from grpo_lightning.policy.finite_checks import finite
from grpo_lightning.policy.policy import Policy
from grpo_lightning.rewards.suite import Rewards
from grpo_lightning.rollout.checks import bad_advantages, bad_logprobs, bad_penalty
from grpo_lightning.rollout.micro_batches import _unsound
from grpo_lightning.types import Completion, SamplingParams

NAN, INF = math.nan, math.inf


# ---- sampling


@pytest.fixture
def engine():
    policy = Policy(tiny_llama(), tiny_tokenizer())
    engine = hf_engine(policy)
    engine.generate(REQUESTS, SamplingParams(max_tokens=2))
    return engine


REQUESTS = [Request(prompt_ids=[5, 6, 7], seeds=[1, 2])]
SAMPLINGS = [
    {},
    {"temperature": 0.0},
    {"top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"repetition_penalty": 2.0},
]


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_no_token_comes_from_logits_that_are_not_finite(engine, options, value):
    sampling = SamplingParams(max_tokens=4, **options)
    assert all(len(c.token_ids) for c in engine.generate(REQUESTS, sampling)[0])
    with torch.no_grad():
        # of two infinite logits one is negative, which only forbids a token
        engine._policy.causal.get_output_embeddings().weight[40:42, 0] = torch.tensor([value, -value])
    with pytest.raises(EngineError, match="logits of LlamaForCausalLM are not finite"):
        engine.generate(REQUESTS, sampling)


def test_a_model_that_is_ruined_from_the_start_is_no_architecture_to_change():
    policy = Policy(tiny_llama(), tiny_tokenizer())
    with torch.no_grad():
        policy.causal.get_output_embeddings().weight[40] = NAN
    engine = hf_engine(policy)
    with pytest.raises(EngineError, match="logits of LlamaForCausalLM are not finite"):
        engine.generate(REQUESTS, SamplingParams(max_tokens=2))


def test_logits_of_minus_infinity_only_forbid_a_token(engine):
    def forbid(module, args, out):
        out.logits[..., 50:] = -INF
        return out

    engine._policy.causal.register_forward_hook(forbid)
    for options in SAMPLINGS:
        out = engine.generate(REQUESTS, SamplingParams(max_tokens=8, **options))[0]
        assert all(max(c.token_ids) < 50 for c in out)


@pytest.mark.parametrize("bad", [NAN, -INF, INF])
def test_what_another_engine_reports_is_looked_at(bad):
    good = Completion(token_ids=[5, 6], logprobs=[-0.5, -1.0])
    sick = Completion(token_ids=[5, 6], logprobs=[-0.5, bad])
    assert bad_logprobs(HFEngine(), REQUESTS, [[good, good]]) is None
    assert bad_logprobs(HFEngine(), REQUESTS, [[good, Completion(token_ids=[5])]]) is None
    error = bad_logprobs(HFEngine(), REQUESTS, [[good, sick]])
    assert isinstance(error, EngineError)
    assert "token 1 of completion 1 of prompt 0" in str(error)


# ---- rewards and advantages


def score(values, weights=None):
    rewards = Rewards([lambda completions, _v=v, **_: _v for v in values], weights)
    n = len(values[0])
    return rewards.score(
        prompts=[f"prompt {s}" for s in range(n)],
        completions=[f"text {s}" for s in range(n)],
        completion_ids=[[5]] * n,
        columns={},
    )


@pytest.mark.parametrize("huge", [1e300, -1e300, 3.5e38, 10**400])
def test_a_huge_reward_is_an_error_with_function_value_and_sample(huge):
    with pytest.raises(RewardError, match=r"<lambda>.*returned -?(inf|[13]\S*) for completion 1") as error:
        score([[0.0, huge]])
    assert "text 1" in str(error.value)
    assert "prompt 1" in str(error.value)


@pytest.mark.parametrize("weights", [[1e30, 1e30], [1e300, 1e300], [1e300, -1e300]])
def test_weights_that_make_a_reward_huge(weights):
    with pytest.raises(RewardError, match="weighted rewards of completion 1 add up to") as error:
        score([[0.0, 1e20], [0.0, 1e20]], weights)
    assert "text 1" in str(error.value)
    assert "1e+20" in str(error.value)


def test_large_rewards_are_left_alone():
    assert score([[1e30, -1e30], [None, 1.0]]).totals == [1e30, -1e30]


def table(*rewards, **options):
    column = torch.tensor(rewards, dtype=torch.float64)[:, None]
    n = len(column)
    return RewardTable(
        by_function=column,
        weights=torch.ones(1, dtype=torch.float64),
        group_ids=torch.zeros(n, dtype=torch.int64),
        num_groups=1,
        lengths=torch.ones(n, dtype=torch.int64),
        **options,
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_largest_rewards_make_finite_advantages_or_an_error(name):
    """None turns an overflow into the advantage 0, which would look like a group without signal."""
    t = table(3e38, -3e38, 1e38, 0.0)
    out = compute_advantages(name, t)
    samples = {"prompt": ["p"] * 4, "completion": ["a", "b", "c", "d"], "advantage": []}
    error = bad_advantages(out, name, t, samples)
    assert error is not None or out.abs().max() > 0


def test_an_advantage_that_overflows_shows_the_sample():
    t = table(1.0, -1.0, 4e-45, 0.0)  # maxrl divides by their mean
    out = compute_advantages("maxrl", t)
    samples = {"prompt": ["p"] * 4, "completion": ["a", "b", "c", "d"], "advantage": []}
    error = bad_advantages(out, "maxrl", t, samples)
    assert isinstance(error, RewardError)
    assert "maxrl" in str(error)
    assert "'completion'" in str(error)


def test_a_kl_penalty_that_is_nan_does_not_hide_as_an_unscored_completion():
    t = table(1.0, 0.0, penalty=torch.tensor([NAN, 0.0]).double())
    assert compute_advantages("group_mean", t).tolist()[0] == 0.0  # what would have trained
    assert "completion 0 is nan" in str(bad_penalty(t.penalty))
    assert bad_penalty(torch.zeros(2)) is None


# ---- what is scored before training


@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs"])
def test_scores_of_the_trainer(field):
    from dataclasses import replace

    batch = random_rollout()
    good = torch.full((len(batch.target_ids),), -1.0)
    bad = good.clone()
    bad[1] = NAN
    parts = [replace(batch, **{field: good}), replace(batch, **{field: bad})]
    assert _unsound(parts[:1], LossConfig()) is None
    assert isinstance(_unsound(parts, LossConfig()), GRPOError)


def test_entropies_count_where_they_choose_tokens():
    """A vocabulary with forbidden tokens may have none, and nobody asks."""
    from dataclasses import replace

    batch = random_rollout()
    parts = [replace(batch, old_entropies=torch.full((len(batch.target_ids),), NAN))]
    assert _unsound(parts, LossConfig()) is None
    assert "entropies" in str(_unsound(parts, LossConfig(top_entropy_quantile=0.2)))


def test_finite_of_all_types():
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((3,), torch.finfo(kind).max, dtype=kind)
        assert finite([largest, largest])
        for bad in (NAN, INF, -INF):
            assert not finite([largest, torch.tensor([0.0, bad], dtype=kind)])
    assert finite([])
    assert finite([torch.ones(2, dtype=torch.int64), torch.ones(0)])


# ---- a user's own surrogate


def scalar(ratio, advantages):
    return -(ratio * advantages).mean()


def one_per_completion(advantages, segments):
    return segments.mean(-advantages)


def number(advantages):
    return 0.5


def raising(ratio):
    raise KeyError("alpha")


def column(ratio, advantages):
    return -(ratio * advantages)[:, None]


def sound(ratio, advantages, logprobs, log_ratio, old_logprobs, correction, selected, segments, config):
    return -ratio * advantages * correction * selected + 0.0 * (logprobs + log_ratio + old_logprobs)


@pytest.fixture
def tables():
    """Puts the tables of losses back, which other tests read as a whole."""
    before = [(table, dict(table)) for table in (SURROGATES, RECIPES)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("function", "says"),
    [
        (scalar, r"scalar returned shape \(\), expected shape \(6,\)"),
        (one_per_completion, r"returned shape \(4,\), expected shape \(6,\)"),
        (number, "number returned float"),
        (column, r"returned shape \(6, 1\)"),
        (raising, "fails on 6 made-up tokens: KeyError"),
    ],
)
def test_surrogates_of_another_shape(function, says):
    register_surrogate(f"mine.{function.__name__}")(function)
    config = LossConfig(f"mine.{function.__name__}")
    with pytest.raises(ConfigError, match=says):
        check_surrogate(config)
    if function is scalar:
        batch = random_rollout()
        with pytest.raises(ConfigError, match="one value per token"):
            policy_loss(torch.zeros(len(batch.target_ids)), batch, config)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("changes", [{}, {"kl_coef": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}])
def test_a_surrogate_that_works(changes):
    register_surrogate("mine.sound")(sound)
    check_surrogate(LossConfig("mine.sound", **changes))
    check_surrogate(LossConfig("examples/custom_loss.py:tanh_clip", **changes))


@dataclass(frozen=True)
class Walls:
    height: float = 2.0

    def __post_init__(self):
        if self.height <= 0:
            raise ValueError(f"height is {self.height}; it must be > 0")


def walled(ratio, advantages, options: Walls):
    return -options.height * ratio * advantages


def of_no_class(ratio, options):
    return ratio


@pytest.mark.usefixtures("tables")
def test_options_of_a_surrogate_of_your_own():
    register_surrogate("mine.walled")(walled)
    batch = random_rollout()
    logprobs = torch.zeros(len(batch.target_ids))
    configs = LossConfig("mine.walled"), LossConfig("mine.walled", params={"height": 4.0})
    losses = [policy_loss(logprobs, batch, config).loss for config in configs]
    assert losses[1] == 2 * losses[0] != 0
    with pytest.raises(ConfigError, match=r"model.loss.params has 'hight' \(did you mean 'height'\?"):
        LossConfig("mine.walled", params={"hight": 1.0})
    with pytest.raises(ConfigError, match=r"model\.loss\.params: height is -1\.0; it must be > 0"):
        LossConfig("mine.walled", params={"height": -1.0})
    with pytest.raises(ConfigError, match=r"model\.loss\.params\.height is nan"):
        LossConfig("mine.walled", params={"height": NAN})
    with pytest.raises(ConfigError, match="surrogate 'ppo_clip' reads none; remove it"):
        LossConfig("dapo", params={"height": 1.0})
    with pytest.raises(ConfigError, match=r"'mine\.none' asks for options without saying which"):
        register_surrogate("mine.none")(of_no_class)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_options_are_declared_beside_one_surrogate_and_are_keys_of_the_loss(kind):
    assert isinstance(LossConfig(), kind)
    rows = [name for name, row in SURROGATES.items() if row.options and issubclass(row.options, kind)]
    assert rows
    own = {f.name for f in fields(kind)}
    assert own <= {f.name for f in fields(LossConfig)}
    others = {
        f.name for o in OPTIONS if not issubclass(o, kind) and not issubclass(kind, o) for f in fields(o)
    }
    assert not own & others


@dataclass(frozen=True, kw_only=True)
class Wider(ClipOptions):
    extra: float = 1.0


def widened(ratio, advantages, options: "Wider"):
    return -advantages * ratio.clamp(max=1 + options.extra * options.clip_high)


@pytest.mark.usefixtures("tables")
def test_options_that_inherit_ours_take_them_from_the_config():
    register_surrogate("mine.widened")(widened)
    check_surrogate(LossConfig("mine.widened", params={"extra": 2.0}))
    config = LossConfig("mine.widened", clip_high=0.3, params={"extra": 2.0}).resolve()
    made = config.surrogate_row.options_of(config)
    assert (made.clip_high, made.extra) == (0.3, 2.0)
    with pytest.raises(ConfigError, match="params has 'clip_high'"):
        LossConfig("mine.widened", params={"clip_high": 2.0})
    register_surrogate("mine.late", required=("width",))(widened)
    with pytest.raises(ConfigError, match=r"requirement for 'width', which is no key of model\.loss"):
        LossConfig("mine.late")
