"""Writes docs/models.md: how every causal architecture of transformers runs here, tried on tiny random models.

python docs/make_models.py            writes the page (a minute)
python docs/make_models.py --check    compares also gradients, cuts and engines with one row at a time;
                                      fails where one differs; names of model types may follow
"""

import copy
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_configs import VOCAB, WINDOW, tiny_config

from grpo_lightning.engines.base import EngineContext, Request
from grpo_lightning.engines.hf import MODES, HFEngine, working_mode
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import GRPOError
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.dropout import disable_dropout
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.probe import settle_forward
from grpo_lightning.types import Completion, SamplingParams

PAGE = Path(__file__).with_name("models.md")
LARGEST = 3_000_000
"""parameters of a model that is still tiny"""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
                                "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 4.0, 9.0, 16.0]},
        },
    ),
    "qwen2, sliding windows": ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
}  # fmt: skip
"""options that make another class of behaviour of an architecture"""


class Tokenizer:
    """What a policy asks of a tokenizer."""

    pad_token_id, eos_token_id, all_special_ids = 0, 1, (0, 1)


class Row(NamedTuple):
    """What became of an architecture."""

    name: str
    class_name: str
    way: str
    """packed, padded, refused or not built"""
    note: str = ""
    decoding: str = ""


def names() -> list[str]:
    """Returns every model type that AutoModelForCausalLM knows, then the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def build(name: str) -> Any:
    """Returns a tiny model, every parameter of which matters.

    Raises:
        ValueError: it would not be tiny; and whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, changes = VARIANTS.get(name, (name, {}))
    config = tiny_config(CONFIG_MAPPING[model_type], **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its tiny model has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.float()


def batch() -> RolloutBatch:
    """Returns 3 prompts of different lengths with 3 completions each, one of them empty."""
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(2, VOCAB, (n,), generator=g).tolist()

    lengths = (9, 2, 14, 5, 0, 8, 11, 7, 3)
    return RolloutBatch.pack(
        prompt_ids=[ids(n) for n in (4, 11, 7)],
        completions=[Completion(token_ids=ids(n)) for n in lengths],
        group_ids=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        advantages=torch.zeros(len(lengths)),
        max_tokens=max(lengths),
    )


def one_by_one(model: Any, b: RolloutBatch) -> torch.Tensor:
    """Returns log-probabilities [N] of the stock model: a row per call, no padding, no cache."""
    alone, out, start = b.unshared(), [], 0
    rows = alone.row_starts().prompts
    for p, n, row in zip(alone.prompt_lengths, alone.lengths, rows, strict=True):
        if n:
            ids = alone.input_ids[row : row + p + n - 1]
            z = model(input_ids=ids[None], use_cache=False).logits[0, p - 1 :].float().log_softmax(-1)
            out.append(z.gather(1, b.target_ids[start : start + n, None])[:, 0])
        start += n
    return torch.cat(out)


def differences(stock: Any, policy: Policy) -> dict[str, float]:
    """Returns how far a settled policy is from its stock model: log-probabilities and gradients of one and of
    four micro-batches, and what HFEngine reports of the tokens that it samples."""
    b, found = batch(), {}
    weights = torch.linspace(-1, 1, sum(b.lengths))
    expected = one_by_one(stock.eval(), b)
    wanted = _gradient(stock, (expected * weights).sum())
    for parts in (1, 4):
        cuts = b.sequence_layout.split(parts)
        where = torch.cat([torch.tensor([i for s in cut for i in _tokens_of(b, s)]) for cut in cuts]).long()
        policy.train()
        logprobs = torch.cat([policy.logprobs(b.take(cut)).logprobs for cut in cuts])
        gradient = _gradient(policy.causal, (logprobs * weights[where]).sum())
        found[f"log-probabilities, {parts} micro-batches"] = (logprobs - expected[where]).abs().max().item()
        found[f"gradient, {parts} micro-batches"] = ((gradient - wanted).norm() / wanted.norm()).item()
    engine, sampling = HFEngine(), SamplingParams(max_tokens=12)
    engine.start(EngineContext(policy=policy, model_path="", max_model_len=None, sampling=sampling))
    engine.sync(PolicyWeights(policy), 0)
    prompts = [[5, 6, 7], [20, 21, 22, 23, 24, 25, 26, 27, 28], [40, 41, 42, 43, 44]]
    requests = [Request(prompt_ids=p, seeds=[3 * i, 3 * i + 1, 3 * i + 2]) for i, p in enumerate(prompts)]
    out = engine.generate(requests, sampling)
    sampled = RolloutBatch.pack(
        prompt_ids=prompts,
        completions=[c for group in out for c in group],
        group_ids=[i for i, group in enumerate(out) for _ in group],
        advantages=torch.zeros(9),
        max_tokens=12,
    )
    assert sampled.sampler_logprobs is not None
    with torch.no_grad():
        found["HFEngine"] = (one_by_one(stock, sampled) - sampled.sampler_logprobs).abs().max().item()
    return found


LIMITS = {"log-probabilities": 2e-4, "gradient": 2e-3, "HFEngine": 1e-3}
"""of `differences`, by the first words of its keys: rounding of fp32"""


def _tokens_of(b: RolloutBatch, s: int) -> range:
    start = sum(b.lengths[:s])
    return range(start, start + b.lengths[s])


def _gradient(model: Any, total: torch.Tensor) -> torch.Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, params, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, params, strict=True)]
    )


def trial(name: str, check: bool = False) -> Row:
    """Returns how an architecture runs.

    Raises:
        AssertionError: `check` found that it runs wrong.
    """
    try:
        model = build(name)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(3, 20)[None])
    except Exception as error:
        return Row(name, "", "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    class_name, stock = type(model).__name__, copy.deepcopy(model)
    rates = disable_dropout(model)
    policy = Policy(model, Tokenizer())
    policy.rates = rates
    try:
        settle_forward(policy)
    except GRPOError as error:
        return Row(name, class_name, "refused", str(error))
    row = Row(
        name,
        class_name,
        "padded" if policy.padded_reason else "packed",
        policy.padded_reason or "",
        MODES[working_mode(policy)],
    )
    if check:
        for what, value in differences(stock, policy).items():
            limit = next(limit for key, limit in LIMITS.items() if what.startswith(key))
            assert value <= limit, f"{name}: {what} differ by {value:.3g}, at most {limit:g} is rounding"
    return row


HEAD = """# Architectures

Generated by `python docs/make_models.py` with transformers {version}; `--check` repeats the comparison below (a
minute).

The table has {total} entries: every model type of `AutoModelForCausalLM`, and {variants} options that
change how a model type behaves.

| runs | entries | |
|---|---|---|
| packed | {packed} | a prompt appears once for its group, and nothing is padded |
| padded | {padded} | one row per completion, padded on the right, with the architecture's own masks |
| refused | {refused} | with a one-sentence reason, before anything trains |
| not built | {not_built} | transformers cannot build a tiny model of it from its config here, so it was not tried |

No list of architectures is maintained by hand. At the start of a fit, a few tokens go through the loaded model in its
own dtype: packed, padded and one row at a time. The fastest way that gives the log-probabilities of one row at a time
is used (`grpo_lightning/policy/probe.py`). `HFEngine` finds in the same way how it may decode:

| HFEngine decodes | entries |
|---|---|
| all prompts together | {together} |
| prompts of one length at a time | {by_length} |
| without a cache | {uncached} |

The comparison runs in fp32 on random models of two to four layers in which every parameter matters. Sliding windows
have {window} tokens. Every dropout rate of the config is 0.1 before dropout is disabled. The reference is the stock
model with one row per call, no padding and no cache. The first two rows are computed as one and as four micro-batches.

| compared | difference, at most |
|---|---|
| log-probabilities of 8 completions of 3 prompts | {limit:g} nats |
| gradient of their weighted sum with respect to all parameters | {gradient:g} of its norm |
| log-probabilities that `HFEngine` reports for 9 completions that it sampled | {engine:g} nats |

Attention that selects its keys (`index_topk`) may select more keys here than there are tokens.

Rotary factors of the kinds `longrope` and `dynamic` depend on the longest row of a call if that row exceeds the length
that the model was first trained for. With `longrope`, a run uses the factors of its longest prompt and completion for
all sequences, as vLLM does. Longer sequences with `dynamic` factors are refused.

| model type | class | runs | because | HFEngine |
|---|---|---|---|---|
"""


def page(rows: list[Row], version: str) -> str:
    """Returns docs/models.md."""
    ways, decodings = Counter(r.way for r in rows), Counter(r.decoding for r in rows)
    together, by_length, uncached = (decodings[name] for name in MODES.values())
    head = HEAD.format(
        version=version,
        total=len(rows),
        variants=len(VARIANTS),
        packed=ways["packed"],
        padded=ways["padded"],
        refused=ways["refused"],
        not_built=ways["not built"],
        together=together,
        by_length=by_length,
        uncached=uncached,
        window=WINDOW,
        limit=LIMITS["log-probabilities"],
        gradient=LIMITS["gradient"],
        engine=LIMITS["HFEngine"],
    )
    lines = (
        f"| {r.name} | {r.class_name} | {r.way} | {r.note.replace('|', '/')} | {r.decoding.partition(',')[0]} |"
        for r in rows
    )
    return head + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Tries architectures; returns how many run wrong. Without names, it tries all and writes the page."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    check, chosen = "--check" in arguments, [a for a in arguments if not a.startswith("--")]
    rows, wrong = [], 0
    for name in chosen or names():
        try:
            rows.append(trial(name, check))
            print(*rows[-1], sep=" | ", flush=True)
        except Exception as error:
            wrong += 1
            print("WRONG", name, type(error).__name__, error, flush=True)
    if not (chosen or check):
        PAGE.write_text(page(rows, transformers.__version__))
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
