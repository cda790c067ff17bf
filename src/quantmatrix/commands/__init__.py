"""Commands that have a module of their own, one file each.

A module has `add_to(commands)`, which adds its parser by `cli.add_command` and imports nothing heavy;
its handler takes (arguments, words that the parser did not know) and returns the exit code.
"""

from __future__ import annotations

# fmt: off
NAMES: tuple[str, ...] = (
    "explain",
    "agreement",
    "validate",
    "packet",
    "evidence",
    "summary",
    "speed",
    "quantize",
    "fallback",
    "compare",
    "mutate",
    "thresholds",
    "trace",
    "true_size",
    "bench",
    "compile",
)
# fmt: on
"""The modules, in the order of `quantmatrix --help`. One name a line, so that changes merge."""
