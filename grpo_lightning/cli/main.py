"""The Lightning CLI with our three sections, configs found in the package, and errors of one line."""

import difflib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch import strategies
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from grpo_lightning.callbacks.health import Health
from grpo_lightning.callbacks.rollout import RolloutCallback
from grpo_lightning.checkpoints.newest import AUTO, resolve_last
from grpo_lightning.cli.faults import differing, explained, leaves, report
from grpo_lightning.cli.preflight import check_values, rehearse
from grpo_lightning.cli.usage import complaint
from grpo_lightning.data.datamodule import PromptDataModule
from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.modules.grpo import GRPOModule
from grpo_lightning.utils.signals import Stopped, exits_named, ignore, listen, set_command
from grpo_lightning.utils.untrusted import check_arguments, check_config, restrict_parser

TRAINER_DEFAULTS: dict[str, Any] = {
    "trainer.gradient_clip_val": 1.0,
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.use_distributed_sampler": False,
    "trainer.plugins": [{"class_path": "grpo_lightning.checkpoints.AdapterCheckpointIO"}],
}


LINGER = 10.0
"""seconds that a stopped process has for what runs at exit"""
TRACEBACK = "--traceback"
"""shows more than the one line of an error; no option of the run, so no config holds it"""


class Parser(LightningArgumentParser):
    """Says where an option of another trainer lives here, and ends with exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one cause and one remedy."""
        if self.exit_on_error is False and ex is not None:
            raise ex
        first, *hints = complaint(self, message, sys.argv[1:])
        print(f"error: {first}", *hints, sep="\n  ", file=sys.stderr)
        raise SystemExit(2)


class SaveConfig(SaveConfigCallback):
    """Keeps the resolved config beside the logs and in every checkpoint; a resume says what changed."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        self.text = parser.dump(config, skip_none=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Does nothing yet: a run that is refused writes nothing."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Never overwrites the config of an earlier run in the same folder."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        resumes = len(list(folder.glob("config*.yaml")))
        if resumes:
            self.config_filename = f"config-resume-{resumes}.yaml"
        super().setup(trainer, pl_module, "fit")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the config."""
        checkpoint.setdefault("grpo_lightning", {})["config"] = self.text

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Prints what differs from the checkpoint's config; the command line wins."""
        then = checkpoint.get("grpo_lightning", {}).get("config")
        if then is None or not trainer.is_global_zero:
            return
        lines = difflib.unified_diff(then.splitlines(), self.text.splitlines(), lineterm="", n=0)
        changed = [line for line in lines if re.match(r"[+-](?![+-])(?!.*ckpt_path)", line)]
        print("config as in the checkpoint" if not changed else "config now (+) and in the checkpoint (-):")
        print(*changed, sep="\n", end="\n" if changed else "")


class CLI(LightningCLI):
    """`trainer`, `model`, `data`, `rollout` and `health`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the sections of our callbacks and our defaults of the Trainer."""
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(Health, "health")
        parser.set_defaults(TRAINER_DEFAULTS)
        parser.usage = "grpo-lightning COMMAND [--config FILE ...] [--SECTION.KEY VALUE ...]"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the commands; just the one that is called for, since building a parser takes a while."""
        every = LightningCLI.subcommands()
        return {k: v for k, v in every.items() if k in sys.argv[1:2]} or every

    def instantiate_classes(self) -> None:
        """Makes model, data and callbacks; names the option behind an error of another library.

        A constructor that exits does not end the run in silence.
        """
        try:
            with explained(self._given, ConfigError):
                super().instantiate_classes()
        except SystemExit as error:
            if error.code:  # the parser's own, with its message
                raise
            with exits_named("a class that the config names", GRPOError):
                raise

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs a command once data and options have been checked, before loggers make their folders."""
        with explained(self._given), exits_named("user code", GRPOError):
            rehearse(self.trainer, self.model, self.datamodule, subcommand)
            super()._run_subcommand(subcommand)

    def _set_seed(self) -> None:
        check_values(self._parser(self.subcommand), dict(leaves(self._options())))
        super()._set_seed()

    def _options(self) -> dict[str, Any]:
        return self.config[str(self.subcommand)].as_dict()

    def _given(self) -> dict[str, Any]:
        return differing(self._options(), self._parser(self.subcommand).get_defaults().as_dict())

    def _parse_ckpt_path(self) -> None:
        """Checks what was parsed; Lightning would let the checkpoint's values win over the command line's."""
        subcommand = str(self.config.subcommand)
        config = self.config[subcommand]
        name = (config.get("trainer") or {}).get("strategy")
        if isinstance(name, str) and ("." in name or isinstance(getattr(strategies, name, None), type)):
            # the parser leaves a class path without arguments as text, which the Trainer takes for a name
            path = name if "." in name else f"{strategies.__name__}.{name}"
            named = {"trainer": {"strategy": {"class_path": path}}}
            self.config[subcommand] = config = self._parser(subcommand).parse_object(named, config)
        check_config(config)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Looks for `last` and `auto` before anything else."""
        given = super()._prepare_subcommand_kwargs(subcommand)
        if (asked := given.get("ckpt_path")) in ("last", AUTO):
            given["ckpt_path"] = resolve_last(self.trainer, subcommand == "fit", asked)
        return given


NOISE = (
    "is_gradient_checkpointing",  # peft asks transformers by an old name
    "isinstance\\(treespec",  # Lightning asks torch by an old name
    "Total length of `list`",  # a datamodule without validation says so with an empty list
    "does not have many workers",  # prompts need none
    "in eval mode at the start of training",  # the frozen reference is meant to be
    "It is recommended to use `self.log\\(",  # what is logged is over all ranks already
    "You defined a `validation_step` but have no",  # validation is optional
)
"""warnings about other libraries' business; a user can do nothing about them"""


def _hush() -> None:
    for message in NOISE:
        warnings.filterwarnings("ignore", f".*{message}")
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: "litlogger" not in record.getMessage())


def run(argv: list[str]) -> int:
    """Runs one command; returns its exit code."""
    _hush()
    restrict_parser()
    full = TRACEBACK in argv
    argv = [arg for arg in argv if arg != TRACEBACK]
    sys.path.insert(0, "") if "" not in sys.path else None
    set_command(argv)
    listen()
    try:
        sys.argv[1:] = find_configs(check_arguments(argv))
        CLI(
            GRPOModule,
            PromptDataModule,
            save_config_callback=SaveConfig,
            parser_class=Parser,
            parser_kwargs={"prog": "grpo-lightning", "allow_abbrev": False},
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except Stopped as stopped:
        _leave_soon(int(stopped.code or 1))
        return int(stopped.code or 1)
    except Exception as error:
        return report(error, full=full)
    finally:
        ignore()
    return 0


def _leave_soon(code: int) -> None:
    """Ends the process with `code` even if a thread of a reward function, which nothing can end, goes on."""
    last = threading.Timer(LINGER, os._exit, (code,))
    last.daemon = True
    last.start()


def find_configs(argv: list[str]) -> Iterator[str]:
    """Yields the arguments with every --config that exists only in the package replaced by its path there.

    Raises:
        ConfigError: a config is a URL, or is nowhere.
    """
    flags = ("--config", "-c")
    wanted = False
    for arg in argv:
        name, joined, value = arg.partition("=")
        if wanted:
            yield str(find_config(arg))
        elif joined and name in flags:
            yield f"{name}={find_config(value)}"
        elif arg.startswith("-c") and arg != "-c":
            yield f"-c{find_config(arg[2:])}"
        else:
            yield arg
        wanted = not wanted and arg in flags


def find_config(name: str) -> Path:
    """Returns a config in the working folder, or the shipped one of that name."""
    if "://" in name:
        raise ConfigError(f"--config {name}: configs are not read from URLs; download it first")
    if Path(name).is_file():
        return Path(name)
    root = config_root()
    relative = Path(name).with_suffix(".yaml")
    for candidate in (root.parent / relative, root / relative):
        if candidate.is_file() and candidate.resolve().is_relative_to(root.resolve()):
            return candidate
    shipped = sorted(str(p.relative_to(root.parent)) for p in root.rglob("*.yaml"))
    raise ConfigError(f"--config {name}: no such file; shipped are {', '.join(shipped)}")


def config_root() -> Path:
    """Returns the folder of shipped configs: in the package, or in a checkout beside it."""
    here = Path(__file__).parents[1]
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def load_config(name: str) -> dict[str, Any]:
    """Returns a shipped or local config as plain data."""
    return yaml.safe_load(find_config(name).read_text())
