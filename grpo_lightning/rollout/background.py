"""One thread for calls of user code beside decoding; it never keeps a process from ending."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any


class Background:
    """Runs calls one after another in a daemon thread; the threads of an executor are waited for at exit."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        Thread(target=self._run, daemon=True, name=name).start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Returns what `call` is going to return, or raise."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Ends the thread once the calls it has are done; waits for none of them."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # the caller's to handle
                future.set_exception(error)
