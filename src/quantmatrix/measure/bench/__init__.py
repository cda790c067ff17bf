"""Bench: timings beside BF16 in one process."""
