"""Tiny: small stand-ins of every repository, in its true on-disk format."""
