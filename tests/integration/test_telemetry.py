"""What fails while logs are written is said once and ends no run; a disk that is full, too."""

import json
import warnings

import pyarrow.parquet as pq
import pytest
from commands import command
from fits import data, module, rollout, rows_of, same_bits, trainer, vowels, weights
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from grpo_lightning.callbacks import SampleTable
from grpo_lightning.engines import replay as recording
from grpo_lightning.errors import RewardError


class Broken(Logger):
    """Fails where it is told to; `calls` counts what reached it."""

    def __init__(self, *where):
        super().__init__()
        self.where, self.calls = where, []

    def _do(self, what):
        self.calls.append(what)
        if what in self.where:
            raise OSError(28, "No space left on device", f"/logs/{what}")

    name = version = "broken"

    @property
    def experiment(self):
        self._do("experiment")
        return self

    def log_metrics(self, metrics, step=None):
        self._do("log_metrics")

    def log_hyperparams(self, params, *args, **kwargs):
        self._do("log_hyperparams")

    def log_table(self, key, **_):
        self._do("log_table")

    def save(self):
        self._do("save")

    def after_save_checkpoint(self, callback):
        self._do("after_save_checkpoint")

    def finalize(self, status):
        self._do("finalize")


def fit(folder, root, *callbacks, m=None, **changes):
    """Returns (trainer, module, warnings of ours)."""
    m = m or module(folder)
    t = trainer(root, *callbacks, **changes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.fit(m, data())
    return t, m, [str(w.message) for w in said if "training goes on" in str(w.message)]


@pytest.mark.parametrize(
    "where", ["experiment", "log_metrics", "log_hyperparams", "save", "finalize", "log_table"]
)
def test_a_failing_logger_is_said_once(model_folder, tmp_path, where):
    whole = fit(model_folder, tmp_path / "a", rollout())
    broken = Broken(where)
    loggers = [broken, CSVLogger(tmp_path, name="logs", version=0)]
    t, m, said = fit(model_folder, tmp_path / "b", rollout(), LearningRateMonitor(), logger=loggers)
    if where in ("log_table", "log_hyperparams"):  # what a user's callback calls
        with pytest.warns(UserWarning, match=f"Broken failed to {where}"):
            getattr(t.logger, where)("samples")
    else:
        assert len(said) == 1
        doing = "start" if where == "experiment" else where
        assert said[0].startswith(f"Broken failed to {doing} (OSError: [Errno 28] No space left on device")
    assert t.global_step == 3
    assert same_bits(weights(m), weights(whole[1]))
    assert len([r for r in rows_of(tmp_path) if r["reward"]]) == 3
    assert isinstance(t.logger, Broken)
    if where == "experiment":
        assert set(broken.calls) == {"experiment"}
        assert len(broken.calls) == 1


def test_a_logger_that_works_gets_everything(model_folder, tmp_path):
    logger = Broken()
    _, _, said = fit(model_folder, tmp_path, rollout(), logger=logger)
    assert not said
    assert logger.calls.count("log_metrics") == 3
    assert {"experiment", "save", "finalize"} <= set(logger.calls)


def test_a_logger_without_its_package_or_options_is_an_error_at_once(model_folder, tmp_path):
    with pytest.raises(TypeError, match="save_dir"):
        CSVLogger()


def test_an_error_of_the_run_is_not_hidden_by_a_logger(model_folder, tmp_path):
    def failing(completions, **_):
        raise KeyError("answer")

    t = trainer(tmp_path, rollout(reward_funcs=[failing]), logger=Broken("finalize"))
    with (
        pytest.warns(UserWarning, match="Broken failed to finalize"),
        pytest.raises(RewardError, match="failing"),
    ):
        t.fit(module(model_folder), data())


def test_columns_that_come_and_go(model_folder, tmp_path):
    """A row holds what was measured then; earlier rows survive a new column."""
    calls = []

    def moody(completions, log_metric, **_):
        calls.append(1)
        log_metric(f"moody/{len(calls)}", 7.0)
        return vowels(completions)

    fit(model_folder, tmp_path, rollout(reward_funcs=[moody]))
    rows = [r for r in rows_of(tmp_path) if r["reward"]]
    assert [[r[f"moody/{i}"] for i in (1, 2, 3)] for r in rows] == [
        ["7.0", "", ""],
        ["", "7.0", ""],
        ["", "", "7.0"],
    ]


def mixed(completions, log_extra, **_):
    log_extra("parts", [1, "two", None, 3.0, object()] * 3 + ["x"])
    return vowels(completions)


def test_mixed_types_in_log_extra(model_folder, tmp_path):
    t = trainer(tmp_path, rollout(reward_funcs=[mixed]), SampleTable(every_n_steps=1))
    with pytest.warns(UserWarning, match="column 'parts' as text"):
        t.fit(module(model_folder), data())
    assert t.global_step == 3
    table = pq.read_table(tmp_path / "completions" / "completions-000002-rank0.parquet").to_pydict()
    assert table["parts"][:4] == ["1", "two", None, "3.0"]
    assert all(isinstance(r, float) for r in table["reward"])


@pytest.mark.parametrize("what", ["SampleTable", "rollout.record_to"])
def test_a_full_disk_under_parquet_files(model_folder, tmp_path, monkeypatch, what):
    def full(table, path):
        path.write_bytes(b"PAR1 half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    folder = tmp_path / "files"
    r = rollout(record_to=str(folder) if what == "rollout.record_to" else None)
    table = [SampleTable(every_n_steps=1, folder=str(folder))] if what == "SampleTable" else []
    t, _, said = fit(model_folder, tmp_path, r, *table)
    assert t.global_step == 3
    assert len(said) == 1
    assert said[0].startswith(f"{what} failed to write")
    assert "No space left" in said[0]
    assert list(folder.iterdir()) == []


def test_a_table_that_cannot_be_printed(model_folder, tmp_path):
    class Closed:
        def __str__(self):
            raise ValueError("I/O operation on closed file")

    def closed(completions, log_extra, **_):
        log_extra("note", [Closed()] * len(completions))
        return vowels(completions)

    r = rollout(reward_funcs=[closed])
    t, _, said = fit(model_folder, tmp_path, r, SampleTable(every_n_steps=1, folder=None))
    assert t.global_step == 3
    assert [s.split(" (")[0] for s in said] == ["SampleTable failed to print samples"]


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "rows.parquet"
    recording.write_parquet(path, {"a": [1, 2]})
    with pytest.raises(Exception, match="convert"):
        recording.write_parquet(path, {"a": [1, object()]})
    assert pq.read_table(path).to_pydict() == {"a": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_the_command_ends_with_0(model_folder, tmp_path):
    """/dev/full takes no byte: the folder of the logs is there, and every write to it fails."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    (tmp_path / "logs" / "version_0" / "metrics.csv").symlink_to("/dev/full")
    (tmp_path / "loggers.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n"
        "class Full(CSVLogger):\n"
        "    def save(self):\n"
        "        open('/dev/full', 'w').write('x' * 9999)\n"
        "def length(completions, **_):\n"
        "    return [len(c) for c in completions]\n"
    )
    done = command(
        "fit",
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "2"),
        *("--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.enable_checkpointing", "false"),
        *("--trainer.logger", "loggers.Full", "--trainer.logger.save_dir", str(tmp_path / "run")),
        *("--model.model_name", model_folder, "--model.lora", "{r: 4}"),
        *("--data.dataset", str(tmp_path / "rows.jsonl"), "--data.prompts_per_rollout", "4"),
        *("--rollout.reward_funcs+=loggers.length", "--rollout.sampling.max_tokens", "4"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert done.err.count("Full failed to save (OSError: [Errno 28] No space left on device)") == 1
