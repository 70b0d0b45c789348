"""Builds a `Policy` from a name on disk: model, adapter, dropout, checkpointing."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.errors import ConfigError
from grpo_lightning.ops.offload import Offloader
from grpo_lightning.policy.dropout import disable_dropout as switch_off
from grpo_lightning.policy.lora import check_lora
from grpo_lightning.policy.policy import Policy, unwrap
from grpo_lightning.policy.weight_dtypes import keep_copies_in_fp32


def load_policy(
    path: str,
    tokenizer: Any,
    *,
    lora: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    gradient_checkpointing: bool | str = True,
    disable_dropout: bool = True,
    quantization: str | None = None,
    keep_reference: bool = False,
    reference_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
) -> Policy:
    """Returns the policy, in torch's default dtype unless `model_kwargs` names one.

    Args:
        path: folder or hub id.
        tokenizer: its tokenizer.
        lora: a peft LoraConfig, or None to train every weight.
        model_kwargs: passed to `from_pretrained`.
        gradient_checkpointing: recompute activations in the backward; `offload` keeps the layers' inputs in
            host memory meanwhile.
        disable_dropout: set every dropout and jitter of the base model to 0.
        quantization: `nf4` loads the base in 4 bit (bitsandbytes, scales quantised too); adapters train.
        keep_reference: keep a copy of what trains as reference.
        reference_dtype: type of that copy; None is the type of what trains.
        chunk_rows: rows that go through the vocabulary at one time.
    """
    from transformers import AutoModelForCausalLM

    kwargs = {"dtype": torch.get_default_dtype(), "use_safetensors": True, **(model_kwargs or {})}
    if quantization is not None:
        kwargs["quantization_config"] = _four_bit(kwargs["dtype"])
    # Under bf16-true Lightning sets the default dtype; a model is built in it either way.
    causal = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if quantization is not None:
        _keep_base_as_it_is(causal)
    rates = switch_off(causal) if disable_dropout else []
    if gradient_checkpointing:
        # transformers 5.23 renames it and warns about the old name.
        enable = getattr(causal, "activation_checkpointing_enable", causal.gradient_checkpointing_enable)
        random = not disable_dropout or (lora is not None and bool(lora.lora_dropout))
        enable({"use_reentrant": False, "preserve_rng_state": random})
    if gradient_checkpointing == "offload":
        _offload(causal)
    model = causal
    if lora is not None:
        from peft import get_peft_model

        check_lora(lora)
        model = get_peft_model(causal, lora)
        keep_copies_in_fp32(model)
        if hasattr(causal.get_output_embeddings(), "lora_A"):
            raise ConfigError(
                "model.lora puts an adapter on the LM head, whose product never exists as a whole; leave it "
                "out of target_modules, or train it as it is: modules_to_save: [lm_head]"
            )
    policy = Policy(
        model,
        tokenizer,
        keep_reference=keep_reference,
        reference_dtype=reference_dtype,
        chunk_rows=chunk_rows,
    )
    policy.rates = rates
    if policy.padded_reason:
        rank_zero_warn(
            f"{type(unwrap(model)).__name__} runs padded, not packed, because {policy.padded_reason}"
        )
    return policy


def _four_bit(dtype: torch.dtype | str) -> Any:
    """Returns QLoRA's setting (2305.14314): NF4 blocks whose scales are quantised again."""
    from transformers import BitsAndBytesConfig

    compute = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(compute, torch.dtype):
        raise ConfigError(
            f"model.model_kwargs.dtype is {dtype!r}; with model.quantization it must be a type, e.g. bfloat16"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _keep_base_as_it_is(model: torch.nn.Module) -> None:
    """Switches off bitsandbytes' packing for CPUs: saving undoes it with loss, which would change the base
    that trains."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - a plain flag


def _offload(model: torch.nn.Module) -> None:
    """Gives every layer a checkpoint function that keeps its input in host memory (transformers' seam)."""
    offloader = Offloader()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            setattr(module, "_gradient_checkpointing_func", offloader.checkpoint)  # noqa: B010 - a function
