"""Memory and time of a step on long completions: a base in 4 bit, activations kept, recomputed or away.

python benchmarks/bench_memory.py               # one GPU: 8B, 8k and 32k tokens
python benchmarks/bench_memory.py --small       # a CPU, to see that it runs
"""

import sys
from pathlib import Path
from typing import Any

import torch
from measure import parser, race, save, setting, table

sys.path.insert(0, str(Path(__file__).parents[1]))

from workloads import SHAPES, TOKENIZER, make_model

from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import LossConfig
from grpo_lightning.losses.fused import policy_loss
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.loading import _offload
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import Completion

WAYS = ("kept", "recomputed", "recomputed, inputs in host memory")


def one_long(length: int, vocabulary: int) -> RolloutBatch:
    """Returns one completion of `length` tokens after a prompt of 256."""
    g = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=g).tolist()

    return RolloutBatch.pack(
        prompt_ids=[draw(256)],
        completions=[Completion(token_ids=draw(length))],
        group_ids=[0],
        advantages=torch.ones(1),
        max_tokens=length,
    )


def measure(shape: str, lengths: list[int], device: torch.device, repeats: int) -> dict[str, Any]:
    """Returns a row per length and way of holding activations."""
    model = make_model(shape, device, four_bit=True)
    policy = Policy(model, TOKENIZER)
    on = "on" if device.type == "cuda" else "off"
    policy.prepare(KernelConfig(head=on, attention=on, lora="on", compile="off"), device)
    rows: dict[str, Any] = {}
    model.train()
    for way in WAYS:
        if way != WAYS[0]:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        if way == WAYS[2]:
            _offload(model)
        for length in lengths:
            batch = one_long(length, SHAPES[shape]["vocab_size"]).to(device)

            def step(batch: RolloutBatch = batch) -> None:
                policy.zero_grad(set_to_none=True)
                logprobs, entropy, _ = policy.logprobs(batch)
                policy_loss(logprobs, batch, LossConfig("dapo"), entropy).loss.backward()

            rows |= race({f"{length} tokens, {way}": step}, device, repeats, warm_up=1)
    return rows


def main() -> None:
    """Measures and writes the result."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--shape", default="8B", choices=list(SHAPES))
    options.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768])
    args = options.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    if args.small:
        args.shape, args.lengths, args.repeats = "tiny", [64, 256], 1
    rows = measure(args.shape, args.lengths, device, args.repeats)
    held = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    print(f"{args.shape} in 4 bit holds {held:.1f} GiB; a step holds on top of it:")
    cells = [
        [n, r["failed"][:60], ""]
        if "failed" in r
        else [n, f"{r['median_ms']:.0f}", f"{r['peak_mib'] / 1024:.1f}"]
        for n, r in rows.items()
    ]
    print(table(("one completion", "ms", "peak GiB"), cells))
    if not args.small:
        print(save("memory", {"setting": setting(device), "held_gib": held, "rows": rows}, args.out))


if __name__ == "__main__":
    main()
