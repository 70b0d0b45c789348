"""Which way a head's call goes."""

from grpo_lightning.ops.head_logits import Logits


def calls_through_logits(monkeypatch):
    """Returns a list that every call through logits is added to."""
    calls = []
    real = Logits.scores
    monkeypatch.setattr(
        Logits, "scores", lambda self, x, want_u: calls.append(want_u) or real(self, x, want_u)
    )
    return calls
