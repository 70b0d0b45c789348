"""`PromptDataModule`: the `data:` section of a config, and the prompts of a run."""

import os
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.data.encode import OVERLONG, EncodedPrompts, Encoder
from grpo_lightning.data.loader import EvalPromptLoader, PromptLoader, asked_of_dealer
from grpo_lightning.data.prompts import PromptFormat
from grpo_lightning.data.sources import Source
from grpo_lightning.data.splits import Splits
from grpo_lightning.data.stream import PromptStream, StreamingPromptLoader
from grpo_lightning.errors import ConfigError, choices, hinted

if TYPE_CHECKING:
    from datasets import IterableDataset

STREAMING = ("streaming_length", "streaming_buffer")
SLOW = 2000
"""rows from which on tokenising is announced"""
STAGES = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


@hinted
class PromptDataModule(LightningDataModule):
    """Prompts for GRPO, from files, the Hugging Face hub, reasoning-gym or your own code.

    All rows are checked and tokenised in `setup`, which Lightning calls before the model is loaded.

    Args:
        dataset: a local .jsonl, .json, .csv or .parquet file (or a list of them), a Hugging Face hub id,
            `reasoning_gym:<task>`, or `python:<function that returns rows>` such as
            `python:grpo_lightning.data.arithmetic.sums`. From Python also a list of dicts or a
            datasets.Dataset.
        subset: configuration of a hub dataset, e.g. `main` of openai/gsm8k.
        split: split of a hub dataset to train on; datasets' slices such as `train[:1000]` work too.
        validation_split: prompts for validation: a number of rows or a fraction (below 1) to hold out from
            the training rows, the name of another split, or the path of a file; null is no validation. Which
            rows are held out does not depend on the seed, so that runs can be compared.
        test_split: prompts for `test`, in the same forms; rows held out for it are never those of validation.
        dataset_kwargs: options of the source: of datasets.load_dataset, of the reasoning-gym task (size,
            seed, ...), of the python function, or of csv.DictReader.
        prompt_column: column that holds the prompt, a text or a list of {role, content} messages.
        prompt_template: makes the prompt out of columns instead, e.g. "{question}\\nThink step by step."
        columns: renames columns before anything else, {new name: existing name}. All columns but the prompt
            reach the reward functions by name.
        system_prompt: system message put before every prompt; makes text prompts conversational.
        conversational: true sends text prompts through the chat template as one user message, false insists
            on plain text, null takes the data as they are.
        chat_template_kwargs: variables for the chat template, e.g. {enable_thinking: false}.
        prompts_per_rollout: prompts in one rollout, over all ranks; each of them gets num_generations
            completions.
        validation_batch_size: prompts in one validation batch, over all ranks; null is prompts_per_rollout.
        max_prompt_tokens: longest prompt in tokens; null is no limit.
        overlong: what happens to longer prompts: `error`, `drop`, or `left-truncate`, which keeps their end.
        shuffle: whether each epoch has its own order.
        seed: of the order of prompts; null is the seed of `seed_everything`, or 0.
        streaming: read rows while training, not before it; needs streaming_length and max_prompt_tokens.
        streaming_length: prompts that make one epoch of a stream.
        streaming_buffer: rows of a stream that are held in memory and shuffled among themselves.
        allow_changed_data: resume although the dataset, its order or prompts_per_rollout has changed.
        tokenizer: null is the model's; give one to use the module without a Trainer.

    Raises:
        ConfigError: an option cannot work, or a file does not exist; before anything is loaded.
    """

    def __init__(
        self,
        dataset: str | list[Any] | Any,
        subset: str | None = None,
        split: str = "train",
        validation_split: int | float | str | None = None,
        test_split: int | float | str | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        columns: dict[str, str] | None = None,
        system_prompt: str | None = None,
        conversational: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompts_per_rollout: int = 16,
        validation_batch_size: int | None = None,
        max_prompt_tokens: int | None = 512,
        overlong: Literal["error", "drop", "left-truncate"] = "error",
        shuffle: bool = True,
        seed: int | None = None,
        streaming: bool = False,
        streaming_length: int | None = None,
        streaming_buffer: int = 1000,
        allow_changed_data: bool = False,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.source = Source(
            dataset=dataset,
            subset=subset,
            split=split,
            dataset_kwargs=dataset_kwargs or {},
            streaming=streaming,
        )
        self.form = PromptFormat(
            prompt_column=prompt_column,
            prompt_template=prompt_template,
            system_prompt=system_prompt,
            conversational=conversational,
            columns=columns,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        self.splits = Splits(self.source, {"validation": validation_split, "test": test_split})
        self.prompts_per_rollout = prompts_per_rollout
        self.validation_batch_size = (
            prompts_per_rollout if validation_batch_size is None else validation_batch_size
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong = overlong
        self.shuffle = shuffle
        self.seed = seed
        self.streaming_length = streaming_length
        self.streaming_buffer = streaming_buffer
        self.allow_changed_data = allow_changed_data
        self.tokenizer = tokenizer
        self._check()
        self._prompts: dict[str, EncodedPrompts] = {}
        self._stream_rows: IterableDataset | None = None
        self._loader: PromptLoader | None = None
        self._position: dict[str, Any] | None = None

    def _check(self) -> None:
        if self.overlong not in OVERLONG:
            raise ConfigError(f"data.overlong is {choices(self.overlong, OVERLONG)}")
        for name in ("prompts_per_rollout", "validation_batch_size", "max_prompt_tokens", *STREAMING):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}; it must be at least 1")
        for name in ("streaming_length", "max_prompt_tokens"):
            if self.source.streaming and getattr(self, name) is None:
                raise ConfigError(f"data.{name} is null, but data.streaming is true; give a number")
        self.source.check()
        self.splits.check()

    @property
    def order_seed(self) -> int:
        """`seed`, or what it stands for."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all splits that are set up; of a stream, the limit."""
        limit = 0 if self._stream_rows is None else self.max_prompt_tokens or 0
        return max((prompts.longest for prompts in self._prompts.values()), default=limit)

    @property
    def columns_of_prompts(self) -> list[str] | None:
        """Names of the columns that reach the reward functions; None of a stream, which is not read yet."""
        return next((list(prompts.column_names) for prompts in self._prompts.values()), None)

    @property
    def num_dropped(self) -> int:
        """Prompts left out for being overlong, so far."""
        return self._count("num_dropped")

    @property
    def num_truncated(self) -> int:
        """Prompts cut on the left for being overlong, so far."""
        return self._count("num_truncated")

    def _count(self, name: str) -> int:
        stream = self._loader.stream if isinstance(self._loader, StreamingPromptLoader) else None
        return sum(getattr(prompts, name, 0) for prompts in (*self._prompts.values(), stream))

    def setup(self, stage: str) -> None:
        """Loads, checks and tokenises the splits that `stage` needs.

        Raises:
            DataError: rows cannot be used; the message names file and line, or the row.
        """
        for name in STAGES[stage]:
            split = self._predicted() if name == "predict" else name
            if split == "train" and self.source.streaming:
                self._open_stream(stage)
            elif split not in self._prompts and split in self.splits:
                self._encode(split)

    def train_dataloader(self) -> PromptLoader:
        """Returns the loader, which goes on where the checkpoint was saved when a run is resumed."""
        self._check_trainer()
        rank, world_size = self._rank()
        options: dict[str, Any] = {
            "prompts_per_rollout": self.prompts_per_rollout,
            "rank": rank,
            "world_size": world_size,
            "micro_batches": asked_of_dealer(self.trainer, "micro_batches_per_rollout", 1),
            "seed": self.order_seed,
            "shuffle": self.shuffle,
            "allow_changed_data": self.allow_changed_data,
        }
        spares = asked_of_dealer(self.trainer, "spares_per_prompt", 0)
        if self.source.streaming and spares:
            raise ConfigError(
                f"rollout.dynamic_sampling is {spares}, which draws prompts from anywhere in the data, but "
                "data.streaming reads them once, in order; set one of them to 0 or false"
            )
        if self.source.streaming:
            fingerprint = f"{self.source.name} in blocks of {self.streaming_buffer}"
            loader = StreamingPromptLoader(self._make_stream(), fingerprint=fingerprint, **options)
        else:
            prompts = self._ready("train")
            loader = PromptLoader(prompts, fingerprint=prompts.fingerprint, spares=spares, **options)
        if loader.remainder:
            rank_zero_info(
                f"{loader.remainder} of {loader.n} prompts are left over in each epoch, since "
                f"data.prompts_per_rollout={self.prompts_per_rollout} does not divide them"
            )
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        self._loader = loader
        return loader

    def val_dataloader(self) -> EvalPromptLoader | list[Any]:
        """Returns the validation prompts in order, or nothing when there is no validation split."""
        return self._eval_loader("validation") if "validation" in self.splits else []

    def test_dataloader(self) -> EvalPromptLoader | list[Any]:
        """Returns the test prompts in order, or nothing when there is no test split."""
        return self._eval_loader("test") if "test" in self.splits else []

    def predict_dataloader(self) -> EvalPromptLoader:
        """Returns the prompts of the test split, else of validation, else of training, in order."""
        return self._eval_loader(self._predicted())

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the train loader.

        Lightning's loops save it as well, but after a save at the end of an epoch under max_epochs they do
        not give it back, and the run would see its first epoch again.
        """
        return {} if self._loader is None else {"train_loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the position for `train_dataloader`, unless the checkpoint is only evaluated."""
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._position = state_dict.get("train_loader")

    def _check_trainer(self) -> None:
        for flag in ("reload_dataloaders_every_n_epochs", "overfit_batches"):
            if value := getattr(self.trainer, flag, 0):
                raise ConfigError(
                    f"trainer.{flag} is {value}, which would upset the order of prompts; set it to 0 "
                    "(to train on a few prompts only, give a small dataset)"
                )

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _predicted(self) -> str:
        return next(name for name in ("test", "validation", "train") if name in self.splits)

    def _eval_loader(self, split: str) -> EvalPromptLoader:
        rank, world_size = self._rank()
        size = self.validation_batch_size
        return EvalPromptLoader(self._ready(split), batch_size=size, rank=rank, world_size=world_size)

    def _ready(self, split: str) -> EncodedPrompts:
        if split not in self._prompts:
            raise ConfigError(
                f"the {split} prompts are not set up; call setup('fit'), or that of their stage, first"
            )
        return self._prompts[split]

    def _encoder(self) -> Encoder:
        module = None if self.trainer is None else self.trainer.lightning_module
        tokenizer = getattr(module, "tokenizer", None) if self.tokenizer is None else self.tokenizer
        if tokenizer is None:
            raise ConfigError("data.tokenizer is null and there is no model that has one; give one")
        return Encoder(
            tokenizer=tokenizer,
            form=self.form,
            max_prompt_tokens=self.max_prompt_tokens,
            overlong=self.overlong,
        )

    def _encode(self, split: str) -> None:
        rows, indices, name = self.splits.select(split)
        encoder = self._encoder()
        if len(indices) > SLOW:
            rank_zero_info(f"{name}: tokenising {len(indices)} prompts ({split})")
        self._prompts[split] = encoder.encode_all(rows, indices, name)
        for line in encoder.report(self._prompts[split]):
            rank_zero_info(f"{name}: {line}")

    def _open_stream(self, stage: str) -> None:
        if stage != "fit":
            raise ConfigError(
                f"{stage} needs prompts that end, but data.streaming is true; name a data.test_split"
            )
        if self._stream_rows is None:
            self._stream_rows = self.source.load()  # type: ignore[assignment]  # streaming: an IterableDataset
            self._make_stream().take(1)  # what is wrong with every row shows before the model is loaded

    def _make_stream(self) -> PromptStream:
        if self._stream_rows is None:
            raise ConfigError("the train prompts are not set up; call setup('fit') first")
        return PromptStream(
            self._stream_rows,
            self._encoder(),
            length=self.streaming_length or 0,
            buffer_size=self.streaming_buffer,
            shuffle=self.shuffle,
            seed=self.order_seed,
            name=self.source.name,
        )
