"""The losses and advantages of losses.md written down a second time: scalar loops at 40 digits.

It takes nothing from the package and knows no autograd, so that an error would have to be made twice. Numbers
in comments are sections of losses.md. Whatever the page puts under sg() is computed once, by `detached`; a
difference in the log-probabilities alone is then the gradient with the detached parts frozen.
"""

from dataclasses import dataclass, field
from math import isfinite
from types import SimpleNamespace

import mpmath

mp = mpmath.mp.clone()  # a context of our own: the precision of other tests stays theirs
mp.dps = 40
exp, ln, ZERO = mp.exp, mp.ln, mp.mpf(0)
STEP = mp.mpf(10) ** -13  # a central difference of 40 digits: truncation 1e-26, rounding 1e-26

# 4.5: name, surrogate, ratio level, aggregation, advantage, defaults that differ. `real` has no level and no
# weights: what stands here is for its KL term (6: the token ratio; 4.2: sequence_mean).
RECIPE_TABLE = """
    grpo         ppo_clip   token          sequence_mean         group_norm
    bnpo         ppo_clip   token          microbatch_token_mean group_norm
    dr_grpo      ppo_clip   token          constant              group_mean
    dapo         ppo_clip   token          token_mean            group_norm    clip_high=0.28
    gspo         ppo_clip   sequence       sequence_mean         group_norm    clip_low=3e-4 clip_high=4e-4
    gspo_token   ppo_clip   sequence_token sequence_mean         group_norm    clip_low=3e-4 clip_high=4e-4
    luspo        ppo_clip   sequence       sequence_sum          group_norm    clip_low=2e-3 clip_high=2.5e-3
    cispo        cispo      token          token_mean            group_norm
    scalerl      cispo      token          prompt_mean           batch_norm
    sapo         sapo       token          sequence_mean         group_norm
    vespo        vespo      token          token_mean            group_norm
    gmpo         gmpo       token          sequence_mean         group_norm
    gpg          reinforce  token          token_mean            gpg
    rloo         reinforce  token          sequence_sum          leave_one_out kl_in=reward
    reinforce_pp ppo_clip   token          token_mean            reinforce_pp  kl_estimator=k2
    maxrl        ppo_clip   token          token_mean            maxrl         clip_high=0.28
    gdpo         ppo_clip   token          sequence_mean         gdpo
    pass_at_k    ppo_clip   token          token_mean            pass_at_k
    dppo_tv      dppo_tv    token          token_mean            group_norm    dppo_low=0.15 dppo_high=0.15
    dppo_kl      dppo_kl    token          token_mean            group_norm    dppo_low=0.05 dppo_high=0.05
    clip_cov     clip_cov   token          token_mean            group_norm    clip_low=1.0 clip_high=1.0
    kl_cov       kl_cov     token          token_mean            group_norm
    fipo         fipo       token          token_mean            group_norm    clip_high=0.28 dual_clip=10.0
    dro          dro        token          token_mean            group_norm
    real         real       token          sequence_mean         group_mean
"""
LEVELS = {  # 4.1, 4.2: of the other surrogates, token alone; reinforce sees no ratio, its KL term does
    "ppo_clip": ("token", "sequence", "sequence_token"),
    "reinforce": ("token", "sequence", "sequence_token"),
    "cispo": ("token", "sequence_token"),
    "sapo": ("token", "sequence_token"),
}
# 4.2, 6: values of what neither the recipe nor the user sets; what the page calls required has none.
DEFAULTS = """
    clip_low=0.2 clip_high=0.2 cispo_weight_min=0.0 cispo_weight_max=5.0 sapo_tau_pos=1.0 sapo_tau_neg=1.05
    vespo_k_pos=2.0 vespo_lambda_pos=3.0 vespo_k_neg=3.0 vespo_lambda_neg=2.0
    log_clip_low=0.4 log_clip_high=0.4 dppo_weight_max=20.0 cov_frac=2e-4 kl_cov_coef=1.0
    fipo_range=0.2 fipo_rho_max=10.0 real_tau=0.5 kl_coef=0.0 kl_in=loss kl_estimator=k3 entropy_coef=0.0
"""


def settings(words):
    """Options from words like clip_high=0.28."""
    out = {}
    for word in words:
        name, _, value = word.partition("=")
        out[name] = float(value) if value[0].isdigit() else value
    return out


RECIPES = {
    row.split()[0]: (*row.split()[1:5], settings(row.split()[5:])) for row in RECIPE_TABLE.split("\n")[1:-1]
}
COMMON = {"dual_clip": None, "kl_bias_correction": True, "off_policy_threshold": None}
COMMON |= {"fipo_gamma": 2 ** (-1 / 32), **settings(DEFAULTS.split())}
CORRECTION = {"level": "token", "mode": "truncate", "low": None, "high": 2.0, "bypass": False}  # 7.1: tis


def clamp(x, low, high):
    return min(max(x, low), high)


def exact(options):
    return SimpleNamespace(**{k: mp.mpf(v) if isinstance(v, float) else v for k, v in options.items()})


@dataclass
class Case:
    """One micro-batch and the counts of its window; counts left at None are the micro-batch's own."""

    recipe: str
    lengths: list  # [S]
    groups: list  # [S]
    advantages: list  # [S]
    logprobs: list  # [N]
    old: list | None = None
    sampler: list | None = None
    ref: list | None = None
    entropy: list | None = None
    selected: list | None = None
    entropy_keep: list | None = None
    changes: dict = field(default_factory=dict)  # what the user sets, by the names of LossConfig
    max_tokens: int = 4
    micro_batches: int = 1  # K * W
    tokens: int | None = None  # N_w
    sequences: int | None = None  # S_w
    group_count: int | None = None  # P_w
    group_tokens: list | None = None  # N_{g,w} by group id
    entropy_tokens: int | None = None  # window sum of e where there is a keep

    def __post_init__(self):
        for name in ("advantages", "logprobs", "old", "sampler", "ref", "entropy"):
            if getattr(self, name) is not None:
                setattr(self, name, [mp.mpf(x) for x in getattr(self, name)])
        surrogate, level, aggregation, _, defaults = RECIPES[self.recipe]
        parts = {"surrogate": surrogate, "ratio_level": level, "aggregation": aggregation}
        self.o = exact({**COMMON, **parts, **defaults, **self.changes})
        self.correction = exact({**CORRECTION, **self.changes.get("correction", {})})
        self.seq = [s for s, length in enumerate(self.lengths) for _ in range(length)]
        self.N, self.S = len(self.seq), len(self.lengths)
        if self.group_tokens is None:
            self.group_tokens = [0] * (max(self.groups) + 1)
            for g, length in zip(self.groups, self.lengths, strict=True):
                self.group_tokens[g] += length
        own = {
            "tokens": self.N,
            "sequences": self.S,
            "group_count": sum(n > 0 for n in self.group_tokens),
            "entropy_tokens": sum(self.entropy_keep or []),
        }
        for name, count in own.items():
            if getattr(self, name) is None:
                setattr(self, name, count)

    def classes(self, g):
        """Completions with A > 0 and with A <= 0; without tokens there is no policy, hence neither (9.3)."""
        live = [s for s in range(self.S) if self.groups[s] == g and self.lengths[s] > 0]
        return [s for s in live if self.advantages[s] > 0], [s for s in live if self.advantages[s] <= 0]

    def seg_sum(self, x):
        return [sum((x[n] for n in range(self.N) if self.seq[n] == s), ZERO) for s in range(self.S)]

    def seg_mean(self, x):
        return [total / max(length, 1) for total, length in zip(self.seg_sum(x), self.lengths, strict=True)]

    def spread(self, y):
        """y[seq]"""
        return [y[s] for s in self.seq]


# --- 1, 4.1: log-ratios and ratios


def log_ratios(case, lp, old):
    return [clamp(lp[n] - old[n], -20, 20) for n in range(case.N)]


def ratios(case, lp, held):
    d = log_ratios(case, lp, held.old)
    return {
        "token": lambda: [exp(x) for x in d],
        "sequence": lambda: [exp(x) for x in case.spread(case.seg_mean(d))],
        "sequence_token": lambda: [
            # l - sg(l) of the clamped d: 9.5 wants no gradient beyond the clamp, 4.1 that of `sequence`
            exp(x + d[n] - held.d[n])
            for n, x in enumerate(case.spread(case.seg_mean(held.d)))
        ],
    }[case.o.ratio_level]()


# --- everything under sg()


def detached(case, lp):
    """The parts of the loss at `lp` that carry no gradient."""
    held = SimpleNamespace(lp=lp, old=lp if case.old is None else case.old)  # 1: None means sg(l)
    seen = [case.sampler is not None and isfinite(case.sampler[n]) for n in range(case.N)]
    sampler = [case.sampler[n] if seen[n] else held.old[n] for n in range(case.N)]  # 7.1: else m_n = 0
    if case.correction.bypass:
        held.old = sampler
    held.d = log_ratios(case, lp, held.old)
    held.rho = ratios(case, lp, held)
    held.c = correction(case, [clamp(held.old[n] - sampler[n], -20, 20) for n in range(case.N)])
    held.moved = case.seg_mean([sampler[n] - lp[n] for n in range(case.N)])  # 7.4
    held.keep = [1 if keeps(case, n, held.moved[case.seq[n]]) else 0 for n in range(case.N)]
    held.phi = vespo_phi(case, held)
    held.f = [fipo_factor(case, held, n) for n in range(case.N)]
    return held


def correction(case, m):
    """7.1: c_n."""
    how = case.correction
    if case.sampler is None or how.bypass or how.mode == "off":
        return [mp.mpf(1)] * case.N
    q = {
        "token": [exp(x) for x in m],
        "sequence": [exp(clamp(x, -20, 20)) for x in case.spread(case.seg_sum(m))],
        "geometric": [exp(x) for x in case.spread(case.seg_mean(m))],
    }[how.level]
    low, high = -mp.inf if how.low is None else how.low, mp.inf if how.high is None else how.high
    inside = [low <= x <= high for x in q]
    return {
        "truncate": [clamp(x, low, high) for x in q],
        "mask": [x if ok else ZERO for x, ok in zip(q, inside, strict=True)],
        "gate": [exp(x) if ok else ZERO for x, ok in zip(m, inside, strict=True)],
    }[how.mode]


def keeps(case, n, moved):
    """7.4 and 7.5."""
    threshold = case.o.off_policy_threshold
    on_policy = threshold is None or case.advantages[case.seq[n]] >= 0 or moved <= threshold
    return on_policy and (case.entropy_keep is None or case.entropy_keep[n])


def vespo_phi(case, held):
    """4.2, per completion."""
    floor, phi = ln(mp.mpf("1e-8")), []
    log_c = [clamp(ln(c) if c > 0 else -mp.inf, floor, 20) for c in held.c]
    for s, total in enumerate(case.seg_sum([held.d[n] + log_c[n] for n in range(case.N)])):
        sign = "pos" if case.advantages[s] >= 0 else "neg"
        k = getattr(case.o, f"vespo_k_{sign}")
        rate = max(getattr(case.o, f"vespo_lambda_{sign}"), mp.mpf("1e-4"))
        u = clamp(total, floor, 20)
        phi.append(exp(rate + k * u - rate * exp(u)))
    return phi


def fipo_factor(case, held, n):
    """4.2: f of token n."""
    o, s = case.o, case.seq[n]
    far = [rho > (o.dual_clip or o.fipo_rho_max) for rho in held.rho]
    down = case.advantages[s] < 0
    if down and sum(far[m] for m in range(case.N) if case.seq[m] == s) > 1:
        return ZERO
    ahead = [m for m in range(n, case.N) if case.seq[m] == case.seq[n] and not far[m]]
    f = clamp(exp(sum(mp.mpf(o.fipo_gamma) ** (m - n) * held.d[m] for m in ahead)), 1, 1 + o.fipo_range)
    return clamp(f, mp.mpf("0.8"), 1) if down and held.rho[n] > o.fipo_rho_max else f


# --- 4.2: l_n of the token t


def ppo_clip(o, t):
    capped = t.rho if o.dual_clip is None else min(t.rho, o.dual_clip)
    return -min(capped * t.A, clamp(t.rho, 1 - o.clip_low, 1 + o.clip_high) * t.A)


def sapo(o, t):
    tau = o.sapo_tau_pos if t.A > 0 else o.sapo_tau_neg
    return -t.A * (4 / tau) / (1 + exp(-tau * (t.rho - 1)))


def dppo_tv(o, t):
    moved = exp(t.lp_sg) - exp(t.old)
    keep = (t.A > 0 and moved <= o.dppo_high) or (t.A <= 0 and moved >= -o.dppo_low)
    return -min(t.rho_sg, o.dppo_weight_max) * keep * t.A * t.lp


def dppo_kl(o, t):
    p, p_old, tiny = exp(t.lp_sg), exp(t.old), mp.mpf("1e-8")
    kl = p_old * (t.old - t.lp_sg) + (1 - p_old) * ln((1 - p_old + tiny) / (1 - p + tiny))
    up = t.A > 0 and (kl <= o.dppo_high or p <= p_old)
    down = t.A <= 0 and (kl <= o.dppo_low or p >= p_old)
    return -min(t.rho_sg, o.dppo_weight_max) * (up or down) * t.A * t.lp


SURROGATES = {
    "ppo_clip": ppo_clip,
    "reinforce": lambda o, t: -t.A * t.lp,
    "cispo": lambda o, t: -clamp(t.rho_sg, o.cispo_weight_min, o.cispo_weight_max) * t.A * t.lp,
    "sapo": sapo,
    "vespo": lambda o, t: -t.phi * t.A * t.lp,
    "gmpo": lambda o, t: -t.A * t.gmpo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "clip_cov": lambda o, t: 0 if t.selected else ppo_clip(o, t),
    "kl_cov": lambda o, t: -t.A * t.rho + (o.kl_cov_coef * abs(t.d) if t.selected else 0),
    "dro": lambda o, t: -(t.A * t.lp - o.dro_coef * t.d**2 / 2),
    "fipo": lambda o, t: t.f * ppo_clip(o, t),
}


def gmpo_means(case, d):
    e = []
    for n in range(case.N):
        near = clamp(d[n], -case.o.log_clip_low, case.o.log_clip_high)
        e.append(min(d[n], near) if case.advantages[case.seq[n]] > 0 else max(d[n], near))
    return [exp(x) for x in case.seg_mean(e)]


def surrogate(case, lp, held):
    """l_n."""
    d, rho = log_ratios(case, lp, held.old), ratios(case, lp, held)
    means, out = gmpo_means(case, d), []
    for n, s in enumerate(case.seq):
        token = {"A": case.advantages[s], "lp": lp[n], "old": held.old[n], "d": d[n], "rho": rho[n]}
        frozen = {"lp_sg": held.lp[n], "rho_sg": held.rho[n], "phi": held.phi[s], "f": held.f[n]}
        selected = case.selected is not None and case.selected[n]
        t = SimpleNamespace(**token, **frozen, gmpo=means[s], selected=selected)
        out.append(SURROGATES[case.o.surrogate](case.o, t))
    return out


def real(case, lp, held):
    s, tau, total = case.seg_mean(log_ratios(case, lp, held.old)), case.o.real_tau, ZERO
    for positive, negative in (case.classes(g) for g in set(case.groups)):
        if positive and negative:
            total += ln(1 + sum(exp(-s[i] / tau) for i in positive))
            total += ln(1 + sum(exp(s[i] / tau) for i in negative))
    return total / max(case.group_count, 1)


# --- 4.3, 6, 5


def weight(case, n):
    s = case.seq[n]
    divisors = {
        "sequence_mean": case.lengths[s] * case.sequences,
        "token_mean": max(case.tokens, 1),
        "constant": case.sequences * case.max_tokens,
        "sequence_sum": case.sequences,
        "prompt_mean": case.group_tokens[case.groups[s]] * case.group_count,
        "microbatch_token_mean": max(case.N, 1) * case.micro_batches,
    }
    return mp.mpf(1) / divisors[case.o.aggregation]


def kl(case, n, lp, held, rho):
    """6: kl_n."""
    x, x_sg = (clamp(case.ref[n] - y[n], -20, 20) for y in (lp, held.lp))
    factor = rho[n] if case.o.kl_bias_correction else 1
    return {
        "k1": lambda: factor * -x,
        "k2": lambda: x**2 / 2,
        "k3": lambda: factor * (exp(x) - x - 1),
        "k1_straight": lambda: -x_sg + (x**2 - x_sg**2) / 2,
        "k3_straight": lambda: exp(x_sg) - x_sg - 1 + (x**2 - x_sg**2) / 2,
    }[case.o.kl_estimator]()


def entropy_term(case, H):
    if case.entropy_keep is None:
        e, window = [1] * case.N, case.tokens
    else:
        e, window = case.entropy_keep, case.entropy_tokens
    return -case.o.entropy_coef * sum(e[n] * H[n] for n in range(case.N)) / max(window, 1)


def loss(case, lp, held):
    """5: steps 1 to 7."""
    if case.o.surrogate == "real":
        total = real(case, lp, held)
    else:
        terms, c = surrogate(case, lp, held), held.c if case.o.surrogate != "vespo" else [1] * case.N
        total = sum((weight(case, n) * terms[n] * held.keep[n] * c[n] for n in range(case.N)), ZERO)
    if case.o.kl_coef and case.o.kl_in == "loss":
        rho = ratios(case, lp, held)
        total += case.o.kl_coef * sum(weight(case, n) * kl(case, n, lp, held, rho) for n in range(case.N))
    return total + (entropy_term(case, case.entropy) if case.o.entropy_coef else 0)


def differences(f, x):
    """Central differences of f at x."""
    out = []
    for n in range(len(x)):
        up, down = ([*x[:n], x[n] + h, *x[n + 1 :]] for h in (STEP, -STEP))
        out.append(float((f(up) - f(down)) / (2 * STEP)))
    return out


def value_and_grad(case):
    """The loss and its gradient with respect to the log-probabilities."""
    lp, held = case.logprobs, detached(case, case.logprobs)
    return float(loss(case, lp, held)), differences(lambda x: loss(case, x, held), lp)


# --- what is chosen once per window, and the penalty in the reward


def largest_covariances(case):
    """4.2: what kl_cov selects; the case is the whole window."""
    A, mean_old = case.spread(case.advantages), mean(case.old)
    mean_A = mean(A)
    cov = [(A[n] - mean_A) * (case.old[n] - mean_old) for n in range(case.N)]
    ranked = sorted(range(case.N), key=lambda n: -cov[n])
    chosen = ranked[: max(1, int(mp.floor(mp.mpf(case.o.cov_frac) * case.N)))]
    return [n in chosen for n in range(case.N)]


def top_entropy(H, q):
    """7.5: the tokens of highest entropy."""
    ranked = sorted(H)
    place = (1 - q) * (len(H) - 1)
    below = int(place)
    above = min(below + 1, len(H) - 1)
    cut = ranked[below] + (place - below) * (ranked[above] - ranked[below])
    return [h >= cut for h in H]


def reward_penalty(case):
    """3: the sum of k1 over each completion."""
    return case.seg_sum([case.old[n] - case.ref[n] for n in range(case.N)])


# --- 3: advantages

EPS = mp.mpf("1e-4")
GROUP_ADVANTAGES = {
    "group_norm": lambda R, g: (R - g.mu) / (g.sigma + EPS),
    "batch_norm": lambda R, g: (R - g.mu) / (g.sigma_all + EPS),
    "group_mean": lambda R, g: R - g.mu,
    "leave_one_out": lambda R, g: R - (sum(g.R) - R) / (len(g.R) - 1),
    "maxrl": lambda R, g: (R - g.mu) / g.mu if g.mu > 0 else ZERO,
    "pass_at_k": lambda R, g: (g.best - g.second) / (g.sigma + EPS) if g.best == R else ZERO,
    "opo": lambda R, g: R - g.baseline,
    "gpg": lambda R, g: g.alpha * (R - g.mu),
}


def mean(x):
    return sum(x, ZERO) / len(x)


def std(x):
    return mp.sqrt(sum((y - mean(x)) ** 2 for y in x) / (len(x) - 1)) if len(x) > 1 else ZERO


def flat(x):
    """Zero variance: fewer than two, or all equal."""
    return len(x) < 2 or max(x) == min(x)


def advantages(name, rewards, weights, groups, lengths):
    """3: A before the clip and the cast. rewards: [S][K], None where a reward does not apply."""
    rows = [{k: mp.mpf(r) for k, r in enumerate(row) if r is not None} for row in rewards]
    R = [sum(mp.mpf(weights[k]) * r for k, r in row.items()) if row else None for row in rows]
    scorable = [s for s in range(len(rows)) if rows[s]]
    of_group = [[s for s in scorable if groups[s] == g] for g in sorted(set(groups))]
    if name == "gdpo":
        return gdpo(rows, weights, of_group, scorable)
    if name == "reinforce_pp":
        return reinforce_pp(R, lengths, of_group, scorable)
    A, alive = [ZERO] * len(rows), [m for m in of_group if not flat([R[s] for s in m])]
    for members in alive:
        own = sorted((R[s] for s in members), reverse=True)
        L = sum(lengths[s] for s in members)
        g = SimpleNamespace(R=own, mu=mean(own), sigma=std(own), sigma_all=std([R[s] for s in scorable]))
        g.best, g.second = own[:2]
        g.baseline = sum(lengths[s] * R[s] for s in members) / L if L else g.mu
        g.alpha = mp.mpf(len(scorable)) / sum(len(m) for m in alive)
        for s in members:
            A[s] = GROUP_ADVANTAGES[name](R[s], g)
    return A


def gdpo(rows, weights, of_group, scorable):
    Z, alive = [ZERO] * len(rows), []
    for members in of_group:
        for k in range(len(weights)):
            column = {s: rows[s][k] for s in members if k in rows[s]}
            r = list(column.values())
            if not flat(r):
                alive += members
                for s in column:
                    Z[s] += mp.mpf(weights[k]) * (column[s] - mean(r)) / (std(r) + EPS)
    everyone = [Z[s] for s in scorable]
    return [(Z[s] - mean(everyone)) / (std(everyone) + EPS) if s in alive else ZERO for s in range(len(rows))]


def reinforce_pp(R, lengths, of_group, scorable):
    A, c = [ZERO] * len(R), {s: R[s] - mean([R[j] for j in members]) for members in of_group for s in members}
    total = sum(lengths[s] for s in scorable)
    if total > 1:
        m = sum(lengths[s] * c[s] for s in scorable) / total
        v = sum(lengths[s] * (c[s] - m) ** 2 for s in scorable) / (total - 1)
        for s in scorable:
            A[s] = (c[s] - m) / mp.sqrt(v + mp.mpf("1e-8"))
    return A
