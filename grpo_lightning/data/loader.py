"""Deals prompts to the trainer: sized, so that nothing is read ahead, and stateful, so that a run resumes.

Lightning reads a loader without length one batch ahead, which would make every rollout one policy version
stale and every saved position one batch too far; hence no iterable-style loader, and no torch `DataLoader`
with its samplers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from grpo_lightning.data.encode import EncodedPrompt
from grpo_lightning.errors import ConfigError, DataError
from grpo_lightning.types import PromptBatch

VERSION = 1


@runtime_checkable
class FeedsMicroBatches(Protocol):
    """A callback that needs each rollout's prompts more than once: once for every micro-batch made of it."""

    def micro_batches_per_rollout(self, trainer: Any) -> int: ...


def asked_of_dealer(trainer: Any, question: str, default: int) -> int:
    """Returns what the callback that makes rollouts answers, or `default`."""
    callbacks = getattr(trainer, "callbacks", [])
    dealer = next((callback for callback in callbacks if isinstance(callback, FeedsMicroBatches)), None)
    answer = getattr(dealer, question, None)
    return default if answer is None else answer(trainer)


class PromptLoader:
    """Yields `PromptBatch`es: for each rollout this rank's prompts, dealt `micro_batches` times.

    The order is a pure function of (seed, epoch) and the same on every rank. Each rollout is a block of
    `prompts_per_rollout` neighbours in that order; rank r takes the r-th slice of the block, so no group
    spans ranks. What remains at the end of an epoch, fewer prompts than one rollout, is dropped.

    A pass yields `len(loader)` batches from where the loader stands, into the next epoch if it stands in the
    middle of one. Lightning takes from a pass what its own epoch still needs, so that every prompt comes in
    its turn after a resume and with `limit_train_batches`.

    Args:
        prompts: has a length, and item i is an `EncodedPrompt`.
        prompts_per_rollout: over all ranks.
        rank: of this process.
        world_size: number of ranks.
        micro_batches: that one rollout feeds: how often its prompts are dealt.
        seed: of the order.
        shuffle: False keeps the order of the dataset in every epoch.
        fingerprint: of the prompts; a saved position is only taken up with the same one.
        allow_changed_data: takes up a saved position in spite of another dataset, seed or size.
        spares: how many prompts come along that may stand in for each; drawn at random from the others, they
            do not change the order.

    Raises:
        ConfigError: `prompts_per_rollout` cannot be dealt to `world_size` ranks.
        DataError: there are fewer prompts than one rollout needs.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        prompts_per_rollout: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        fingerprint: str = "",
        allow_changed_data: bool = False,
        spares: int = 0,
    ) -> None:
        check_world(prompts_per_rollout, world_size)
        check_enough(len(prompts), prompts_per_rollout)
        if micro_batches < 1:
            raise ConfigError(f"a rollout feeds {micro_batches} micro-batches; it must be at least 1")
        self.prompts, self.n = prompts, len(prompts)
        self.prompts_per_rollout = prompts_per_rollout
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self.seed, self.shuffle = seed, shuffle
        self.fingerprint, self.allow_changed_data = fingerprint, allow_changed_data
        self.spares = spares
        # The next batch to be dealt.
        self.epoch, self.rollout, self.micro_batch = 0, 0, 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def rollouts_per_epoch(self) -> int:
        return self.n // self.prompts_per_rollout

    @property
    def remainder(self) -> int:
        """Prompts that each epoch leaves out."""
        return self.n % self.prompts_per_rollout

    def __len__(self) -> int:
        return self.rollouts_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[PromptBatch]:
        # Lightning makes iterators that it never reads; nothing happens before the first batch is taken.
        for _ in range(len(self)):
            batch = self._batch()
            self._advance()
            yield batch

    def _batch(self) -> PromptBatch:
        share = self.prompts_per_rollout // self.world_size
        batch = collate(self._take(slice(self.rank * share, (self.rank + 1) * share)))
        batch.rollout_index = self.epoch * self.rollouts_per_epoch + self.rollout
        batch.micro_batch, batch.micro_batches = self.micro_batch, self.micro_batches
        if self.spares and self.micro_batch == 0:
            batch.spares = self._spares(batch.rollout_index, share)
        return batch

    def _spares(self, rollout_index: int, share: int) -> list[PromptBatch]:
        """Returns this rank's stand-ins, `share` in each batch: a function of seed and rollout."""
        start = self.rollout * self.prompts_per_rollout
        dealt = set(self._order[1][start : start + self.prompts_per_rollout])
        others = [i for i in permutation(self.n, self.seed, -1, rollout_index) if i not in dealt]
        blocks = [
            others[k : k + self.prompts_per_rollout] for k in range(0, len(others), self.prompts_per_rollout)
        ]
        mine = slice(self.rank * share, (self.rank + 1) * share)
        found = [collate([self.prompts[i] for i in block[mine]]) for block in blocks[: self.spares]]
        for spare in found:
            spare.rollout_index = rollout_index
        return [spare for spare in found if len(spare) == share]

    def _take(self, mine: slice) -> list[EncodedPrompt]:
        """Returns this rank's prompts of the current rollout."""
        if self._order[0] != self.epoch:
            order = permutation(self.n, self.seed, self.epoch) if self.shuffle else list(range(self.n))
            self._order = (self.epoch, order)
        start = self.rollout * self.prompts_per_rollout
        return [self.prompts[i] for i in self._order[1][start : start + self.prompts_per_rollout][mine]]

    def _advance(self) -> None:
        self.micro_batch += 1
        if self.micro_batch == self.micro_batches:
            self.micro_batch = 0
            self.rollout += 1
        if self.rollout == self.rollouts_per_epoch:
            self.rollout = 0
            self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns where the next batch stands, in global units: the same for every rank and world size."""
        return {
            "version": VERSION,
            "epoch": self.epoch,
            "position": self.rollout * self.prompts_per_rollout,  # prompts of this epoch in complete rollouts
            "part": self.micro_batch,
            "parts": self.micro_batches,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """What the order depends on, by the name of the option or fact."""
        return {
            "shuffle": self.shuffle,
            "seed": self.seed if self.shuffle else None,
            "n": self.n,
            "prompts_per_rollout": self.prompts_per_rollout,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ConfigError: it was taken with other prompts or in another order, or in the midst of a rollout
            that is cut
                differently now.
        """
        if state.get("version") != VERSION:
            raise ConfigError(
                f"the checkpoint's prompt position has version {state.get('version')}, this release reads "
                f"{VERSION}; "
                "resume with the release that wrote it"
            )
        if not self.allow_changed_data:
            for name, value in self._identity().items():
                if state[name] != value:
                    raise ConfigError(
                        f"the checkpoint was written with {_SAYS[name]} {state[name]}, now it is {value}; "
                        "restore it, "
                        "or set data.allow_changed_data: true to go on at the same place in the new order"
                    )
        sizes = {"parts": self.micro_batches, "prompts_per_rollout": self.prompts_per_rollout}
        for name, value in sizes.items():
            if state["part"] != 0 and state[name] != value:
                raise ConfigError(
                    f"the checkpoint was written amid a rollout with {_SAYS[name]} {state[name]}, now it is "
                    f"{value}; restore it, or resume from a checkpoint written at the end of a rollout"
                )
        self.epoch, self.micro_batch = int(state["epoch"]), int(state["part"])
        self.rollout = int(state["position"]) // self.prompts_per_rollout
        if self.rollout >= self.rollouts_per_epoch:
            self.epoch, self.rollout, self.micro_batch = self.epoch + 1, 0, 0


class EvalPromptLoader:
    """Yields every prompt once, in order: `batch_size` over all ranks per batch.

    The last batches may be smaller, or empty on some ranks; the number of batches is the same on all of them.
    """

    def __init__(
        self, prompts: Sequence[EncodedPrompt], *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"data.validation_batch_size is {batch_size}; it must be at least 1")
        self.prompts, self.batch_size, self.rank, self.world_size = prompts, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        share = -(-self.batch_size // self.world_size)
        for number in range(len(self)):
            stop = min((number + 1) * self.batch_size, len(self.prompts))
            start = number * self.batch_size + self.rank * share
            batch = collate([self.prompts[i] for i in range(start, min(start + share, stop))])
            batch.rollout_index = number
            yield batch


def collate(items: Sequence[EncodedPrompt]) -> PromptBatch:
    """Returns a batch of its own lists; a column that some prompt lacks is None there."""
    names = dict.fromkeys(name for item in items for name in item.columns)
    return PromptBatch(
        prompts=[item.prompt for item in items],
        prompt_ids=[list(item.prompt_ids) for item in items],
        columns={name: [item.columns.get(name) for item in items] for name in names},
        uids=[item.uid for item in items],
    )


def permutation(n: int, *key: int) -> list[int]:
    """Returns 0..n-1 in an order that is a function of the arguments alone, e.g. of seed and epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(*key))).tolist()


def mix(*key: int) -> int:
    """Returns a number of 56 bits; a sum would make epoch 1 of seed 0 the same as epoch 0 of seed 1."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:7])


def check_enough(prompts: int, prompts_per_rollout: int) -> None:
    """Raises DataError unless the prompts fill one rollout."""
    if prompts < prompts_per_rollout:
        raise DataError(
            f"the dataset has {prompts} prompts, fewer than data.prompts_per_rollout={prompts_per_rollout}; "
            f"lower it to at most {prompts}, or give more prompts"
        )


def check_world(prompts_per_rollout: int, world_size: int) -> None:
    """Raises ConfigError unless every rank gets the same number of prompts, at least one."""
    if prompts_per_rollout < 1 or prompts_per_rollout % world_size:
        below = prompts_per_rollout // world_size * world_size
        allowed = " or ".join(str(n) for n in (below, below + world_size) if n > 0)
        raise ConfigError(
            f"data.prompts_per_rollout={prompts_per_rollout} cannot be dealt evenly to {world_size} ranks; "
            f"set it to {allowed}"
        )


_SAYS = {
    "seed": "data.seed",
    "shuffle": "data.shuffle",
    "n": "a dataset whose number of prompts is",
    "prompts_per_rollout": "data.prompts_per_rollout",
    "fingerprint": "prompts whose fingerprint is",
    "parts": "micro-batches per rollout (trainer.accumulate_grad_batches times updates)",
}
