"""Which way a call goes: the head's through logits, the decoder's without a graph."""

from grpo_lightning.kernels.cuda_graphs import decoded
from grpo_lightning.ops.lm_head.chunked_logits import Logits


def calls_through_logits(monkeypatch):
    """Returns a list that every call through logits is added to."""
    calls = []
    real = Logits.scores
    monkeypatch.setattr(
        Logits, "scores", lambda self, x, want_u: calls.append(want_u) or real(self, x, want_u)
    )
    return calls


class NoGraph:
    """Stands for `Graphs` that always call the decoder, with batches that are filled up all the same."""

    def __init__(self, policy):
        self.decoder = policy.causal.get_decoder()
        self.calls = 0

    def hidden(self, ids, positions, layout):
        assert len(ids) == len(layout.shared.order) == layout.shared.shape.rows
        self.calls += 1
        return decoded(self.decoder, ids, positions, layout)
