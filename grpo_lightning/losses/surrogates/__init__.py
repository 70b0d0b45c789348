"""The rows of `SURROGATES`, each beside its own options.

A: advantages, rho: ratio, d: log-ratio, l: log-probability, sg: no gradient.
"""

from grpo_lightning.losses.surrogates.clipped import cispo, dro, ppo_clip, reinforce, sapo
from grpo_lightning.losses.surrogates.completions import fipo, gmpo, real, vespo
from grpo_lightning.losses.surrogates.covariance import clip_cov, kl_cov
from grpo_lightning.losses.surrogates.divergence import dppo
from grpo_lightning.losses.surrogates.options import ClipOptions, SurrogateOptions

__all__ = [
    "ClipOptions",
    "SurrogateOptions",
    "cispo",
    "clip_cov",
    "dppo",
    "dro",
    "fipo",
    "gmpo",
    "kl_cov",
    "ppo_clip",
    "real",
    "reinforce",
    "sapo",
    "vespo",
]
