"""A resume does what its command says, over the same model and data, or does not begin."""

import json
import os
import shutil

import pytest
import torch
from fits import data, module, rollout, same_bits, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from models import save_tiny
from stops import config, fit
from tiny import tiny_tokenizer
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import AdaptiveEntropy, LossConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def saved(folder, name="last.ckpt"):
    return torch.load(folder / "ckpt" / name, weights_only=True)


def into_ckpt(folder):
    saver = {"dirpath": str(folder / "ckpt"), "every_n_train_steps": 1, "save_last": True}
    return [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}]


def test_the_command_lines_optimizer_is_the_one_that_steps(model, tmp_path):
    """Read in the checkpoint that the resumed run writes."""
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}
    config(
        model,
        tmp_path,
        trainer__callbacks=into_ckpt(tmp_path),
        trainer__max_steps=2,
        model__scheduler=schedule,
    )
    assert fit(tmp_path).code == 0
    args = ["--trainer.max_steps", "3", "--model.optimizer.init_args.lr", "0.5"]
    args += [
        "--model.optimizer.init_args.weight_decay",
        "0.25",
        "--model.optimizer.init_args.betas",
        "[0.5,0.6]",
    ]
    args += ["--model.optimizer.init_args.eps", "0.001"]
    done = fit(tmp_path, "--ckpt_path", "last", *args)
    assert done.code == 0, done.err
    (group,) = saved(tmp_path)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.05  # a tenth after two steps, as in a run that had it from its start
    assert (group["weight_decay"], group["eps"], list(group["betas"])) == (0.25, 0.001, [0.5, 0.6])
    assert saved(tmp_path)["optimizer_states"][0]["state"][0]["step"] == 3
    said = done.out + done.err
    assert "the optimizer's lr is now 0.5, was 0.01" in said
    assert "the learning rate at optimizer step 2 is 0.05" in said
    files = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    refused = fit(tmp_path, "--ckpt_path", "last", "--model.optimizer", "torch.optim.SGD")
    assert refused.code == 2, refused.err
    assert "error: --ckpt_path: model.optimizer is torch.optim.adamw.AdamW in the checkpoint" in refused.err
    assert files == sorted(p.name for p in (tmp_path / "ckpt").iterdir())


def checkpoint(folder, tmp_path, **changes):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    m = module(folder, **changes)
    trainer(tmp_path, rollout(), saver, max_steps=4).fit(m, data())
    return weights(m)


def test_an_unchanged_schedule_and_adaptive_loss_go_on_to_the_last_bit(model, tmp_path):
    loss = LossConfig("dapo", adaptive_entropy=AdaptiveEntropy(target=100.0, delta=0.25, max=0.6))

    def scheduled(optimizer):
        return CosineAnnealingLR(optimizer, T_max=3)

    whole = checkpoint(model, tmp_path / "a", loss=loss, scheduler=scheduled)
    m = module(model, loss=loss, scheduler=scheduled)
    t = trainer(tmp_path / "b", rollout(), max_steps=4)
    t.fit(m, data(), ckpt_path=tmp_path / "a" / "step=2.ckpt")
    assert same_bits(whole, weights(m))


def test_a_python_program_resumes_with_the_optimizer_it_names(model, tmp_path):
    checkpoint(model, tmp_path / "a")

    def other(params):
        return AdamW(params, lr=3e-3, weight_decay=0.1)

    t = trainer(tmp_path / "b", rollout(), max_steps=3)
    t.fit(module(model, optimizer=other), data(), ckpt_path=tmp_path / "a" / "step=2.ckpt")
    (group,) = t.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.1)
    assert next(iter(t.optimizers[0].state.values()))["step"] == 3


def swap_weights(folder):
    other = save_tiny(folder.parent / "other", initializer_range=0.16)
    shutil.copy(f"{other}/model.safetensors", folder / "model.safetensors")


def swap_one_number(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))


def swap_template(folder):
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.save_pretrained(folder)


PATCH_RULES = {
    swap_weights: r"model\.safetensors of model\.model_name or model\.tokenizer is another one here",
    swap_one_number: r"config\.json of",
    swap_template: r"chat_template\.jinja of|tokenizer_config\.json of",
}


@pytest.mark.parametrize("swap", PATCH_RULES)
def test_the_same_path_with_other_files_is_refused_by_their_name(tmp_path, swap):
    folder = tmp_path / "model"
    save_tiny(folder)
    checkpoint(str(folder), tmp_path / "a")
    swap(folder)
    with pytest.raises(ConfigError, match=PATCH_RULES[swap]):
        trainer(tmp_path / "b", rollout()).fit(
            module(str(folder)), data(), ckpt_path=tmp_path / "a" / "step=2.ckpt"
        )


def test_a_model_that_moved_is_still_the_model(model, tmp_path):
    whole = checkpoint(model, tmp_path / "a")
    moved = shutil.copytree(model, tmp_path / "moved")
    m = module(str(moved))
    trainer(tmp_path / "b", rollout(), max_steps=4).fit(m, data(), ckpt_path=tmp_path / "a" / "step=2.ckpt")
    assert same_bits(whole, weights(m))


def test_other_rows_in_the_same_file_are_refused(model, tmp_path):
    config(model, tmp_path, trainer__callbacks=into_ckpt(tmp_path), trainer__max_steps=2)
    assert fit(tmp_path).code == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("say 7", "say x"))
    done = fit(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert done.code == 2, done.err
    assert "fingerprint" in done.err


def test_last_without_a_checkpoint_does_not_start_anew_and_writes_nothing(model, tmp_path):
    tmp_path /= "runs/one"  # a folder of its own: runs beside it would be named
    config(
        model, tmp_path, trainer__callbacks=into_ckpt(tmp_path), trainer__max_steps=1, trainer__logger=True
    )
    before = {p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)}
    done = fit(tmp_path, "--ckpt_path", "last")
    assert done.code == 2, done.err
    assert f"there is no checkpoint in {tmp_path / 'ckpt'}; name a file, or take auto" in done.err
    left = {p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)} - before
    assert {p.name for p in left} <= {".out", ".err"}


@pytest.mark.parametrize("asked", ["last", "auto", "gone.ckpt"])
def test_a_link_to_nothing_and_a_folder_that_moved_are_errors(model, tmp_path, asked):
    config(model, tmp_path, trainer__callbacks=into_ckpt(tmp_path))
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "last.ckpt").symlink_to("/moved/away/step=3.ckpt")
    done = fit(tmp_path, "--ckpt_path", asked)
    assert done.code == (2 if asked == "gone.ckpt" else 1), done.err
    assert (
        "gone.ckpt" if asked == "gone.ckpt" else "last.ckpt is a link to /moved/away/step=3.ckpt"
    ) in done.err
    assert not (tmp_path / "run").exists()


def test_auto_starts_the_first_time_and_goes_on_the_second(model, tmp_path):
    config(model, tmp_path, trainer__callbacks=into_ckpt(tmp_path), trainer__max_steps=1)
    first = fit(tmp_path, "--ckpt_path", "auto")
    assert first.code == 0, first.err
    assert "starting from step 0" in first.out + first.err
    second = fit(tmp_path, "--ckpt_path", "auto", "--trainer.max_steps", "2")
    assert second.code == 0, second.err
    assert saved(tmp_path)["global_step"] == 2
    assert "starting from step 0" not in second.out + second.err


@pytest.mark.parametrize("asked", ["last", "nowhere.ckpt"])
def test_a_python_program_is_told_too(model, tmp_path, asked):
    saver = ModelCheckpoint(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is no checkpoint in|there is no such file: .*nowhere\.ckpt"):
        trainer(tmp_path, rollout(), saver).fit(module(model), data(), ckpt_path=asked)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__dataset": "missing.jsonl"},
        {"rollout__sampling": {"max_tokens": 300}},
        {"model__model_name": "./nowhere"},
        {"trainer__precision": "bf16-true", "model__lora": None},
    ],
)
def test_a_refused_run_writes_no_folder(model, tmp_path, changes):
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "run")},
    }
    config(model, tmp_path, trainer__logger=logger, **changes)
    done = fit(tmp_path)
    assert done.code == 2, done.err
    assert not (tmp_path / "run").exists()
