"""Architectures run packed, padded, or not at all; never wrong.

One of each class of behaviour here; `python docs/make_models.py --check` compares all of them.
"""

import importlib
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from fits import data, module, rollout, trainer
from models import TINY, hf_engine, random_rollout, tiny_llama
from tiny import tiny_tokenizer
from torch import nn

from grpo_lightning.engines import Request
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.policy.dropout import disable_dropout, dropout_rates
from grpo_lightning.policy.dynamic_rope import rope_limit
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.logit_transforms import logit_changes
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.probe import alone, settle_forward
from grpo_lightning.policy.verification import logprob_distance
from grpo_lightning.types import Completion, SamplingParams

DOCS = Path(__file__).parents[2] / "docs"
REPRESENTATIVES = [
    "llama",
    "gemma2",
    "gpt_oss",
    "mimo_v2_flash",
    "llama4_text",
    "deepseek_v3",
    "phimoe",
    "opt",
    "seed_oss",
    "xglm",
    "mixtral",
    "bart",
    "stablelm",
    "nemotron",
    "doge",
    "biogpt",
    "gpt_bigcode",
    "mpt",
    "hyperclovax",
    "falcon_h1",
    "bert",
    "cpmant",
    "mamba",
    "jamba",
    "recurrent_gemma",
    "qwen3_5_text",
    "lfm2",
    "lfm3",
    "minimax",
    "moshi",
]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0],
}


@pytest.fixture(scope="module")
def maker():
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("make_models")
    sys.path.remove(str(DOCS))


def page():
    rows = re.findall(
        r"^\| (.+?) \| (\S*) \| (\w[\w ]*) \| (.*) \| (.*?) ?\|$", (DOCS / "models.md").read_text(), re.M
    )
    return {name: (way, decoding.strip()) for name, _, way, _, decoding in rows[1:]}


@pytest.mark.parametrize("name", [*REPRESENTATIVES, "qwen2, sliding windows", "phi3, longrope"])
@pytest.mark.filterwarnings("ignore")
def test_it_runs_as_the_page_says_and_right(maker, name):
    row = maker.trial(name, check=True)
    assert row.way != "not built", row.note
    if f"transformers {transformers.__version__};" in (DOCS / "models.md").read_text():
        assert page()[name] == (row.way, row.decoding.partition(",")[0])


def test_the_page_has_every_architecture(maker):
    if f"transformers {transformers.__version__};" in (DOCS / "models.md").read_text():
        assert list(page()) == maker.names(), "run: python docs/make_models.py"


def phi3(**changes):
    config = transformers.Phi3Config(
        **{
            **TINY,
            "hidden_size": 64,
            "original_max_position_embeddings": 24,
            "rope_parameters": LONGROPE,
            **changes,
        }
    )
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(config)


def uneven():
    """Two prompts; a completion of the second goes beyond 24 tokens, those of the first do not."""
    g = torch.Generator().manual_seed(0)
    lengths = (6, 4, 30, 5)
    return random_rollout(
        prompt_ids=[torch.randint(3, 131, (n,), generator=g).tolist() for n in (5, 7)],
        completions=[
            Completion(token_ids=torch.randint(3, 131, (n,), generator=g).tolist()) for n in lengths
        ],
        group_ids=[0, 0, 1, 1],
        advantages=torch.zeros(4),
        max_tokens=30,
    )


@pytest.mark.parametrize("padded", [False, True])
def test_longrope_takes_the_factors_of_the_longest_sequence_for_all(padded):
    policy, b = Policy(phi3(), tiny_tokenizer()), uneven()
    if padded:
        policy.run_padded("test")
    with pytest.raises(ConfigError, match=r"make 36 tokens, but beyond 24 .*rollout\.sampling\.max_tokens"):
        policy.logprobs(b)
    with torch.no_grad():
        short = policy.logprobs(b.take([0, 1])).logprobs
        with pytest.warns(UserWarning, match="over 24 tokens for all, since the longest may have 40"):
            policy.fit_lengths(40)
        whole = policy.logprobs(b).logprobs
        cut = torch.cat(
            [policy.logprobs(part).logprobs for part in (b.take([0, 1]), b.take([2]), b.take([3]))]
        )
    torch.testing.assert_close(whole, cut, atol=1e-5, rtol=0)
    assert (whole[: len(short)] - short).abs().max() > 0.1
    assert logprob_distance(policy, b).max() < 1e-5


def test_longrope_in_the_engine_is_that_of_training():
    policy = Policy(phi3(eos_token_id=1), tiny_tokenizer())
    policy.fit_lengths(60)
    engine = hf_engine(policy)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    out = engine.generate(
        [Request(prompt_ids=p, seeds=[1, 2]) for p in prompts], SamplingParams(max_tokens=40)
    )
    assert max(len(c.token_ids) for group in out for c in group) > 24
    for prompt, group in zip(prompts, out, strict=True):
        for c in group:
            row = alone(policy, [*prompt, *c.token_ids[:-1]])[len(prompt) - 1 :]
            expected = row[range(len(row)), c.token_ids]
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=0)


def test_a_run_fixes_longrope_by_its_longest_sequence(tmp_path):
    folder = tmp_path / "model"
    phi3().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    limits = {}
    for max_tokens in (8, 30):
        m = module(str(folder), lora={"r": 4, "target_modules": ["qkv_proj"]})
        fit = trainer(
            tmp_path / str(max_tokens), rollout(sampling=SamplingParams(max_tokens=max_tokens)), max_steps=1
        )
        fit.fit(m, datamodule=data())
        limits[max_tokens] = m.policy.rope_limit
    longest = fit.datamodule.longest_prompt
    assert longest + 8 <= 24 < longest + 30
    assert limits == {8: 24, 30: None}


def test_longrope_of_one_kind_of_layer():
    rope = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**{**TINY, "layer_types": kinds, "rope_parameters": rope})
    torch.manual_seed(0)
    policy, b = Policy(transformers.Gemma3ForCausalLM(config), tiny_tokenizer()), uneven()
    assert policy.rope_limit == 24
    policy.fit_lengths(40)
    with torch.no_grad():
        whole = policy.logprobs(b).logprobs
        cut = torch.cat([policy.logprobs(b.take([s])).logprobs for s in range(4)])
    torch.testing.assert_close(whole, cut, atol=1e-5, rtol=0)


def test_dynamic_rope_is_refused_beyond_its_first_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    policy = Policy(tiny_llama(rope_parameters=rope, max_position_embeddings=24), tiny_tokenizer())
    with torch.no_grad():
        policy.logprobs(uneven().take([0, 1, 3]))
    policy.fit_lengths(24)
    for call in (lambda: policy.logprobs(uneven()), lambda: policy.fit_lengths(36)):
        with pytest.raises(ConfigError, match=r"make 36 tokens, but beyond 24 .*LlamaForCausalLM depend"):
            call()
    assert rope_limit(tiny_llama().config) is None


@pytest.mark.parametrize(
    "rates",
    [
        ("opt", {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.1}),
        ("seed_oss", {"residual_dropout": 0.3}),
        ("xglm", {"dropout": 0.3, "activation_dropout": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("mpt", {"attn_config": {"attn_pdrop": 1}}),
    ],
)
def test_dropout_of_every_kind_is_seen_and_switched_off(maker, rates, tmp_path):
    name, changes = rates
    config = maker.tiny_config(transformers.CONFIG_MAPPING[name], **changes)
    folder = tmp_path / "model"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert Policy(model, tiny_tokenizer()).drops_out
    model.save_pretrained(folder)
    on, off = (load_policy(str(folder), tiny_tokenizer(), disable_dropout=d) for d in (False, True))
    assert on.drops_out
    assert not off.drops_out
    b = random_rollout(vocab=99)
    off.train()
    with torch.no_grad():
        twice = [off.logprobs(b).logprobs for _ in range(2)]
        off.eval()
        assert torch.equal(*twice)
        torch.testing.assert_close(twice[0], off.logprobs(b).logprobs, atol=1e-5, rtol=0)


def test_rates_of_other_heads_drop_nothing_out():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=99, summary_first_dropout=0.1)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    assert not list(dropout_rates(transformers.GPT2LMHeadModel(config)))


def test_a_model_that_is_random_although_nothing_drops_out_is_refused():
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x) if self.training else x

    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, Noise())
    policy = Policy(model, tiny_tokenizer())
    assert not policy.drops_out
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot train: its padded forward is"):
        settle_forward(policy)


@pytest.mark.filterwarnings("ignore:LlamaForCausalLM runs padded")
def test_layers_that_see_their_neighbours_are_refused():
    class Mean(nn.Module):
        def forward(self, x):
            return x + x.mean((0, 1))

    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, Mean())
    with pytest.raises(ConfigError, match="log-probabilities depend on the tokens after it"):
        settle_forward(Policy(model, tiny_tokenizer()))


def test_what_packs_wrong_runs_padded_and_says_so_once():
    """A convolution over the row, as in hybrid models, looks across the borders of completions."""

    class Before(nn.Module):
        def forward(self, x):
            return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, Before())
    policy = Policy(model, tiny_tokenizer())
    with warnings.catch_warnings(record=True) as said:
        settle_forward(policy)
        settle_forward(policy)
    (message,) = [str(w.message) for w in said]
    assert message.startswith("LlamaForCausalLM runs padded, not packed, because its packed forward is")
    assert "one row at a time" in policy.padded_reason
    b = random_rollout()
    with torch.no_grad():
        assert logprob_distance(policy, b).max() < 1e-5


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_does_not_send_a_model_down_another_path(maker, kind, dtype):
    policy = Policy(maker.build(kind).to(dtype), tiny_tokenizer())
    policy.rates = disable_dropout(policy.causal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle_forward(policy)
    assert policy.padded_reason is None


@pytest.mark.parametrize("name", ["recurrent_gemma", "hyperclovax", "falcon_h1", "granite", "cohere"])
def test_caps_and_scales_of_logits_are_found(maker, name):
    model = maker.build(name)
    policy = Policy(model, tiny_tokenizer())
    policy.rates = disable_dropout(model)
    settle_forward(policy)
    assert policy.logit_changes
    assert policy.logit_changes in logit_changes(model.config)


def test_an_unknown_cap_is_refused_in_fp32():
    """0.06 nats, which a tolerance for bf16 lets pass."""
    policy = Policy(tiny_llama(), tiny_tokenizer())
    head = policy.causal.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: 4 * torch.tanh(out / 4))
    with pytest.raises(ConfigError, match="changes its logits"):
        settle_forward(policy)


def test_sinks_are_found_by_their_parameter():
    model = tiny_llama()
    model.model.layers[0].self_attn.register_parameter("attention_sink_bias", nn.Parameter(torch.zeros(4)))
    assert Policy(model, tiny_tokenizer()).padded_reason == "its attention has sinks"


def test_an_engine_that_cannot_decode_says_so():
    model = tiny_llama()
    policy = Policy(model, tiny_tokenizer())
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        raise TypeError("no such argument; and so on")

    model.forward = fails
    engine = hf_engine(policy)
    with pytest.raises(
        EngineError, match=r"cannot decode LlamaForCausalLM: it fails \(TypeError: no such argument\);"
    ):
        engine.generate([Request(prompt_ids=[5], seeds=[1])], SamplingParams(max_tokens=2))
    assert len(calls) == 4  # three ways, and one row in one call


def test_the_first_step_is_compared_with_one_row_at_a_time():
    """The padded path stands beside neighbours: what depends on them is the same on both sides of it."""

    class Widest(nn.Module):
        def forward(self, x):
            return x * (1 + x.shape[1] / 100)

    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, Widest())
    policy = Policy(model, tiny_tokenizer())
    policy.run_padded("test")
    b = replace(random_rollout(seed=3), old_logprobs=None)
    assert logprob_distance(policy, b).max() > 0.01
