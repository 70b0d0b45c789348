"""What a config may name: 50 hostile names stopped wherever a name is looked up, healthy ones left alone."""

import sys
from typing import Any

import pytest

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards.resolve import resolve
from grpo_lightning.utils.imports import import_object

HOSTILE = """
os.system os.popen posix.system subprocess.run subprocess.Popen pty.spawn multiprocessing.Process
code.interact builtins.eval builtins.exec builtins.open builtins.getattr importlib.import_module
runpy.run_path pydoc.locate pickle.loads pickle.load _pickle.loads marshal.loads shelve.open dill.load
dill.loads joblib.load cloudpickle.load numpy.load numpy.lib.npyio.load numpy.memmap pandas.read_pickle
pandas.eval torch.load torch.serialization.load torch.hub.load torch.hub.load_state_dict_from_url
torch.jit.load torch.utils.cpp_extension.load torch.multiprocessing.spawn torch.package.PackageImporter
lightning.fabric.utilities.cloud_io._load lightning.pytorch.utilities.migration.migrate_checkpoint
lightning.pytorch.trainer.trainer.Trainer transformers.pipeline transformers.AutoModel.from_pretrained
transformers.dynamic_module_utils.get_class_from_dynamic_module datasets.load_dataset fsspec.open
huggingface_hub.hf_hub_download urllib.request.urlopen http.server.HTTPServer smtplib.SMTP socket.socket
webbrowser.open antigravity.geohash ctypes.CDLL functools.partial functools.reduce operator.methodcaller
operator.attrgetter types.FunctionType cProfile.run profile.run trace.Trace timeit.timeit doctest.testfile
unittest.main logging.config.dictConfig logging.config.fileConfig shutil.rmtree pathlib.Path
tempfile.mkdtemp sqlite3.connect zipfile.ZipFile yaml.unsafe_load yaml.load jinja2.Template sympy.sympify
sympy.parsing.sympy_parser.parse_expr jsonargparse.set_parsing_settings pip.main setuptools.setup
peft.PeftModel.from_pretrained grpo_lightning.cli.main.run grpo_lightning.policy.loading.load_policy
grpo_lightning.utils.imports._import grpo_lightning.utils.imports.importlib.import_module
grpo_lightning.rewards.resolve.import_object grpo_lightning.data.sources.import_object
grpo_lightning.data.files.Path.unlink grpo_lightning.data.datamodule.os.system mine.os.system mine.shell
mine.half_shell mine.get mine.np.load mine.Path.unlink mine.text.format
"""

HEALTHY_FUNCTIONS = """
grpo_lightning.rewards.exact_match grpo_lightning.rewards.math_answer grpo_lightning.rewards.format_reward
grpo_lightning.data.arithmetic.sums mine.plain mine.half mine.cached mine.Judge mine.judge mine.judge.grade
mine.Judge.grade mine.wrapped mine.inner.deep code.py:plain torch.nn.Linear
"""

HEALTHY_CLASSES = """
torch.optim.AdamW torch.optim.SGD torch.optim.lr_scheduler.CosineAnnealingLR torch.optim.adamw.AdamW
lightning.pytorch.callbacks.ModelCheckpoint lightning.pytorch.callbacks.LearningRateMonitor
lightning.pytorch.callbacks.early_stopping.EarlyStopping lightning.pytorch.loggers.CSVLogger
lightning.pytorch.loggers.WandbLogger lightning.pytorch.strategies.DDPStrategy
lightning.pytorch.profilers.SimpleProfiler lightning.pytorch.plugins.MixedPrecision
lightning.pytorch.plugins.io.AsyncCheckpointIO lightning.pytorch.plugins.environments.SLURMEnvironment
lightning.pytorch.cli.ReduceLROnPlateau bitsandbytes.optim.AdamW8bit transformers.Adafactor
grpo_lightning.engines.HFEngine grpo_lightning.engines.VLLMEngine grpo_lightning.callbacks.SampleTable
grpo_lightning.RolloutCallback grpo_lightning.checkpoints.AdapterCheckpointIO mine.Judge mine.half
"""

MINE = """
import functools, os, subprocess
from functools import lru_cache, partial, wraps
from operator import attrgetter
from os import system as shell
from pathlib import Path
import numpy as np

text = "a {0}"
half_shell = partial(shell, "mkdir mark")
get = attrgetter("__class__")

def plain(completions, k=1, **_): return [1.0 for _ in completions]
half = partial(plain, k=2)
cached = lru_cache(plain)

@wraps(plain)
def wrapped(**kwargs): return plain(**kwargs)

class Judge:
    def __call__(self, completions, **_): return [1.0 for _ in completions]
    def grade(self, completions, **_): return [1.0 for _ in completions]

judge = Judge()
class inner:
    @staticmethod
    def deep(completions, **_): return [1.0 for _ in completions]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a module of the user's, and one that is named like one of Python's."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "code.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    assert not (tmp_path / "mark").exists()
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("name", HOSTILE.split())
def test_hostile_names_are_no_rewards_datasets_or_losses(name):
    for spec in (name, {"class_path": name, "init_args": {}}):
        with pytest.raises(ConfigError, match="which a config may not call"):
            resolve(spec)


@pytest.mark.parametrize("name", HEALTHY_FUNCTIONS.split())
def test_healthy_names_are_found(name):
    assert callable(import_object(name, "reward function"))


@pytest.fixture
def restricted(monkeypatch):
    """What the command line allows, for this test."""
    from jsonargparse import _common, _loaders_dumpers

    from grpo_lightning.utils.untrusted import restrict_parser

    monkeypatch.setattr(_common, "parsing_settings", dict(_common.parsing_settings))
    monkeypatch.setattr(_loaders_dumpers, "loaders", dict(_loaders_dumpers.loaders))
    restrict_parser()


@pytest.mark.usefixtures("restricted")
@pytest.mark.parametrize("name", [n for n in HOSTILE.split() if n != "mine.text.format"])
def test_hostile_names_are_no_class_paths(name):
    from jsonargparse._common import ImportDenied
    from jsonargparse._util import import_object as found_by_jsonargparse

    with pytest.raises((ImportDenied, AttributeError, ModuleNotFoundError)) as caught:
        found_by_jsonargparse(name)
    if name.partition(".")[0] != "grpo_lightning":
        assert isinstance(caught.value, ImportDenied)


@pytest.mark.usefixtures("restricted")
@pytest.mark.parametrize("name", HEALTHY_CLASSES.split())
def test_healthy_class_paths_are_found(name):
    from jsonargparse._util import import_object as found_by_jsonargparse

    pytest.importorskip(name.partition(".")[0])
    assert callable(found_by_jsonargparse(name))


@pytest.mark.usefixtures("restricted")
def test_a_class_path_inside_free_options_is_not_built():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--y", type=dict[str, Any])
    parser.add_argument("--z", type=Any)
    value = '{"class_path": "mine.Judge"}'
    made = parser.instantiate(parser.parse_args([f"--y={value}", f"--z={value}"]))
    assert made.y == {"class_path": "mine.Judge"}
    assert "Judge" not in type(made.z).__name__


def test_every_row_is_needed():
    """A row that allows what is open anyway, or closes what is closed, would mislead a reader."""
    from grpo_lightning.utils import import_rules as rules

    for row in rules.ALLOWED_CLASSES | rules.ALLOWED_FUNCTIONS:
        assert row.partition(".")[0] in rules.CLOSED, row
    libraries = rules._LIBRARIES.split()
    assert len(libraries) == len(set(libraries))
    assert not set(libraries) & set(sys.stdlib_module_names)
