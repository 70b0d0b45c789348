"""`grpo-lightning`: answers --help and --version by itself; the rest is the Lightning CLI."""

import os
import sys

from grpo_lightning import __version__

HELP = f"""\
grpo-lightning {__version__}: GRPO for language models as PyTorch Lightning components

usage: grpo-lightning COMMAND [--config FILE ...] [--SECTION.KEY VALUE ...]

commands:
  fit        train; --ckpt_path last (or a file) goes on where a run stopped, auto also starts
  validate   roll out and score the validation split of a checkpoint
  test       the same for the test split
  predict    the same, and return the completions

start here:
  grpo-lightning fit --config configs/quickstart.yaml
  grpo-lightning fit --config configs/quickstart.yaml --config configs/loss/grpo.yaml --trainer.max_steps 100
  grpo-lightning fit --config configs/quickstart.yaml --print_config
  grpo-lightning fit --help          every option, explained

Configs named here are found in the installed package where the working folder has none.
"""

SPINS = "1000"
"""rounds that a thread of torch waits on its core for the others; OpenMP's own 300,000 take the core from
those it waits for when other work runs beside. Read when torch is loaded"""


def main(args: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 fault, 2 usage, 130 Ctrl-C, 143 SIGTERM."""
    argv = sys.argv[1:] if args is None else args
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"grpo-lightning {__version__}")
        return 0
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    from grpo_lightning.cli.main import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
