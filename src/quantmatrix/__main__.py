"""`python -m quantmatrix`."""

from quantmatrix.cli.main import entry

entry()
