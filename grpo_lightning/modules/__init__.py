"""LightningModules: from a rollout to a loss."""
