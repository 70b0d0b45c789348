"""Where options of transformers' TrainingArguments 5.x, of peft's LoraConfig and of older versions live here.

GRPOConfig inherits the first. The entries are written as in `options.py`, which answers with them.
"""

_ADAM = "model.optimizer.init_args"
_CHECKPOINT = "trainer.callbacks (add ModelCheckpoint, with"
_LOGGER = "trainer.logger (in the init_args of the logger)"
_DDP = "trainer.strategy (class_path lightning.pytorch.strategies.DDPStrategy, with"
_HUB = "not offered: upload the adapter that a run writes, with the hub's own tool"
_NO_WORKERS = "not offered: prompts are tokenised before training, so no workers load them"
_PACKED = "not offered: batches are packed, so lengths need no sorting and nothing is padded"
_NO_LABELS = "not offered: rewards take the place of labels"
_MEANS = "not offered: val/reward and val/pass@1 come from rollout.reward_funcs"
_GLOBAL = "not offered: losses are means over the tokens of all ranks"

INHERITED: dict[str, str] = {
    # optimizer and scheduler
    "weight_decay": f"{_ADAM}.weight_decay",
    "adam_beta1": f"{_ADAM}.betas (both in one list)",
    "adam_beta2": f"{_ADAM}.betas (both in one list)",
    "adam_epsilon": f"{_ADAM}.eps",
    "betas": f"{_ADAM}.betas",
    "eps": f"{_ADAM}.eps",
    "lr": f"{_ADAM}.lr",
    "optim_args": f"{_ADAM}",
    "optim_target_modules": "not offered: the optimizer gets all weights that train; see model.lora",
    "lr_scheduler_kwargs": "model.scheduler.init_args",
    "adafactor": "model.optimizer (by class path)",
    "optimizers": "model.optimizer with model.scheduler",
    # precision and kernels
    "bf16_full_eval": "trainer.precision (validation has that of training)",
    "fp16_full_eval": "trainer.precision (validation has that of training)",
    "fp16_opt_level": "not offered: apex is gone; see trainer.precision",
    "half_precision_backend": "trainer.precision",
    "tf32": "not offered: call torch.set_float32_matmul_precision('high') in a file that the config names",
    "activation_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing_kwargs": "not offered: recomputation is always the non-reentrant one",
    "gradient_checkpointing_kwargs": "not offered: recomputation is always the non-reentrant one",
    "torch_compile": "model.kernels.compile (on; decoder layers, one by one)",
    "torch_compile_backend": "not offered: see model.kernels.compile",
    "torch_compile_mode": "not offered: see model.kernels.compile",
    "use_liger_kernel": "model.kernels (own kernels; auto is on)",
    "use_liger_loss": "model.kernels.loss (an own kernel; auto is on)",
    "liger_kernel_config": "model.kernels (own kernels; auto is on)",
    "use_cache": "not offered: engines decode with a cache, training has none",
    "neftune_noise_alpha": "not offered: noise in the embeddings makes the ratio differ from 1",
    "torch_empty_cache_steps": "not offered: rollout.micro_batches keeps a step within the memory",
    "label_smoothing_factor": _NO_LABELS,
    "label_names": _NO_LABELS,
    "average_tokens_across_devices": _GLOBAL,
    # logging
    "logging_strategy": "trainer.log_every_n_steps",
    "logging_first_step": "trainer.log_every_n_steps (1 logs all)",
    "logging_dir": _LOGGER,
    "log_on_each_node": "not offered: rank 0 logs",
    "logging_nan_inf_filter": "not offered: a loss that is not finite is never hidden",
    "include_num_input_tokens_seen": "metric num_tokens",
    "include_tokens_per_second": "metric num_tokens",
    "log_level": "not offered: set it with Python's logging",
    "log_level_replica": "not offered: set it with Python's logging",
    "disable_tqdm": "trainer.enable_progress_bar (the opposite)",
    "project": _LOGGER,
    "trackio_space_id": "not offered: Lightning has no trackio logger; see trainer.logger",
    "trackio_bucket_id": "not offered: Lightning has no trackio logger; see trainer.logger",
    "trackio_static_space_id": "not offered: Lightning has no trackio logger; see trainer.logger",
    "wandb_project": "trainer.logger (WandbLogger, with project)",
    "WANDB_PROJECT": "trainer.logger (WandbLogger, with project)",
    "wandb_log_unique_prompts": "trainer.callbacks (grpo_lightning.callbacks.SampleTable; unique_prompts)",
    # evaluation
    "eval_strategy": "trainer.val_check_interval",
    "evaluation_strategy": "trainer.val_check_interval",
    "do_eval": "data.validation_split",
    "do_train": "grpo-lightning fit",
    "do_predict": "grpo-lightning predict",
    "eval_delay": "not offered: see trainer.val_check_interval",
    "eval_on_start": "rollout.validation.before_training",
    "per_device_eval_batch_size": "data.validation_batch_size (prompts over all ranks)",
    "eval_accumulation_steps": "data.validation_batch_size (prompts over all ranks)",
    "prediction_loss_only": _MEANS,
    "compute_metrics": _MEANS,
    "include_for_metrics": _MEANS,
    "include_inputs_for_metrics": _MEANS,
    "batch_eval_metrics": _MEANS,
    "eval_do_concat_batches": _MEANS,
    "eval_use_gather_object": _MEANS,
    # checkpoints
    "save_strategy": f"{_CHECKPOINT} every_n_train_steps)",
    "save_total_limit": f"{_CHECKPOINT} save_top_k)",
    "save_only_model": f"{_CHECKPOINT} save_weights_only)",
    "metric_for_best_model": f"{_CHECKPOINT} monitor, e.g. val/pass@1)",
    "greater_is_better": f"{_CHECKPOINT} mode: max or min)",
    "load_best_model_at_end": "not offered: ModelCheckpoint (monitor) keeps it; name it with --ckpt_path",
    "save_safetensors": "not offered: adapters are always safetensors",
    "save_on_each_node": "not offered: rank 0 writes",
    "overwrite_output_dir": "not offered: see trainer.default_root_dir",
    "enable_jit_checkpoint": "not offered: ModelCheckpoint with every_n_train_steps bounds what is lost",
    "ignore_data_skip": "not offered: a resumed run goes on with the prompt after the last",
    "restore_callback_states_from_checkpoint": "not offered: a resumed run restores them always",
    # the hub
    **dict.fromkeys(
        (
            "push_to_hub",
            "push_to_hub_model_id",
            "push_to_hub_organization",
            "hub_model_id",
            "hub_private_repo",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
    "hub_token": "not offered: tokens come from the environment only (HF_TOKEN)",
    "push_to_hub_token": "not offered: tokens come from the environment only (HF_TOKEN)",
    # data
    "data_seed": "data.seed",
    "full_determinism": "trainer.deterministic",
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "data_collator",
        ),
        _NO_WORKERS,
    ),
    "dataloader_drop_last": "not offered: a rollout is whole; see data.prompts_per_rollout",
    "group_by_length": _PACKED,
    "length_column_name": _PACKED,
    "train_sampling_strategy": _PACKED,
    "formatting_func": "data.prompt_template",
    "max_length": "data.max_prompt_tokens with rollout.sampling.max_tokens (there is no separate limit)",
    # devices
    "local_rank": "not offered: the launcher sets it; see trainer.devices",
    "no_cuda": "trainer.accelerator (cpu)",
    "accelerator_config": "trainer.strategy",
    "parallelism_config": "trainer.strategy",
    "fsdp_config": "trainer.strategy",
    "ddp_find_unused_parameters": f"{_DDP} find_unused_parameters)",
    "ddp_bucket_cap_mb": f"{_DDP} bucket_cap_mb)",
    "ddp_broadcast_buffers": f"{_DDP} broadcast_buffers)",
    "ddp_static_graph": f"{_DDP} static_graph)",
    "ddp_backend": f"{_DDP} process_group_backend)",
    "ddp_timeout": f"{_DDP} timeout)",
    "debug": "trainer.detect_anomaly",
    "skip_memory_metrics": "not offered: memory/peak_gib is logged on every GPU",
    # the arguments of GRPOTrainer, and older GRPOConfigs
    "peft_config": "model.lora (a mapping with the fields of peft's LoraConfig)",
    "reward_processing_classes": "not offered: a reward function of your own tokenises for its model",
    "ref_model": "model.reference (how it follows; it starts as the policy does)",
    "quantization_config": "model.quantization (nf4)",
    "attn_implementation": "model.model_kwargs.attn_implementation",
    "torch_dtype": "model.model_kwargs.dtype (see trainer.precision first)",
    "load_in_8bit": "not offered: model.quantization has nf4",
    "revision": "model.model_kwargs.revision",
    "rollout_func": "rollout.engine (a class of your own with the methods of RolloutEngine)",
    "tools": "not offered yet: rollouts have a single turn",
    "vllm_guided_decoding_regex": "rollout.sampling.regex",
    "vllm_max_model_len": "rollout.engine.init_args.max_model_len",
    "vllm_dtype": "rollout.engine.init_args.engine_kwargs ({dtype: ...})",
    "vllm_enable_prefix_caching": "rollout.engine.init_args.engine_kwargs ({enable_prefix_caching: ...})",
    "vllm_device": "not offered: the engine shares the trainer's GPU",
    "max_num_seqs": "rollout.engine.init_args.max_num_seqs",
}

# peft: what is not a matter of the adapter's weights is set here.
for _name in ("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"):
    INHERITED[_name] = "not offered: model.lora sets it"
INHERITED["base_model_name_or_path"] = "model.model_name (a Hugging Face id or a folder)"
LORA = """
exclude_modules fan_in_fan_out use_rslora modules_to_save init_lora_weights layers_to_transform
layers_pattern rank_pattern alpha_pattern megatron_config megatron_core trainable_token_indices loftq_config
eva_config corda_config lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora
qalora_group_size monteclora_config layer_replication lora_bias target_parameters use_bdlora arrow_config
kasa_config ensure_weight_tying
""".split()  # noqa: SIM905  (so long a list reads better as words)
INHERITED |= {name: f"model.lora.{name}" for name in LORA}
