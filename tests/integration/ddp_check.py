"""Run by test_policy_check.py on two CPU ranks: an engine that is sick on rank 1 alone; says how it ended."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fits import data, module, rollout, trainer
from sick import Sick, adapter_off

from grpo_lightning.errors import EngineError

if __name__ == "__main__":
    folder, root, masked = sys.argv[1:]
    rank = int(os.environ.get("LOCAL_RANK", "0"))

    def mine(completions, **_):
        """With `masked` rank 0 has nothing that could be judged."""
        return [float(len(c)) for c in completions]

    engine = Sick(adapter_off, 2 if rank == 1 else 99)
    if masked == "masked" and rank == 0:
        stock = engine.generate

        def cut(requests, sampling):
            from dataclasses import replace

            return [[replace(c, finish_reason="length") for c in g] for g in stock(requests, sampling)]

        engine.generate = cut
    r = rollout(
        engine=engine, reward_funcs=[mine], num_generations=12, mask_truncated_completions=masked == "masked"
    )
    t = trainer(Path(root), r, max_steps=4, devices=2, strategy="ddp", logger=False)
    try:
        t.fit(module(folder), data())
        end = "went on"
    except EngineError as error:
        end = str(error)
    Path(root, f"{rank}").write_text(f"{t.global_step} {end}")
