"""Ratio levels: which probability ratio a surrogate sees. One row each, `(log_ratio [N], segments) -> ratio
[N]`."""

from collections.abc import Callable

from torch import Tensor

from grpo_lightning.losses.completion_sums import Segments

MAX_LOG_RATIO = 20.0
"""log-ratios are clamped to this; beyond it the value stays finite and the gradient is 0"""


def token(log_ratio: Tensor, segments: Segments) -> Tensor:
    """Returns exp(d_n), each token by itself."""
    return log_ratio.exp()


def sequence(log_ratio: Tensor, segments: Segments) -> Tensor:
    """Returns the geometric mean of the token ratios of a completion (GSPO, 2507.18071)."""
    return segments.spread(segments.mean(log_ratio).exp())


def sequence_token(log_ratio: Tensor, segments: Segments) -> Tensor:
    """Returns the value of `sequence` with the gradient of the token alone (GSPO-token)."""
    return (segments.spread(segments.mean(log_ratio.detach())) + log_ratio - log_ratio.detach()).exp()


RATIO_LEVELS: dict[str, Callable[[Tensor, Segments], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "sequence_token": sequence_token,
}
