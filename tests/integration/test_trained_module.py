"""RolloutCallback feeds any LightningModule that has what it uses, and refuses others before weights load."""

import lightning.pytorch as pl
import pytest
import torch
from fits import data, rollout, rows_of, trainer, weights
from models import save_tiny
from tiny import tiny_tokenizer

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import Coefficients, LossConfig
from grpo_lightning.modules.policy_module import PolicyModule
from grpo_lightning.policy.reference import ReferenceConfig
from grpo_lightning.rollout.trained_module import check_module


class BestOfGroup(PolicyModule):
    """Fine-tunes on completions with a positive advantage: rejection sampling, as in RAFT (2304.06767)."""

    def __init__(self, model_name, **options):
        optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)  # noqa: E731
        super().__init__(model_name, lora={"r": 4}, optimizer=optimizer, **options)
        self.loss = LossConfig("grpo").resolve()
        self.coefficients = Coefficients(self.loss)
        self.step_stats, self.step_gaps = {}, []

    def score(self, batch, *, old):
        return batch

    def training_step(self, batch, batch_idx):
        rollout = batch.rollout
        good = rollout.advantages > 0
        loss = -(self.policy.logprobs(rollout).logprobs * good).sum() / good.sum().clamp(min=1)
        self.log("nll", loss)
        return loss


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_another_loss_learns_under_the_same_callback(model_folder, tmp_path):
    torch.manual_seed(0)
    m = BestOfGroup(model_folder)
    trainer(tmp_path, rollout(), max_steps=25).fit(m, data())
    rewards = [float(r["reward"]) for r in rows_of(tmp_path) if r.get("reward")]
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])
    assert any(w.norm() > 0 for n, w in weights(m).items() if "lora_B" in n)


def test_it_resumes(model_folder, tmp_path):
    """Checkpoints hold what trains, and what a subclass adds."""
    found = []
    for name, stops in (("whole", (4,)), ("resumed", (2, 4))):
        folder, saver = tmp_path / name, None
        for stop in stops:
            torch.manual_seed(0)
            m = BestOfGroup(model_folder)
            saver = pl.callbacks.ModelCheckpoint(folder / "ckpt", every_n_train_steps=1, save_last=True)
            last = folder / "ckpt" / "last.ckpt"
            run = trainer(folder, rollout(), saver, max_steps=stop)
            run.fit(m, data(), ckpt_path=last if last.exists() else None)
        found.append(weights(m))
    assert all(torch.equal(w, found[1][n]) for n, w in found[0].items())


def test_a_module_without_what_is_used_is_refused_by_name(tmp_path):
    class Bare(pl.LightningModule):
        tokenizer = tiny_tokenizer()

        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    with pytest.raises(ConfigError, match=r"Bare cannot train .* no coefficients, loss, model_path, policy"):
        trainer(tmp_path, rollout()).fit(Bare(), data())


def test_a_module_with_its_weights_passes(model_folder):
    """As the command line has it, where a model that cannot be loaded is refused first."""
    m = BestOfGroup(model_folder)
    m.configure_model()
    check_module(m)


def test_the_check_calls_no_property(model_folder):
    """A tokenizer may take seconds, or a network, to load."""

    class Lazy(BestOfGroup):
        @property
        def tokenizer(self):
            raise AssertionError("loaded")

    check_module(Lazy(model_folder))


def test_a_reference_that_nothing_compares_with_is_refused(model_folder, tmp_path):
    m = BestOfGroup(model_folder, reference=ReferenceConfig(ema_every=1))
    with pytest.raises(ConfigError, match=r"model.reference is set, but BestOfGroup .* remove"):
        trainer(tmp_path, rollout()).fit(m, data())
