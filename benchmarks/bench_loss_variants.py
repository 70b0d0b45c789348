"""Time of the loss itself, recipe by recipe: value, gradient and statistics of one micro-batch.

python benchmarks/bench_loss_variants.py            # one GPU, 128 completions, about 16k tokens
python benchmarks/bench_loss_variants.py --small    # a CPU
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import parser, race, save, setting, table

sys.path.insert(0, str(Path(__file__).parents[1]))

from workloads import WORKLOADS, make_rollout

from grpo_lightning.losses import RECIPES, LossConfig
from grpo_lightning.ops import policy_loss_grad

REQUIRED = {"dppo_kl": {"dppo_low": 0.05, "dppo_high": 0.05}, "dro": {"dro_coef": 0.1}}


def main() -> None:
    """Measures every recipe and writes the result."""
    options = parser(__doc__, repeats=20)
    args = options.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    work = WORKLOADS["tiny" if args.small else "gsm8k-like"]
    batch = make_rollout(work, 131 if args.small else 151_936).to(device)
    n = len(batch.target_ids)
    logprobs = -torch.rand(n, device=device)
    batch = replace(
        batch,
        old_logprobs=logprobs + 0.1 * torch.randn(n, device=device),
        ref_logprobs=logprobs + 0.1 * torch.randn(n, device=device),
        sampler_logprobs=logprobs + 0.01 * torch.randn(n, device=device),
        selected=torch.rand(n, device=device) < 0.01,
        totals=replace(batch.totals, two_class_groups=len(batch.prompt_lengths)),
    )
    runs: dict[str, Any] = {}
    for name in RECIPES:
        config = LossConfig(name, kl_coef=0.01, kl_in="loss", **REQUIRED.get(name, {}))
        runs[name] = lambda config=config: policy_loss_grad(logprobs, batch, config)
    rows = race(runs, device, args.repeats)
    cells = [
        [name, r["failed"][:60], ""]
        if "failed" in r
        else [name, f"{r['median_ms']:.3f}", f"{r['first_ms']:.1f}"]
        for name, r in rows.items()
    ]
    print(f"{n} tokens, {len(batch.lengths)} completions")
    print(table(("recipe", "ms", "first ms"), cells))
    if not args.small:
        print(save("loss_variants", {"setting": setting(device), "tokens": n, "rows": rows}, args.out))


if __name__ == "__main__":
    main()
