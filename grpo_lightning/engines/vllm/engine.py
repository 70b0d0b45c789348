"""`VLLMEngine`: vLLM in the trainer's process, handed the policy's weights in memory before it samples."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from grpo_lightning.engines.base import EngineContext, Request, SyncKind, WeightSource
from grpo_lightning.engines.process_guard import process_kept, random_kept
from grpo_lightning.engines.session import Session
from grpo_lightning.engines.sync_kinds import KINDS, choose_kind
from grpo_lightning.engines.update_share import UpdateShare
from grpo_lightning.engines.vllm.arguments import engine_arguments, request_parameters
from grpo_lightning.engines.vllm.compat import (
    check_version,
    fused_modules,
    import_vllm,
    installed,
    put_weights,
    set_ranks,
    shut_down,
)
from grpo_lightning.engines.vllm.session import VLLMSession
from grpo_lightning.engines.vllm.shared_base import SharedBase, offered
from grpo_lightning.errors import ConfigError, EngineError, choices, hinted
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import Completion, SamplingParams
from grpo_lightning.utils.ranges import check_numbers

SLEEPS = ("auto", "weights", "kv_cache", "off")
SHARES = ("auto", "on", "off")
RESUME = "the last checkpoint is untouched: resume with --ckpt_path last"
NOT_ALONE = "; vLLM measures the whole GPU: if another process uses it, set rollout.engine.sleep to 'off'"


@hinted
class VLLMEngine:
    """vLLM in the trainer's process: token ids in, token ids and their log-probabilities out.

    Args:
        sync: how weights get there. `adapter` writes the LoRA tensors into the engine's linear layers,
            `merge` the base with the adapter added and rounded to the engine's type, in which small updates
            vanish, `full` all weights; `auto` takes adapter with LoRA, else full.
        gpu_memory_utilization: share of the GPU's memory for weights and KV cache of the engine.
        kv_cache_memory_bytes: size of the KV cache; null takes what the share above leaves, and on a CPU what
            `max_num_seqs` completions need.
        max_model_len: longest prompt plus completion; null takes the data's and the sampling's limits.
        max_num_seqs: most completions decoded at one time.
        sleep: what the engine gives back while the trainer works: `weights` (and the KV cache), `kv_cache`
            alone (vLLM 0.31 and later), `off`; `auto` or true takes kv_cache where it is to be had, else
            weights, and off on a CPU.
        share_base: keep one copy of the frozen base for trainer and engine. `auto` does so on a GPU with sync
            `adapter`, where the engine's weights stay in place (sleep `off` or `kv_cache`); `on` needs that.
        enforce_eager: no compilation and no CUDA graphs: starts in seconds, decodes slower. null is true on a
            CPU, false on a GPU.
        allow_mismatch: sample from an unquantised base for a trainer in 4 bit. Two different policies (0.5
            nats apart on a small model), so model.loss.correction has to be on.
        engine_kwargs: further arguments of vllm.LLM, e.g. {max_num_batched_tokens: 16384}; what its
            compilation_config says goes before ours, which compiles nothing.

    Raises:
        ConfigError: vLLM is not installed, or of a version that is not supported.
    """

    def __init__(
        self,
        sync: Literal["auto", "adapter", "merge", "full"] = "auto",
        gpu_memory_utilization: float = 0.35,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        sleep: str | bool = "auto",
        share_base: str | bool = "auto",
        enforce_eager: bool | None = None,
        allow_mismatch: bool = False,
        engine_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not installed():
            raise ConfigError(
                "rollout.engine is VLLMEngine, but vllm is not installed: "
                'pip install "grpo-lightning[vllm]", or use grpo_lightning.engines.HFEngine'
            )
        check_version()
        sizes = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "max_model_len": max_model_len,
        }
        bounds = [(key, value is None or value >= 1, "at least 1") for key, value in list(sizes.items())[1:]]
        share = ("gpu_memory_utilization", 0 < gpu_memory_utilization <= 1, "in (0, 1]")
        check_numbers("rollout.engine", sizes, [share, *bounds])
        sleep = {True: "auto", False: "off"}.get(sleep, sleep) if isinstance(sleep, bool) else sleep
        if sleep not in SLEEPS:
            raise ConfigError(f"rollout.engine.sleep is {choices(sleep, SLEEPS)}")
        if sync not in KINDS:
            raise ConfigError(f"rollout.engine.sync is {choices(sync, KINDS)}")
        if isinstance(share_base, bool):  # what YAML makes of an unquoted on or off
            share_base = "on" if share_base else "off"
        if share_base not in SHARES:
            raise ConfigError(f"rollout.engine.share_base is {choices(share_base, SHARES)}")
        self.share_base = share_base
        self.sync_kind, self.sleep_mode = sync, sleep
        self.gpu_memory_utilization, self.kv_cache_memory_bytes = (
            gpu_memory_utilization,
            kv_cache_memory_bytes,
        )
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.enforce_eager, self.allow_mismatch = enforce_eager, allow_mismatch
        self.engine_kwargs = dict(engine_kwargs or {})
        self.policy_version = -1
        self.exact = not allow_mismatch
        self._llm: Any = None
        self._asleep = False
        self._stop_ids: list[int] = []
        self._vocabulary = 0
        self._longest = 0
        self._dtype = torch.float32
        self._kind: SyncKind = "full"
        self._base: SharedBase | None = None
        self._share: UpdateShare | None = None
        self.sync_metrics: dict[str, float] = {}
        """of the latest sync, logged by the rollout"""

    def start(self, context: EngineContext) -> None:
        """Loads the model into vLLM; the process is left as it was.

        Raises:
            ConfigError: options, policy and engine do not fit together.
            EngineError: vLLM did not start.
        """
        policy = context.policy
        self.sync_kind = self._kind = choose_kind(policy, self.sync_kind)
        self.sleep_mode = self._sleep_that_fits(policy)
        arguments = engine_arguments(self, context)
        self._dtype = getattr(torch, arguments["dtype"])
        self._stop_ids, self._vocabulary = policy.eos_ids, policy.causal.config.get_text_config().vocab_size
        self._had_group = torch.distributed.is_initialized()
        self._base = SharedBase.of(policy) if self._shares_base(policy) else None
        self._share = UpdateShare.of(policy, self.sync_kind, self._dtype)
        began = perf_counter()
        rank_zero_info(f"starting vLLM ({self.sync_kind} sync) ...")
        with process_kept(), _named("start"), offered(self._base):
            if context.world_size > 1:
                device = policy.causal.device.index  # vLLM's «local rank» is the number of its device
                set_ranks(context.rank, context.local_rank if device is None else device, context.world_size)
            self._llm = import_vllm().LLM(**arguments)
        self._longest = self._llm.llm_engine.model_config.max_model_len
        rank_zero_info(
            f"vLLM is up after {perf_counter() - began:.1f} s; sleep: {self.sleep_mode}; "
            + ("a base of its own" if self._base is None else self._base.report)
        )
        if self.share_base == "on" and self._base is not None and not self._base.taken:
            self.close()
            raise ConfigError(
                "rollout.engine.share_base is on, but no weight of the engine equals the trainer's: they are "
                "of different types, or not laid out alike; take auto or off"
            )

    def _sleep_that_fits(self, policy: Policy) -> str:
        if policy.causal.device.type == "cpu":
            return "off"
        with process_kept(), _named("start"):  # importing it changes the process too
            has_kv = hasattr(import_vllm().LLM, "release_kv_cache_memory")
        if self.sleep_mode == "auto":
            stays = "kv_cache" if has_kv else "off"
            return stays if has_kv or self.share_base == "on" else "weights"
        if self.sleep_mode == "kv_cache" and not has_kv:
            raise ConfigError(
                "rollout.engine.sleep is 'kv_cache', which needs vLLM 0.31 or later; take 'weights' or 'auto'"
            )
        return self.sleep_mode

    def _shares_base(self, policy: Policy) -> bool:
        obstacles = {
            "rollout.engine.sync writes into the engine's weights; take adapter": self.sync_kind != "adapter",
            "sleep moves the engine's weights away; take kv_cache or off": self.sleep_mode == "weights",
            "vLLM repacks its weights on a CPU; take auto or off": policy.causal.device.type == "cpu",
            f"the base is in {policy.causal.dtype} and the engine in {policy.compute_dtype}; take "
            "trainer.precision bf16-true or 16-true": policy.causal.dtype != policy.compute_dtype,
        }
        found = next((reason for reason, holds in obstacles.items() if holds), None)
        if self.share_base == "on" and found is not None:
            raise ConfigError(f"rollout.engine.share_base is on, but {found}")
        return self.share_base != "off" and found is None

    def sync(self, source: WeightSource, version: int) -> None:
        """Makes the engine serve the weights of `source`, and forgets what it has cached of older ones.

        Raises:
            EngineError: the engine does not hold what was sent.
        """
        llm = self._awake()
        with process_kept(), _named("take the weights"), torch.no_grad():
            if self._kind == "adapter":
                from grpo_lightning.engines.vllm.adapter import put_adapter

                llm.collective_rpc(put_adapter, args=(source.adapter(),))
            (stacked,) = llm.collective_rpc(fused_modules)
            tensors = source.tensors(self._kind, self._dtype, stacked=stacked, first=self.policy_version < 0)
            llm.collective_rpc(put_weights, args=(tensors,))
            if not llm.reset_prefix_cache():
                raise EngineError("vLLM kept cached prefixes of the old policy: requests are still running")
            self.sync_metrics = self._share.metrics() if self._share is not None else {}
        self.policy_version = version

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        """Returns for each request one completion per seed, in order.

        Raises:
            EngineError: the engine refuses a prompt, which is named, or has died.
        """
        session = self.session(sampling)
        done: dict[int, list[Completion]] = {}
        try:
            session.add(requests)
            while session.busy:
                done.update((id(request), completions) for request, completions in session.step())
        except BaseException:
            session.abort()
            raise
        return [done[id(r)] for r in requests]

    def session(self, sampling: SamplingParams) -> Session:
        """Returns the decoding of one rollout, group by group; raises as `generate` does."""
        llm = self._awake()
        if self.policy_version < 0:
            raise EngineError("VLLMEngine has no policy yet: call sync(source, version) before generate")
        parameters = partial(request_parameters, sampling, stop_ids=self._stop_ids)
        return VLLMSession(llm, parameters, partial(self._check, sampling=sampling), _decoding)

    def _check(self, request: Request, sampling: SamplingParams) -> None:
        """Raises EngineError for a prompt that vLLM would refuse without saying which."""
        ids, where = request.prompt_ids, f"prompt {request.uid} of rollout {request.rollout_index}"
        if not ids:
            raise EngineError(f"{where} has no tokens")
        if len(ids) + sampling.max_tokens > self._longest:
            raise EngineError(
                f"{where} has {len(ids)} tokens, with max_tokens {sampling.max_tokens} more than the "
                f"engine's {self._longest}; lower data.max_prompt_tokens or raise "
                "rollout.engine.max_model_len"
            )
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise EngineError(f"{where} has token ids outside of the model's {self._vocabulary}")

    def sleep(self) -> None:
        """Gives memory back until the next `sync` or `generate`."""
        if self._llm is None or self._asleep or self.sleep_mode == "off":
            return
        with process_kept(), _named("sleep", NOT_ALONE):
            if self.sleep_mode == "kv_cache":
                self._llm.sleep(level=0)
                self._llm.release_kv_cache_memory()
            else:
                self._llm.sleep(level=1)
        self._asleep = True
        torch.cuda.empty_cache()

    def _awake(self) -> Any:
        """Returns the engine, woken if it sleeps."""
        if self._llm is None:
            raise EngineError("VLLMEngine was not started: call start(context) first")
        if self._asleep:
            torch.cuda.empty_cache()
            with process_kept(), _named("wake up"):
                self._llm.wake_up()
            self._asleep = False
        return self._llm

    def close(self) -> None:
        """Ends the engine and frees what it holds; raises EngineError if a shared weight was written to."""
        if self._llm is None:
            return
        if self._asleep:  # vLLM's allocator gives back once more what sleeps, and CUDA objects
            try:
                self._awake()
            except EngineError as e:
                rank_zero_warn(f"vLLM is closed asleep: {e}")
        llm, self._llm = self._llm, None
        base, self._base = self._base, None
        with process_kept():
            shut_down(llm, keep_process_group=self._had_group)
            del llm
            gc.collect()
        self.policy_version, self._asleep = -1, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if base is not None:
            base.check()


@contextmanager
def _decoding(action: str) -> Iterator[None]:
    with random_kept(), _named(action):
        yield


@contextmanager
def _named(action: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever vLLM raises into an EngineError."""
    try:
        yield
    except (EngineError, ConfigError, KeyboardInterrupt):
        raise
    except Exception as e:
        raise EngineError(f"vLLM could not {action}: {type(e).__name__}: {e}; {RESUME}{remedy}") from e
