"""Plan: everything about a run decided once, from headers and JSON, before a tensor is read."""
