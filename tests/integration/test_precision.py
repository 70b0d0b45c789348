"""Mixed and half precision on a CPU: what runs without gradient runs in the precision of a training step."""

import pytest
import torch
from fits import data, module, rollout, rows_of, trainer, weights

from grpo_lightning.losses import LossConfig

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None], ids=["lora", "full"])
def test_no_pass_without_gradient_leaves_traces(model_folder, tmp_path, precision, lora):
    """Autocast keeps copies of weights; one without a graph, or of the reference, would stop the training."""
    asked = {"dtype": torch.bfloat16} if lora is None and precision == "bf16-true" else {}
    m = module(model_folder, lora=lora, loss=LossConfig("dapo", kl_coef=0.1), model_kwargs=asked)
    m.configure_model()
    before = weights(m)
    trainer(tmp_path, rollout(), max_steps=2, precision=precision).fit(m, data())
    moved = [(w.float() - before[n].float()).abs().max().item() for n, w in weights(m).items()]
    assert sum(x > 0 for x in moved) >= 0.9 * len(moved)
    kl = [float(r["kl"]) for r in rows_of(tmp_path) if r["loss"]]
    assert kl[0] == 0.0
    assert kl[1] > 0.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_pass_of_several_has_ratio_one(model_folder, tmp_path, precision):
    settings = {"precision": precision, "max_steps": 2, "accumulate_grad_batches": 2}
    trainer(tmp_path, rollout(num_iterations=2), **settings).fit(module(model_folder), data())
    first = next(r for r in rows_of(tmp_path) if r["loss"])
    assert float(first["ratio/first_pass_max_error"]) == 0.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sampling_and_training_agree(model_folder, tmp_path, precision):
    """Decoding with a cache rounds otherwise than a packed forward, but in the same precision."""
    trainer(tmp_path, rollout(), max_steps=1, precision=precision).fit(module(model_folder), data())
    row = next(r for r in rows_of(tmp_path) if r["loss"])
    gap = float(row["sampling/sampling_logp_difference/mean"])
    assert gap < (1e-4 if precision == "32-true" else 0.05)
    assert float(row["check/logprob_distance_mean"]) < (1e-4 if precision == "32-true" else 0.05)


def test_counts_are_exact_in_bf16(model_folder, tmp_path):
    """bf16 has 8 bits: a count beyond 256 would be rounded."""
    m = module(model_folder)
    r = rollout(num_generations=16)
    trainer(tmp_path, r, max_steps=1, precision="bf16-true").fit(m, data())
    row = next(r for r in rows_of(tmp_path) if r["loss"])
    tokens = float(row["rollout/step_tokens"])
    assert tokens == round(64 * float(row["completions/mean_length"]))
    assert tokens > 256


def test_a_number_becomes_no_bf16_tensor():
    from grpo_lightning.metrics.reduce import combine, effective_share, mean, reduced, values

    torch.set_default_dtype(torch.bfloat16)
    try:
        ess = effective_share(torch.ones(1001))
        parts = [{"sum": reduced("sum", 4097.0), "mean": mean(1001.0, 3), "ess": ess}]
        assert values(combine(parts)) == {"sum": 4097.0, "mean": 1001 / 3, "ess": 1.0}
    finally:
        torch.set_default_dtype(torch.float32)
