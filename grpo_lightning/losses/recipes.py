"""Recipes: the names papers gave to a surrogate, a ratio level, an aggregation and an advantage together."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A row of `RECIPES`; every part can be overridden in `LossConfig`."""

    surrogate: str
    ratio_level: str = "token"
    aggregation: str
    advantage: str = "group_norm"
    defaults: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    drops_zero_variance_groups: bool = False
    """groups without variance leave the rollout before anything is counted"""
    paper: str = ""
    note: str = ""
    """when to take it"""
    differs: str = ""
    """from the paper"""


RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(
        surrogate="ppo_clip",
        aggregation="sequence_mean",
        paper="2402.03300",
        note="the original: every completion weighs the same, so tokens of long completions weigh less",
        differs="no KL term unless kl_coef is set (0.04 there); KL with bias correction",
    ),
    "bnpo": Recipe(
        surrogate="ppo_clip",
        aggregation="microbatch_token_mean",
        note="mean over the tokens of the local micro-batch, as TRL defines it; depends on the packing",
        differs="only the name is that of a paper (2506.02864): it is TRL's local token mean",
    ),
    "dr_grpo": Recipe(
        surrogate="ppo_clip",
        aggregation="constant",
        advantage="group_mean",
        paper="2503.20783",
        note="no length bias and no division by the group's spread",
    ),
    "dapo": Recipe(
        surrogate="ppo_clip",
        aggregation="token_mean",
        defaults={"clip_high": 0.28},
        paper="2503.14476",
        note="every token weighs the same; more room upwards than downwards",
        differs="groups are dropped with zero_variance_groups, not refilled; overlong shaping is a reward",
    ),
    "gspo": Recipe(
        surrogate="ppo_clip",
        ratio_level="sequence",
        aggregation="sequence_mean",
        defaults={"clip_low": 3e-4, "clip_high": 4e-4},
        paper="2507.18071",
        note="ratio and clip of the whole completion; steadier for mixture-of-experts models",
    ),
    "gspo_token": Recipe(
        surrogate="ppo_clip",
        ratio_level="sequence_token",
        aggregation="sequence_mean",
        defaults={"clip_low": 3e-4, "clip_high": 4e-4},
        paper="2507.18071",
        note="as gspo, where advantages differ inside a completion",
    ),
    "luspo": Recipe(
        surrogate="ppo_clip",
        ratio_level="sequence",
        aggregation="sequence_sum",
        defaults={"clip_low": 2e-3, "clip_high": 2.5e-3},
        paper="2602.05261",
        note="gspo without the division by the length",
    ),
    "cispo": Recipe(
        surrogate="cispo",
        aggregation="token_mean",
        paper="2506.13585",
        note="caps the weight instead of clipping the gradient; rare tokens keep learning",
        differs="cap absolute at 5, as in TRL, Unsloth and Liger; no lower bound",
    ),
    "scalerl": Recipe(
        surrogate="cispo",
        aggregation="prompt_mean",
        advantage="batch_norm",
        drops_zero_variance_groups=True,
        paper="2510.13786",
        note="cispo with every prompt weighing the same",
        differs="loss, advantage and the dropping of groups; nothing of its pipeline",
    ),
    "sapo": Recipe(
        surrogate="sapo",
        aggregation="sequence_mean",
        paper="2511.20347",
        note="a smooth gate in place of the clip",
    ),
    "vespo": Recipe(
        surrogate="vespo",
        aggregation="token_mean",
        paper="2602.10693",
        note="a smooth weight of the completion's whole ratio; for stale rollouts",
        differs="a sampler correction is folded into the weight, as TRL does",
    ),
    "gmpo": Recipe(
        surrogate="gmpo",
        aggregation="sequence_mean",
        paper="2507.20673",
        note="geometric mean of clipped token ratios; robust to single tokens",
        differs="nothing but epsilon in the advantages (1e-8 there); log clip 0.4, as in the authors' script",
    ),
    "gpg": Recipe(
        surrogate="reinforce",
        aggregation="token_mean",
        advantage="gpg",
        paper="2504.02546",
        note="no ratio at all; scaled up by the share of groups with signal",
        differs="the scale counts groups without variance, not zero rewards: a shift changes nothing",
    ),
    "rloo": Recipe(
        surrogate="reinforce",
        aggregation="sequence_sum",
        advantage="leave_one_out",
        defaults={"kl_in": "reward"},
        paper="2402.14740",
        note="REINFORCE with the other completions as baseline",
        differs="REINFORCE form: no ratio of the whole completion",
    ),
    "reinforce_pp": Recipe(
        surrogate="ppo_clip",
        aggregation="token_mean",
        advantage="reinforce_pp",
        defaults={"kl_estimator": "k2"},
        paper="2501.03262",
        note="advantages whitened over all tokens of the rollout",
        differs="the baseline variant: rewards are centred in their group first",
    ),
    "maxrl": Recipe(
        surrogate="ppo_clip",
        aggregation="token_mean",
        advantage="maxrl",
        defaults={"clip_high": 0.28},
        paper="2602.02710",
        note="divides by the group's mean: rare successes count most; rewards >= 0",
        differs="the paper fixes the advantage alone; the surrogate is dapo's",
    ),
    "gdpo": Recipe(
        surrogate="ppo_clip",
        aggregation="sequence_mean",
        advantage="gdpo",
        paper="2601.05242",
        note="several rewards, each normalised by itself before they are added",
        differs="the paper's mean over completions; the authors' code averages over tokens (set aggregation "
        "to token_mean), and its verl form weighs completions by their length in the last whitening too",
    ),
    "pass_at_k": Recipe(
        surrogate="ppo_clip",
        aggregation="token_mean",
        advantage="pass_at_k",
        paper="2503.19595",
        note="only the best completion of a group learns",
        differs="the advantage alone, on dapo's surrogate without the wider clip",
    ),
    "dppo_tv": Recipe(
        surrogate="dppo_tv",
        aggregation="token_mean",
        paper="2602.04879",
        note="trust region on the probability itself, not on the ratio",
        differs="weights capped at 20; thresholds of 0.15, as in verl's script",
    ),
    "dppo_kl": Recipe(
        surrogate="dppo_kl",
        aggregation="token_mean",
        paper="2602.04879",
        note="as dppo_tv, in KL",
        differs="weights capped at 20; thresholds of 0.05, as in verl's script",
    ),
    "clip_cov": Recipe(
        surrogate="clip_cov",
        aggregation="token_mean",
        defaults={"clip_low": 1.0, "clip_high": 1.0},
        paper="2505.22617",
        note="keeps entropy up by silencing a few tokens of high covariance",
        differs="tokens are selected once per optimizer step, on the old policy, where no ratio is clipped "
        "yet: no split changes them (authors: per micro-batch); clip 1 / 1 as in the authors' scripts",
    ),
    "kl_cov": Recipe(
        surrogate="kl_cov",
        aggregation="token_mean",
        paper="2505.22617",
        note="keeps entropy up by holding back the tokens of highest covariance",
        differs="tokens are selected once per optimizer step, on the old policy: no split changes them "
        "(authors: per micro-batch); covariances are rounded to 1e-4, and of equal ones the first are taken",
    ),
    "fipo": Recipe(
        surrogate="fipo",
        aggregation="token_mean",
        defaults={"clip_high": 0.28, "dual_clip": 10.0},
        paper="2603.19835",
        note="weighs a token by how the rest of its completion has moved",
        differs="a completion on which the dual clip acts twice has no loss, as in the authors' code, "
        "but keeps its place in the mean",
    ),
    "dro": Recipe(
        surrogate="dro",
        aggregation="token_mean",
        note="quadratic pull to the old policy, as in verl; dro_coef must be given",
        differs="verl's form: the advantage is the group's, no value function",
    ),
    "real": Recipe(
        surrogate="real",
        aggregation="sequence_mean",
        advantage="group_mean",
        paper="2602.05630",
        note="good against bad completions of a group as a classification",
        differs="good is A > 0, the authors' a reward of 1; groups of one class count in the mean, as theirs",
    ),
}
