"""Modules stay small, public names stay, heavy imports stay lazy. Layers of imports: `lint-imports`."""

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lightning.migration.class_paths import MOVED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "grpo_lightning"


def modules() -> dict[str, Path]:
    out = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        out[name.removesuffix(".__init__")] = path
    out.pop("__init__")
    return out


@pytest.mark.parametrize(
    "below", ["errors", "types", "packing", "metrics.reduce", "advantages", "losses", "ops"]
)
def test_the_core_knows_torch_alone(below):
    for name, path in modules().items():
        allowed = {"torch", "grpo_lightning", *sys.stdlib_module_names}
        allowed |= {"triton"} if name.endswith("_triton") else set()
        if name == below or name.startswith(f"{below}."):
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                assert {n.partition(".")[0] for n in names} <= allowed, f"{name}: {names}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_modules_stay_small(module):
    path = modules()[module]
    assert len(path.read_text().splitlines()) <= 320
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.body[0].lineno + 1
            doc = ast.get_docstring(node, clean=False)
            assert length - (doc.count("\n") + 1 if doc else 0) <= 60, f"{module}.{node.name}"


def test_what_is_replaced_in_a_dataclass_or_named_tuple_is_a_field():
    """No type checker looks at these names."""
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items()}
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    classes = [node for _, node in nodes if isinstance(node, ast.ClassDef)]
    fields = {ast.unparse(x.target) for c in classes for x in c.body if isinstance(x, ast.AnnAssign)}
    calls = [
        (name, node.lineno, keyword.arg)
        for name, node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"replace", "_replace"}
        for keyword in node.keywords
        if keyword.arg is not None
    ]
    assert len(calls) > 30
    assert [call for call in calls if call[2] not in fields] == []


def test_no_loss_ladder():
    """A variant is a table row: no comparison with a name of a table."""
    from grpo_lightning.advantages import ADVANTAGES
    from grpo_lightning.losses import AGGREGATIONS, RECIPES, SURROGATES

    names = {*RECIPES, *SURROGATES, *AGGREGATIONS, *ADVANTAGES}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                for side in (node.left, *node.comparators):
                    assert not (isinstance(side, ast.Constant) and side.value in names), (
                        f"{module}:{node.lineno}"
                    )


PUBLIC = {
    "grpo_lightning": ["GRPOModule", "PromptDataModule", "RolloutCallback", "SamplingParams", "RolloutBatch"],
    "grpo_lightning.losses": ["policy_loss", "LossConfig", "RECIPES", "register_surrogate"],
    "grpo_lightning.advantages": ["ADVANTAGES"],
    "grpo_lightning.ops": ["fused_linear_logprobs"],
    "grpo_lightning.engines": ["HFEngine", "VLLMEngine", "ReplayEngine", "RolloutEngine"],
    "grpo_lightning.rewards": ["exact_match", "math_answer", "format_reward", "length_penalty"],
    "grpo_lightning.callbacks": ["RolloutCallback", "SampleTable", "RunReport"],
    "grpo_lightning.checkpoints": ["AdapterCheckpointIO"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module):
    import importlib

    loaded = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert getattr(loaded, name) is not None
        assert name in dir(loaded)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_moved_names_are_answered_with_their_new_place(old, new):
    assert pkgutil.resolve_name(new).__name__ == new.rpartition(".")[2]
    with pytest.raises(ImportError, match=f"{re.escape(old)} is now {re.escape(new)}$"):
        pkgutil.resolve_name(old)


def test_import_pulls_in_nothing_heavy():
    code = (
        "import sys, grpo_lightning, grpo_lightning.engines, grpo_lightning.callbacks;"
        "import grpo_lightning.rollout, grpo_lightning.checkpoints;"
        "print([m for m in "
        "('torch','vllm','triton','bitsandbytes','datasets','transformers','lightning') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_everything_imports_without_the_optional_packages():
    code = (
        "import sys\n"
        "for m in ('vllm','triton','bitsandbytes','gguf','reasoning_gym','datasets','math_verify'):\n"
        "    sys.modules[m] = None\n"
        "import grpo_lightning.cli.main, grpo_lightning.policy.loading, grpo_lightning.engines as r\n"
        "from grpo_lightning import *\n"
        "r.HFEngine, r.VLLMEngine, r.ReplayEngine\n"
        "print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("flag", ["--help", "--version", None])
def test_help_and_version_need_no_torch(flag):
    command = [sys.executable, "-X", "importtime", "-m", "grpo_lightning", *([flag] if flag else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "grpo-lightning" in done.stdout
    assert "torch" not in done.stderr


def test_slow_tests_exist():
    """A name that is gone would take its test's successor into `make test` unnoticed."""
    names = (ROOT / "tests" / "slow_tests.txt").read_text().split()
    assert names == sorted(set(names))
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert [n for n in names if f"\ndef {n.split('::')[1]}(" not in files[n.split("::")[0]]] == []
