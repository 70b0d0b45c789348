"""Attention over a packed rollout, with prompts that several completions share, in few shapes."""
