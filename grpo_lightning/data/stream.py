"""Prompts that are read while training, for datasets too large to be loaded or indexed before it."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from grpo_lightning.data.encode import EncodedPrompt, Encoder
from grpo_lightning.data.files import Row
from grpo_lightning.data.loader import PromptLoader, mix, permutation
from grpo_lightning.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset


class PromptStream:
    """An endless stream of prompts out of a `datasets.IterableDataset`, begun again whenever it ends.

    Shards come in another order in each pass, and rows are read in blocks of `buffer_size`, each shuffled by
    itself: orders are functions of the seed and of the place, so that a resumed run reads the block again and
    goes on in it. (The buffer of `IterableDataset.shuffle` is lost on resume, and datasets 5.2 can hang in
    one near the end of a pass.)

    Args:
        dataset: the rows.
        encoder: makes prompts of them; overlong ones that it drops are skipped.
        length: prompts that count as one epoch.
        buffer_size: rows of one block.
        shuffle: False keeps the order of the dataset.
        seed: of the shuffle.
        name: of the dataset, for messages.
    """

    def __init__(
        self,
        dataset: "IterableDataset",
        encoder: Encoder,
        *,
        length: int,
        buffer_size: int = 1000,
        shuffle: bool = True,
        seed: int = 0,
        name: str = "dataset",
    ) -> None:
        self.dataset, self.encoder, self.length = dataset, encoder, length
        self.buffer_size, self.shuffle, self.seed, self.name = buffer_size, shuffle, seed, name
        self.num_dropped = 0
        self.num_truncated = 0
        self._rows: Iterator[Row] | None = None
        self._passes = 0  # how often the dataset has ended
        self._start = 0  # rows before the block, over all passes
        self._block: list[Row] = []
        self._order: list[int] = []
        self._next = 0  # how many rows of the block are used up
        self._dataset_state: dict[str, Any] | None = None  # before the block; None: at the begin of a pass

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
            if self._next == len(self._block) and not self._read_block():
                ends += 1
                # The first end may be of a pass that was resumed near it; the second one ends a whole pass.
                if ends == 2:
                    raise DataError(
                        f"{self.name} gives no prompt ({self.num_dropped} were longer than "
                        "data.max_prompt_tokens); give a dataset with at least one usable row"
                    )
                continue
            index = self._order[self._next]
            self._next += 1
            prompt = self._encode(self._block[index], self._start + index)
            if prompt is not None:
                out.append(prompt)
                ends = 0
        return out

    def _read_block(self) -> bool:
        """Reads the next block; returns False at the end of the dataset, after which the next pass begins."""
        self._start += len(self._block)
        if self._rows is None:
            self._rows, self._dataset_state = self._begin(None), None
        else:
            self._dataset_state = self.dataset.state_dict()
        self._fill(self._rows)
        if not self._block:
            self._passes, self._rows = self._passes + 1, None
        return bool(self._block)

    def _begin(self, position: dict[str, Any] | None) -> Iterator[Row]:
        """Returns the rows of this pass from `position` on; datasets orders its shards by the epoch."""
        self.dataset.set_epoch(mix(self.seed, self._passes) if self.shuffle else 0)
        # Also None is loaded: a position stays in the dataset, and copies of it share their attributes.
        self.dataset.load_state_dict(position)  # type: ignore[arg-type]  # None is its initial value
        return iter(self.dataset)

    def _fill(self, rows: Iterator[Row]) -> None:
        self._block = list(islice(rows, self.buffer_size))
        size = len(self._block)
        self._order = permutation(size, self.seed, self._start) if self.shuffle else list(range(size))
        self._next = 0

    def _encode(self, row: Row, uid: int) -> EncodedPrompt | None:
        place = f"{self.name}, streamed row {uid}"
        prompt, columns, ids = self.encoder.encode_row(row, place)
        kept = self.encoder.fit(ids, place)
        if kept is None:
            self.num_dropped += 1
            return None
        self.num_truncated += len(kept) < len(ids)
        return EncodedPrompt(prompt=prompt, prompt_ids=kept, columns=columns, uid=uid)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the current block begins and how much of it is used up."""
        return {
            "passes": self._passes,
            "start": self._start,
            "used": self._next,
            "dataset": self._dataset_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, by reading its block again."""
        self._passes, self._start = state["passes"], state["start"]
        self._rows, self._dataset_state = self._begin(state["dataset"]), state["dataset"]
        self._fill(self._rows)
        self._next = state["used"]


class StreamingPromptLoader(PromptLoader):
    """A `PromptLoader` over a stream: every rank reads all of it and takes its slice of each rollout."""

    def __init__(self, stream: PromptStream, **options: Any) -> None:
        super().__init__(stream, **options)  # type: ignore[arg-type]  # only its length is used there
        self.stream = stream
        self._drawn: list[EncodedPrompt] = []
        self._before = stream.state_dict()

    def _take(self, mine: slice) -> list[EncodedPrompt]:
        if self.micro_batch == 0 or not self._drawn:
            self._before = self.stream.state_dict()
            self._drawn = self.stream.take(self.prompts_per_rollout)
        return self._drawn[mine]

    def state_dict(self) -> dict[str, Any]:
        # Amid a rollout, its prompts have to be drawn once more after a resume.
        stream = self.stream.state_dict() if self.micro_batch == 0 else self._before
        return super().state_dict() | {"stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._drawn = []
        if state["fingerprint"] == self.fingerprint:
            self.stream.load_state_dict(state["stream"])
