"""Whole models with exchanged modules against the models as they were loaded."""

import copy
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from models import TINY, random_rollout
from tiny import tiny_tokenizer

from grpo_lightning.kernels.config import AUTO, KernelConfig
from grpo_lightning.kernels.patching import PATCH_RULES
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.verification import logprob_distance

CPU = torch.device("cpu")
BODY = ("lora", "qkv", "swiglu", "norm", "rotary")
LAYERS = {  # modules of a decoder layer that each flag exchanges; Qwen3 has norms of q and k
    "Llama": {"lora": 7, "qkv": 3, "swiglu": 3, "norm": 2, "rotary": 1},
    "Qwen2": {"lora": 7, "qkv": 3, "swiglu": 3, "norm": 2, "rotary": 1},
    "Qwen3": {"lora": 7, "qkv": 3, "swiglu": 3, "norm": 4, "rotary": 1},
}


def causal(kind, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, "tie_word_embeddings": True, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.ndim == 1:  # weights of norms that are not 1, biases that are not 0
            p.data += 0.3 * torch.randn(p.shape, generator=g)
        assert p.isfinite().all(), name
    return model


def policy(kind="Qwen2", flags=(), checkpointing=False, dtype=None, targets="all-linear", **changes):
    from peft import LoraConfig, get_peft_model

    ranks = {"k_proj": 2} if targets == "all-linear" else {}
    lora = {"r": 4, "lora_alpha": 8, "rank_pattern": ranks, **changes}
    base = causal(kind)
    model = get_peft_model(
        base if dtype is None else base.to(dtype), LoraConfig(target_modules=targets, **lora)
    )
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
    made = Policy(model, tiny_tokenizer())
    if checkpointing:
        made.causal.gradient_checkpointing_enable({"use_reentrant": False})
        made.causal.enable_input_require_grads()
    made.prepare(KernelConfig(**dict.fromkeys(flags, "on")), CPU)
    return made


def run(made, seed=3):
    made.zero_grad()
    b = random_rollout(seed=seed)
    logp = made.logprobs(b).logprobs
    (logp * b.advantages).sum().backward()
    return {"logp": logp.detach(), **{n: p.grad.clone() for n, p in made.trainable().items()}}


def assert_same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


def exchanged(made):
    made_of = ("Fused", "Sharing", "Swiglu", "Kernel", "Rotary")
    return [m for m in made.modules() if type(m).__name__.startswith(made_of)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_everything_on_gives_the_same_gradient(kind, checkpointing):
    fast = policy(kind, BODY, checkpointing)
    layers = LAYERS[kind]
    assert len(exchanged(fast)) == 2 * (layers["lora"] + layers["norm"] + 2) + 1
    want = run(policy(kind, (), checkpointing))
    for _ in range(2):
        assert_same(run(fast), want)
    for m in fast.modules():
        assert getattr(m, "siblings", None) is None or (not m.siblings.apart and m.siblings._x is None)


@pytest.mark.parametrize("flag", BODY)
def test_each_flag_alone(flag):
    fast = policy("Qwen3", [flag])
    assert len(exchanged(fast)) == 2 * LAYERS["Qwen3"][flag] + (flag == "norm")
    assert_same(run(fast), run(policy("Qwen3")))


def test_the_projections_share_their_products():
    """Counted in forward and backward: three layers of five share x A, h B, x W, dA and dx."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen[func.overloadpacket.__name__] += 1
            return func(*args, **kwargs or {})

    found = []
    for flags in (["lora"], BODY):
        made = policy("Llama", flags)
        with Count() as count:
            run(made)
        found.append(sum(n for name, n in count.seen.items() if name in ("mm", "addmm", "addmm_")))
    alone, shared = found
    layers = made.causal.config.num_hidden_layers
    assert alone - shared == layers * 3 * 6 - 2 * 2  # the first layer has no dx of q, k and v


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "down_proj"], ["k_proj", "up_proj"]])
def test_adapters_on_some_projections(targets):
    alone = "q_proj" not in targets
    with pytest.warns(UserWarning, match="none to exchange") if alone else nullcontext():
        fast = policy("Qwen2", BODY, targets=targets)
    assert_same(run(fast), run(policy("Qwen2", targets=targets)))


def test_pefts_switches():
    fast, stock = policy("Qwen3", BODY), policy("Qwen3")
    b = random_rollout(seed=3)
    with torch.no_grad():
        on = fast.logprobs(b).logprobs
        torch.testing.assert_close(on, stock.logprobs(b).logprobs, atol=1e-5, rtol=0)
        with fast.reference(), stock.reference():
            torch.testing.assert_close(
                fast.logprobs(b).logprobs, stock.logprobs(b).logprobs, atol=1e-5, rtol=0
            )
            assert not torch.allclose(fast.logprobs(b).logprobs, on, atol=1e-2)
        for switch in (fast.model.merge_adapter, fast.model.unmerge_adapter):
            switch()
            torch.testing.assert_close(fast.logprobs(b).logprobs, on, atol=1e-4, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(fast.logprobs(b).logprobs, on, atol=1e-5, rtol=0)
    assert_same(run(fast), run(stock), 1e-4)  # merging has rounded the weights


def test_generation_is_the_same():
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    found = []
    for flags in ((), BODY):
        made = policy("Qwen3", flags)
        with made.generating() as model:
            found.append(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*found)


def test_names_and_files_stay(tmp_path):
    from safetensors.torch import load_file

    fast, stock = policy("Qwen2", BODY), policy("Qwen2")
    assert list(fast.state_dict()) == list(stock.state_dict())
    for name, made in (("a", fast), ("b", stock)):
        made.model.save_pretrained(tmp_path / name)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stock_classes_come_back():
    fast, stock = policy("Qwen3", BODY), policy("Qwen3")
    loaded = [type(m) for m in stock.modules()]
    made = [type(m) for m in fast.modules()]
    with fast.prepared.plain():
        assert [type(m) for m in fast.modules()] == loaded
    assert [type(m) for m in fast.modules()] == made
    assert logprob_distance(fast, random_rollout(seed=2)).max() < 1e-5
    twin = copy.deepcopy(fast)
    assert_same(run(twin), run(fast))
    fast.prepared.restore()
    assert [type(m) for m in fast.modules()] == loaded
    assert not any("siblings" in vars(m) for m in fast.modules())
    fast.prepare(KernelConfig(**dict.fromkeys(BODY, "on")), CPU)
    assert [type(m) for m in fast.modules()] == made


def test_bf16_is_as_near_to_fp32_as_stock():
    """On average: from one rollout to the next the gap changes by a tenth."""
    plain = policy("Qwen3")
    exact = [run(plain, seed) for seed in range(3, 9)]
    gaps = []
    for flags in ((), BODY):
        half = policy("Qwen3", flags, dtype=torch.bfloat16)
        found = [run(half, seed) for seed in range(3, 9)]
        assert all(x.dtype == torch.float32 for n, x in found[0].items() if "lora" in n)
        pairs = [(a[n].double(), x.double()) for a, b in zip(found, exact, strict=True) for n, x in b.items()]
        gaps.append(sum((a - x).norm() / x.norm() for a, x in pairs))
    assert gaps[1] < 1.15 * gaps[0]


def test_dropout_stays_pefts_and_is_said():
    found = []
    for flags in ((), BODY):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = policy("Llama", flags, lora_dropout=0.4)
        torch.manual_seed(7)
        found.append(run(made.train()))
    assert_same(*found)
    texts = [str(w.message) for w in said if "model.kernels" in str(w.message)]
    assert len(texts) == 3
    assert "model.kernels.qkv: 6 of 6 modules run their own forward (dropout)" in texts
    assert "model.kernels.swiglu: 4 of 6 modules run their own forward (dropout)" in texts


@pytest.mark.parametrize("lora", [False, True])
def test_autocast(lora):
    """Norms and SwiGLU are exchanged under it too, where an input is of the type of the weight."""
    found = []
    for flags in ((), ("swiglu", "norm", "rotary")):
        made = policy("Qwen3") if lora else Policy(causal("Qwen3"), tiny_tokenizer())
        made.precision = lambda: torch.autocast("cpu", torch.bfloat16)
        made.prepare(KernelConfig(**dict.fromkeys(flags, "on")), CPU)
        with made.precision():
            found.append(run(made))
    for name, x in found[0].items():
        assert found[1][name].dtype == x.dtype
        assert (found[1][name] - x).norm() <= 2e-2 * x.norm() + 1e-6, name


def test_full_weights_train_the_norms_too():
    found = []
    for flags in ((), ("swiglu", "norm", "rotary")):
        made = Policy(causal("Qwen3"), tiny_tokenizer())
        made.prepare(KernelConfig(**dict.fromkeys(flags, "on")), CPU)
        found.append(run(made))
    assert "model.model.layers.0.self_attn.q_norm.weight" in found[0]
    assert_same(found[1], found[0], 2e-5)


def test_modules_that_compute_something_else_stay():
    """Gemma multiplies by 1 + w, and by GELU."""
    with pytest.warns(UserWarning, match="another one") as said:
        made = policy("Gemma", ["swiglu", "norm"])
    texts = [str(w.message) for w in said]
    assert "model.kernels.norm: 5 of 5 modules run their own forward (its forward is another one)" in texts
    assert "model.kernels.swiglu: 2 of 6 modules run their own forward (its forward is another one)" in texts
    assert_same(run(made), run(policy("Gemma")))


@pytest.mark.parametrize(
    ("kind", "changes", "stay"),
    [
        ("Gemma", {}, 0),  # its norms and its MLP are others, its attention is not
        ("Cohere", {}, 2),  # turns neighbours, not halves
        ("Glm", {}, 2),
        ("Olmo2", {}, 2),  # has norms over all heads at once
        ("Mistral", {"sliding_window": 8}, 2),  # reads its window off the config
        ("Mistral", {"sliding_window": None}, 0),
        ("Starcoder2", {}, 0),
        ("Starcoder2", {"residual_dropout": 0.5}, 2),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, 1),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, 0),
    ],
)
def test_attention_that_computes_something_else_stays(kind, changes, stay):
    said = f"rotary: {stay} of 2 modules run their own forward"
    found = []
    for flags in ((), ["rotary"]):
        made = Policy(causal(kind, **changes), tiny_tokenizer())
        with pytest.warns(UserWarning, match=said) if flags and stay else nullcontext():
            made.prepare(KernelConfig(**dict.fromkeys(flags, "on")), CPU)
        assert len(exchanged(made)) == (2 - stay if flags else 0)
        found.append(run(made.eval()))
    assert_same(found[1], found[0], 2e-5)


def test_the_probe_leaves_an_attention_as_it_was():
    from grpo_lightning.kernels.patching import one_kernel_rotary

    (swap,) = (s for s in PATCH_RULES if s.flag == "rotary")
    model = causal("Qwen3", attention_dropout=0.25)
    layer = model.model.layers[0].self_attn.train()
    layer.q_norm.eval()
    state, before = torch.get_rng_state(), dict(vars(layer))
    assert swap.stays(layer, False) is None
    assert vars(layer) == before
    assert layer.config is model.config
    assert model.config._attn_implementation == "sdpa"
    assert [m.training for m in layer.modules()] == [True] * 5 + [False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert one_kernel_rotary(type(layer)) is swap.become(type(layer))


def test_only_packed_rows_are_turned_by_the_op(monkeypatch):
    from grpo_lightning.kernels import rotary_attention as attention_layers

    calls = []
    stock = attention_layers.rotary
    monkeypatch.setattr(attention_layers, "rotary", lambda *args: calls.append(args) or stock(*args))
    made = policy("Qwen2", ["rotary"])
    calls.clear()
    run(made)
    assert len(calls) == 2
    with made.generating() as model, torch.no_grad():
        ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
        model(input_ids=ids, use_cache=False)
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    layer = made.causal.model.layers[0].self_attn
    narrow = torch.ones(1, 3, layer.head_dim // 2)  # of partial rotary embeddings
    with pytest.raises(RuntimeError, match="size of tensor"):
        layer(
            torch.ones(1, 3, 32), position_embeddings=(narrow, narrow), attention_mask=None, layout=object()
        )
    assert len(calls) == 2


def test_the_kernels_in_a_model(monkeypatch):
    """Under Triton's interpreter, where a model on a CPU takes the twins otherwise."""
    pytest.importorskip("triton")
    from grpo_lightning.ops import rotary, swiglu

    made = policy("Qwen3", BODY)
    for op in (rotary, swiglu):
        monkeypatch.setattr(op, "use_triton", lambda device, backend: True)
    assert_same(run(made), run(policy("Qwen3")))


def test_a_4_bit_base(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from peft import LoraConfig, get_peft_model
    from workloads import quantise

    found = []
    for flags in ((), BODY):
        base = causal("Qwen2", hidden_size=64, intermediate_size=128)
        quantise(base, torch.float32)
        lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
        model = get_peft_model(base, lora)
        g = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
        made = Policy(model, tiny_tokenizer())
        made.prepare(KernelConfig(**dict.fromkeys(flags, "on")), CPU)
        assert len(exchanged(made)) == (2 * (5 + 1 + 2 + 1) + 1 if flags else 0)
        found.append(run(made))
    assert_same(found[1], found[0], 1e-4)


def attention(flags=("qkv",)):
    made = policy("Llama", flags)
    layer = made.causal.model.layers[0].self_attn
    return layer.q_proj, layer.k_proj, layer.v_proj


def stock_forward(layer, x):
    return type(layer).__mro__[1].forward(layer, x)


def test_nothing_stale_is_handed_out():
    def write_to_x(x, layer):
        x.add_(1.0)

    def step(x, layer):
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(2.0)

    def other_scaling(x, layer):
        layer.scaling["default"] = 5.0

    def switch_off(x, layer):
        layer.enable_adapters(False)

    for change in (write_to_x, step, other_scaling, switch_off):
        q, k, v = attention()
        x = torch.randn(3, 32)
        q(x)
        change(x, k)
        torch.testing.assert_close(k(x), stock_forward(k, x))
        torch.testing.assert_close(v(x), stock_forward(v, x))
        torch.testing.assert_close(q(x), stock_forward(q, x))


def test_a_graph_is_not_handed_out_without_one():
    q, k, _v = attention()
    x = torch.randn(3, 32)
    with torch.no_grad():
        q(x)
    with pytest.warns(UserWarning, match="they compute one by one"):
        assert k(x).requires_grad


def test_equal_numbers_in_another_tensor_are_another_x():
    q, k, _v = attention()
    x = torch.randn(3, 32)
    q(x)
    with pytest.warns(UserWarning, match="they compute one by one"):
        k(x.clone())
    assert q.siblings.apart
    assert q.siblings._x is None
    torch.testing.assert_close(q(x), stock_forward(q, x))


def test_nothing_is_kept_after_the_last_is_taken():
    import gc
    import weakref

    q, k, v = attention()
    x = torch.randn(3, 32)
    gone = weakref.ref(x)
    for _ in range(2):
        for layer in (v, q, k):  # in any order
            torch.testing.assert_close(layer(x), stock_forward(layer, x))
    assert not q.siblings.apart
    del x
    gc.collect()
    assert gone() is None


def test_compiled_layers_with_everything(monkeypatch):
    from torch._dynamo.utils import counters

    counters.clear()
    stock = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **k: stock(m, **{**k, "backend": "aot_eager"}))
    want = run(policy("Qwen3"))
    made = policy("Qwen3", (*BODY, "compile"))
    assert_same(run(made), want)
    for seed in range(4, 8):
        run(made, seed)
    assert all("_attention" in reason for reason in counters["graph_break"])  # siblings are seen through
    known = counters["stats"]["unique_graphs"]
    run(made, 9)
    assert counters["stats"]["unique_graphs"] == known
    assert not any(m.siblings.apart for m in made.modules() if hasattr(m, "siblings"))


def test_every_row_has_a_flag():
    assert {s.flag for s in PATCH_RULES} == set(BODY)
    assert set(BODY) <= set(AUTO)
