"""vLLM beside the trainer: start, sync by kind, decoding, parity before and after 50 syncs, memory by phase.

One process per kind, since an engine leaves its mark on the allocator. The row «all weights, merged and
unmerged» is the way of trainers that merge into their own model, load everything and unmerge; the loop is
re-typed here, the loading is vLLM's.

    python benchmarks/bench_rollout.py --shape 0.5B --out $OUT
    python benchmarks/bench_rollout.py --shape 0.5B --turns merge adapter --out $OUT
    python benchmarks/bench_rollout.py --shape 7B --kinds "one base" "two bases" --out $OUT

`--turns` keeps engines of several kinds in one process and lets them decode in turns: decoding waits for the
host, whose speed moves.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import parser, save, setting, table, used_gib
from workloads import LINEAR, SHAPES

from grpo_lightning.engines import EngineContext, Request, VLLMEngine
from grpo_lightning.engines.base import WeightSource, sample_seeds
from grpo_lightning.engines.vllm.compat import put_weights
from grpo_lightning.engines.weight_sync import PolicyWeights, all_weights
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.lora import lora_config
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import SamplingParams

AWAKE = {"sync": "adapter", "sleep": "off", "kv_cache_memory_bytes": 10 << 30}
ROWS: dict[str, dict[str, Any]] = {
    "adapter": {"sync": "adapter"},
    "merge": {"sync": "merge"},
    "full": {"sync": "full"},
    "all weights, merged and unmerged": {"sync": "merge"},
    "one base": {**AWAKE, "share_base": "on"},
    "two bases": {**AWAKE, "share_base": "off"},
}
"""options of each engine"""


class Merging(VLLMEngine):
    """Merges into the trainer's own weights, sends all of them, and unmerges."""

    def sync(self, source: WeightSource, version: int) -> None:
        assert isinstance(source, PolicyWeights)
        policy = source.policy
        policy.model.merge_adapter()  # pyright: ignore
        pairs = (
            (name.replace(".base_layer", ""), w)
            for name, w in all_weights(policy, self._dtype)
            if ".lora_" not in name
        )
        self._awake().collective_rpc(put_weights, args=(pairs,))
        policy.model.unmerge_adapter()  # pyright: ignore
        self._llm.reset_prefix_cache()
        self.policy_version = version


def save_model(shape: str, folder: Path, eos: int = 1, pad: int = 0) -> None:
    """Writes a random Qwen2 of `shape`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"tie_word_embeddings": True, **SHAPES[shape], "max_position_embeddings": 4096}
    if shape == "tiny":  # vLLM's CPU attention takes heads of 32 and more
        sizes |= {"hidden_size": 128, "num_attention_heads": 4}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, eos_token_id=eos, pad_token_id=pad)).bfloat16()
    model.save_pretrained(folder)


def move(policy: Policy, seed: int) -> None:
    """Changes what trains as a step would."""
    generator = torch.Generator(policy.causal.device).manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn(p.shape, generator=generator, device=p.device) * 0.01)


def parity(policy: Policy, requests: list[Request], out: list[list[Any]]) -> tuple[float, float]:
    """Returns mean and largest |trainer - engine| on the sampled tokens of a few prompts, in nats."""
    few = min(4, len(requests))
    flat = [c for group in out[:few] for c in group]
    batch = RolloutBatch.pack(
        prompt_ids=[r.prompt_ids for r in requests[:few]],
        completions=flat,
        group_ids=[i for i, group in enumerate(out[:few]) for _ in group],
        advantages=torch.zeros(len(flat)),
        max_tokens=4096,
    ).to(policy.causal.device)
    assert batch.sampler_logprobs is not None  # vLLM returns them
    with torch.no_grad():
        gap = (policy.logprobs(batch).logprobs - batch.sampler_logprobs).abs()
    return float(gap.mean()), float(gap.max())


def one(kind: str, folder: str, small: bool, repeats: int) -> dict[str, Any]:
    """Returns the row of `kind`."""
    cuda = torch.cuda.is_available()
    lora = None if kind == "full" else lora_config({"r": 16, "lora_alpha": 32, "target_modules": LINEAR})
    settings = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    policy = load_policy(folder, tokenizer, lora=lora, model_kwargs=settings, gradient_checkpointing=False)
    policy = policy.to("cuda" if cuda else "cpu")
    memory = {"trainer": used_gib()}
    prompts, group, length = (4, 2, 8) if small else (64, 8, 256)
    engine = (Merging if "unmerged" in kind else VLLMEngine)(**ROWS[kind], max_num_seqs=16 if small else 512)
    sampling = SamplingParams(max_tokens=length, extra={"min_tokens": length})
    began = time.perf_counter()
    engine.start(
        EngineContext(policy=policy, model_path=folder, max_model_len=32 + length, sampling=sampling)
    )
    row: dict[str, Any] = {"start_s": time.perf_counter() - began}
    memory["awake"] = used_gib()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, policy.causal.config.vocab_size, (prompts, 24), generator=draw).tolist()

    def generate(version: int) -> tuple[list[Request], list[list[Any]], float]:
        requests = [
            Request(prompt_ids=p, seeds=sample_seeds(0, version, i, group), uid=i) for i, p in enumerate(ids)
        ]
        began = time.perf_counter()
        out = engine.generate(requests, sampling)
        return requests, out, sum(len(c.token_ids) for g in out for c in g) / (time.perf_counter() - began)

    def timed_sync(version: int) -> float:
        move(policy, version)
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        engine.sync(PolicyWeights(policy), version)
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    row["first_sync_ms"] = timed_sync(0)
    generate(0)
    requests, out, rate = generate(0)
    row["parity_before"] = parity(policy, requests, out)
    rates = [rate]
    syncs = [timed_sync(v) for v in range(1, 51)]
    for _ in range(repeats):
        requests, out, rate = generate(50)
        rates.append(rate)
    if kind == "merge":
        trained = [p.detach().clone() for p in policy.trainable().values()]
        turns: dict[str, list[float]] = {"base": [], "merged": []}
        for i in range(2 * repeats + 2):  # in turns, since the host's speed moves
            served = ("base", "merged")[i % 2]
            with torch.no_grad():
                for p, w in zip(policy.trainable().values(), trained, strict=True):
                    p.copy_(w if served == "merged" else torch.zeros_like(w))
            engine.sync(PolicyWeights(policy), 51 + i)
            turns[served].append(generate(51 + i)[2])
        row["in_turns"] = turns
    row |= {
        "sync_ms": statistics.median(syncs),
        "syncs_ms": syncs,
        "tokens_per_s": max(rates),
        "rates": rates,
    }
    row["parity_after"] = parity(policy, requests, out)
    engine.sleep()
    memory["asleep"] = used_gib()
    began = time.perf_counter()
    generate(50)
    row["wake_and_generate_s"] = time.perf_counter() - began
    engine.close()
    memory["closed"] = used_gib()
    return row | {"memory_gib": memory, "sleep": engine.sleep_mode}


def in_turns(kinds: list[str], folder: str, small: bool, repeats: int) -> dict[str, Any]:
    """Returns starts, syncs and rates of engines of all `kinds` in one process, which decode in turns."""
    cuda = torch.cuda.is_available()
    settings = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    lora = lora_config({"r": 32, "lora_alpha": 64, "target_modules": LINEAR})
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    policy = load_policy(folder, tokenizer, lora=lora, model_kwargs=settings, gradient_checkpointing=False)
    policy = policy.to("cuda" if cuda else "cpu")
    move(policy, 1)
    length = 8 if small else 256
    sampling = SamplingParams(max_tokens=length, extra={"min_tokens": length})
    context = EngineContext(policy=policy, model_path=folder, max_model_len=32 + length, sampling=sampling)
    engines: dict[str, VLLMEngine] = {}
    found: dict[str, Any] = {"start_s": {}, "sync_ms": {}, "rates": {}}
    for kind in kinds:
        room = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 10 << 30} if cuda else {}
        engine = VLLMEngine(
            sync=kind, max_num_seqs=16 if small else 512, sleep="off", share_base="off", **room
        )
        began = time.perf_counter()
        engine.start(context)
        found["start_s"][kind] = time.perf_counter() - began
        times = []
        for version in range(12):
            began = time.perf_counter()
            engine.sync(PolicyWeights(policy), version)
            times.append(1e3 * (time.perf_counter() - began))
        found["sync_ms"][kind] = statistics.median(times)
        engines[kind] = engine
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, policy.causal.config.vocab_size, (64, 24), generator=draw).tolist()
    for count in (8, 16) if small else (512, 128, 32, 8):
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(repeats + 1):
            for kind in kinds[i % len(kinds) :] + kinds[: i % len(kinds)]:
                group = max(1, count // len(prompts))
                asked = [
                    Request(prompt_ids=p, seeds=sample_seeds(0, i, j, group), uid=j)
                    for j, p in enumerate(prompts[:count])
                ]
                began = time.perf_counter()
                out = engines[kind].generate(asked, sampling)
                tokens = sum(len(c.token_ids) for g in out for c in g)
                if i:
                    rates[kind].append(tokens / (time.perf_counter() - began))
        found["rates"][str(count)] = rates
    return found


def print_turns(found: dict[str, Any]) -> None:
    """Prints the rates of each kind, by completions at a time, and how they compare with the first kind's."""
    kinds = list(found["start_s"])
    rows = []
    for count, rates in found["rates"].items():
        medians = {kind: statistics.median(rates[kind]) for kind in kinds}
        rows += [[count, *(f"{m:.0f} ({m / medians[kinds[0]]:.3f})" for m in medians.values())]]
    for name, unit in (("start_s", "s"), ("sync_ms", "ms")):
        rows.append([name.split("_")[0], *(f"{found[name][kind]:.1f} {unit}" for kind in kinds)])
    print(table(("completions at a time", *kinds), rows))


def main() -> None:
    """Measures every kind in a process of its own and writes the result."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--shape", default="0.5B", choices=list(SHAPES))
    options.add_argument("--kinds", nargs="+", default=list(ROWS)[:4], choices=list(ROWS))
    options.add_argument("--turns", nargs="+", default=None, help="kinds that decode in turns in one process")
    options.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options.add_argument("--folder", default=None, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.folder, args.small, args.repeats)))
        return
    device = torch.device("cpu" if args.small else "cuda")
    shape = "tiny" if args.small else args.shape
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, Path(folder))
        if args.turns:
            found = in_turns(args.turns, folder, args.small, args.repeats)
            if not args.small:
                result = {"setting": setting(device), "shape": shape, "repeats": args.repeats, **found}
                save(f"rollout-turns-{shape}", result, args.out)
            print_turns(found)
            return
        for kind in args.kinds:
            command = [sys.executable, __file__, "--one", kind, "--folder", folder]
            command += ["--repeats", str(args.repeats)] + (["--small"] if args.small else [])
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"start_s"')]
            rows[kind] = json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-300:]}
            result = {"setting": setting(device), "shape": shape, "rows": rows}
            if not args.small:
                save(f"rollout-{shape}", result, args.out)
    cells = [
        [name, "failed", r["failed"][-80:], *[""] * 6]
        if "failed" in r
        else [
            name,
            f"{r['start_s']:.1f}",
            f"{r['first_sync_ms']:.0f}",
            f"{r['sync_ms']:.1f}",
            f"{r['tokens_per_s']:.0f}",
            "{:.4f} / {:.3f}".format(*r["parity_before"]),
            "{:.4f} / {:.3f}".format(*r["parity_after"]),
            " ".join(f"{r['memory_gib'][k]:.1f}" for k in ("trainer", "awake", "asleep", "closed")),
            f"{r['wake_and_generate_s']:.2f}",
        ]
        for name, r in rows.items()
    ]
    header = ("sync", "start s", "first ms", "ms", "tok/s", "parity before", "after 50 syncs")
    print(table((*header, "GiB trainer awake asleep closed", "wake + generate s"), cells))
    for turns in (r["in_turns"] for r in rows.values() if "in_turns" in r):
        base, merged = (statistics.median(turns[name]) for name in ("base", "merged"))
        print(f"in turns, tokens a second: base {base:.0f}, merged {merged:.0f}, {merged / base:.3f} of it")


if __name__ == "__main__":
    main()
