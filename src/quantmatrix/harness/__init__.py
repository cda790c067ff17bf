"""Harness: the matrix as pytest suites, in shards and packets. Standard library only when imported."""
