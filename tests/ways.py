"""Which way a call goes: the head's through logits, the decoder's without a graph."""

from grpo_lightning.ops.head_logits import Logits


def calls_through_logits(monkeypatch):
    """Returns a list that every call through logits is added to."""
    calls = []
    real = Logits.scores
    monkeypatch.setattr(
        Logits, "scores", lambda self, x, want_u: calls.append(want_u) or real(self, x, want_u)
    )
    return calls


class NoGraph:
    """Stands for `Graphs` that always leave it to a call, of batches that are filled up all the same."""

    shapes = ()

    def hidden(self, ids, positions, layout):
        assert len(ids) == len(layout.shared.order)
