"""How much slower do torch's threads become when other programs run on the same cores? For a CPU.

Each row is a process of its own that waits in another way; `--busy` loops run beside all of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter

import torch
from measure import parser, save, setting, table
from torch import Tensor

WAYS: dict[str, dict[str, str]] = {
    "OpenMP's own (300,000 rounds)": {},
    "GOMP_SPINCOUNT 100,000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT 10,000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT 1,000 (ours)": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""ends with this process"""
X, W = torch.randn(2048, 576), torch.randn(576, 1536)
ACTIONS: dict[str, Callable[[], Tensor]] = {
    "2,048 rows x 576 x 1,536": lambda: X @ W,
    "64 rows x 576 x 1,536": lambda: X[:64] @ W,
    "20 sums over 64 x 576": lambda: torch.stack([(X[:64] * X[0]).sum() for _ in range(20)]),
}


def rate(action: Callable[[], Tensor], seconds: float) -> float:
    """Returns how often a second."""
    action()
    count, began = 0, perf_counter()
    while perf_counter() - began < seconds:
        action()
        count += 1
    return count / (perf_counter() - began)


def rates(ways: dict[str, str], seconds: float) -> dict[str, float]:
    """Returns the rates of a process that waits like this."""
    command = [sys.executable, __file__, "--measure", str(seconds)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(command, env={**clean, **ways}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measures alone and beside busy loops, and writes the result."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--busy", type=int, default=6, help="loops beside")
    options.add_argument("--seconds", type=float, default=4.0, help="of each action")
    options.add_argument("--measure", type=float, help="seconds; prints the rates of this process alone")
    args = options.parse_args()
    if args.measure:
        print(json.dumps({name: rate(action, args.measure) for name, action in ACTIONS.items()}))
        return
    seconds, ways, found = args.seconds, WAYS, {}
    if args.small:
        seconds, ways, args.busy = 0.1, {"one thread": WAYS["one thread"]}, 1
    for busy in (0, args.busy):
        with ExitStack() as beside:
            for _ in range(busy):
                loop = beside.enter_context(subprocess.Popen([sys.executable, "-c", LOOP]))
                beside.callback(loop.kill)
            for name, way in ways.items():
                found[f"{name}, {busy} busy loops"] = rates(way, seconds)
    print(f"{os.cpu_count()} cores; times a second")
    cells = [[name, *(f"{r:.1f}" for r in row.values())] for name, row in found.items()]
    print(table(("threads wait", *ACTIONS), cells))
    if not args.small:
        result = {"setting": setting(torch.device("cpu")), "cores": os.cpu_count(), "rows": found}
        print(save("busy", result, args.out))


if __name__ == "__main__":
    main()
