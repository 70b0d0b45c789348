"""Log-probabilities straight from hidden states: the LM head, chunk by chunk or in one GEMM of its own."""
