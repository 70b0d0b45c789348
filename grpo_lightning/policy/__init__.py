"""The policy: a Hugging Face causal LM as it is loaded, adapted, run over packed rollouts and verified."""
