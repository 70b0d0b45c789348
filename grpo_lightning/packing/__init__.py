"""The packed rollout: the tensors that travel from sampling to training, and their geometry. Torch only."""
