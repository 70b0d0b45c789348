"""`grpo-lightning` with a note of what its engine takes of the GPU.

python benchmarks/engine_memory.py engine.json fit --config configs/gpu/smollm2_arithmetic.yaml
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure import used_gib


def noted(start: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Returns `start`, which then writes to `file` how much more of the GPU is in use after it, in GiB."""

    @wraps(start)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = used_gib()
        out = start(*args, **kwargs)
        file.write_text(json.dumps({"engine_gib": used_gib() - before}))
        return out

    return run


if __name__ == "__main__":
    from grpo_lightning.__main__ import main
    from grpo_lightning.engines import HFEngine, VLLMEngine

    for kind in (HFEngine, VLLMEngine):
        kind.start = noted(kind.start, Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
