"""`HFEngine`: samples from the live policy with transformers alone. The CPU path, and the oracle for other
engines."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.engines.base import EngineContext, Request, WeightSource
from grpo_lightning.engines.hf_decoding import DecodeMode, decode, not_finite
from grpo_lightning.errors import ConfigError, EngineError, hinted
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.probe import alone, rounding, said, tokens
from grpo_lightning.types import Completion, SamplingParams
from grpo_lightning.utils.signals import deferred

MODES = {
    DecodeMode(padded=True, cached=True): "all prompts together",
    DecodeMode(padded=False, cached=True): "prompts of one length at a time",
    DecodeMode(padded=False, cached=False): "without a cache, which takes much longer",
}
"""the fastest first; the first that gives the model's own log-probabilities is taken"""


@hinted
class HFEngine:
    """Decodes with the model being trained: nothing to synchronise, nothing to install.

    A prompt is read once for all its completions, and a completion that has ended leaves the batch at once.
    Padding stays in the state of a state-space model, and not every cache gives what the forward does: which
    way of decoding is right is tried on a few tokens.

    Args:
        batch_size: most completions decoded at one time; null decodes all of a rollout together.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"rollout.engine.batch_size is {batch_size}; it must be null or at least 1")
        self.batch_size = batch_size
        self.policy_version = -1
        self._policy: Policy | None = None
        self._mode: DecodeMode | None = None

    def start(self, context: EngineContext) -> None:
        """Takes the live policy; raises ConfigError for sampling that this engine does not have."""
        self.check(context.sampling)
        self._policy, self._mode = context.policy, None

    @staticmethod
    def check(sampling: SamplingParams) -> None:
        """Raises ConfigError for sampling that this engine does not have; before anything is loaded."""
        if sampling.regex is not None or sampling.extra:
            raise ConfigError(
                "rollout.sampling.regex and .extra need an engine with structured outputs; "
                "HFEngine has none: remove them or use VLLMEngine"
            )

    def sync(self, source: WeightSource, version: int) -> None:
        """Takes note of the version; there is no copy of the weights."""
        self.policy_version = version

    def sleep(self) -> None:
        """Holds no memory between calls."""

    def close(self) -> None:
        """Lets go of the policy."""
        self._policy, self.policy_version = None, -1

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        """Returns for each request one completion per seed, in order.

        Raises:
            EngineError: called before `start` and `sync`, or the model cannot be decoded.
        """
        if self._policy is None or self.policy_version < 0:
            raise EngineError(
                "HFEngine has no policy yet: call start(context) and sync(source, version) before generate"
            )
        if other := next((r for r in requests if r.model_inputs), None):
            raise EngineError(
                f"prompt {other.uid} of rollout {other.rollout_index} has model inputs "
                f"({', '.join(other.model_inputs)}); HFEngine reads tokens alone: use VLLMEngine"
            )
        with deferred():  # left between two tokens, so that the policy is as it was
            self._mode = self._mode or working_mode(self._policy)
            return decode(self._policy, requests, sampling, self._mode, self.batch_size)


def working_mode(policy: Policy) -> DecodeMode:
    """Returns the fastest way of decoding that gives the log-probabilities of one row in one call.

    Raises:
        EngineError: none does.
    """
    lengths = (3, 8)
    ids = tokens(policy, sum(lengths))
    requests = [
        Request(prompt_ids=ids[: lengths[0]], seeds=[1, 2]),
        Request(prompt_ids=ids[lengths[0] :], seeds=[3, 4]),
    ]
    reasons = []
    for mode, name in MODES.items():
        reason = _why_wrong(policy, requests, mode)
        if reason is None:
            if reasons:
                model = type(policy.causal).__name__
                rank_zero_warn(f"HFEngine decodes {model} {name}: otherwise its decoding {reasons[-1]}")
            return mode
        reasons.append(reason)
    if _ruined(policy, ids):
        raise EngineError(not_finite(policy.causal))
    raise EngineError(
        f"HFEngine cannot decode {type(policy.causal).__name__}: it {reasons[-1]}; use another architecture"
    )


def _ruined(policy: Policy, ids: list[int]) -> bool:
    try:
        return bool(alone(policy, ids, kernels=True).isnan().any())
    except Exception:  # what the ways of decoding have met already
        return False


def _why_wrong(policy: Policy, requests: Sequence[Request], mode: DecodeMode) -> str | None:
    try:
        out = decode(policy, requests, SamplingParams(max_tokens=6), mode)
    except Exception as error:  # whatever a model of somebody else's raises
        return f"fails ({said(error)})"
    gaps = []
    for request, group in zip(requests, out, strict=True):
        for c in group:
            row = alone(policy, [*request.prompt_ids, *c.token_ids[:-1]], kernels=True)
            row = row[len(request.prompt_ids) - 1 :]
            own = row[range(len(row)), c.token_ids].tolist()
            gaps += [abs(x - y) for x, y in zip(own, c.logprobs or (), strict=True)]
    gap = sum(gaps) / len(gaps)
    return None if gap <= rounding(policy) else f"is {gap:.3g} nats from one row in one call"
