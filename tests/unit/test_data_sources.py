"""Rows from files, objects, functions and the hub; each malformed one is named by file and line."""

import json
import sys
import types

import pytest

from grpo_lightning.data.sources import load_rows
from grpo_lightning.errors import ConfigError, DataError

ROWS = [{"prompt": "a", "answer": 1, "meta": {"n": [1]}}, {"prompt": "b", "answer": 2, "meta": {"n": [2]}}]


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_rows_keep_their_types_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) + "\n" for row in ROWS))
    rows = load_rows(str(path))
    assert list(rows) == ROWS
    assert rows.places == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "b"', "malformed JSON, Expecting ',' delimiter at column 15"),
        (b"[1, 2]", "expected an object with named columns, got list"),
        (b'{"prompt": "\xff"}', "invalid start byte at byte 12; save the file as UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, says):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        load_rows(str(path))
    assert str(error.value).startswith(f"{path}:2: {says}")


def test_several_files_follow_one_another(tmp_path):
    paths = [jsonl(tmp_path / "a.jsonl", ROWS[1:]), jsonl(tmp_path / "b.jsonl", ROWS[:1])]
    assert list(load_rows(paths)) == [ROWS[1], ROWS[0]]
    with pytest.raises(DataError, match=r"'openai/gsm8k' is not a file"):
        load_rows([paths[0], "openai/gsm8k"])


@pytest.mark.parametrize("content", [ROWS, {"version": 1, "rows": ROWS}])
def test_json_is_a_list_or_an_object_with_one_list(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert list(load_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": [], "b": []}', r"has 2 lists \(a, b\)"),
        ("3", "expected a list of objects, got int"),
        ("[1]", "x.json, item 0: expected an object"),
        ('[\n{"a" 1}]', "Expecting ':' delimiter at line 2, column 6"),
    ],
)
def test_other_json_is_refused(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        load_rows(str(path))


def test_csv_fields_are_strings_and_options_reach_the_reader(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt;answer\n"a\nb";1\n')
    assert list(load_rows(str(path), dataset_kwargs={"delimiter": ";"})) == [
        {"prompt": "a\nb", "answer": "1"}
    ]
    with pytest.raises(DataError, match=r"data.dataset_kwargs has sep, but .*x.csv takes delimiter"):
        load_rows(str(path), dataset_kwargs={"sep": ";"})


@pytest.mark.parametrize(("line", "found"), [("b,2,3", 3), ("b", 1)])
def test_a_csv_line_with_a_field_too_many_or_too_few_is_named(tmp_path, line, found):
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,answer\na,1\n{line}\n")
    with pytest.raises(DataError, match=rf"x.csv:3: {found} fields where the header has 2"):
        load_rows(str(path))


def test_parquet_is_read_and_a_broken_one_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(tmp_path / "x.parquet")
    assert list(load_rows(str(tmp_path / "x.parquet"))) == ROWS
    broken = tmp_path / "broken.parquet"
    broken.write_text("nonsense")
    with pytest.raises(DataError, match=r"broken.parquet .* cannot be loaded: Parquet magic bytes"):
        load_rows(str(broken))


def test_a_missing_file_is_named_with_what_stands_beside_it(tmp_path):
    jsonl(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=rf"no file .*trian.jsonl \({tmp_path} has train.jsonl\)"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=rf"\({tmp_path} has train.jsonl\)"):
        load_rows(str(tmp_path / "nowhere" / "x.csv"))
    with pytest.raises(DataError, match=r"there is no ./data.txt; give a file that ends with .jsonl"):
        load_rows("./data.txt")


def test_objects_are_taken_as_they_are():
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    assert load_rows(ROWS) is ROWS
    assert load_rows(dataset) is dataset
    splits = DatasetDict(train=dataset, test=dataset.select([1]))
    assert list(load_rows(splits, split="test")) == ROWS[1:]
    with pytest.raises(DataError, match=r"data.split is 'tets' \(did you mean 'test'\?"):
        load_rows(splits, split="tets")


def test_what_is_no_dataset_says_what_would_be():
    with pytest.raises(DataError, match=r"data.dataset is 3; give a file"):
        load_rows(3)


def test_a_function_gives_rows_and_gets_the_options():
    rows = load_rows("python:grpo_lightning.data.arithmetic.sums", dataset_kwargs={"size": 3})
    assert len(rows) == 3
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'sise'"):
        load_rows("python:grpo_lightning.data.arithmetic.sums", dataset_kwargs={"sise": 3})


def test_reasoning_gym_entries_become_rows_whose_metadata_stay_a_dict(monkeypatch):
    gym = types.ModuleType("reasoning_gym")

    def create_dataset(name, size, seed=0):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return [
            {"question": f"{seed}+{i}", "answer": str(i), "metadata": {"source_dataset": name}}
            for i in range(size)
        ]

    gym.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    rows = load_rows("reasoning_gym:chain_sum", dataset_kwargs={"size": 2, "seed": 5})
    assert rows[1] == {
        "prompt": "5+1",
        "question": "5+1",
        "answer": "1",
        "metadata": {"source_dataset": "chain_sum"},
    }
    with pytest.raises(DataError, match=r"with options \{'size': 1\}: Dataset 'chain' not registered"):
        load_rows("reasoning_gym:chain", dataset_kwargs={"size": 1})
    with pytest.raises(DataError, match=r"unexpected keyword argument 'sise'"):
        load_rows("reasoning_gym:chain_sum", dataset_kwargs={"sise": 1})


def test_a_missing_reasoning_gym_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r'pip install "grpo-lightning\[gym\]"'):
        load_rows("reasoning_gym:chain_sum")


def test_the_hub_gets_the_options_and_its_failure_is_one_line(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        if path == "no/where":
            raise ConnectionError("Couldn't reach 'no/where'\non the Hub")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("openai/gsm8k", subset="main", split="test", dataset_kwargs={"revision": "v1"}) is ROWS
    options = {"name": "main", "split": "test", "streaming": False, "revision": "v1"}
    assert calls == [("openai/gsm8k", options)]
    with pytest.raises(DataError) as error:
        load_rows("no/where")
    assert "data.dataset=no/where (subset None, split train) cannot be loaded" in str(error.value)
    assert "give a local file (.jsonl, .json, .csv, .parquet)" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        (ROWS, {"split": "test"}, "data.split is 'test', but data.dataset is an object, which takes"),
        ("python:a.b", {"subset": "main"}, "data.subset is 'main', but data.dataset is a python function"),
        ("a/b", {"dataset_kwargs": {"trust_remote_code": True}}, "trust_remote_code is not allowed"),
    ],
)
def test_an_option_that_does_not_fit_the_kind_is_refused(dataset, options, says):
    with pytest.raises(ConfigError, match=says):
        load_rows(dataset, **options)


def test_streaming_reads_the_same_rows_from_every_kind(tmp_path):
    from datasets import Dataset, IterableDataset

    path = jsonl(tmp_path / "x.jsonl")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "x.parquet")
    for dataset in (path, str(tmp_path / "x.parquet"), ROWS, Dataset.from_list(ROWS)):
        stream = load_rows(dataset, streaming=True)
        assert isinstance(stream, IterableDataset)
        assert list(stream) == ROWS
        assert load_rows(stream, streaming=True) is stream
        with pytest.raises(ConfigError, match=r"is a stream .* set data.streaming: true"):
            load_rows(stream)


def test_a_generator_cannot_be_streamed_but_its_function_can():
    with pytest.raises(ConfigError, match=r"is a generator; .* python:<generator function>"):
        load_rows((row for row in ROWS), streaming=True)
    source = "python:grpo_lightning.data.arithmetic.sums"
    stream = load_rows(source, dataset_kwargs={"size": 3}, streaming=True)
    assert len(list(stream)) == 3
