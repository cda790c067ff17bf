"""Command-line tools that make or rearrange checkpoints: `python -m quantmatrix.tools.<name>`."""
