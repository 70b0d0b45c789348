"""Makes `tests/*.py` importable, and keeps tiny models on one thread, where they are fastest."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # after the thread count, which torch reads on import
from models import save_tiny

if os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError):  # Triton is for Linux
        from interpreter import patch_once_per_launch

        patch_once_per_launch()

SLOW = frozenset((Path(__file__).parent / "slow_tests.txt").read_text().split())
"""functions that `make test` leaves to `make test-slow`, as file::function"""


def pytest_collection_modifyitems(items):
    for item in items:
        if f"{item.path.name}::{getattr(item, 'originalname', item.name)}" in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model and its tokenizer on disk."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))
