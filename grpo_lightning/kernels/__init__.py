"""What is replaced inside a loaded transformers model, for `model.kernels`."""
