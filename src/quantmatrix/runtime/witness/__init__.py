"""Witness: what a quantized file means, proved by the base model's own weights."""
