"""Prompts that are read while training, for datasets too large to be loaded or indexed before it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.data.encode import EncodedPrompt, Encoder
from grpo_lightning.data.loader import PromptLoader
from grpo_lightning.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset


class PromptStream:
    """An endless stream of prompts out of a `datasets.IterableDataset`, begun again whenever it ends.

    Args:
        dataset: the rows.
        encoder: makes prompts of them; overlong ones that it drops are skipped.
        length: prompts that count as one epoch.
        seed: of the shuffle.
        buffer_size: rows among which the next one is drawn; 0 keeps the order of the dataset.
        name: of the dataset, for messages.
    """

    def __init__(
        self,
        dataset: "IterableDataset",
        encoder: Encoder,
        *,
        length: int,
        seed: int = 0,
        buffer_size: int = 0,
        name: str = "dataset",
    ) -> None:
        self.dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size else dataset
        self.encoder, self.length, self.buffer_size, self.name = encoder, length, buffer_size, name
        self.passes = 0
        """how often the dataset has ended"""
        self.rows_read = 0
        """since the beginning of training; the uid of the next prompt"""
        self.num_dropped = 0
        self.num_truncated = 0
        self._rows: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.length

    def take(self, count: int) -> list[EncodedPrompt]:
        """Returns the next `count` prompts.

        Raises:
            DataError: a row cannot be used, or a whole pass through the dataset gave no prompt.
        """
        out: list[EncodedPrompt] = []
        ends = 0
        while len(out) < count:
            row = self._next_row()
            prompt = self._encode(row) if row is not None else None
            if prompt is not None:
                out.append(prompt)
                ends = 0
            ends += row is None
            # The first end may belong to a pass that was resumed near it; the second one ends a whole pass.
            if ends == 2:
                raise DataError(
                    f"{self.name} gives no prompt ({self.num_dropped} were longer than "
                    "data.max_prompt_tokens); "
                    "give a dataset with at least one usable row"
                )
        return out

    def _next_row(self) -> dict[str, Any] | None:
        """Returns the next row, None at the end of the dataset, after which the next pass begins."""
        if self._rows is None:
            self.dataset.set_epoch(self.passes)
            self._rows = iter(self.dataset)
        row = next(self._rows, None)
        if row is None:
            self.passes, self._rows = self.passes + 1, None
        return row

    def _encode(self, row: dict[str, Any]) -> EncodedPrompt | None:
        uid = self.rows_read
        self.rows_read += 1
        place = f"{self.name}, streamed row {uid}"
        prompt, columns = self.encoder.form.split(row, place)
        ids = self.encoder.encode(prompt, place)
        kept = self.encoder.fit(ids, place)
        if kept is None:
            self.num_dropped += 1
            return None
        self.num_truncated += len(kept) < len(ids)
        return EncodedPrompt(prompt=prompt, prompt_ids=kept, columns=columns, uid=uid)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the next row stands."""
        return {
            "passes": self.passes,
            "rows_read": self.rows_read,
            "dataset": None if self._rows is None else self.dataset.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; rows that waited in the shuffle buffer then are skipped."""
        self.passes, self.rows_read = state["passes"], state["rows_read"]
        self._rows = None
        self.dataset.set_epoch(self.passes)
        if state["dataset"] is None:
            return
        self.dataset.load_state_dict(state["dataset"])
        if self.buffer_size:
            rank_zero_info(
                f"{self.name}: resumed after row {self.rows_read}; rows that were in the shuffle buffer "
                f"(data.streaming_buffer={self.buffer_size}) are lost until the next pass"
            )


class StreamingPromptLoader(PromptLoader):
    """A `PromptLoader` over a stream: every rank reads it all and takes its slice of each rollout's block.

    Resuming is exact without shuffling; with it, the contents of the shuffle buffer are lost.
    """

    def __init__(self, stream: PromptStream, **options: Any) -> None:
        super().__init__(stream, **options)  # type: ignore[arg-type]  # only its length is used there
        self.stream = stream
        self._block: list[EncodedPrompt] = []
        self._before_block: dict[str, Any] = stream.state_dict()

    def _take(self, mine: slice) -> list[EncodedPrompt]:
        if self.part == 0 or not self._block:
            self._before_block = self.stream.state_dict()
            self._block = self.stream.take(self.prompts_per_rollout)
        return self._block[mine]

    def state_dict(self) -> dict[str, Any]:
        # In the midst of a rollout its prompts have to be read once more after a resume.
        stream = self.stream.state_dict() if self.part == 0 else self._before_block
        return super().state_dict() | {"stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._block = []
        if state["fingerprint"] == self.fingerprint:
            self.stream.load_state_dict(state["stream"])
