"""vLLM's decoding as a session: its engine steps here, so groups come as they end and others may join."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from grpo_lightning.engines.base import Request
from grpo_lightning.engines.session import Ended
from grpo_lightning.types import Completion
from grpo_lightning.utils.signals import check, deferred


class VLLMSession:
    """Requests inside a running vLLM.

    Args:
        llm: `vllm.LLM`; steps until the first group has ended, each time it is asked.
        parameters: from seeds to vLLM's sampling parameters, one per seed.
        check: raises EngineError for a request that vLLM would refuse.
        guarded: what surrounds its work, by name: keeps random states, turns errors into EngineError.
    """

    def __init__(
        self,
        llm: Any,
        parameters: Callable[[Sequence[int]], list[Any]],
        check: Callable[[Request], None],
        guarded: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._engine = llm.llm_engine
        self._parameters, self._check, self._guarded = parameters, check, guarded
        self._places: dict[str, tuple[int, int]] = {}
        self._groups: list[tuple[Request, list[Completion | None]]] = []

    @property
    def busy(self) -> bool:
        """Whether anything is still to be decoded."""
        return bool(self._places)

    def add(self, requests: Sequence[Request]) -> None:
        """Lets `requests` join; all are looked at before the first does."""
        for request in requests:
            self._check(request)
        with self._guarded("take a request"), deferred():
            for request in requests:
                group = len(self._groups)
                self._groups.append((request, [None] * len(request.seeds)))
                for i, parameters in enumerate(self._parameters(request.seeds)):
                    # vLLM adds to the name what makes it unique, and gives the outputs the name alone.
                    name = f"{id(self)}-{group}-{i}"
                    self._places[name] = (group, i)
                    prompt = {"prompt_token_ids": request.prompt_ids, **request.model_inputs}
                    self._engine.add_request(name, prompt, parameters)

    def step(self) -> list[Ended]:
        """Decodes until a group has ended; returns those that have."""
        ended: list[Ended] = []
        with self._guarded("generate"), deferred():
            while self._places and not ended:
                check()
                for output in self._engine.step():
                    if output.finished:
                        group, i = self._places.pop(output.request_id)
                        request, completions = self._groups[group]
                        completions[i] = _completion(output.outputs[0])
                        if None not in completions:
                            ended.append((request, [c for c in completions if c is not None]))
        return ended

    def abort(self) -> None:
        """Takes what has not ended out of the engine, which could not be synchronised otherwise."""
        names, self._places = list(self._places), {}
        with suppress(Exception):  # of an engine that is dead; what killed it is on its way to the user
            self._engine.abort_request(names)


def _completion(output: Any) -> Completion:
    reason = "length" if output.finish_reason == "length" else "stop"
    return Completion(
        token_ids=list(output.token_ids), logprobs=list(output.logprobs.logprobs), finish_reason=reason
    )
