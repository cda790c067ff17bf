"""Report: what claims and evidence render to. No torch, ever."""
