"""`python -m quantmatrix`."""

from quantmatrix.cli import entry

entry()
