"""Producers: what the files of one writer have in common, whatever the family."""
