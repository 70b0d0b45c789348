"""The LM head's log-probabilities, forward and backward with a frozen head, beside other libraries' heads.

python benchmarks/bench_head.py                  # one GPU, the sizes of docs/performance_results.md
python benchmarks/bench_head.py --small          # a CPU, to see that it runs
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import parser, race, save, setting, table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from peers.heads import Head, installed

from grpo_lightning.ops import fused_linear_logprobs

FLOOR = "floor: two products"
TILES = {
    "512 rows": (512, 1 << 30),
    "1,024 rows": (1024, 1 << 30),
    "1,952 rows": (1952, 1 << 30),
    "4,096 rows, 65,536 words": (4096, 65_536),
    "16,384 rows, 16,384 words": (16_384, 16_384),
    "16,384 rows": (16_384, 1 << 30),
}
"""of logits in bf16, at 151,936 words: the last takes 4.6 GiB, the others fit into 600 MiB"""


def ours(backend: str, **options: Any) -> Head:
    """Returns our head with a backend."""
    return lambda h, w, ids: fused_linear_logprobs(h, w, ids, backend=backend, **options)


def through_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Our Triton head as it is where its own GEMM cannot run: fp32 logits and a row kernel."""
    with patch("grpo_lightning.ops.lm_head.fused_gemm.suits", return_value=False):
        return fused_linear_logprobs(hidden, weight, ids, backend="triton")


def error(head: Head, hidden: Tensor, weight: Tensor, ids: Tensor) -> float:
    """Returns the largest difference from fp64 over 256 rows, in nats."""
    h, y = hidden.detach()[:256], ids[:256]
    with torch.no_grad():
        logp, _ = head(h, weight, y)
        want = (h.double() @ weight.double().T).log_softmax(-1).gather(1, y[:, None])[:, 0]
    return (logp.double() - want).abs().max().item()


def products(hidden: Tensor, weight: Tensor, rows: int, words: int) -> Any:
    """Returns the two products that no design can do without, in tiles of the logits."""
    buffer = torch.empty(rows * words, dtype=hidden.dtype, device=hidden.device)
    out = torch.empty_like(hidden)

    def run() -> None:
        for h, o in zip(hidden.detach().split(rows), out.split(rows), strict=True):
            for i, w in enumerate(weight.split(words)):
                logits = buffer[: len(h) * len(w)].view(len(h), len(w))
                torch.mm(h, w.T, out=logits)
                torch.addmm(o, logits, w, beta=min(i, 1), out=o)

    return run


def least(rows: dict[str, Any]) -> dict[str, Any]:
    """Returns `rows` with the fastest tiling of the two products as the floor."""
    tiles = {name: r for name, r in rows.items() if name in TILES}
    best = min((name for name, r in tiles.items() if "failed" not in r), key=lambda n: tiles[n]["median_ms"])
    times = {name: r.get("median_ms") for name, r in tiles.items()}
    rest = {name: r for name, r in rows.items() if name not in TILES}
    return {FLOOR: {**tiles[best], "tile": best, "tiles_ms": times}} | rest


def measure(n: int, width: int, vocabulary: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Returns one row per contender for one size."""
    g = torch.Generator(device).manual_seed(0)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(n, width, device=device, generator=g).to(half).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, generator=g) * width**-0.5).to(half)
    ids = torch.randint(0, vocabulary, (n,), device=device, generator=g)
    grad = torch.randn(n, device=device, generator=g)
    heads = {
        "ours, Triton": ours("triton"),
        "ours, Triton through logits": through_logits,
        "ours, torch twin": ours("torch"),
        **installed(),
    }

    def step(head: Head) -> Any:
        def run() -> None:
            hidden.grad = None
            logp, _ = head(hidden, weight, ids)
            logp.backward(grad.to(logp.dtype))

        return run

    tiles = {
        name: products(hidden, weight, min(rows, n), min(words, vocabulary))
        for name, (rows, words) in TILES.items()
    }
    rows = least(race(tiles | {name: step(h) for name, h in heads.items()}, device, repeats))
    for name, head in heads.items():
        if "failed" not in rows[name] and "loss instead" not in name:
            rows[name]["error_nats"] = error(head, hidden, weight, ids)
    hidden.grad = None
    with torch.no_grad():
        forward = {f"{name}, no gradient": lambda h=h: h(hidden, weight, ids) for name, h in heads.items()}
        rows |= race(forward, device, max(repeats // 2, 1))
    return rows


def show(rows: dict[str, Any]) -> str:
    """Returns the table of one size."""
    floor, first = rows[FLOOR]["median_ms"], rows["ours, Triton"].get("median_ms")

    def cells(name: str, r: dict[str, Any]) -> list[str]:
        if "failed" in r:
            return [name, r["failed"][:60], "", "", "", ""]
        ratio = "" if first is None or "no gradient" in name else f"{r['median_ms'] / first:.2f}x"
        far = f"{r['error_nats']:.1e}" if "error_nats" in r else ""
        share = "" if "no gradient" in name else f"{floor / r['median_ms']:.0%}"
        return [name, f"{r['median_ms']:.2f}", ratio, share, f"{r['peak_mib']:.0f}", far]

    header = ("head", "ms", "to ours", "of floor rate", "peak MiB", "max |dlogp|")
    return table(header, [cells(n, r) for n, r in rows.items()])


def main() -> None:
    """Measures every size and writes the result."""
    options = parser(__doc__, repeats=10)
    options.add_argument("--rows", type=int, nargs="+", default=[16_384])
    options.add_argument("--hidden", type=int, nargs="+", default=[896, 2048, 4096])
    options.add_argument("--vocabulary", type=int, default=151_936)
    args = options.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    if args.small:
        args.rows, args.hidden, args.vocabulary, args.repeats = [64], [32], 997, 2
    result: dict[str, Any] = {"setting": setting(device), "sizes": {}}
    for n in args.rows:
        for width in args.hidden:
            name = f"N {n}, H {width}, V {args.vocabulary}"
            rows = measure(n, width, args.vocabulary, device, args.repeats)
            result["sizes"][name] = rows
            print(f"\n{name}\n{show(rows)}", flush=True)
            if not args.small:  # after each size: a machine may end before the last
                print(save("head", result, args.out))


if __name__ == "__main__":
    main()
