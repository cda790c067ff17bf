"""Checkpoints: sets of weight files, what their headers say and how their tensors are read. No torch when imported."""
