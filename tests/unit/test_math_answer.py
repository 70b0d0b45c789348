"""`math_answer` on a table of answers, without and with math-verify, and the process of math-verify."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from math_pairs import ALL, V

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards import math_answer, math_verifier

IDS = [f"{kind}-{i}" for i, (kind, *_) in enumerate(ALL)]


@pytest.mark.parametrize(("kind", "text", "gold", "expected"), ALL, ids=IDS)
def test_the_default(monkeypatch, kind, text, gold, expected):
    monkeypatch.setattr(math_verifier, "find_spec", lambda name: None)
    assert math_answer([text], answer=[gold]) == [0 if expected == V else expected]


@pytest.mark.math
@pytest.mark.parametrize(("kind", "text", "gold", "expected"), ALL, ids=IDS)
def test_with_math_verify(kind, text, gold, expected):
    assert math_answer([text], answer=[gold]) == [1 if expected == V else expected]


@pytest.mark.math
def test_math_verify_answers_in_threads():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: math_answer([rf"\boxed{{x+{i}}}"], answer=[f"{i % 5}+x"]), range(20)))
    assert found == [[1.0] if i < 5 else [0.0] for i in range(20)]


def test_the_table_is_large_and_has_both_kinds_of_answers():
    answers = [expected for *_, expected in ALL]
    assert len(ALL) >= 200
    assert min(answers.count(1), answers.count(0)) > 80
    assert len({repr(pair[1:3]) for pair in ALL}) == len(ALL)


FAKE = """
class LatexExtractionConfig: pass
def parse(text, kinds, **how):
    return [text.strip("$")]
def verify(expected, found, **how):
    print("noise")
    if found == ["h+g"]:
        10 ** 10 ** 10
    if found == ["d+e"]:
        raise SystemExit(1)
    return sorted(expected[0]) == sorted(found[0])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module that says what math-verify would, hangs where it would, and ends where it would."""
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "math_verify", raising=False)
    monkeypatch.setattr(math_verifier, "SECONDS", 1)
    math_verifier._of_process.cache_clear()
    yield tmp_path
    math_verifier._of_process.cache_clear()


def process_id():
    return math_verifier._of_process(os.getpid()).process.pid


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("bad", ["h+g", "d+e"])
def test_a_verifier_that_hangs_or_dies_is_replaced_and_the_answer_is_wrong(bad, caplog):
    assert math_answer([r"\boxed{x+1}"], answer=["1+x"]) == [1.0]
    first = process_id()
    assert math_answer([r"\boxed{x+1}", r"\boxed{x+3}"], answer=["1+x", "1+x"]) == [1.0, 0.0]
    assert process_id() == first
    with caplog.at_level(logging.WARNING):
        assert math_answer([rf"\boxed{{{bad}}}", r"\boxed{x+1}"], answer=["x", "1+x"]) == [0.0, 1.0]
    assert [r.getMessage() for r in caplog.records] == [
        f"math-verify was ended over '{bad}', expected 'x' (at most 1 s of CPU time): counts as wrong"
    ]
    assert process_id() != first


@pytest.mark.usefixtures("fake")
def test_numbers_and_prose_are_no_matter_for_math_verify(monkeypatch):
    monkeypatch.setattr(math_verifier, "first_answer", lambda *_: pytest.fail("was asked"))
    texts = [
        r"\boxed{5}",
        r"\boxed{\text{silent}}",
        r"\boxed{x+1}",
        r"\boxed{}",
        r"\boxed{" + "x+" * 500 + "1}",
    ]
    golds = ["6", "listen", "x + 1", "x", "1+x"]
    assert math_answer(texts, answer=golds) == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_a_broken_math_verify_is_named(fake):
    (fake / "math_verify.py").write_text("import no_such_module")
    with pytest.raises(ConfigError, match=r"does not start \(exit status 1.*grpo-lightning\[math\]"):
        math_answer([r"\boxed{x+1}"], answer=["1+x"])
