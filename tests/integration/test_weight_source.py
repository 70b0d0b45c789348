"""What an engine is given: weights as a stream, prompts that are more than tokens."""

import multiprocessing
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from fits import data, module, rollout, rows_of, trainer, weights
from models import hf_engine, save_tiny
from tiny import tiny_tokenizer
from torch.utils.data import DataLoader

from grpo_lightning.engines import HFEngine, RolloutEngine
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.types import PromptBatch


def serve(connection, model_path):
    """The other process: it has a model of its own, and is sent weights and prompts."""
    torch.set_num_threads(1)
    policy = load_policy(model_path, tiny_tokenizer(), gradient_checkpointing=False)
    weights = dict(policy.causal.named_parameters())
    engine = hf_engine(policy)
    while (message := connection.recv()) is not None:
        name, *arguments = message
        if name == "generate":
            connection.send(engine.generate(*arguments))
        else:
            with torch.no_grad():
                weights[name].copy_(
                    torch.frombuffer(bytearray(connection.recv_bytes()), dtype=torch.float32).view(*arguments)
                )


class OtherProcess:
    """Knows neither policy nor peft: of `start` it takes a path, of `sync` names and tensors."""

    def __init__(self, kind):
        self.kind, self.policy_version, self.sent = kind, -1, []

    def start(self, context):
        spawn = multiprocessing.get_context("spawn")
        self.connection, there = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(there, context.model_path), daemon=True)
        self.process.start()

    def sync(self, source, version):
        first = self.policy_version < 0
        for name, weight in source.tensors(self.kind, torch.float32, first=first):
            self.sent.append((version, name))
            self.connection.send((name, weight.shape))
            self.connection.send_bytes(weight.contiguous().numpy().tobytes())
        self.policy_version = version

    def generate(self, requests, sampling):
        self.connection.send(("generate", requests, sampling))
        return self.connection.recv()

    def sleep(self):
        pass

    def close(self):
        self.connection.send(None)
        self.process.join(20)
        assert self.process.exitcode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def fit(folder, path, lora, **changes):
    m = module(folder, lora=lora, model_kwargs={"dtype": torch.float32})
    trainer(path, rollout(**changes)).fit(m, data())
    return weights(m), rows_of(path)


def test_all_weights_as_a_stream_give_the_run_of_the_live_policy(folder, tmp_path):
    engine = OtherProcess("full")
    assert isinstance(engine, RolloutEngine)
    streamed, rows = fit(folder, tmp_path / "stream", None, engine=engine)
    live, expected = fit(folder, tmp_path / "live", None)
    assert streamed.keys() == live.keys()
    assert all(torch.equal(streamed[n], live[n]) for n in live)
    assert [r["reward"] for r in rows] == [r["reward"] for r in expected]
    assert [version for version, _ in engine.sent] == [v for v in (0, 1, 2) for _ in live]


def test_a_merged_adapter_as_a_stream_is_the_policy(folder, tmp_path):
    engine = OtherProcess("merge")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    streamed, rows = fit(folder, tmp_path / "stream", lora, engine=engine)
    live, expected = fit(folder, tmp_path / "live", lora)
    assert all(torch.allclose(streamed[n], live[n], atol=1e-4) for n in live)
    assert [r["reward"] for r in rows] == [r["reward"] for r in expected]
    assert max(float(r["sampling/parity_mean"]) for r in rows) < 1e-5
    names = {name for _, name in engine.sent}
    assert {n.rsplit(".", 2)[1] for n in names} == {"q_proj", "down_proj"}


def test_a_stream_that_stops_arriving_is_another_policy(folder, tmp_path):
    """The version alone is not believed: what is sampled has to be the policy's."""

    class Deaf(OtherProcess):
        def sync(self, source, version):
            if version < 1:
                super().sync(source, version)
            self.policy_version = version

    with pytest.raises(EngineError, match="KL"):
        fit(folder, tmp_path, None, engine=Deaf("full"))


class Images(pl.LightningDataModule):
    """Four prompts, each with an image of one number."""

    def train_dataloader(self):
        def batch(micro_batch):
            pictures = [{"multi_modal_data": {"image": i}} for i in range(4)]
            ids = [[5, 6], [7], [8, 9, 10], [11]]
            own = {
                "prompts": ["", "", "", ""],
                "columns": {},
                "uids": [0, 1, 2, 3],
                "micro_batch": micro_batch,
            }
            return PromptBatch(prompt_ids=ids, model_inputs=pictures, **own)

        return DataLoader([batch(0), batch(0)], batch_size=None)


class ReadsImages(HFEngine):
    """Notes the image of each prompt, and samples without it."""

    def __init__(self):
        super().__init__()
        self.images = []

    def generate(self, requests, sampling):
        self.images += [(r.uid, r.model_inputs["multi_modal_data"]["image"]) for r in requests]
        return super().generate([replace(r, model_inputs={}) for r in requests], sampling)


@pytest.mark.parametrize("by_group", [False, True])
def test_what_a_model_reads_beside_tokens_reaches_the_engine(folder, tmp_path, by_group):
    m, engine = module(folder), ReadsImages()
    m.reads_model_inputs = True
    run = trainer(tmp_path, rollout(engine=engine, overlap_rewards=by_group), max_steps=2)
    run.fit(m, Images())
    assert run.global_step == 2
    assert sorted(engine.images) == sorted((i, i) for i in range(4) for _ in range(2))


def test_a_module_or_engine_of_tokens_alone_refuses_images(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"model_inputs \(multi_modal_data\), but GRPOModule trains"):
        trainer(tmp_path, rollout(engine=ReadsImages())).fit(module(folder), Images())
    m = module(folder)
    m.reads_model_inputs = True
    with pytest.raises(EngineError, match=r"prompt 0 of rollout 0 has model inputs .* use VLLMEngine"):
        trainer(tmp_path / "hf", rollout()).fit(m, Images())


def test_prompts_of_text_and_of_images_may_be_joined():
    text = PromptBatch(prompts=["a"], prompt_ids=[[5]], columns={}, uids=[0])
    image = PromptBatch(prompts=["b"], prompt_ids=[[6]], columns={}, uids=[1], model_inputs=[{"image": 1}])
    assert PromptBatch.join([text, image]).model_inputs == [{}, {"image": 1}]
    assert PromptBatch.join([text, text]).model_inputs == []
