"""Two ranks, whoever starts them: Lightning, torchrun, SLURM, or a person on two machines."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import yaml
from commands import started
from fits import data, module, rollout
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from models import save_tiny
from stops import adapter, config, fit

from grpo_lightning.errors import ConfigError
from grpo_lightning.modules.strategies import check_strategy

RUN = ("fit", "--config", "config.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def two(model, folder, **changes):
    return config(model, folder, **{"trainer__devices": 2, "trainer__strategy": "ddp", **changes})


def run(folder, *command):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def all_end_well(ranks):
    ended = [rank.wait() for rank in ranks]
    assert [e.code for e in ended] == [0] * len(ranks), "".join(e.err for e in ended)


@pytest.fixture(scope="module")
def by_lightning(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    two(model, folder)
    run(folder, "-m", "grpo_lightning", *RUN)
    return adapter(folder)


def test_torchrun(model, by_lightning, tmp_path):
    two(model, tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    run(tmp_path, *torchrun, "-m", "grpo_lightning", *RUN)
    assert adapter(tmp_path) == by_lightning


def test_slurm(model, by_lightning, tmp_path):
    """`srun` starts every rank and tells it who it is."""
    two(model, tmp_path)
    job = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "grpo",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    ranks = []
    for rank in "01":
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        (tmp_path / rank).mkdir()
        ranks.append(started("fit", "--config", "../config.yaml", cwd=tmp_path / rank, **job, **place))
    all_end_well(ranks)
    assert adapter(tmp_path) == by_lightning


@pytest.mark.parametrize("strategy", ["ddp", "lightning.pytorch.strategies.DDPStrategy"])
def test_two_machines(model, by_lightning, tmp_path, strategy):
    """The same command on each, with one address and its own NODE_RANK."""
    two(model, tmp_path, trainer__devices=1, trainer__num_nodes=2, trainer__strategy=strategy)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in "01":
        (tmp_path / rank).mkdir()
        ranks.append(
            started("fit", "--config", "../config.yaml", cwd=tmp_path / rank, NODE_RANK=rank, **where)
        )
    all_end_well(ranks)
    assert adapter(tmp_path) == by_lightning


REFUSED = {
    "fsdp": "ddp, by name or as DDPStrategy",
    "deepspeed_stage_3": "ddp, by name or as DDPStrategy",
    "DeepSpeedStrategy": "ddp, by name or as DDPStrategy",
    "lightning.pytorch.strategies.FSDPStrategy": "weights in shards are not supported",
    "lightning.pytorch.strategies.ModelParallelStrategy": "weights in shards (FSDP2, tensor parallel)",
    "xla": "kernels and engines need an NVIDIA GPU or a CPU",
    "DDP_SPAWN": "starts ranks by spawn",
    "nosuch.Thing": "nosuch.Thing",
    "mine.Constructed": "mine.Constructed",
}


@pytest.mark.parametrize("strategy", REFUSED)
def test_another_strategy_is_refused_with_the_one_to_take(model, tmp_path, strategy):
    two(model, tmp_path, trainer__strategy=strategy)
    ended = fit(tmp_path)
    assert ended.code == 2, ended.err
    assert "error: trainer.strategy" in ended.err.replace('Parser key "', "")
    assert "Traceback" not in ended.err
    assert REFUSED[strategy] in ended.err
    assert not (tmp_path / "run").exists()


def test_shards_with_arguments_are_refused(model, tmp_path):
    """It would train: each rank with its own gradients."""
    path = "lightning.pytorch.strategies.ModelParallelStrategy"
    arguments = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    two(model, tmp_path, trainer__strategy={"class_path": path, "init_args": arguments})
    ended = fit(tmp_path)
    assert ended.code == 2
    assert f"error: trainer.strategy.class_path is '{path}'" in ended.err


def test_python_is_refused_too(model, tmp_path):
    trainer = pl.Trainer(
        strategy=ModelParallelStrategy(), accelerator="cpu", callbacks=[rollout()], default_root_dir=tmp_path
    )
    with pytest.raises(ConfigError, match=r"trainer\.strategy is ModelParallelStrategy; it must be ddp"):
        trainer.fit(module(model), data())
    assert not list(tmp_path.iterdir())


class MaxLatencyDDP(DDPStrategy):
    """A user's own, with «xla» in its name."""


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, XLAStrategy])
def test_what_lightning_derives_from_ddp_is_refused_and_a_users_own_is_not(kind):
    """DeepSpeed itself is not installed here."""
    own = type("Mine", (kind,), {})
    with pytest.raises(ConfigError, match=r"trainer\.strategy is Mine; it must be ddp, by name"):
        check_strategy(SimpleNamespace(strategy=own.__new__(own)))
    check_strategy(SimpleNamespace(strategy=MaxLatencyDDP()))


@pytest.mark.parametrize("form", ["text", "arguments"])
def test_a_users_own_strategy_trains(model, tmp_path, form):
    path = "mine.MaxLatencyDDP"
    strategy = path if form == "text" else {"class_path": path, "init_args": {"static_graph": False}}
    two(model, tmp_path, trainer__devices=1, trainer__max_steps=1, trainer__strategy=strategy)
    with (tmp_path / "mine.py").open("a") as mine:
        mine.write(
            "\n\nfrom lightning.pytorch.strategies import DDPStrategy\n\n\n"
            "class MaxLatencyDDP(DDPStrategy):\n    pass\n"
        )
    ended = fit(tmp_path)
    assert ended.code == 0, ended.err


def test_an_empty_section_is_refused_in_one_line(model, tmp_path):
    written = two(model, tmp_path)
    written["trainer"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    ended = fit(tmp_path)
    assert ended.code == 2
    assert "Traceback" not in ended.err
