"""The datamodule by itself and under a real Trainer: a resumed run sees the prompts it would have seen."""

import json
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_tokenizer

from grpo_lightning.data.datamodule import PromptDataModule
from grpo_lightning.data.splits import hold_out
from grpo_lightning.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"p{i}", "answer": i} for i in range(11)]


def data(dataset=None, **options):
    dataset = ROWS if dataset is None else dataset
    return PromptDataModule(
        dataset, **{"prompts_per_rollout": 4, "seed": 3, "tokenizer": TOKENIZER, **options}
    )


def uids(loader):
    return [uid for batch in loader for uid in batch.uids]


# By itself.


def test_it_works_without_a_trainer():
    module = data()
    module.setup("fit")
    first, second = module.train_dataloader()
    assert len({*first.uids, *second.uids}) == 8
    assert first.columns == {"answer": first.uids}
    assert first.micro_batches == 1
    assert module.val_dataloader() == []
    assert module.test_dataloader() == []
    module.setup("predict")
    assert uids(module.predict_dataloader()) == list(range(11))


def test_without_a_tokenizer_it_says_so():
    with pytest.raises(ConfigError, match=r"data.tokenizer is null"):
        data(tokenizer=None).setup("fit")


def test_a_stage_that_is_not_set_up_says_so():
    with pytest.raises(ConfigError, match=r"the train prompts are not set up; call setup\('fit'\)"):
        data().train_dataloader()


@pytest.mark.parametrize(
    ("validation", "test", "sizes"), [(3, None, (3, 0)), (2, 0.3, (2, 3)), (0.01, 1, (1, 1))]
)
def test_held_out_rows_are_disjoint_and_do_not_depend_on_the_seed(validation, test, sizes):
    seen = []
    for seed in (1, 2):
        module = data(validation_split=validation, test_split=test, seed=seed, prompts_per_rollout=1)
        for stage in ("fit", "test"):
            module.setup(stage)
        loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
        seen.append([sorted(uids(loader)) for loader in loaders])
    assert seen[0] == seen[1]
    assert (len(seen[0][1]), len(seen[0][2])) == sizes
    assert sorted(uid for split in seen[0] for uid in split) == list(range(11))


def test_holding_out_everything_is_refused():
    with pytest.raises(
        DataError, match=r"data.validation_split=6 and data.test_split=0.5 would leave nothing of 11"
    ):
        hold_out(11, {"validation": 6, "test": 0.5})


def test_validation_may_be_a_file_or_another_split(tmp_path):
    from datasets import Dataset, DatasetDict

    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps({"prompt": "v", "answer": 0}))
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2]))
    module = data(splits, validation_split=str(path), test_split="test")
    for stage in ("fit", "validate", "test", "predict"):
        module.setup(stage)
    (batch,) = module.val_dataloader()
    assert batch.prompts == ["v"]
    assert uids(module.test_dataloader()) == uids(module.predict_dataloader()) == [0, 1]
    assert len(uids(module.train_dataloader())) == 8


def test_validation_batches_have_their_own_size():
    module = data(validation_split=5, validation_batch_size=2)
    module.setup("validate")
    assert [len(batch) for batch in module.val_dataloader()] == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts_per_rollout": 0}, "data.prompts_per_rollout is 0; it must be at least 1"),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens is 0"),
        ({"validation_batch_size": 0}, "data.validation_batch_size is 0"),
        ({"overlong": "drp"}, r"data.overlong is 'drp' \(did you mean 'drop'\?"),
        ({"dataset": "gone.jsonl"}, "there is no file gone.jsonl"),
        ({"validation_split": "gone.jsonl"}, "there is no file gone.jsonl"),
        (
            {"validation_split": "test"},
            "data.validation_split is 'test', which is no file, and data.dataset has no",
        ),
        ({"test_split": 0}, "data.test_split is 0; give a number of rows"),
        ({"validation_split": 1.5}, "data.validation_split is 1.5; give"),
        ({"split": "test"}, "data.split is 'test', but data.dataset is an object"),
        ({"streaming": True}, "data.streaming_length is null, but data.streaming is true"),
        (
            {"streaming": True, "streaming_length": 8, "max_prompt_tokens": None},
            "data.max_prompt_tokens is null",
        ),
        (
            {"streaming": True, "streaming_length": 8, "validation_split": 2},
            "nothing can be held out of a stream",
        ),
        ({"streaming_buffer": 0}, "data.streaming_buffer is 0"),
    ],
)
def test_what_cannot_work_is_known_before_loading(options, says):
    with pytest.raises(ConfigError, match=says):
        data(**options)


def test_an_empty_dataset_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    for dataset in ([], str(path)):
        with pytest.raises(
            DataError, match=r"the dataset is empty; give a dataset with at least one usable row"
        ):
            data(dataset).setup("fit")


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": null}\n')
    with pytest.raises(DataError, match=rf"^{path}:3: the prompt is null"):
        data(str(path)).setup("fit")


def test_overlong_prompts_are_counted_and_told_once(caplog):
    rows = [{"prompt": "x" * n} for n in range(1, 8)]
    module = data(rows, max_prompt_tokens=5, overlong="drop", validation_split=1)
    with caplog.at_level(logging.INFO):
        module.setup("fit")
        module.setup("validate")
    assert module.num_dropped == 2
    assert module.num_truncated == 0
    assert module.longest_prompt == 5
    assert caplog.text.count("are longer than data.max_prompt_tokens=5: dropped") == caplog.text.count(
        "longer than"
    )
    assert "2 of 6 prompts" in caplog.text
    cut = data(rows, max_prompt_tokens=5, overlong="left-truncate")
    cut.setup("fit")
    assert (cut.num_dropped, cut.num_truncated) == (0, 2)


def test_prompts_left_over_in_each_epoch_are_told(caplog):
    module = data()
    module.setup("fit")
    with caplog.at_level(logging.INFO):
        module.train_dataloader()
    assert "3 of 11 prompts are left over in each epoch" in caplog.text


def test_the_seed_is_that_of_seed_everything_unless_given(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert data(seed=None).order_seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert data(seed=None).order_seed == 7
    assert data(seed=0).order_seed == 0


def test_a_stream_trains_but_does_not_predict():
    options = {"streaming": True, "streaming_length": 8, "max_prompt_tokens": 20}
    module = data(**options)
    module.setup("fit")
    assert module.longest_prompt == 20
    assert len(module.train_dataloader()) == 2
    assert sorted(uids(module.train_dataloader()) + uids(module.train_dataloader())) == sorted(
        2 * uids(module.train_dataloader())
    )
    with pytest.raises(ConfigError, match=r"predict needs prompts that end, but data.streaming is true"):
        data(**options).setup("predict")
    with pytest.raises(DataError, match="streamed row 0: there is no column 'prompt'"):
        data([{"q": "a"}], **options).setup("fit")


# Under a Trainer.


class Module(pl.LightningModule):
    """Remembers its batches; the weight depends on all of them and on their grouping into optimizer steps."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.tokenizer = TOKENIZER
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.rollout_index, batch.micro_batch, tuple(batch.uids)))
        return (self.weight * sum(batch.uids) - 1).square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(tuple(batch.uids))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Parts(pl.Callback):
    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def micro_batches_per_rollout(self, trainer):
        return self.micro_batches


def fit(module=None, micro_batches=1, saver=None, ckpt_path=None, datamodule=None, **options):
    module = module or Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saver is not None,
        callbacks=[Parts(micro_batches), *([saver] if saver else [])],
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule or data(tokenizer=None), ckpt_path=ckpt_path)
    return module, trainer


SAVES = {"step": {"every_n_train_steps": 1}, "epoch": {"every_n_epochs": 1}}


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 7}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("cut", [{}, {"limit_train_batches": 3}], ids=str)
def test_a_run_resumed_at_any_checkpoint_sees_the_same_prompts(
    tmp_path, limit, accumulate, micro_batches, save, cut
):
    options = {**limit, **cut, "micro_batches": micro_batches, "accumulate_grad_batches": accumulate}
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **SAVES[save])
    full, _ = fit(saver=saver, **options)
    paths = list(tmp_path.iterdir())
    assert paths
    for path in paths:
        state = torch.load(path, weights_only=True)["PromptDataModule"]["train_loader"]
        done = (state["epoch"] * 2 + state["position"] // 4) * micro_batches + state["part"]
        resumed, _ = fit(ckpt_path=str(path), **options)
        assert resumed.seen == full.seen[done:]
        assert torch.equal(resumed.weight, full.weight)


def test_validation_inside_and_at_the_end_of_an_epoch_does_not_move_the_prompts(tmp_path):
    plain, _ = fit(
        max_epochs=2, datamodule=data(validation_split=2, prompts_per_rollout=1), limit_val_batches=0
    )
    module, _ = fit(
        max_epochs=2, datamodule=data(validation_split=2, prompts_per_rollout=1), val_check_interval=3
    )
    assert module.seen == plain.seen
    assert len(module.seen) == 18
    assert len(module.validated) == 2 * 3 * 2
    assert not {uid for uids in module.validated for uid in uids} & {
        uid for _, _, uids in module.seen for uid in uids
    }


def test_a_second_fit_begins_anew_and_an_evaluated_checkpoint_leaves_no_position(tmp_path):
    datamodule = data(validation_split=2)
    first, trainer = fit(max_steps=3, datamodule=datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.validate(Module(), datamodule, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    second, _ = fit(max_steps=3, datamodule=datamodule)
    assert second.seen == first.seen


def test_resuming_with_other_data_is_refused_unless_allowed(tmp_path):
    _, trainer = fit(max_steps=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = [{"prompt": f"q{i}"} for i in range(11)]
    resume = {"ckpt_path": str(tmp_path / "x.ckpt"), "max_steps": 2}
    with pytest.raises(ConfigError, match=r"prompts whose fingerprint is .*, now it is"):
        fit(datamodule=data(other), **resume)
    module, _ = fit(datamodule=data(other, allow_changed_data=True), **resume)
    assert [index for index, _, _ in module.seen] == [1]


@pytest.mark.parametrize("flag", ["reload_dataloaders_every_n_epochs", "overfit_batches"])
def test_trainer_flags_that_upset_the_order_are_refused(flag):
    with pytest.raises(ConfigError, match=f"trainer.{flag} is 1, which would upset the order"):
        fit(max_steps=1, **{flag: 1})


def test_low_precision_leaves_prompts_as_they_are():
    module, _ = fit(max_steps=1, precision="bf16-true", micro_batches=2)
    assert module.seen == fit(max_steps=1, micro_batches=2)[0].seen


def test_a_stream_resumes_under_the_trainer(tmp_path):
    def stream():
        return data(streaming=True, streaming_length=8, streaming_buffer=5)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    full, _ = fit(max_epochs=3, micro_batches=2, accumulate_grad_batches=1, saver=saver, datamodule=stream())
    assert len(full.seen) == 12
    for path in tmp_path.iterdir():
        done = int(path.stem.removeprefix("step="))
        resumed, _ = fit(max_epochs=3, micro_batches=2, ckpt_path=str(path), datamodule=stream())
        assert resumed.seen == full.seen[done:]


# On the command line.


def test_options_parse_from_the_command_line_and_each_is_explained():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(PromptDataModule, "data")
    parsed = parser.parse_args(
        ["--data.dataset=[a.jsonl, b.jsonl]", "--data.validation_split=100", "--data.test_split=0.1"]
    ).data
    assert (parsed.dataset, parsed.validation_split, parsed.test_split) == (["a.jsonl", "b.jsonl"], 100, 0.1)
    actions = [action for action in parser._actions if action.dest.startswith("data.")]
    assert len(actions) == 23
    assert all(action.help for action in actions)
