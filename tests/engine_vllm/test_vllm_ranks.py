"""Several ranks, an engine on each."""

from pathlib import Path

import pytest
from commands import run_ranks
from fits import same_bits

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("sync", ["adapter", "merge"])
def test_each_rank_samples_from_the_policy_that_trains(folder, tmp_path, sync):
    """Lightning's own launcher tells a rank less than torchrun does, from which vLLM knows its place."""
    found = run_ranks(Path(__file__).with_name("ranks_run.py"), tmp_path, folder, tmp_path, sync)
    assert len(found["parity"]) == 3
    assert max(found["parity"]) < 1e-4
    assert same_bits(*found["weights"])
