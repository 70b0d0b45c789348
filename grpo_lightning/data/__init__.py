"""Prompts: where they come from, how rows become prompts, and how they are dealt to the trainer."""
