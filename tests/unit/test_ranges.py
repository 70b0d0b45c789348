"""Numbers among the options: nan, infinity and what is out of range are refused by name."""

import math

import pytest
import torch

from grpo_lightning import RolloutCallback, SamplingParams
from grpo_lightning.callbacks.evaluation import ValidationConfig
from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import RECIPES, AdaptiveEntropy, AdaptiveKL, CorrectionConfig, LossConfig
from grpo_lightning.policy.finite_checks import build_optimizer
from grpo_lightning.policy.lora import lora_config
from grpo_lightning.policy.reference import ReferenceConfig
from grpo_lightning.schedulers import WarmupCosine
from grpo_lightning.utils.ranges import check_numbers

NAN, INF = math.nan, math.inf


def reward(completions, **_):
    return [0.0 for _ in completions]


def rollout(**options):
    return RolloutCallback([reward, reward], **options)


def adamw(**options):
    params = [torch.nn.Parameter(torch.ones(2))]
    return build_optimizer(lambda p: torch.optim.AdamW(p, **options), None, params)


SICK = [
    (SamplingParams, "temperature", [INF, NAN, -1.0]),
    (SamplingParams, "top_p", [NAN, 0.0, 1.5, INF]),
    (SamplingParams, "min_p", [NAN, -0.1]),
    (SamplingParams, "repetition_penalty", [INF, NAN, 0.0]),
    (SamplingParams, "extra", [{"presence_penalty": NAN}, {"logit_bias": {"7": INF}}]),
    (LossConfig, "kl_coef", [NAN, INF, -1.0]),
    (LossConfig, "clip_low", [NAN, INF, -0.1]),
    (LossConfig, "clip_high", [NAN, -INF, -0.1]),
    (LossConfig, "entropy_coef", [NAN, INF]),
    (LossConfig, "cispo_weight_max", [NAN]),
    (LossConfig, "vespo_k_pos", [NAN, INF, -1.0]),
    (LossConfig, "kl_cov_coef", [NAN, INF, -1.0]),
    (LossConfig, "fipo_range", [NAN, INF, -1.0]),
    (LossConfig, "fipo_rho_max", [NAN, 0.0]),
    (LossConfig, "dppo_high", [NAN, -1.0]),
    (LossConfig, "sapo_tau_neg", [INF]),
    (LossConfig, "real_tau", [INF]),
    (LossConfig, "off_policy_threshold", [NAN]),
    (LossConfig, "params", [{"width": NAN}]),
    (AdaptiveEntropy, "target", [NAN, INF]),
    (AdaptiveEntropy, "delta", [NAN]),
    (AdaptiveEntropy, "max", [INF]),
    (AdaptiveKL, "target", [NAN, INF]),
    (CorrectionConfig, "low", [NAN]),
    (CorrectionConfig, "high", [NAN]),
    (ReferenceConfig, "ema_alpha", [NAN, 1.5, 0.0, -INF]),
    (ValidationConfig, "pass_threshold", [NAN, INF]),
    (rollout, "advantage_clip", [(1.0, -1.0), (0.5, 1.0), (0.0, 0.0), (NAN, 1.0), (None, INF)]),
    (rollout, "reward_weights", [[0.0, 0.0], [NAN, 1.0], [INF, 1.0]]),
    (adamw, "lr", [INF, NAN, -1.0]),
    (adamw, "weight_decay", [NAN, INF]),
    (adamw, "eps", [INF]),
    (adamw, "betas", [(0.9, 1.5)]),
]


@pytest.mark.parametrize(
    ("make", "key", "value"), [(make, key, value) for make, key, values in SICK for value in values]
)
def test_numbers_that_cannot_work(make, key, value):
    with pytest.raises(ConfigError) as error:
        make(**{key: value})
    assert key in str(error.value) or "Invalid" in str(error.value)  # torch's words for what it refuses
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("lora_alpha", NAN), ("lora_alpha", 0), ("lora_dropout", NAN), ("lora_dropout", 1.0)]
)
def test_numbers_of_an_adapter(key, value):
    from peft import LoraConfig

    for given in ({"r": 4, key: value}, LoraConfig(r=4, **{key: value})):
        with pytest.raises(ConfigError, match=rf"model\.lora\.{key} is"):
            lora_config(given)


def test_a_schedule_that_ends_nowhere():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for value in (NAN, INF, -1.0):
        with pytest.raises(ConfigError, match=r"WarmupCosine\.final_ratio"):
            WarmupCosine(optimizer, 10, final_ratio=value)


@pytest.mark.parametrize("factor", [NAN, INF])
def test_a_schedule_that_ruins_the_rate(factor):
    params = [torch.nn.Parameter(torch.ones(2))]

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor)

    with pytest.raises(ConfigError, match=r"model\.optimizer\.lr is (nan|inf)"):
        build_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-3), schedule, params)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        *((LossConfig, {"name": name, "dro_coef": 0.1}) for name in RECIPES),
        (LossConfig, {"clip_high": INF}),
        (LossConfig, {"dual_clip": INF}),
        (LossConfig, {"cispo_weight_max": INF}),
        (LossConfig, {"name": "examples/custom_loss.py:tanh_clip", "params": {"width": INF}}),
        (CorrectionConfig, {"high": INF}),
        (SamplingParams, {"temperature": 0.0}),
        (SamplingParams, {"top_p": 1.0, "min_p": 0.0, "extra": {"stop": ["a"], "logit_bias": {"7": -100.0}}}),
        (rollout, {"advantage_clip": (None, 5.0)}),
        (rollout, {"advantage_clip": (0.0, None)}),
        (rollout, {"advantage_clip": (-5.0, 5.0)}),
        (rollout, {"reward_weights": [0.0, 1.0]}),
        (rollout, {"reward_weights": [-1.0, 0.0]}),
        (ReferenceConfig, {"ema_alpha": 1.0}),
        (adamw, {"lr": 0.0}),
        (adamw, {"lr": torch.tensor(1e-3)}),
        (lora_config, {"lora": {"r": 1, "lora_alpha": 1, "rank_pattern": {"q_proj": 2}}}),
    ],
)
def test_what_works_is_left_alone(make, options):
    assert make(**options) is not None


def test_numbers_are_found_in_lists_and_mappings():
    with pytest.raises(ConfigError, match=r"^a\.b\.1\.c is nan; it must be a finite number$"):
        check_numbers("a", {"b": [1, {"c": NAN}]})
    with pytest.raises(ConfigError, match=r"^a\.b is inf"):
        check_numbers("a", {"b": 10**400})
    check_numbers("a", {"b": [1, True, "nan", None, {"c": 2.0}]})


@pytest.mark.parametrize("key", ["sapo_tau_pos", "vespo_k_pos", "log_clip_low", "real_tau", "entropy_coef"])
def test_null_is_no_number_where_a_number_is_the_default(key):
    with pytest.raises(ConfigError, match=f"model.loss.{key} is None; it must be"):
        LossConfig("dapo", **{key: None})
    assert LossConfig("dapo", clip_high=None, dro_coef=None, dppo_low=None).resolve().clip_high == 0.28
