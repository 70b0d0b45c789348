"""Options of now, state of then: read in the optimizer, not in what is printed."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR, StepLR

from grpo_lightning.checkpoints.resume import describe, take_over_optimizer
from grpo_lightning.errors import ConfigError
from grpo_lightning.policy.model_files import contents
from grpo_lightning.schedulers import WarmupCosine

STEPS, WHOLE = 7, 12


def adam(lr=0.1, **options):
    return lambda params: AdamW(params, **{"lr": lr, "weight_decay": 0.0, **options})


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, T_max=20)


def stairs(optimizer):
    return StepLR(optimizer, step_size=3, gamma=0.5)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.3, total_steps=20)


def sequence(optimizer):
    parts = [LambdaLR(optimizer, lambda step: (step + 1) / 4), CosineAnnealingLR(optimizer, T_max=9)]
    return SequentialLR(optimizer, parts, milestones=[4])


def warmup(optimizer):
    return WarmupCosine(optimizer, total_steps=20, warmup_steps=3)


SCHEDULES = [None, cosine, stairs, one_cycle, sequence, warmup]


class Run:
    """A few weights, an optimizer and a schedule, stepped as Lightning does."""

    def __init__(self, optimizer, schedule=None):
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(5))
        trainable = {"w": self.weight}
        self.module = SimpleNamespace(
            make_optimizer=optimizer,
            make_scheduler=schedule,
            policy=SimpleNamespace(trainable=lambda: trainable),
        )
        self.optimizer = optimizer(trainable.values())
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.steps, self.rates = 0, []

    def go(self, upto):
        while self.steps < upto:
            generator = torch.Generator().manual_seed(self.steps)
            self.weight.grad = torch.randn(5, generator=generator)
            self.optimizer.step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            if self.schedule is not None:
                self.schedule.step()
            self.steps += 1
        return self

    def checkpoint(self):
        return {
            "global_step": self.steps,
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [] if self.schedule is None else [self.schedule.state_dict()],
        }

    def resume(self, then):
        """Takes over another run as Lightning does after `take_over_optimizer`."""
        saved = then.checkpoint()
        take_over_optimizer(self.module, saved, describe(then.module))
        self.optimizer.load_state_dict(saved["optimizer_states"][0])
        for state in saved["lr_schedulers"][: self.schedule is not None]:
            self.schedule.load_state_dict(state)
        self.weight.data.copy_(then.weight.data)
        self.steps = then.steps
        return self


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_unchanged_config_goes_on_to_the_last_bit(schedule):
    whole = Run(adam(), schedule).go(WHOLE)
    resumed = Run(adam(), schedule).resume(Run(adam(), schedule).go(STEPS)).go(WHOLE)
    assert torch.equal(whole.weight, resumed.weight)
    assert whole.rates[STEPS:] == resumed.rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_new_learning_rate_is_that_of_a_run_which_always_had_it(schedule):
    then = Run(adam(0.1), schedule).go(STEPS)
    moments = then.optimizer.state[then.weight]["exp_avg"].clone()
    resumed = Run(adam(0.02), schedule).resume(then)
    assert torch.equal(resumed.optimizer.state[resumed.weight]["exp_avg"], moments)
    assert resumed.optimizer.state[resumed.weight]["step"] == STEPS
    assert resumed.go(WHOLE).rates == Run(adam(0.02), schedule).go(WHOLE).rates[STEPS:]


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.3}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}, {"maximize": True}]
)
@pytest.mark.parametrize("schedule", [None, cosine])
def test_another_option_acts_and_the_rate_stays(change, schedule):
    then = Run(adam(), schedule).go(STEPS)
    resumed = Run(adam(**change), schedule).resume(then)
    (key,) = change
    assert resumed.optimizer.param_groups[0][key] == change[key]
    assert resumed.go(WHOLE).rates == Run(adam(), schedule).go(WHOLE).rates[STEPS:]
    assert not torch.equal(resumed.weight, Run(adam(), schedule).go(WHOLE).weight)


@pytest.mark.parametrize("old", SCHEDULES)
@pytest.mark.parametrize("new", SCHEDULES)
def test_another_schedule_is_as_if_it_had_always_been(old, new):
    resumed = Run(adam(), new).resume(Run(adam(), old).go(STEPS))
    assert resumed.go(WHOLE).rates == Run(adam(), new).go(WHOLE).rates[STEPS:]


def test_an_option_of_the_schedule_alone():
    longer = lambda optimizer: WarmupCosine(optimizer, total_steps=40, warmup_steps=3)  # noqa: E731
    resumed = Run(adam(), longer).resume(Run(adam(), warmup).go(STEPS))
    assert resumed.optimizer.param_groups[0]["lr"] == Run(adam(), longer).go(STEPS + 1).rates[-1]


def test_what_somebody_set_by_hand_stays_if_the_config_does():
    then = Run(adam()).go(STEPS)
    then.optimizer.param_groups[0]["lr"] = 0.033
    assert Run(adam()).resume(then).optimizer.param_groups[0]["lr"] == 0.033


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (adam(), lambda p: SGD(p, lr=0.1), r"model\.optimizer is .*AdamW in the checkpoint and .*SGD"),
        (adam(), adam(amsgrad=True), "amsgrad is False in the checkpoint, which has no max_exp_avg_sq"),
        (lambda p: RMSprop(p), lambda p: RMSprop(p, momentum=0.9), "momentum is 0"),
        (adam(), lambda p: AdamW([{"params": [x]} for x in [*p, torch.zeros(1)]]), "1 groups .* and 2"),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(old, new, match):
    with pytest.raises(ConfigError, match=match):
        Run(new).resume(Run(old).go(STEPS)) if "groups" not in match else take_over_optimizer(
            Run(adam()).module.__class__(
                make_optimizer=new,
                make_scheduler=None,
                policy=SimpleNamespace(trainable=lambda: {"w": torch.zeros(2)}),
            ),
            Run(old).go(STEPS).checkpoint(),
            describe(Run(old).module),
        )


def test_the_words_are_what_happens(capsys, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    Run(adam(0.05, weight_decay=0.3), cosine).resume(Run(adam(), cosine).go(STEPS))
    said = caplog.text + capsys.readouterr().err
    assert "the optimizer's lr is now 0.05, was 0.1" in said
    assert "weight_decay is now 0.3, was 0.0" in said
    rate = Run(adam(0.05), cosine).go(STEPS + 1).rates[-1]
    assert f"the learning rate at optimizer step {STEPS} is {rate:.3g}" in said


def shards(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(300, 41, generator=g) for i in range(6)} | {"norm": torch.ones(9)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1, "transformers_version": "5.0"}')
    (folder / "tokenizer.json").write_text("{}")
    return tensors


@pytest.mark.parametrize("name", ["layer.0", "layer.5", "norm"])
def test_weights_of_which_one_tensor_is_another_are_other_weights(tmp_path, name):
    from safetensors.torch import save_file

    tensors = shards(tmp_path / "a")
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "a")
    tensors[name] += 1e-3
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    changed = contents(tmp_path / "a")
    assert {k for k in before if before[k] != changed[k]} == {"model.safetensors"}


def test_a_copy_elsewhere_is_the_same_model_and_so_is_one_that_a_later_release_wrote(tmp_path):
    shards(tmp_path / "a")
    shards(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"transformers_version": "5.9", "a": 1}')
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ x }}")
    assert contents(tmp_path / "a") != contents(tmp_path / "b")


def test_other_files_of_weights_are_sampled_too(tmp_path):
    data = bytearray(torch.arange(50_000).numpy().tobytes())
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    before = contents(tmp_path)
    data[-1] ^= 1
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    assert contents(tmp_path) != before
