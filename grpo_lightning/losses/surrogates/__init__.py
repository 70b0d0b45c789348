"""The rows of `SURROGATES`, each beside its own options.

A: advantages, rho: ratio, d: log-ratio, l: log-probability, sg: no gradient.
"""

from grpo_lightning.losses.surrogates import clipped, completions, covariance, divergence

__all__ = ["clipped", "completions", "covariance", "divergence"]
