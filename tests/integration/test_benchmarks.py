"""The benchmark scripts run, at sizes that say nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_tiny
from tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "row"),
    [
        ("bench_busy", "one thread, 1 busy loops"),
        ("bench_head", "ours, Triton"),
        ("bench_loss_variants", "dapo"),
        ("bench_memory", "256 tokens, recomputed, inputs in host memory"),
        ("bench_step --without compiled", "+ shared prompts"),
    ],
)
def test_small(script, row):
    script, *flags = script.split()
    pytest.importorskip("bitsandbytes" if script == "bench_memory" else "triton")
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--small", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith(f"{row}  ")]
    assert float(found.removeprefix(row).split()[0]) > 0


def test_learning(tmp_path):
    """A file takes the place of the config's dataset and of its `dataset_kwargs`."""
    model = save_tiny(tmp_path / "tiny")
    sums = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sums)))
    command = [
        *(
            sys.executable,
            str(ROOT / "benchmarks" / "bench_learning.py"),
            "--config",
            "configs/quickstart.yaml",
        ),
        *("--model", model, "--sides", "HF", "--steps", "6", "--seed", "1", "--out", str(tmp_path)),
        *("--dataset", str(tmp_path / "rows.jsonl")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("learning-quickstart-seed-1-*.json")
    result = json.loads(file.read_text())
    job = result["job"]
    assert (job["seed"], job["dataset_kwargs"]) == (1, None)
    assert (job["config"], job["dataset"]) == ("configs/quickstart.yaml", "rows.jsonl")  # of no machine
    side = result["sides"]["HF"]
    assert "failed" not in side, side["failed"]
    assert len(side["seconds"]) == len(side["correct"]) == len(side["reward"]) == 6
    assert 0 < side["start_s"] < side["wall_s"]
    assert {"sync", "generate", "reward", "rollout"} <= set(side["phases"])
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("HF ")]
    assert [r[1] for r in rows] == ["...", "6", rows[2][1], "2"]  # the last one is on steps 5 and 6
    assert 0 < float(rows[3][2]) <= float(rows[3][5])
    sync, generate, reward, score, rollout, train = map(float, rows[2][1:])
    assert sync + generate + reward + score == pytest.approx(rollout, abs=0.003)  # each is rounded
    assert train > 0


def test_steady_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from bench_learning import steady

    seconds = [9.0, 0.5, 0.5, 0.5, *[0.1] * 54, 0.3, 0.2, 7.0]  # steps 1 to 61
    captures = [0, 0, 1, 2, *[2] * 54, 3, 3, 4]
    found = steady("ours", {"seconds": seconds, "captures": list(map(float, captures))})
    assert found == ["ours", "56", "0.105", "0.100", "1.05", "0.300", "1 of 4"]
    assert steady("TRL", {"seconds": seconds[:5]}) == ["TRL", "1", "0.100", "0.100", "1.00", "0.100", "-"]
    assert steady("TRL", {"seconds": seconds[:4]})[1] == "-"


def test_a_shipped_config_on_random_weights(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "bench_config.py"), "--shape", "tiny"),
        *("--config", "configs/qwen.yaml", "--tokenizer", str(tmp_path / "tokenizer"), "--steps", "3"),
        *("--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path), "--flags"),
        *("--rollout.engine", "grpo_lightning.engines.HFEngine", "--trainer.accelerator", "cpu"),
        *("--trainer.precision", "32-true", "--rollout.sampling.max_tokens", "4"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("config-qwen-*.json")
    side = json.loads(file.read_text())
    assert len(side["seconds"]) == 3
    assert 0 < sum(side["reward"]) / 3 < 1
    assert max(side["parity"]) < 1e-4
    assert side["engine_gib"] == 0  # of a GPU
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("qwen "))
    assert row[1] == "3"


def test_runs_are_compared_value_by_value(tmp_path):
    head = "step,reward,rewards/math_answer/mean,step_time,val/rewards/math_answer/mean\n"
    logs = {
        "whole": "0,0.1,0,9,\n1,0.5,1,9,\n1,,,,0.75\n2,0.6,1,9,\n",
        "ended": "0,0.1,0,8,\n1,0.5,1,7,\n",
        "other": "1,0.5,0,9,\n1,,,,0.75\n2,0.6,1,1,\n",
    }
    for name, rows in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(head + rows)
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_runs.py"), "--out", str(tmp_path)]
    for others, code in ((["ended"], 0), (["ended", "other"], 1)):
        files = [str(tmp_path / name / "metrics.csv") for name in ("whole", *others)]
        done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    (file,) = tmp_path.glob("compared-runs-*.json")
    found = json.loads(file.read_text())
    assert found["equal"]["ended"] == {"values": 8, "different": 0, "first": []}
    assert found["equal"]["other"]["first"] == ["rewards/math_answer/mean at 1: 1, 0"]
    assert found["whole"]["correct"] == [0, 1, 1]
    assert found["other"]["held_out"] == [[1, 0.75]]
