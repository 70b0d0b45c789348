"""Running out of memory names the options that take it, with their values; weights are whole or not saved."""

import pytest
import torch
from fits import data, module, rollout, same_bits, sgd, trainer, weights
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from grpo_lightning.engines import HFEngine
from grpo_lightning.errors import EngineError, GRPOError, OutOfMemory

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
TRAINING = (
    "trainer.accumulate_grad_batches is 2 (raise); rollout.micro_batches is auto (set to all); "
    "model.gradient_checkpointing is false (set to true or offload); "
    "model.logprob_chunk_rows is null (lower); rollout.sampling.max_tokens is 8 (lower); "
    "data.prompts_per_rollout is 4 (lower)"
)


def full(stock, n, error=None):
    """Returns a function that raises when it is called for the n-th time, and else does what `stock` does."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise error or torch.OutOfMemoryError(CUDA)
        return stock(*args, **kwargs)

    return call


def reached(folder, root, steps):
    """Returns the weights after that many optimizer steps."""
    m = module(folder, optimizer=sgd)
    trainer(root, rollout(), max_steps=steps, accumulate_grad_batches=2).fit(m, data())
    return weights(m)


def failing(folder, root, *, engine=None, change=lambda m: None, **changes):
    """Returns (message, weights, checkpoint saved on the error or None) of a run that runs out of memory."""
    m = module(folder, **{"optimizer": sgd, **changes})
    m.configure_model()
    change(m)
    saver = OnExceptionCheckpoint(root / "error", "last")
    options = {"engine": engine} if engine else {}
    t = trainer(root, rollout(**options), saver, enable_checkpointing=True, accumulate_grad_batches=2)
    with pytest.raises(GRPOError) as caught:
        t.fit(m, data())
    path = root / "error" / "last.ckpt"
    return caught.value, weights(m), torch.load(path, weights_only=True) if path.exists() else None


@pytest.mark.parametrize(
    ("where", "n"),
    [("forward", 3), ("forward", 4), ("backward", 3), ("backward", 4), ("backward on a CPU", 4)],
)
def test_in_training(model_folder, tmp_path, monkeypatch, where, n):
    """In either micro-batch of the second optimizer step."""

    def change(m):
        if where == "forward":
            score = m.score
            monkeypatch.setattr(m, "score", full(score, n))
        else:
            error = torch.OutOfMemoryError(CUDA)
            if where.endswith("CPU"):
                error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
            monkeypatch.setattr(torch.Tensor, "backward", full(torch.Tensor.backward, n, error))

    monkeypatch.setattr("grpo_lightning.policy.verification.gradient_distance", lambda *a: 0.0)
    error, found, saved = failing(model_folder, tmp_path, change=change)
    said = str(error)
    assert isinstance(error, OutOfMemory)
    assert said.startswith(f"out of memory while training ({error.__cause__}). Weights are those after 1 opt")
    assert said.endswith(f"What takes memory: {TRAINING}")
    assert "\n" not in said
    monkeypatch.undo()
    assert same_bits(found, reached(model_folder, tmp_path / "whole", 1))
    assert all(torch.equal(saved["state_dict"][f"policy.{k}"], v) for k, v in found.items())


class HalfWay(torch.optim.SGD):
    """Runs out of memory in its second step, when it has changed some weights."""

    steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        self.steps += 1
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if self.steps == 2 and i == self.at:
                raise torch.OutOfMemoryError(CUDA)
            p.sub_(0.5 * p.grad)
        return loss


@pytest.mark.parametrize("at", [0, 5])
def test_in_the_optimizer(model_folder, tmp_path, at):
    """A checkpoint of half a step is never written."""

    def optimizer(params):
        made = HalfWay(params, lr=0.5)
        made.at = at
        return made

    error, found, saved = failing(model_folder, tmp_path, optimizer=optimizer)
    before = reached(model_folder, tmp_path / "whole", 1)
    if at:
        assert "nothing is saved; resume from the last checkpoint" in str(error)
        assert "Some weights had changed already: go on from the last checkpoint" in str(error.__context__)
        assert saved is None
        assert not same_bits(found, before)
    else:
        assert "Weights are those after 1 optimizer steps" in str(error)
        assert same_bits(found, before)
        assert all(torch.equal(saved["state_dict"][f"policy.{k}"], v) for k, v in found.items())


class Hungry(HFEngine):
    """Runs out of memory in its n-th rollout."""

    max_num_seqs, gpu_memory_utilization, sleep_mode = 256, 0.35, "off"

    def __init__(self, n, where="generate"):
        super().__init__(batch_size=16)
        self.left, self.where = n, where

    def start(self, context):
        super().start(context)
        if self.where == "start":
            raise EngineError(
                "vLLM could not start: ValueError: No available memory for the cache blocks. Try increasing "
                "`gpu_memory_utilization` when initializing the engine."
            )

    def generate(self, requests, sampling):
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError(CUDA)
        return super().generate(requests, sampling)


def test_in_sampling(model_folder, tmp_path):
    error, found, _ = failing(model_folder, tmp_path, engine=Hungry(2))
    assert str(error).endswith(
        "rollout.engine.batch_size is 16 (lower); rollout.engine.max_num_seqs is 256 (lower); "
        "rollout.engine.gpu_memory_utilization is 0.35 (lower); rollout.sampling.max_tokens is 8 (lower); "
        "data.prompts_per_rollout is 4 (lower)"
    )
    assert str(error).startswith("out of memory while sampling (CUDA out of memory. Tried to allocate 2.00")
    assert same_bits(found, reached(model_folder, tmp_path / "whole", 1))


def test_an_engine_without_room_for_its_cache(model_folder, tmp_path):
    error, _, _ = failing(model_folder, tmp_path, engine=Hungry(2, "start"))
    assert "out of memory while starting the engine (vLLM could not start: ValueError: No avail" in str(error)
    assert "rollout.engine.max_num_seqs is 256 (lower)" in str(error)
    assert "rollout.engine.gpu_memory_utilization is 0.35 (raise)" in str(error)


def test_other_errors_pass_as_they_are(model_folder, tmp_path):
    class Dead(HFEngine):
        def generate(self, requests, sampling):
            raise EngineError("vLLM could not generate: EngineDeadError: core died")

    error, _, _ = failing(model_folder, tmp_path, engine=Dead())
    assert str(error) == "vLLM could not generate: EngineDeadError: core died"
    assert not isinstance(error, OutOfMemory)
