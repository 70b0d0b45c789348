"""Whole runs of the Trainer with the real vLLM: learning, resume, and a broken sync that must not pass."""

import sys
from pathlib import Path

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from models import save_tiny
from serving import SHAPE

from grpo_lightning import PromptDataModule
from grpo_lightning.callbacks import ValidationConfig
from grpo_lightning.engines import VLLMEngine
from grpo_lightning.errors import EngineError

pytestmark = pytest.mark.vllm


def engine(**options):
    return VLLMEngine(**{"max_num_seqs": 32, "max_model_len": 64, **options})


class FrozenBase(Callback):
    """Keeps what does not train, before and after."""

    def on_train_start(self, trainer, pl_module):
        self.before = self.weights(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.after = self.weights(pl_module)

    def weights(self, m):
        return {n: p.clone() for n, p in m.policy.named_parameters() if not p.requires_grad}


def worst(rows, name):
    return max(float(r[name]) for r in rows if r[name])


@pytest.mark.parametrize("sync", ["adapter", "merge"])
def test_reward_rises_and_the_policies_stay_one(folder, tmp_path, sync):
    """And fifteen merges into the engine's weights leave no bit of the trainer's base changed (trl#6688)."""
    base = FrozenBase()
    callback = rollout(num_generations=8, engine=engine(sync=sync))
    trainer(tmp_path, callback, base, max_steps=15).fit(module(folder), data())
    assert base.before
    assert same_bits(base.before, base.after)
    rows = [r for r in rows_of(tmp_path) if r["reward"]]
    rewards = [float(r["reward"]) for r in rows]
    assert len(rewards) == 15
    assert sum(rewards[-4:]) > sum(rewards[:4]) * 1.5
    assert worst(rows, "sampling/parity_mean") < 1e-4
    assert worst(rows, "sampling/parity_max") < 1e-2


def test_full_weights_train(folder, tmp_path):
    m = module(folder, lora=None, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    trainer(tmp_path, rollout(engine=engine()), max_steps=3).fit(m, data())
    assert worst(rows_of(tmp_path), "sampling/parity_mean") < 1e-4


def test_far_positions_are_the_engines_in_bf16(tmp_path_factory, tmp_path):
    """Rotary frequencies rounded to bf16 are other positions, and the further away the more."""
    far = save_tiny(tmp_path_factory.mktemp("far"), **SHAPE, max_position_embeddings=2048)
    rows = [{"prompt": f"{'count the stars and ' * 75} {i}"} for i in range(4)]
    t = trainer(tmp_path, rollout(engine=engine(max_model_len=1600)), max_steps=1, precision="bf16-true")
    t.fit(module(far), PromptDataModule(rows, prompts_per_rollout=4, max_prompt_tokens=1560))
    (row,) = (r for r in rows_of(tmp_path) if r["reward"])
    assert float(row["sampling/parity_mean"]) < 0.03


@pytest.mark.parametrize("sync", ["auto", "merge"])
def test_a_run_logs_the_share_of_its_update_that_arrives(folder, tmp_path, sync):
    """From the first update on; an engine that is not synced has nothing to say."""
    small = module(folder, optimizer=lambda params: torch.optim.AdamW(params, lr=5e-6))
    callback = rollout(engine=engine(sync=sync), updates_per_rollout=2)
    trainer(tmp_path, callback, max_steps=6, precision="bf16-true").fit(small, data())
    rows = [r for r in rows_of(tmp_path) if r["loss"]]
    shares = [r["sync/update_arrived"] for r in rows]
    assert [bool(x) for x in shares] == [False, False, True, False, True, False]
    assert all((float(x) > 0.99) == (sync == "auto") for x in shares if x)
    assert all((float(x) < 0.5) == (sync == "merge") for x in shares if x)


def test_a_resumed_run_is_the_run(folder, tmp_path):
    def run(root, ckpt_path=None):
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        m = module(folder)
        torch.manual_seed(99 if ckpt_path else 0)
        callback = rollout(engine=engine(sync="adapter"), updates_per_rollout=2)
        trainer(root, callback, saver, max_steps=4).fit(m, data(), ckpt_path=ckpt_path)
        return weights(m)

    whole = run(tmp_path / "whole")
    for step in (1, 2):  # in the middle of a rollout, and after one
        resumed = run(tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert same_bits(resumed, whole), step


def test_validation_samples_from_the_engine(folder, tmp_path):
    callback = rollout(engine=engine(sync="merge"), validation=ValidationConfig(before_training=True))
    t = trainer(tmp_path, callback, max_steps=2, val_check_interval=1, check_val_every_n_epoch=None)
    t.fit(module(folder), data(validation_split=4))
    assert "val/reward" in t.logged_metrics


STALE = {"adapter": "adapter_of", "merge": "merged_weights"}


@pytest.mark.parametrize("sync", STALE)
def test_a_sync_that_sends_old_weights_stops_the_run(folder, tmp_path, monkeypatch, sync):
    from grpo_lightning.engines import weight_sync

    name, first = STALE[sync], {}
    stock = getattr(weight_sync, name)

    def stale(*args):
        if not first:
            sent = stock(*args)
            if name == "adapter_of":
                first["sent"] = {k: m._replace(a=m.a.clone(), b=m.b.clone()) for k, m in sent.items()}
            else:
                first["sent"] = [(k, t.clone()) for k, t in sent]
        return first["sent"] if name == "adapter_of" else iter(first["sent"])

    monkeypatch.setattr(weight_sync, name, stale)
    m = module(folder, optimizer=lambda params: torch.optim.SGD(params, lr=300.0))
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    t = trainer(tmp_path, rollout(engine=engine(sync=sync)), saver, max_steps=6)
    with pytest.raises(
        EngineError, match=r"does not sample .* another sync does not help; rounding explains"
    ):
        t.fit(m, data())
    assert t.global_step == 1  # the step on the stale rollout was not taken
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"]
    now = {f"policy.{k}": v for k, v in weights(m).items()}
    assert same_bits(saved, now)


def test_an_engine_that_dies_leaves_the_last_checkpoint(folder, tmp_path, monkeypatch):
    dying = engine(sync="adapter")
    calls = []
    stock = VLLMEngine.generate

    def generate(self, *args):
        calls.append(1)
        if len(calls) == 3:

            def die(*args, **kwargs):
                raise RuntimeError("the GPU fell off the bus")

            monkeypatch.setattr(self._llm.llm_engine, "step", die)
        return stock(self, *args)

    monkeypatch.setattr(VLLMEngine, "generate", generate)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    m = module(folder)
    with pytest.raises(EngineError, match="fell off the bus"):
        trainer(tmp_path, rollout(engine=dying), saver, max_steps=5).fit(m, data())
    monkeypatch.undo()
    again = module(folder)
    t = trainer(tmp_path / "again", rollout(engine=engine(sync="adapter")), max_steps=3)
    t.fit(again, data(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert t.global_step == 3


def test_groups_without_signal_are_replaced_while_others_decode(folder, tmp_path):
    def picky(prompts, completions, **_):
        number = [int(p.rsplit(" ", 1)[1].split("\n")[0]) for p in prompts]
        return [len(c) if n % 2 == 0 else 1.0 for n, c in zip(number, completions, strict=True)]

    def run(root, ckpt_path=None):
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callback = rollout(
            engine=engine(sync="adapter", max_num_seqs=4), reward_funcs=[picky], dynamic_sampling=4
        )
        m = module(folder)
        rows = [{"prompt": f"say {i}"} for i in range(40)]
        t = trainer(root, callback, saver, max_steps=3)
        t.fit(m, PromptDataModule(rows, prompts_per_rollout=4, seed=5), ckpt_path=ckpt_path)
        return weights(m)

    whole = run(tmp_path / "whole")
    rows = [r for r in rows_of(tmp_path / "whole") if r["reward"]]
    assert sum(float(r["rollout/replaced_groups"]) for r in rows) >= 3
    assert worst(rows, "frac_reward_zero_std") <= 0.25
    assert worst(rows, "sampling/parity_mean") < 1e-4
    assert same_bits(run(tmp_path / "again", str(tmp_path / "whole" / "step=1.ckpt")), whole)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("sickness", ["adapter off", "wrong rope base"])
def test_a_sick_engine_is_caught_at_its_first_rollout(tmp_path_factory, tmp_path, sickness, precision):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from sick_vllm import SickVLLM

    sick = SickVLLM(sickness, 3, max_num_seqs=32, max_model_len=64)
    folder = save_tiny(tmp_path_factory.mktemp("model"), **SHAPE)
    t = trainer(tmp_path, rollout(engine=sick), max_steps=5, precision=precision)
    with pytest.raises(EngineError, match=r"SickVLLM does not sample .* another sync does not help"):
        t.fit(module(folder), data())
    assert t.global_step == 3
