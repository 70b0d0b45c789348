"""vLLM in the trainer's process. `compat.py` alone knows names of vLLM that are not public."""
