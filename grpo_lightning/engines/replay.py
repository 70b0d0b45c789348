"""Rollouts on disk: what an engine sampled, as parquet, and an engine that gives it back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_lightning.engines.base import EngineContext, Request, WeightSource
from grpo_lightning.errors import ConfigError, EngineError, hinted
from grpo_lightning.types import Completion, SamplingParams
from grpo_lightning.utils.atomic_files import removed_after, temporary


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns of equal length; a file under its name is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    with removed_after(unfinished):
        pq.write_table(pa.table(dict(columns)), unfinished)
        unfinished.replace(path)


def record(
    folder: Path, rank: int, requests: Sequence[Request], completions: Sequence[Sequence[Completion]]
) -> Path:
    """Writes one rollout of one rank, a row per completion; returns the file."""
    rows = [
        (r.rollout_index, r.uid, i, r.prompt_ids, c.token_ids, c.logprobs, c.finish_reason, c.loss_mask)
        for r, group in zip(requests, completions, strict=True)
        for i, c in enumerate(group)
    ]
    names = (
        "rollout_index",
        "uid",
        "sample",
        "prompt_ids",
        "token_ids",
        "logprobs",
        "finish_reason",
        "loss_mask",
    )
    index = requests[0].rollout_index if requests else 0
    path = folder / f"rollout-{index:06d}-rank{rank}.parquet"
    write_parquet(path, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {})
    return path


@hinted
class ReplayEngine:
    """Gives back recorded completions instead of sampling: for debugging a loss, a reward or a resume.

    Args:
        path: folder with the parquet files that `rollout.record_to` wrote.
    """

    def __init__(self, path: str) -> None:
        files = sorted(Path(path).glob("rollout-*.parquet"))
        if not files:
            raise ConfigError(
                f"rollout.engine.path is {path!r}: no rollout-*.parquet there; record with rollout.record_to"
            )
        self.policy_version = -1
        self.exact = False  # what was recorded need not come from the policy that trains now
        self.path = path
        self._known: dict[tuple[int, int, int], tuple[list[int], Completion]] = {}
        for file in files:
            self._read(file)

    def _read(self, file: Path) -> None:
        import pyarrow.parquet as pq

        for row in pq.read_table(file).to_pylist():
            completion = Completion(
                token_ids=row["token_ids"],
                logprobs=row["logprobs"],
                finish_reason=row["finish_reason"],
                loss_mask=row.get("loss_mask"),
            )
            self._known[row["rollout_index"], row["uid"], row["sample"]] = (row["prompt_ids"], completion)

    def start(self, context: EngineContext) -> None:
        """Needs nothing."""

    def sync(self, source: WeightSource, version: int) -> None:
        """Takes note of the version; what was recorded does not change."""
        self.policy_version = version

    def sleep(self) -> None:
        """Holds no device memory."""

    def close(self) -> None:
        """Forgets the recording."""
        self._known.clear()

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        """Returns what was recorded for these rollouts and prompts.

        Raises:
            EngineError: a completion was not recorded, or was recorded for another prompt.
        """
        return [[self._find(r, i) for i in range(len(r.seeds))] for r in requests]

    def _find(self, request: Request, sample: int) -> Completion:
        key = (request.rollout_index, request.uid, sample)
        if key not in self._known:
            raise EngineError(
                f"{self.path} has no sample {sample} of prompt {request.uid} in rollout "
                f"{request.rollout_index}; "
                "replay with the data, seed and num_generations of the recording"
            )
        prompt_ids, completion = self._known[key]
        if prompt_ids != request.prompt_ids:
            raise EngineError(
                f"{self.path} holds another prompt as number {request.uid}; replay with the data of the "
                f"recording"
            )
        return completion
