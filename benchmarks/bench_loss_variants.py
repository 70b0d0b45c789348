"""Time of the loss of one micro-batch, its gradient and its statistics: recipe by recipe, kernel beside twin.

python benchmarks/bench_loss_variants.py            # one GPU, 128 completions, about 16k tokens
python benchmarks/bench_loss_variants.py --small    # a CPU, the kernel in Triton's interpreter
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import parser, race, save, setting, table

if "--small" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
sys.path.insert(0, str(Path(__file__).parents[1]))

from workloads import WORKLOADS, make_rollout

from grpo_lightning.losses import RECIPES, LossConfig
from grpo_lightning.losses.fused import policy_loss_grad
from grpo_lightning.losses.fused.launch_triton import why_not

REQUIRED = {"dro": {"dro_coef": 0.1}}


def figure(row: dict[str, Any]) -> str:
    """Returns what a contender's cell shows."""
    return row.get("failed", f"{row['median_ms']:.3f}" if row else "not covered")[:60]


def main() -> None:
    """Measures every recipe and writes the result."""
    options = parser(__doc__, repeats=20)
    args = options.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    work = WORKLOADS["tiny" if args.small else "gsm8k-like"]
    batch = make_rollout(work, 131 if args.small else 151_936).to(device)
    if args.small:  # the interpreter takes a while for each completion
        batch, args.repeats = batch.take(range(3)), 1
    n = len(batch.target_ids)
    logprobs = -torch.rand(n, device=device)
    batch = replace(
        batch,
        old_logprobs=logprobs + 0.1 * torch.randn(n, device=device),
        ref_logprobs=logprobs + 0.1 * torch.randn(n, device=device),
        sampler_logprobs=logprobs + 0.01 * torch.randn(n, device=device),
        selected=torch.rand(n, device=device) < 0.01,
    )
    runs: dict[str, Any] = {}
    for name in RECIPES:
        config = LossConfig(name, kl_coef=0.01, kl_in="loss", **REQUIRED.get(name, {}))
        for backend in ["torch", "triton"] if why_not(config.resolve()) is None else ["torch"]:
            runs[f"{name} {backend}"] = lambda config=config, backend=backend: policy_loss_grad(
                logprobs, batch, config, backend=backend
            )
    rows = race(runs, device, args.repeats)
    cells = [
        [name, *(figure(rows.get(f"{name} {backend}", {})) for backend in ("torch", "triton"))]
        for name in RECIPES
    ]
    print(f"{n} tokens, {len(batch.lengths)} completions; median ms")
    print(table(("recipe", "torch", "triton"), cells))
    if not args.small:
        print(save("loss_variants", {"setting": setting(device), "tokens": n, "rows": rows}, args.out))


if __name__ == "__main__":
    main()
