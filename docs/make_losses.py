"""Writes docs/losses.md and docs/losses.png from the tables of the package: `python docs/make_losses.py`."""

from dataclasses import replace
from pathlib import Path

import torch

from grpo_lightning.advantages import ADVANTAGES
from grpo_lightning.losses import AGGREGATIONS, KL_ESTIMATORS, RECIPES, SURROGATES, LossConfig, policy_loss
from grpo_lightning.losses.corrections import PRESETS
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

HERE = Path(__file__).parent
REQUIRED = {
    "dppo_tv": {"dppo_low": 0.05, "dppo_high": 0.05},
    "dppo_kl": {"dppo_low": 0.05, "dppo_high": 0.05},
    "dro": {"dro_coef": 0.1},
}

INTRO = """# Losses

Generated from the tables of the package by `python docs/make_losses.py`; a test keeps it up to date.

`loss = sum_n w_n c_n surrogate_n + kl_coef sum_n w_n KL_n - entropy_coef mean(H)` over the `N` loss tokens of an
optimizer step, on all ranks. Loss tokens are the completion tokens that the loss covers. Symbols:

- `rho`: the ratio that the surrogate gets; the ratio level determines it.
- `w`: weight of the aggregation.
- `c`: sampler correction.
- `A`: advantage.
- `l`: log-probability.
- `d`: log-ratio to the old policy.
- `sg`: stop-gradient.

All counts (`N_w` tokens, `S_w` completions, `P_w` groups) cover the whole optimizer step, so a gradient does not depend
on how the step is split into micro-batches. The only exception is `bnpo`, by its definition.
"""

KL = """
`kl_bias_correction` multiplies `k1` and `k3` by the ratio (2512.02556), which makes their gradient unbiased. With
`kl_in: reward`, there is no KL term in the loss. Instead, each completion's reward is reduced by `kl_coef` times the
sum of `old - reference` (k1). `adaptive_kl: {target: 0.05}` adapts `kl_coef` to the KL divergence:
`coef (1 + gain clip(KL / target - 1, -0.2, 0.2))` after every optimizer step (1909.08593).

The reference is the policy at the start of training. With an adapter, it is the base without the adapter. A copy of the
trained weights is kept instead if there is no adapter, or if the adapter does not start at zero (PiSSA, OLoRA ...).

`model.reference: {ema_alpha: 0.6, ema_every: 512}` lets the reference follow the policy:
`ref <- ema_alpha policy + (1 - ema_alpha) ref` every 512 optimizer steps. An `ema_alpha` of 1 copies the policy. With
an adapter, the mean is taken over its factors A and B. The copy and the moving reference are saved in checkpoints.
"""

CORRECTION = """
## Sampler corrections

An engine uses other kernels than the trainer, and perhaps fewer bits, so its policy differs slightly (policy mismatch).
Let `m = old - sampler` per token. `level` determines `q`, and `mode` the weight:

| `level` | `q` |
|---|---|
| `token` | `exp(m)` |
| `sequence` | product of `exp(m)` over the completion |
| `geometric` | geometric mean of `exp(m)` over the completion |

| `mode` | weight |
|---|---|
| `truncate` | `q`, clamped to `[low, high]` |
| `mask` | `q`, or 0 if `q` is outside `[low, high]` |
| `gate` | `exp(m)`, or 0 if `q` is outside `[low, high]` |

`bypass: true` uses the engine's log-probabilities as the old ones. The clip then bounds the mismatch too, and no old
pass is needed (except with truncated sampling). Dropped tokens and completions still count in the normalizers.
`off_policy_threshold` drops completions with A < 0 whose policy has moved further than that on average (2512.02556).

With `top_p`, `top_k` or `min_p`, an engine's log-probabilities are renormalized over the tokens it kept. They are
converted back to the whole vocabulary with the probability mass that the trainer's policy has in that set, so that the
truncation does not count as a mismatch. Penalties, structured outputs and the like cannot be undone. The engine's
log-probabilities are then not used, and a warning says so.

Watch `sampling/importance_sampling_ratio/mean` (near 1), `sampling/ess` (effective share of the tokens) and
`sampling/dropped_sequence_frac` (a few per cent at most).
"""

SWITCH = """
## What changes when you come from TRL

- `loss_type` is `model.loss.name`, `beta` is `model.loss.kl_coef`, `epsilon` / `epsilon_high` are `clip_low` /
  `clip_high`, and `delta` is `dual_clip`. For `cispo`, the cap is `cispo_weight_max` (absolute), not `clip_high`.
- `dapo` clips at 0.2 / 0.28, and `dr_grpo` does not divide advantages by the group's standard deviation, as in their
  papers. TRL clips at 0.2 / 0.2 and divides. To reproduce TRL, set `clip_high: 0.2` or `rollout.advantage: group_norm`.
- Normalizers are exact counts of the optimizer step. TRL divides a rollout's count evenly among its steps.
- The sampler correction is per token, truncated at 2 (TRL: per completion, masked at 3). A bias of 0.01 nat over 1,000
  tokens makes a completion's weight e^10, so a mask per completion would drop every long completion.
- The entropy bonus is a mean over the step's tokens for every recipe. High-entropy tokens are selected once per step
  from the old policy, not per micro-batch.
- Log-ratios are clamped to +-20; smaller values are unchanged. `dual_clip` of at most `1 + clip_high` is refused, because it
  would also cut positive advantages.
- A group whose rewards are all equal has advantages of exactly 0. In TRL, a mean rounded in float32 can leave 5e-3.
- Means over completions leave out those without trainable tokens. Where the engine reported no log-probability, the
  off-policy mask uses the old policy's.
- `docs/conformance.md` has the numbers: our losses and gradients compared with TRL's and Liger's, cell by cell
  (`make conformance`).
"""


def page() -> str:
    """Returns the page."""
    parts = [
        INTRO,
        "\n## Recipes\n",
        "| `model.loss.name` | surrogate | ratio | aggregation | advantage | defaults | arXiv | when | "
        "differs from the paper |",
    ]
    parts.append("|---|---|---|---|---|---|---|---|---|")
    for name, r in RECIPES.items():
        defaults = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in {**SURROGATES[r.surrogate].defaults, **r.defaults}.items()
        )
        cells = [
            f"`{name}`",
            r.surrogate,
            r.ratio_level,
            r.aggregation,
            r.advantage,
            defaults,
            r.paper,
            r.note,
            r.differs,
        ]
        parts.append("| " + " | ".join(c or "–" for c in cells) + " |")
    parts += [
        "\n## Surrogates\n",
        "| name | surrogate, minimised | ratio levels | arXiv |",
        "|---|---|---|---|",
    ]
    for name, s in SURROGATES.items():
        if "." not in name:
            formula = s.formula.replace("|", "\\|")
            parts.append(f"| `{name}` | `{formula}` | {', '.join(s.levels)} | {s.paper or '–'} |")
    parts.append(
        "\nValue and gradient of each surrogate at one token, plotted against the ratio, for A = 1 and A = -1:\n\n"
        "![surrogates](losses.png)"
    )
    parts += ["\n## Aggregations\n", "| name | w | independent of the split |", "|---|---|---|"]
    parts += [
        f"| `{n}` | `{a.formula}` | {'yes' if a.split_invariant else 'no'} |" for n, a in AGGREGATIONS.items()
    ]
    parts += ["\n## Advantages\n", "| `rollout.advantage` | A | arXiv |", "|---|---|---|"]
    parts += [f"| `{n}` | `{a.formula}` | {a.paper or '–'} |" for n, a in ADVANTAGES.items()]
    parts += [
        "\n## KL estimators\n",
        "`x = reference - policy`, a difference of log-probabilities in nats.\n",
        "| name | KL | bias correction |",
        "|---|---|---|",
    ]
    parts += [
        f"| `{n}` | `{k.formula}` | {'yes' if k.correctable else 'no'} |" for n, k in KL_ESTIMATORS.items()
    ]
    parts += ["", KL.strip(), "", CORRECTION.strip(), "\n| overlay | level | mode | low | high | when |"]
    parts.append("|---|---|---|---|---|---|")
    for n, (c, when) in PRESETS.items():
        bounds = ("–", "–") if c.mode == "off" else (c.low, c.high)
        cells = [f"`configs/correction/{n}.yaml`", c.level, c.mode, *bounds, when]
        parts.append("| " + " | ".join("–" if x is None else str(x) for x in cells) + " |")
    return "\n".join(parts) + "\n" + SWITCH


def curve(name: str, advantage: float, ratios: torch.Tensor) -> tuple[list[float], list[float]]:
    """Returns value and gradient of a surrogate at one token, for each ratio; old log-probability -1."""
    config = LossConfig("dapo", surrogate=name, ratio_level="token", **REQUIRED.get(name, {}))
    one = RolloutBatch.pack(
        prompt_ids=[[1]],
        completions=[Completion(token_ids=[1])],
        group_ids=[0],
        advantages=torch.tensor([advantage]),
        max_tokens=1,
    )
    one = replace(one, old_logprobs=torch.tensor([-2.0]), selected=torch.zeros(1, dtype=torch.bool))
    values, slopes = [], []
    for rho in ratios:
        lp = (torch.tensor([-2.0]) + rho.log()).requires_grad_()
        out = policy_loss(lp, one, config)
        (g,) = torch.autograd.grad(out.loss, lp)
        values.append(out.loss.item())
        slopes.append(g.item())
    return values, slopes


def draw(path: Path) -> None:
    """Draws every per-token surrogate."""
    from matplotlib.figure import Figure

    names = [n for n, s in SURROGATES.items() if not s.whole_groups and "." not in n]
    ratios = torch.linspace(0.3, 3.0, 109)
    figure = Figure(figsize=(12, 2.2 * -(-len(names) // 3)), dpi=90, layout="constrained")
    grid = figure.subplots(-(-len(names) // 3), 3, sharex=True).flatten()
    for axes, name in zip(grid, names, strict=False):
        for advantage, colour in ((1.0, "tab:blue"), (-1.0, "tab:red")):
            values, slopes = curve(name, advantage, ratios)
            axes.plot(ratios, values, color=colour, label=f"value, A = {advantage:+g}")
            axes.plot(ratios, slopes, color=colour, linestyle=":", label=f"gradient, A = {advantage:+g}")
        axes.set_title(name)
        axes.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
        axes.grid(alpha=0.3)
    for axes in grid[len(names) :]:
        axes.axis("off")
    grid[0].legend(fontsize="x-small")
    figure.savefig(path)


if __name__ == "__main__":
    (HERE / "losses.md").write_text(page())
    draw(HERE / "losses.png")
