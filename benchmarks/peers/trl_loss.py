"""TRL's side of conformance.py: `GRPOTrainer` itself, with the model and the engine taken out of it.

A trainer is made by TRL's own constructor from TRL's own `GRPOConfig`. Three methods are replaced: what is
sampled, what a forward returns, what rewards are. `_generate_and_score_completions` and `_compute_loss` run
as they are: padding, masks, advantages, importance weights, loss and metrics are all TRL's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Read when the libraries are imported; nothing here needs a network.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CI="1")

import torch
import transformers
import trl.trainer.grpo_trainer as module
from datasets import Dataset
from peers.cases import EOS, GROUP, MAX_TOKENS, PAD, PROMPTS, VOCAB, Case
from peers.cells import Options
from peers.ours import Answer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

ROWS = PROMPTS * GROUP
WIDTH_MULTIPLE = 5  # pads beyond the longest completion too


def correct(**_: object) -> None:
    """Stands for a reward function; `Peer` answers in its place."""


def style(**_: object) -> None:
    """Stands for another."""


class NoEngine:
    """In place of vLLM, so that a trainer with `use_vllm` can be built on a machine without one."""

    def __init__(self, **_: object) -> None: ...


class Peer(GRPOTrainer):
    """TRL's trainer, fed from a `Case`."""

    case: Case
    rewards: Tensor  # [S, K]; NaN where a reward does not apply
    leaf: Tensor  # [S, T] with gradient
    leaf_entropy: Tensor
    rows = slice(None)
    """completions of the micro-batch whose loss is being computed"""

    def _generate(self, prompts):
        case = self.case
        completions = [i.tolist() for i in case.per_completion(case.ids)]
        sampler = [x.tolist() for x in case.per_completion(case.sampler)]
        return [[7]] * len(prompts), completions, None, completions, sampler, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.rewards

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):
        if compute_entropy:
            return self.leaf[self.rows], self.leaf_entropy[self.rows], None
        source = self.case.ref if model is self.ref_model else self.case.old
        source = self.case.logprobs if source is None else source
        return self.case.padded(source, logits_to_keep, salt=1 + (model is self.ref_model)), None, None


@cache
def _parts() -> tuple[str, PreTrainedTokenizerFast]:
    """Returns a folder with the smallest model that the constructor accepts, and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = tempfile.mkdtemp()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, **sizes, num_key_value_heads=1, eos_token_id=EOS, pad_token_id=PAD)
    ).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    names = {"pad_token": f"w{PAD}", "eos_token": f"w{EOS}", "unk_token": "w2"}
    return folder, PreTrainedTokenizerFast(tokenizer_object=words, **names)


def trainer(options: Options, micro_batches: int = 1, optimizer_steps: int = 1) -> Peer:
    """Returns a trainer for rollouts of `ROWS` completions; raises what TRL's constructor raises.

    Args:
        options: arguments of `GRPOConfig`.
        micro_batches: accumulated per optimizer step.
        optimizer_steps: optimizer steps per rollout.
    """
    folder, tokenizer = _parts()
    module.VLLMGeneration = NoEngine
    settings: Options = {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS // (micro_batches * optimizer_steps),
        "gradient_accumulation_steps": micro_batches,
        "steps_per_generation": micro_batches * optimizer_steps,
        "num_generations": GROUP,
        "max_completion_length": MAX_TOKENS,
        "pad_to_multiple_of": WIDTH_MULTIPLE,
        # Makes TRL compute old log-probs where no engine does; changes nothing else here.
        "num_iterations": 2,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    peer = Peer(
        model=LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=[correct, style],
        args=GRPOConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * ROWS}),
        processing_class=tokenizer,
    )
    peer.model.train()
    peer.current_gradient_accumulation_steps = micro_batches  # the training loop sets it
    return peer


@contextmanager
def default(width: torch.dtype) -> Iterator[None]:
    """TRL builds tensors from lists in the default width: in float64 all of its numbers are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(width)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def score(peer: Peer, case: Case, rewards: Tensor | None = None) -> dict[str, Tensor]:
    """Returns what TRL makes of a rollout before it trains: padding, advantages, importance weights."""
    peer.case = case
    peer.rewards = torch.zeros(ROWS, 2, dtype=torch.float64) if rewards is None else rewards
    peer._metrics["train"].clear()
    return peer._generate_and_score_completions([{"prompt": "w3"} for _ in range(ROWS)])


def trl_loss(peer: Peer, case: Case) -> Answer:
    """Returns TRL's loss summed over micro-batches, its gradients and the metrics of the first one."""
    with default(torch.float64):
        inputs = score(peer, case)
        inputs["advantages"] = case.advantages
        width = inputs["completion_ids"].shape[1]
        peer.leaf = case.padded(case.logprobs, width, salt=3).requires_grad_()
        peer.leaf_entropy = (-case.padded(-case.entropy, width, salt=4)).requires_grad_()
        total = torch.zeros(())
        for part in range(count := peer.args.steps_per_generation):
            peer.rows = slice(part * ROWS // count, (part + 1) * ROWS // count)
            total = total + peer._compute_loss(peer.model, split_tensor_dict(inputs, count)[part])
        grads = torch.autograd.grad(total, [peer.leaf, peer.leaf_entropy], allow_unused=True)
    mask = case.mask(width)
    flat = [torch.zeros_like(case.logprobs) if g is None else g[mask] for g in grads]
    for g in grads:
        assert g is None or not g[~mask].any(), "TRL gave padding a gradient"
    metrics = {name: seen[0] for name, seen in peer._metrics["train"].items()}
    return Answer(total.item(), *flat, metrics=metrics)
