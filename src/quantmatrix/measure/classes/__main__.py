"""`python -m quantmatrix.measure.classes [FILE]`: prove every transformer class, and write the table."""

from __future__ import annotations

import sys
from pathlib import Path

from quantmatrix.files import write_whole
from quantmatrix.measure.classes.options import list_classes
from quantmatrix.measure.classes.prove import prove_class
from quantmatrix.proof.reports_folder import find_folder
from quantmatrix.proof.transformer_classes import FILE, write_lines


def main(argv: list[str]) -> None:
    """Prove the classes one after another; the file is written whole at the end."""
    path = Path(argv[0]) if argv else find_folder(None) / FILE
    lines = []
    for name in list_classes():
        found = prove_class(name)
        lines += found
        shown = ", ".join(f"{line.family} {line.error:.3f}" for line in found if line.family)
        print(f"{name}: {shown or found[0].reason}", flush=True)
    write_whole(path, write_lines(lines).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
