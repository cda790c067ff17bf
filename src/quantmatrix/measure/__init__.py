"""Measure: how near a quantized run is to BF16, what ran, and how fast."""
