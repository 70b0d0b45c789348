"""One training step (forward, loss, backward) on one rollout, piece by piece, beside other layouts.

python benchmarks/bench_step.py --shape 0.5B --work gsm8k-like      # one GPU
python benchmarks/bench_step.py --small                             # a CPU, to see that it runs
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = str(int("--small" in sys.argv))  # read when triton is imported

import torch
from measure import parser, race, save, setting, table

sys.path.insert(0, str(Path(__file__).parents[1]))

from workloads import SHAPES, TOKENIZER, WORKLOADS, floor_ms, make_model, make_rollout

from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import LossConfig
from grpo_lightning.losses.fused import policy_loss
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.policy import Policy

OFF = dict.fromkeys(asdict(KernelConfig()), "off")


class Piece(NamedTuple):
    """A row: what it adds to the kernels of those above it."""

    name: str
    kernels: dict[str, str]
    micro_batches: int = 1
    layout: str = "packed"
    adapters: torch.dtype = torch.float32
    """of this row alone"""
    alone: dict[str, str] | None = None
    """kernels of this row alone"""


PIECES = (
    Piece("padded, PEFT, torch head, 4 micro-batches", {}, 4, "padded"),
    Piece("+ Triton head and loss", {"head": "on", "loss": "on"}, 4, "padded"),
    Piece("+ packed, prompts copied", {"attention": "on"}, 4),
    Piece("  the same, adapters kept in bf16", {}, 4, adapters=torch.bfloat16),
    Piece("+ fused LoRA", {"lora": "on"}, 4),
    Piece("+ one micro-batch", {}),
    Piece("+ q, k, v share x", {"qkv": "on"}),
    Piece("+ gate, up share x, SwiGLU", {"swiglu": "on"}),
    Piece("+ RMSNorm", {"norm": "on"}),
    Piece("+ rotary embeddings", {"rotary": "on"}),
    Piece("+ shared prompts", {"shared_prompts": "on"}),
    Piece("  the same, compiled layers", {}, alone={"compile": "on"}),
    Piece("+ CUDA graphs", {"graphs": "on"}),
    Piece("  the same in 4 micro-batches", {}, 4),
)


def step_of(policy: Policy, batch: RolloutBatch, micro_batches: int) -> Callable[[], None]:
    """Returns what runs one step."""
    adapters = list(policy.trainable().values())
    loss_kernel = "triton" if policy.prepared.chosen["loss"] else "torch"

    def step() -> None:
        for p in adapters:
            p.grad = None
        for micro_batch in batch.split(micro_batches):
            logprobs, entropy, _ = policy.logprobs(micro_batch)
            out = policy_loss(logprobs, micro_batch, LossConfig("dapo"), entropy, backend=loss_kernel)
            out.loss.backward()

    return step


def gradient(policy: Policy) -> torch.Tensor:
    """Returns the gradient of all adapters, flat."""
    return torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]).double()


@contextmanager
def adapters_in(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Keeps the adapters in another type inside, as `autocast_adapter_dtype=False` does."""
    masters = {p: p.data for p in policy.trainable().values()}
    for p in masters:
        p.data = p.data.to(dtype)
    yield
    policy.zero_grad(set_to_none=True)
    for p, master in masters.items():
        p.data = master


def measure(
    shape: str, work: str, device: torch.device, repeats: int, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a row per piece, and one for the step without dead groups; none of the pieces `without`."""
    batch = make_rollout(WORKLOADS[work], SHAPES[shape]["vocab_size"]).to(device)
    rows: dict[str, Any] = {}
    if find_spec("trl"):
        from peers.trl_step import trl_step

        run_trl = trl_step(make_model(shape, device), batch, 4)
        rows |= race({"TRL 1.16's own step, 4 micro-batches (imported)": run_trl}, device, repeats)
        del run_trl
    model = make_model(shape, device)
    chosen, reference = dict(OFF), None
    policy = Policy(model, TOKENIZER)
    for piece in PIECES:
        chosen |= piece.kernels
        if any(word in piece.name for word in without):
            continue
        policy.prepared.restore()
        policy = Policy(model, TOKENIZER)
        policy.padded_reason = "asked for" if piece.layout == "padded" else None
        if piece.layout == "padded":
            policy._set_attention("sdpa")
        policy.prepare(KernelConfig(**chosen | (piece.alone or {})), device)

        with adapters_in(policy, piece.adapters):
            name, run, row = in_micro_batches_that_fit(
                piece.name, piece.micro_batches, policy, batch, device, repeats
            )
            rows[name] = row
            if "failed" in row:
                continue
            run()
            found = gradient(policy)
        reference = found if reference is None else reference
        row["gradient_error"] = ((found - reference).norm() / reference.norm()).item()
    half = make_rollout(WORKLOADS[work], SHAPES[shape]["vocab_size"], dead=0.5).to(device)
    alive = half.without_groups(half.zero_variance_groups())
    name, _, row = in_micro_batches_that_fit(
        "half of the groups dead, skipped", 1, policy, alive, device, repeats
    )
    rows[name] = row
    return {
        "rows": rows,
        "floor_ms": floor_ms(model, batch),
        "tokens": batch.num_tokens,
        "padded_slots": len(batch.lengths) * (max(batch.prompt_lengths) + max(batch.lengths)),
    }


def in_micro_batches_that_fit(
    name: str, least: int, policy: Policy, batch: RolloutBatch, device: torch.device, repeats: int
) -> tuple[str, Callable[[], None], dict[str, Any]]:
    """Returns the row of the fewest micro-batches, `least` or more, that fit; its name says so."""
    for micro_batches in (least, *(n for n in (2, 4, 8, 16, 32) if n > least)):
        label = name if micro_batches == least else f"{name} (out of memory; in {micro_batches})"
        run = step_of(policy, batch, micro_batches)
        row = race({label: run}, device, repeats)[label]
        if "OutOfMemory" not in row.get("failed", ""):
            break
    return label, run, row


def show(result: dict[str, Any]) -> str:
    """Returns the table of one workload."""
    rows = result["rows"]
    slowest = next((r["median_ms"] for n, r in rows.items() if "median_ms" in r and "TRL" not in n), None)

    def cells(name: str, r: dict[str, Any]) -> list[str]:
        if "failed" in r:
            return [name, r["failed"][:60], "", "", "", "", ""]
        times = f"{slowest / r['median_ms']:.2f}x" if slowest else ""
        share = f"{result['floor_ms'] / r['median_ms']:.0%}" if "dead" not in name else ""
        far = f"{r['gradient_error']:.1e}" if "gradient_error" in r else ""
        warm = f"{r['first_ms'] / 1e3:.1f}"
        return [name, f"{r['median_ms']:.1f}", times, share, f"{r['peak_mib'] / 1024:.1f}", warm, far]

    header = ("step", "ms", "speed-up", "of floor", "peak GiB", "first s", "gradient")
    return table(header, [cells(n, r) for n, r in rows.items()])


def main() -> None:
    """Measures and writes the result."""
    options = parser(__doc__, repeats=7)
    options.add_argument("--shape", nargs="+", default=["0.5B", "1.5B"], choices=list(SHAPES))
    options.add_argument("--work", nargs="+", default=["gsm8k-like"], choices=list(WORKLOADS))
    options.add_argument("--without", nargs="*", default=[], help="words of pieces that get no row")
    args = options.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    if args.small:
        args.shape, args.work, args.repeats = ["tiny"], ["tiny"], 2
        args.without += ["graphs", "the same in"]
    result: dict[str, Any] = {"setting": setting(device)}
    for shape in args.shape:
        for work in args.work:
            found = measure(shape, work, device, args.repeats, args.without)
            result[f"{shape}, {work}"] = found
            print(f"\n{shape}, {work}: {found['tokens']} tokens, {found['padded_slots']} padded slots")
            print(show(found), flush=True)
            if not args.small:  # after each workload: a machine may end before the last
                print(save("step", result, args.out))


if __name__ == "__main__":
    main()
