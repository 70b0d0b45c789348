"""Metrics: sums that add up over micro-batches and ranks, and the statistics that are logged of them."""
