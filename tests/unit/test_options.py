import re
from dataclasses import fields
from importlib import import_module

import pytest

from grpo_lightning.migration.options import WHERE, explain

# Every field that TRL 1.16.0 defines in GRPOConfig itself, the deprecated ones too.
TRL_FIELDS = """
model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
learning_rate num_generations num_generations_eval max_completion_length shuffle_dataset
remove_unused_columns pad_to_multiple_of ds3_gather_for_generation generation_batch_size
steps_per_generation temperature top_p top_k min_p repetition_penalty generation_kwargs
chat_template_kwargs cache_implementation use_transformers_continuous_batching
transformers_continuous_batching_config use_transformers_paged use_vllm vllm_mode vllm_model_impl
vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host
vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction
vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
vllm_importance_sampling_cap loss_type beta use_bias_correction_kl num_iterations epsilon
epsilon_high delta sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_lambda_pos
vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights scale_rewards
multi_objective_aggregation mask_truncated_completions sync_ref_model ref_model_mixup_alpha
ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min
entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold
max_tool_calling_iterations log_completions num_completions_to_print log_unique_prompts
log_multimodal log_completions_hub_repo
""".split()  # noqa: SIM905  (so long a list reads better as words)

OTHER_NAMES = """
output_dir per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs
max_grad_norm bf16 fp16 logging_steps save_steps eval_steps warmup_ratio warmup_steps
lr_scheduler_type optim report_to run_name resume_from_checkpoint callbacks EarlyStoppingCallback
seed random_state gradient_checkpointing auto_find_batch_size use_cpu fsdp deepspeed model_name
FastLanguageModel max_seq_length load_in_4bit dtype fast_inference gpu_memory_utilization
max_lora_rank r lora_alpha lora_dropout target_modules bias use_gradient_checkpointing
unsloth_num_chunks unsloth_logit_chunk_multiplier unsloth_grpo_mini_batch PatchFastRL
ACCELERATE_MIXED_PRECISION reward_funcs processing_class tokenizer train_dataset eval_dataset prompt
SFTTrainer SFTConfig DPO ORPO KTO PPO save_pretrained save_pretrained_merged save_method
push_to_hub_merged token kl_coef max_new_tokens max_prompt_length reward/mean reward/std
completion_length
""".split()  # noqa: SIM905  (so long a list reads better as words)

PLACES = (
    "model.",
    "data.",
    "rollout.",
    "trainer.",
    "seed_everything",
    "--ckpt_path",
    "grpo-lightning ",
    "metric ",
)
NO_PLACE = ("not offered", "derived")


@pytest.mark.parametrize("name", TRL_FIELDS + OTHER_NAMES)
def test_every_foreign_name_is_answered_in_one_line(name):
    line = explain(name)
    assert line is not None
    assert line.startswith(f"{name!r} is ")
    assert "\n" not in line


@pytest.mark.parametrize(("name", "text"), WHERE.items())
def test_an_entry_begins_with_a_place_or_says_that_there_is_none(name, text):
    assert text.startswith(PLACES + NO_PLACE), f"{name}: {text}"


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("max_new_tokens", "'max_new_tokens' is rollout.sampling.max_tokens here"),
        ("rollout.max_new_tokens", "'max_new_tokens' is rollout.sampling.max_tokens here"),
        ("--rollout.max-new-tokens=64", "'max_new_tokens' is rollout.sampling.max_tokens here"),
        ("model.beta", "'beta' is model.loss.kl_coef here (default 0.0)"),
        ("--beta", "'beta' is model.loss.kl_coef here (default 0.0)"),
        ("trainer.temperature", "'temperature' is rollout.sampling.temperature here (default 1.0)"),
        ("max_lora_rank", "'max_lora_rank' is not offered: the engine learns the rank from model.lora.r"),
    ],
)
def test_keys_may_be_dotted_and_dashed(key, line):
    assert explain(key) == line


@pytest.mark.parametrize("key", ["maxx_steps", "model.model_nam", "", "--", "beta.gamma"])
def test_what_the_table_does_not_know_gets_no_answer(key):
    assert explain(key) is None


def test_every_option_of_transformers_and_peft_is_answered():
    """TrainingArguments is what GRPOConfig inherits."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    for kind in (TrainingArguments, LoraConfig):
        assert not [f.name for f in fields(kind) if explain(f.name) is None]


WRITTEN = """
push_to_hub peft_config weight_decay adam_beta1 attn_implementation load_best_model_at_end evaluation_strategy
logging_dir max_length reward_processing_classes vllm_guided_decoding_regex wandb_project group_by_length
""".split()  # noqa: SIM905  (so long a list reads better as words)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_users_write_is_answered(name):
    assert explain(f"--{name}=1")


def test_commands_and_classes_that_are_named_exist():
    from grpo_lightning.__main__ import HELP

    commands = set(re.findall(r"^  (\w+)  ", HELP, re.MULTILINE))
    named = [c for text in WHERE.values() for c in re.findall(r"\bgrpo-lightning (\w+)", text)]
    assert {"fit", "predict"} <= set(named) <= commands
    paths = {
        p for text in WHERE.values() for p in re.findall(r"\b(?:grpo_lightning|lightning)(?:\.\w+)+", text)
    }
    assert len(paths) >= 4
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path
