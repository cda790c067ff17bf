"""Mutation: planted faults of checkpoints, and which gate catches each."""
