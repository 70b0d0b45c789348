"""One line for every error: which option it is about, and what Python's keywords are told."""

import inspect
from dataclasses import replace

import pytest

from grpo_lightning import GRPOModule, PromptDataModule, RolloutCallback, SamplingParams
from grpo_lightning.callbacks import RunReport, SampleTable, ValidationConfig
from grpo_lightning.cli.faults import blamed, differing, explained, named
from grpo_lightning.cli.usage import condensed
from grpo_lightning.engines import HFEngine, ReplayEngine, VLLMEngine
from grpo_lightning.errors import ConfigError, GRPOError, UnknownOption
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import AdaptiveEntropy, AdaptiveKL, CorrectionConfig, LossConfig
from grpo_lightning.policy.reference import ReferenceConfig
from grpo_lightning.rewards import FormatReward

PUBLIC = (
    GRPOModule, PromptDataModule, RolloutCallback, SamplingParams, RunReport, SampleTable, ValidationConfig,
    KernelConfig, AdaptiveEntropy, AdaptiveKL, CorrectionConfig, LossConfig, ReferenceConfig, FormatReward,
    HFEngine, ReplayEngine, VLLMEngine,
)  # fmt: skip


@pytest.mark.parametrize("cls", PUBLIC)
def test_an_unknown_keyword_is_named(cls):
    with pytest.raises(
        UnknownOption, match=f"{cls.__name__} has no option 'num_train_epochs': .*max_epochs here"
    ):
        cls(num_train_epochs=3)
    assert issubclass(UnknownOption, ConfigError)
    assert issubclass(UnknownOption, TypeError)
    names = inspect.signature(cls).parameters
    assert inspect.Parameter.VAR_KEYWORD not in {p.kind for p in names.values()}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RolloutCallback(beta=0.1), "'beta' is model.loss.kl_coef here"),
        (
            lambda: GRPOModule(learning_rate=1, lorra=2),
            "init_args.lr here; GRPOModule .* did you mean 'lora'",
        ),
        (lambda: PromptDataModule(train_dataset=[]), "'train_dataset' is data.dataset here"),
        (lambda: LossConfig(epsilon=0.2), "'epsilon' is model.loss.clip_low here"),
        (lambda: replace(LossConfig(), epsilon=0.2), "'epsilon' is model.loss.clip_low here"),
        (lambda: VLLMEngine(nothing=1), "it has sync, gpu_memory_utilization"),
        (lambda: SamplingParams(max_new_tokens=3), "'max_new_tokens' is rollout.sampling.max_tokens here"),
    ],
)
def test_keywords_get_the_hints_of_the_command_line(make, match):
    with pytest.raises(UnknownOption, match=match):
        make()


def test_known_keywords_pass():
    assert SamplingParams(temperature=0.5).temperature == 0.5
    assert replace(LossConfig(), kl_coef=0.1).kl_coef == 0.1
    assert str(inspect.signature(HFEngine)) == "(batch_size: int | None = None) -> None"


def fails(r, alpha):
    raise ValueError("no good")


GIVEN = {"model.lora.r": 5, "model.lora.alpha": "much", "trainer.precision": "fp7", "data.dataset": "x.jsonl"}


@pytest.mark.parametrize(
    ("call", "keys"),
    [
        (lambda: fails(5, 3), ["model.lora.r"]),
        (lambda: fails(5, "much"), ["model.lora.r", "model.lora.alpha"]),
        (lambda: fails(6, 3), []),
        (lambda: [].index("fp7 is none"), ["trainer.precision"]),
        (lambda: int("`precision` is wrong"), ["trainer.precision"]),
        (lambda: int("a dataset of precision"), []),
    ],
)
def test_the_option_is_known_by_name_value_or_argument(call, keys):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - any
        call()
    error = caught.value
    frames = [entry.frame for entry in caught.traceback]
    assert blamed(error, [f._raw if hasattr(f, "_raw") else f.raw for f in frames], GIVEN) == keys
    made = named(error, GIVEN)
    assert isinstance(made, ConfigError) == bool(keys)
    assert "\n" not in str(made)
    assert "ValueError" in str(made)


def test_errors_of_ours_pass_as_they_are():
    with pytest.raises(GRPOError, match=r"^ours$") as caught, explained(lambda: GIVEN):
        raise GRPOError("ours")
    assert type(caught.value) is GRPOError
    with pytest.raises(KeyboardInterrupt), explained(lambda: GIVEN):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), explained(lambda: GIVEN):
        raise SystemExit(3)


def test_what_differs_is_found_in_lists_of_classes_too():
    usual = {"a": {"b": 1, "c": None}, "l": [{"x": 1}]}
    assert differing({"a": {"b": 1, "c": 2}, "l": [{"x": 2}]}, usual) == {"a.c": 2, "l.0.x": 2}
    assert differing(usual, usual) == {}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc",
            "trainer.max_steps is 'abc': Expected a int",
        ),
        (f'Parser key "a.b": Expected x. Got value: {"y" * 10_000}', "(10000 characters)"),
        (
            "Parser key \"model.optimizer\": Dict must have a class, but got NestedArg(key='lr', val='2')",
            "model.optimizer.init_args.lr needs model.optimizer.class_path",
        ),
    ],
)
def test_a_parsers_message_is_one_short_line(message, line):
    made = condensed(message)
    assert line in made
    assert "\n" not in made
    assert len(made) < 400
