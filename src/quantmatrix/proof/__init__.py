"""Proof: records of runs, how long they hold, and what state a cell is in. No torch, ever."""
