"""What `VLLMEngine` asks vLLM for on a GPU; no vLLM is needed to know."""

from types import SimpleNamespace

import pytest
import torch

from grpo_lightning.engines import EngineContext
from grpo_lightning.engines.vllm import arguments as vllm_options
from grpo_lightning.errors import ConfigError
from grpo_lightning.types import SamplingParams


def arguments(monkeypatch, sync="merge", **given):
    monkeypatch.setattr(vllm_options, "is_quantized", lambda policy: False)
    causal = SimpleNamespace(device=torch.device("cuda"))
    adapter = SimpleNamespace(r=16)
    policy = SimpleNamespace(
        causal=causal, compute_dtype=torch.bfloat16, model=SimpleNamespace(peft_config={"default": adapter})
    )
    options = {"max_num_seqs": 100, "enforce_eager": None, "engine_kwargs": {}, "max_model_len": None}
    options |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None, "sleep_mode": "off"}
    engine = SimpleNamespace(**options | given, sync_kind=sync, allow_mismatch=False)
    context = EngineContext(policy=policy, model_path="m", max_model_len=64, sampling=SamplingParams())
    return vllm_options.engine_arguments(engine, context)


def test_decoding_is_captured_and_nothing_compiled(monkeypatch):
    config = arguments(monkeypatch)["compilation_config"]
    assert config["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert (config["mode"], config["cudagraph_mode"]) == (0, "FULL_DECODE_ONLY")
    monkeypatch.setattr(vllm_options, "adapter_ranks", lambda policy: {"q_proj": (4, 2.0, False)})
    adapter = arguments(monkeypatch, "adapter")
    assert adapter["compilation_config"] == config
    assert adapter["additional_config"] == {"adapter": {"q_proj": (4, 2.0, False)}}
    assert "compilation_config" not in arguments(monkeypatch, enforce_eager=True)


def test_the_users_compilation_goes_first(monkeypatch):
    kwargs = {"compilation_config": {"mode": 3}, "max_num_batched_tokens": 9}
    found = arguments(monkeypatch, engine_kwargs=kwargs)
    assert found["compilation_config"]["mode"] == 3
    assert found["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert found["max_num_batched_tokens"] == 9
    assert kwargs["compilation_config"] == {"mode": 3}
    assert arguments(monkeypatch, engine_kwargs=kwargs, enforce_eager=True)["compilation_config"]["mode"] == 3
    with pytest.raises(ConfigError, match=r"compilation_config is 3; it must be a mapping"):
        arguments(monkeypatch, engine_kwargs={"compilation_config": 3})
    with pytest.raises(ConfigError, match="engine_kwargs sets dtype"):
        arguments(monkeypatch, engine_kwargs={"dtype": "half"})
