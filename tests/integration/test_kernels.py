"""A prepared model computes what it did as loaded; what does not is found on the first step."""

from contextlib import nullcontext

import pytest
import torch
from fits import data, module, rollout, rows_of, trainer, weights
from models import random_rollout, tiny_llama
from tiny import tiny_tokenizer
from ways import NoGraph

from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.kernels.config import AUTO, KernelConfig
from grpo_lightning.kernels.cuda_graphs import decoded, make_graphs, recomputed
from grpo_lightning.ops.attention.packed import PackedLayout, _say_once
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.verification import first_step_distance, logprob_distance

CPU = torch.device("cpu")


def lora_policy():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), lora)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=g)
    return Policy(model, tiny_tokenizer())


def test_training_is_the_same_with_the_fused_adapters(model_folder, tmp_path):
    found = []
    for choice in ("off", "on"):
        m = module(
            model_folder, kernels=KernelConfig(lora=choice), optimizer=lambda p: torch.optim.SGD(p, 0.5)
        )
        trainer(tmp_path / choice, rollout(updates_per_rollout=2), max_steps=4).fit(m, data())
        found.append(weights(m))
    assert max(w.abs().max().item() for n, w in found[0].items() if "lora_B" in n) > 1e-3
    for name, w in found[0].items():
        torch.testing.assert_close(found[1][name], w, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["head", "loss"])
def test_a_triton_kernel_trains_like_its_twin(model_folder, tmp_path, kernel):
    found = []
    for choice in ("off", "on"):
        kernels = KernelConfig(**{kernel: choice})
        m = module(model_folder, kernels=kernels, optimizer=lambda p: torch.optim.SGD(p, 0.5))
        trainer(tmp_path / choice, rollout(), max_steps=2).fit(m, data())
        found.append((weights(m), rows_of(tmp_path / choice)))
    (want, logged), (got, ours) = found
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, atol=1e-5, rtol=0)
    assert [r.keys() for r in ours] == [r.keys() for r in logged]
    assert float(ours[0]["loss"]) == pytest.approx(float(logged[0]["loss"]), abs=1e-5)


def test_compiled_layers_compute_the_same_and_compile_once(monkeypatch):
    """With the backend that only traces: what is tested is which graphs there are, not how fast they run."""
    from torch._dynamo.utils import counters

    stock = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **k: stock(m, **{**k, "backend": "aot_eager"}))
    policy, b = lora_policy(), random_rollout(seed=3)
    want = policy.logprobs(b).logprobs
    want.sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.trainable().items()}
    policy.zero_grad()
    policy.prepare(KernelConfig(lora="on", compile="on"), CPU)
    got = policy.logprobs(b).logprobs
    got.sum().backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for name, p in policy.trainable().items():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-4)
    graphs = None
    for seed in range(6):
        b = random_rollout(seed=seed, prompts=2 + seed, longest=5 + seed)
        policy.logprobs(b).logprobs.sum().backward()
        with torch.no_grad(), policy.reference():
            policy.logprobs(b)
        if seed >= 1:
            graphs = graphs or counters["stats"]["unique_graphs"]
            assert counters["stats"]["unique_graphs"] == graphs
    with policy.generating() as causal:  # decoding compiles nothing
        causal(input_ids=torch.tensor([[3, 4, 5]]))
    assert counters["stats"]["unique_graphs"] == graphs
    assert logprob_distance(policy, random_rollout(seed=4)).max() < 1e-4


def test_prompts_shared_or_copied_give_the_same():
    b, found = random_rollout(seed=5), []
    for choice in ("on", "off"):
        policy = lora_policy()
        policy.prepare(KernelConfig(shared_prompts=choice), CPU)
        logp = policy.logprobs(b).logprobs
        logp.sum().backward()
        found.append([logp.detach(), *(p.grad for p in policy.trainable().values())])
    for a, c in zip(*found, strict=True):
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


def test_prompts_are_shared_where_it_is_worth_it():
    much = random_rollout(prompts=2, group=6, seed=1)
    little = much.take([0, 6])
    assert KernelConfig().shares(much, segments=True)
    assert not KernelConfig().shares(little, segments=True)
    assert KernelConfig().shares(little, segments=False)
    assert KernelConfig(shared_prompts="on").shares(little, segments=True)
    assert not KernelConfig(shared_prompts="off").shares(much, segments=True)


def test_the_first_step_is_compared_with_the_model_as_loaded(model_folder, tmp_path):
    m = module(model_folder, kernels=KernelConfig(lora="on"))
    trainer(tmp_path, rollout(), max_steps=2).fit(m, data())
    first = next(r for r in rows_of(tmp_path) if r["loss"])
    assert (
        0 <= float(first["check/logprob_distance_mean"]) <= float(first["check/logprob_distance_max"]) < 1e-4
    )
    assert 0 <= float(first["check/gradient_distance"]) < 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_gradient_with_checkpointed_layers(model_folder, tmp_path, checkpointing):
    m = module(model_folder, kernels=KernelConfig(lora="on"), gradient_checkpointing=checkpointing)
    trainer(tmp_path, rollout(), max_steps=1).fit(m, data())
    first = next(r for r in rows_of(tmp_path) if r["loss"])
    assert 0 <= float(first["check/gradient_distance"]) < 1e-3
    assert m.policy.model.training


def test_the_gradient_of_a_policy_that_is_sure_is_compared_too():
    """A run is resumed with a policy whose own tokens have hardly any gradient left."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = tiny_llama(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=2048).bfloat16()
    policy, b = (
        Policy(get_peft_model(base, lora), tiny_tokenizer()),
        random_rollout(1, 2, 8, seed=3, vocab=2048),
    )
    step = torch.optim.Adam(policy.trainable().values(), lr=3e-3)
    for _ in range(51):  # until the same tokens are found again
        step.zero_grad()
        (-policy.logprobs(b).logprobs.mean()).backward()
        step.step()
    assert policy.logprobs(b).logprobs.median() > -0.02
    assert first_step_distance(policy, b)["check/gradient_distance"] < 0.02


def test_a_kernel_without_its_gradient_stops_the_run(model_folder, tmp_path, monkeypatch):
    """Log-probabilities are right."""
    from grpo_lightning.kernels import lora as lora_layers

    stock = lora_layers.lora_linears

    def forgets(x, layers):
        return stock(x, [m._replace(a=m.a * 0 + m.a.detach(), b=m.b * 0 + m.b.detach()) for m in layers])

    monkeypatch.setattr(lora_layers, "lora_linears", forgets)
    m = module(model_folder, kernels=KernelConfig(lora="on"))
    with pytest.raises(GRPOError, match=r"is 1 of the length of a gradient .* Kernels: lora"):
        trainer(tmp_path, rollout(), max_steps=2).fit(m, data())


def test_the_shortest_pair():
    b = random_rollout(seed=3)
    pair = b.shortest_pair()
    assert len(pair.lengths) == 2
    assert len(pair.prompt_lengths) == 1
    assert random_rollout().take([]).shortest_pair().lengths == ()
    first = next(s for s, n in enumerate(b.lengths) if n)
    assert b.take([first]).shortest_pair().lengths == (b.lengths[first],)


def test_a_kernel_that_computes_something_else_stops_the_run(model_folder, tmp_path, monkeypatch):
    from grpo_lightning.kernels import lora as lora_layers

    monkeypatch.setattr(lora_layers, "lora_linears", lambda x, ls: [x @ ls[0].weight.T * 1.1])
    m = module(model_folder, kernels=KernelConfig(lora="on"))
    with pytest.raises(GRPOError, match=r"Kernels: lora; switch them off"):
        trainer(tmp_path, rollout(), max_steps=2).fit(m, data())


def test_choices():
    assert KernelConfig().chosen(CPU) == dict.fromkeys(AUTO, False)
    assert KernelConfig(lora="on").chosen(CPU)["lora"]
    assert set(KernelConfig(head="off").chosen(torch.device("cuda"))) == set(AUTO)
    assert not KernelConfig(head="off").chosen(torch.device("cuda"))["head"]
    with pytest.raises(ConfigError, match=r"model\.kernels\.compile is 'yes'"):
        KernelConfig(compile="yes")


def test_few_takes_completions_of_the_first_and_the_last_group():
    b = random_rollout(prompts=3, group=4, seed=1)
    few = b.spot_check_subset()
    assert len(few.prompt_lengths) == 2
    assert 2 <= len(few.lengths) <= 4
    assert all(few.lengths)
    assert random_rollout().take([]).spot_check_subset().lengths == ()


def test_graphs_are_for_cuda():
    with pytest.raises(ConfigError, match=r"model\.kernels\.graphs is 'on', but the model is on cpu"):
        KernelConfig(graphs="on").chosen(CPU)


def test_what_cannot_be_replayed_is_said():
    policy = lora_policy()
    with pytest.warns(UserWarning, match=r"without graphs \(attention over segments is off, .*autocast\)"):
        assert make_graphs(policy, autocast=True) is None
    policy.prepare(KernelConfig(attention="on"), CPU)
    graphs = make_graphs(policy, autocast=False)
    assert graphs is not None
    policy.causal.config.sliding_window = 8
    with pytest.warns(UserWarning, match="it has a sliding window"):
        assert make_graphs(policy, autocast=False) is None


def test_filling_changes_nothing():
    """A batch that is filled up for graphs, in a call without one."""
    policy, batch = lora_policy(), random_rollout(seed=4)
    want = policy.logprobs(batch)
    ends = batch.sequence_layout, batch.segment_ids, batch.position_ids
    layout = PackedLayout.of(*ends, segments=True, filled=True)
    assert len(layout.shared.order) > batch.num_tokens

    fill_up(policy)
    _say_once.cache_clear()
    with pytest.warns(UserWarning, match="float32 on cpu"):
        got = policy.logprobs(batch)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)


def fill_up(policy):
    policy.graphs = NoGraph(policy)
    policy.prepared.chosen = {**policy.prepared.chosen, "graphs": True, "attention": True}


@pytest.mark.filterwarnings("ignore:attention runs group by group")
def test_the_first_gradient_that_is_compared_is_that_of_a_replay():
    """The first batch of a shape runs without a graph."""
    policy, batch = lora_policy(), random_rollout(seed=4)
    fill_up(policy)
    assert first_step_distance(policy, batch)["check/gradient_distance"] < 1e-3
    assert policy.graphs.calls == 2


def test_parameters_can_stand_in_for_others():
    """As a capture has it: aliases take the gradient, and the parameters none."""
    policy, batch = lora_policy(), random_rollout(seed=4)
    policy.prepare(KernelConfig(lora="on", qkv="on", swiglu="on", norm="on", rotary="on"), CPU)
    decoder = policy.causal.get_decoder()
    params = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    alias = {n: p.detach().requires_grad_() for n, p in params.items()}
    ends = batch.sequence_layout, batch.segment_ids, batch.position_ids
    layout = PackedLayout.of(*ends)
    found = []
    for given, leaves in ((None, params), (alias, alias)):
        hidden = decoded(decoder, batch.input_ids, batch.position_ids, layout, given)
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), list(leaves.values()))])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    assert all(p.grad is None for p in params.values())


def test_layers_that_run_again_in_the_backward_give_the_same_bits():
    """As a size has it that runs without a graph; little is kept, and the layers are left as they were."""
    policy, batch = lora_policy(), random_rollout(seed=4)
    policy.model.train()
    policy.prepare(KernelConfig(lora="on", qkv="on", swiglu="on", norm="on", rotary="on"), CPU)
    decoder = policy.causal.get_decoder()
    params = [p for p in decoder.parameters() if p.requires_grad]
    ends = batch.sequence_layout, batch.segment_ids, batch.position_ids
    layout, kept, found = PackedLayout.of(*ends), [], []

    def seen(x):
        kept[-1] += x.nbytes
        return x

    for block in (nullcontext(), recomputed(decoder)):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x), block:
            hidden = decoded(decoder, batch.input_ids, batch.position_ids, layout)
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), params)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    assert kept[1] < 0.2 * kept[0]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules())
