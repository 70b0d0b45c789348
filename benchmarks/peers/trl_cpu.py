"""TRL's side of cpu_step.py and bench_learning.py: seconds and rewards of every step."""

import json
import sys
import time
from pathlib import Path

# The same reward functions score both sides.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from engine_memory import noted
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.extras import profiling

    from grpo_lightning.rewards import FormatReward, math_answer

    if job.get("trl", {}).get("use_vllm"):
        from trl.generation.vllm_generation import VLLMGeneration

        engine_file = Path(job["out"]).with_name("engine.json")
        VLLMGeneration._init_vllm = noted(VLLMGeneration._init_vllm, engine_file)
    seconds: list[float] = []
    phases: dict[str, list[float]] = {}
    profiling.ProfilingContext._log_metrics = lambda self, took: phases.setdefault(self.name, []).append(took)
    versions = {m.__name__: m.__version__ for m in (trl, transformers, torch)}

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.began)
            if time.perf_counter() - self.start > job.get("limit", float("inf")):
                control.should_training_stop = True

        def on_log(self, args, state, control, **kwargs):
            """Writes what there is, since a run may be ended."""
            history = [h for h in state.log_history if "reward" in h]
            result = {
                "seconds": seconds,
                "phases": phases,
                "wall": time.perf_counter() - began,
                "reward": [h["reward"] for h in history],
                "correct": [h["rewards/math_answer/mean"] for h in history],
                "versions": versions,
            }
            Path(job["out"]).write_text(json.dumps(result))

    options = {
        "output_dir": job["out"] + ".trl",
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["prompts"] * job["group"],
        "num_generations": job["group"],
        "max_completion_length": job["max_tokens"],
        "temperature": job["temperature"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "scale_rewards": job["scale_rewards"],
        "reward_weights": job["weights"],
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.get("seed", 42),
    }
    config = GRPOConfig(**options, **job.get("trl", {"use_cpu": True, "bf16": False}))
    began = time.perf_counter()
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=[math_answer, FormatReward(job["pattern"])],
        args=config,
        train_dataset=Dataset.from_list(job["rows"]),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **job["lora"]),
        callbacks=[Clock()],
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
