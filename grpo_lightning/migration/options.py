"""Where options of TRL 1.16, of Unsloth and of older documents live in our config; answers unknown keys.

The CLI never takes two names for one thing: a key from elsewhere is an error, and the error says where to go.
"""

from grpo_lightning.migration.inherited import INHERITED

# Each entry is a place, then « (remark)» or «; remark»; or a sentence that begins with one of `_NO_PLACE`.
WHERE: dict[str, str] = {
    **INHERITED,
    # TRL GRPOConfig: model
    "model_init_kwargs": "model.model_kwargs (passed to from_pretrained)",
    "trust_remote_code": "model.trust_remote_code (default false)",
    "router_aux_loss_coef": "not offered yet: the model's own router loss does not train",
    "disable_dropout": "model.disable_dropout (default true: dropout breaks ratio = 1)",
    "cast_lm_head_to_fp32": "not offered yet: log-probabilities are summed in fp32 whatever the head's type",
    "learning_rate": "model.optimizer.init_args.lr",
    # TRL GRPOConfig: data
    "num_generations": "rollout.num_generations (default 8; does not set memory)",
    "num_generations_eval": "rollout.validation.num_generations (null = as in training)",
    "max_completion_length": "rollout.sampling.max_tokens (default 512)",
    "shuffle_dataset": "data.shuffle (default true)",
    "remove_unused_columns": "not offered: columns are always kept, reward functions get them by name",
    "pad_to_multiple_of": "not offered: batches are packed, nothing is padded",
    "ds3_gather_for_generation": "not offered: DeepSpeed is not supported yet",
    # TRL GRPOConfig: generation
    "generation_batch_size": (
        "data.prompts_per_rollout (prompts over all ranks; times rollout.num_generations = completions)"
    ),
    "steps_per_generation": (
        "rollout.updates_per_rollout (optimizer steps; TRL counts micro-batches, so divide theirs by "
        "trainer.accumulate_grad_batches)"
    ),
    "temperature": "rollout.sampling.temperature (default 1.0)",
    "top_p": "rollout.sampling.top_p (default 1.0)",
    "top_k": "rollout.sampling.top_k (default 0 = off)",
    "min_p": "rollout.sampling.min_p (default null = off)",
    "repetition_penalty": "rollout.sampling.repetition_penalty (default 1.0)",
    "generation_kwargs": "rollout.sampling.extra (a mapping for the engine)",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "cache_implementation": "not offered: HFEngine decodes with transformers' dynamic cache",
    "use_transformers_continuous_batching": "not offered: for throughput take a vLLM engine",
    "transformers_continuous_batching_config": "not offered: for throughput take a vLLM engine",
    "use_transformers_paged": "not offered: for throughput take a vLLM engine",
    # TRL GRPOConfig: vLLM
    "use_vllm": "rollout.engine.class_path (e.g. grpo_lightning.engines.VLLMEngine)",
    "vllm_mode": ("rollout.engine.class_path (grpo_lightning.engines.VLLMEngine, in the trainer's process)"),
    "vllm_model_impl": "rollout.engine.init_args.engine_kwargs ({model_impl: transformers})",
    "vllm_enable_sleep_mode": "rollout.engine.init_args.sleep (default auto)",
    "vllm_structured_outputs_regex": "rollout.sampling.regex",
    "vllm_server_base_url": "not offered yet: engines run in the trainer's process",
    "vllm_server_host": "not offered yet: engines run in the trainer's process",
    "vllm_server_port": "not offered yet: engines run in the trainer's process",
    "vllm_server_timeout": "not offered yet: engines run in the trainer's process",
    "vllm_group_port": "not offered: adapters travel over HTTP, there is no extra process group",
    "vllm_gpu_memory_utilization": "rollout.engine.init_args.gpu_memory_utilization (default 0.35)",
    "vllm_max_model_length": (
        "rollout.engine.init_args.max_model_len (null = data.max_prompt_tokens + rollout.sampling.max_tokens)"
    ),
    "vllm_tensor_parallel_size": "not offered yet: each rank has an engine of its own",
    "vllm_importance_sampling_correction": "model.loss.correction.mode (off disables it)",
    "vllm_importance_sampling_mode": (
        "model.loss.correction.level with model.loss.correction.mode (default token, truncate)"
    ),
    "vllm_importance_sampling_clip_max": "model.loss.correction.high (default 2.0)",
    "vllm_importance_sampling_clip_min": "model.loss.correction.low (default null)",
    "vllm_importance_sampling_cap": "model.loss.correction.high (default 2.0)",
    # TRL GRPOConfig: loss and advantages
    "loss_type": "model.loss.name (default dapo)",
    "beta": "model.loss.kl_coef (default 0.0)",
    "use_bias_correction_kl": "model.loss.kl_bias_correction (default true)",
    "num_iterations": "rollout.num_iterations (default 1)",
    "epsilon": "model.loss.clip_low (null = the recipe's)",
    "epsilon_high": "model.loss.clip_high (null = the recipe's; cispo has model.loss.cispo_weight_max)",
    "delta": "model.loss.dual_clip (default null; must exceed 1 + clip_high)",
    "sapo_temperature_pos": "model.loss.sapo_tau_pos",
    "sapo_temperature_neg": "model.loss.sapo_tau_neg",
    "vespo_k_pos": "model.loss.vespo_k_pos",
    "vespo_k_neg": "model.loss.vespo_k_neg",
    "vespo_lambda_pos": "model.loss.vespo_lambda_pos",
    "vespo_lambda_neg": "model.loss.vespo_lambda_neg",
    "importance_sampling_level": "model.loss.ratio_level (null = the recipe's)",
    "reward_weights": "rollout.reward_weights (default 1.0 each)",
    "scale_rewards": "rollout.advantage (group = group_norm, batch = batch_norm, none = group_mean)",
    "multi_objective_aggregation": "rollout.advantage (normalize_then_sum = gdpo)",
    "mask_truncated_completions": "rollout.mask_truncated_completions (default false)",
    "sync_ref_model": "model.reference.ema_alpha with model.reference.ema_every (null = off)",
    "ref_model_mixup_alpha": "model.reference.ema_alpha (default 0.6)",
    "ref_model_sync_steps": "model.reference.ema_every (default 512)",
    "top_entropy_quantile": "model.loss.top_entropy_quantile (default 1.0)",
    "entropy_coef": "model.loss.entropy_coef (default 0.0)",
    "use_adaptive_entropy": "model.loss.adaptive_entropy (default null = off)",
    "entropy_coef_min": "model.loss.adaptive_entropy.min (default 0)",
    "entropy_coef_max": "model.loss.adaptive_entropy.max (default 1)",
    "entropy_coef_delta": "model.loss.adaptive_entropy.delta (default 0.005)",
    "entropy_target": "model.loss.adaptive_entropy.target (default 0.2)",
    "off_policy_mask_threshold": "model.loss.off_policy_threshold (default null)",
    "max_tool_calling_iterations": "not offered yet: rollouts have a single turn",
    # TRL GRPOConfig: logging
    "log_completions": "trainer.callbacks (add grpo_lightning.callbacks.SampleTable, with every_n_steps)",
    "num_completions_to_print": "trainer.callbacks (add grpo_lightning.callbacks.SampleTable, with rows)",
    "log_unique_prompts": "trainer.callbacks (add grpo_lightning.callbacks.SampleTable, with unique_prompts)",
    "log_multimodal": "not offered yet: text only, until vision models come",
    "log_completions_hub_repo": "not offered yet: upload the written rollouts with the hub's own tool",
    # Arguments that GRPOConfig inherits
    "output_dir": "trainer.default_root_dir",
    "per_device_train_batch_size": (
        "derived from data.prompts_per_rollout, rollout.num_generations and the number of micro-batches; "
        "to save memory raise trainer.accumulate_grad_batches, of which rollout.micro_batches takes what fits"
    ),
    "gradient_accumulation_steps": (
        "trainer.accumulate_grad_batches (the most; rollout.micro_batches takes as few as fit, and the "
        "gradient does not depend on it)"
    ),
    "max_steps": "trainer.max_steps (optimizer steps)",
    "num_train_epochs": "trainer.max_epochs",
    "max_grad_norm": "trainer.gradient_clip_val",
    "bf16": "trainer.precision (bf16-mixed or bf16-true)",
    "fp16": "trainer.precision (16-mixed)",
    "logging_steps": "trainer.log_every_n_steps",
    "save_steps": "trainer.callbacks (add ModelCheckpoint, with every_n_train_steps)",
    "eval_steps": "trainer.val_check_interval",
    "warmup_ratio": "model.scheduler (any scheduler by class path; warm-up counts in steps)",
    "warmup_steps": "model.scheduler (any scheduler by class path; warm-up counts in steps)",
    "lr_scheduler_type": "model.scheduler (any scheduler by class path)",
    "optim": "model.optimizer (by class path, e.g. bitsandbytes.optim.AdamW8bit or PagedAdamW8bit)",
    "report_to": "trainer.logger (WandbLogger, TensorBoardLogger, CSVLogger ...; none = false)",
    "run_name": "trainer.logger (in the init_args of the logger)",
    "resume_from_checkpoint": "--ckpt_path (last, or a path)",
    "callbacks": "trainer.callbacks",
    "EarlyStoppingCallback": "trainer.callbacks (add EarlyStopping, e.g. monitor: val/pass@1, mode: max)",
    "early_stopping_patience": "trainer.callbacks (add EarlyStopping, with patience)",
    "seed": "seed_everything (at the top of the config)",
    "random_state": "seed_everything (at the top of the config)",
    "gradient_checkpointing": "model.gradient_checkpointing (default true)",
    "auto_find_batch_size": (
        "rollout.micro_batches (auto: as few as fit into memory; the batch of an optimizer step stays)"
    ),
    "use_cpu": "trainer.accelerator (cpu)",
    "device_map": "trainer.devices with trainer.strategy",
    "fsdp": "trainer.strategy",
    "deepspeed": "not offered yet: take another trainer.strategy",
    # Model loading, LoRA, data and rewards in the documents of Unsloth and TRL
    "model_name": "model.model_name (a Hugging Face id or a folder)",
    "FastLanguageModel": "model.model_name (a Hugging Face id or a folder)",
    "from_pretrained": "model.model_name (a Hugging Face id or a folder)",
    "max_seq_length": "data.max_prompt_tokens with rollout.sampling.max_tokens (there is no separate limit)",
    "load_in_4bit": "model.quantization (nf4)",
    "dtype": "trainer.precision (to override it: model.model_kwargs.dtype)",
    "fast_inference": "rollout.engine.class_path (grpo_lightning.engines.VLLMEngine)",
    "gpu_memory_utilization": "rollout.engine.init_args.gpu_memory_utilization (default 0.35)",
    "max_lora_rank": "not offered: the engine learns the rank from model.lora.r",
    "r": "model.lora.r",
    "lora_alpha": "model.lora.lora_alpha",
    "lora_dropout": "model.lora.lora_dropout",
    "target_modules": "model.lora.target_modules",
    "bias": "model.lora.bias (none only: vLLM cannot serve another)",
    "use_gradient_checkpointing": "model.gradient_checkpointing (true, false, or offload for Unsloth's)",
    "unsloth_num_chunks": "model.logprob_chunk_rows (null = from the free memory)",
    "unsloth_logit_chunk_multiplier": "model.logprob_chunk_rows (null = from the free memory)",
    "unsloth_grpo_mini_batch": "rollout.micro_batches (default auto = as few as fit into memory)",
    "PatchFastRL": "not offered: nothing is patched and imports have no order",
    "unsloth": "not offered: nothing is patched and imports have no order",
    "ACCELERATE_MIXED_PRECISION": "trainer.precision (no environment variable is needed)",
    "reward_funcs": "rollout.reward_funcs (import path, path/file.py:func, or class_path with init_args)",
    "reward_model": "not offered yet: call the model in a function of your own, in rollout.reward_funcs",
    "processing_class": "model.tokenizer (null = the model's)",
    "tokenizer": "model.tokenizer (null = the model's)",
    "train_dataset": "data.dataset (with data.subset and data.split; or a DataModule of your own)",
    "eval_dataset": "data.validation_split (or a DataModule of your own)",
    "prompt": "data.prompt_column (messages get the chat template, strings are taken as they are)",
    "SFTTrainer": "not offered: train it elsewhere, and start from its folder with model.model_name",
    "SFTConfig": "not offered: train it elsewhere, and start from its folder with model.model_name",
    "DPO": "not offered yet",
    "ORPO": "not offered yet",
    "KTO": "not offered yet",
    "PPO": "not offered yet",
    "save_pretrained": "trainer.callbacks (add grpo_lightning.callbacks.RunReport, which writes it)",
    "save_pretrained_merged": "not offered yet: merge the adapter of a run with peft's merge_and_unload",
    "save_method": "not offered yet: merge the adapter of a run with peft's merge_and_unload",
    "push_to_hub_merged": "not offered yet: merge the adapter of a run with peft's merge_and_unload",
    "token": "not offered: tokens come from the environment only (HF_TOKEN)",
    # Stale names
    "max_parity": "rollout.on_policy_mismatch (stop or warn; what rounding explains is measured, not set)",
    "kl_coef": "model.loss.kl_coef (default 0.0; usual with k3 are 0.001 to 0.04)",
    "max_new_tokens": "rollout.sampling.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens (what happens beyond it: data.overlong)",
    "bnpo": "model.loss.name (bnpo was an old default, ours is dapo)",
    "reward/mean": "metric reward",
    "reward/std": "metric reward_std (0 means no signal, so smaller is not better)",
    "completion_length": "metric completions/mean_length",
}

_NO_PLACE = ("not offered", "derived")


def explain(key: str) -> str | None:
    """Returns one line on where the option `key` lives here, or None if the table does not know it.

    `key` may be dotted, or a flag of the command line: `model.beta`, `--max-new-tokens`,
    `--rollout.beta=0.04`. Ask only for keys that are unknown where they stand: the answer does not look at
    where that is.
    """
    name = key.removeprefix("--").partition("=")[0].rpartition(".")[2].replace("-", "_")
    text = WHERE.get(name)
    if text is None:
        return None
    if text.startswith(_NO_PLACE):
        return f"{name!r} is {text}"
    ends = [end for end in (text.find(" ("), text.find("; ")) if end >= 0]
    place = text[: min(ends, default=len(text))]
    return f"{name!r} is {place} here{text[len(place) :]}"
