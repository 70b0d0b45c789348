"""The laws of the house: imports go down, rooms stay small, public names stay, heavy imports stay lazy."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "grpo_lightning"
FLOORS = [  # from the ground up; a module may import its own floor's neighbours below it, never above
    ("errors", "ranges", "packing", "samples", "sealed", "atomic", "batch", "stats", "importing",
     "import_rules", "untrusted", "yaml_text", "credentials", "options", "options_inherited", "_lazy",
     "stopping"),
    ("losses", "advantages"),
    ("ops",),
    ("models", "contents", "layouts",
     "reference", "lora", "weight_dtypes", "lora_layers", "attention_layers", "exchange",
     "kernels", "graphs", "dropout", "logit_changes", "rope", "policy", "probe", "rounding",
     "loading", "data", "rewards", "rollout.engine", "rollout.sampling", "rollout.hf",
     "rollout.recording", "rollout.process_guard", "rollout.weights", "rollout.session", "rollout.background",
     "rollout.vllm",
     "rollout.vllm_session", "rollout.vllm_compat", "rollout.vllm_adapter", "rollout.shared_base",
     "rollout.update_share",
     "rollout.vllm_options", "schedulers"),
    ("metrics", "telemetry", "out_of_memory", "rollout.collect", "rollout"),
    ("module", "trainer_support", "finite", "checkpoint", "resume", "verification", "callbacks"),
    ("faults", "preflight", "usage", "cli", "__main__"),
]  # fmt: skip


def modules() -> dict[str, Path]:
    out = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        out[name.removesuffix(".__init__")] = path
    out.pop("__init__")
    return out


def floor(module: str) -> int:
    best = max(
        (name for names in FLOORS for name in names if f"{module}.".startswith(f"{name}.")),
        key=len,
        default=None,
    )
    assert best is not None, f"{module} stands on no floor: give it one here"
    return next(i for i, names in enumerate(FLOORS) if best in names)


def imports(path: Path) -> set[str]:
    """Our modules that a file imports when it runs; what only type checkers read does not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for n in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_lightning"):
            base = (node.module or "").removeprefix("grpo_lightning").lstrip(".")
            found |= {base} if base else {a.name for a in node.names if a.name != "__version__"}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module):
    for other in imports(modules()[module]):
        assert floor(other) <= floor(module), f"{module} imports {other} from above"


def test_module_and_callbacks_do_not_know_each_other():
    everything = modules()
    assert not {i for i in imports(everything["module"]) if i.startswith(("rollout", "callbacks"))}
    for name, path in everything.items():
        if name.startswith("callbacks"):
            assert "module" not in imports(path)


@pytest.mark.parametrize(
    "below", ["errors", "packing", "samples", "batch", "stats", "advantages", "losses", "ops"]
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
def test_rooms_stay_small(module):
    path = modules()[module]
    assert len(path.read_text().splitlines()) <= 320
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.body[0].lineno + 1
            doc = ast.get_docstring(node, clean=False)
            assert length - (doc.count("\n") + 1 if doc else 0) <= 60, f"{module}.{node.name}"


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
    "grpo_lightning.rollout": ["HFEngine", "VLLMEngine", "ReplayEngine", "RolloutEngine"],
    "grpo_lightning.rewards": ["exact_match", "math_answer", "format_reward", "length_penalty"],
    "grpo_lightning.callbacks": ["RolloutCallback", "SampleTable", "RunReport", "AdapterCheckpointIO"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module):
    import importlib

    loaded = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert getattr(loaded, name) is not None
        assert name in dir(loaded)


def test_import_pulls_in_nothing_heavy():
    code = (
        "import sys, grpo_lightning, grpo_lightning.rollout, grpo_lightning.callbacks;"
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
def test_help_and_version_need_no_torch_and_no_time(flag):
    command = [sys.executable, "-X", "importtime", "-m", "grpo_lightning", *([flag] if flag else [])]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert "grpo-lightning" in done.stdout
    assert "torch" not in done.stderr
    assert min(times) < 0.3
