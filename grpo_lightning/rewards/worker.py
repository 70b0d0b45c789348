"""The other side of `process.py`: `python -m grpo_lightning.rewards.worker FD MEMORY module:factory`.

The factory gets the setup and returns the handler; the handler gets a request and a function that sends
answers, as many as it likes, each what JSON can hold.
"""

import importlib
import json
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Tell = Callable[[Any], None]
Handler = Callable[[Any, Tell], None]


def main() -> None:
    """Serves until the other side is gone."""
    import resource  # no module of Windows, where this one is imported all the same

    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    # Private memory, not addresses: CUDA reserves more addresses than any machine has memory.
    limit = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()
    module, _, name = sys.argv[3].partition(":")
    handle: Handler = getattr(importlib.import_module(module), name)(pickle.loads(requests.get()))
    while True:
        request = pickle.loads(requests.get())
        handle(request, lambda answer: connection.send_bytes(json.dumps(answer, default=_plain).encode()))


def _listen(connection: Connection, requests: "queue.SimpleQueue[bytes]") -> None:
    """Reads ahead, so that the end of the other side is seen while a handler is at work."""
    try:
        while True:
            requests.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


def _plain(value: Any) -> Any:
    """Returns scalars of numpy and torch as numbers, anything else as text."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else str(value)


if __name__ == "__main__":
    main()
