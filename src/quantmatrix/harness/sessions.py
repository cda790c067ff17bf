"""Sessions: what `nox -s gpu-h200` and its like do, from the rows of hardware.csv.

A session of a hardware looks for the driver before anything is installed, installs what the row
needs, looks again through torch, runs the suites and the benchmarks, traces one cell of each family
and model, and packs what they left into one archive, failures included:

    identify --drivers -> install -> identify -> suites -> benchmarks -> trace -> <job>.tar.gz

Of several parts of the rows (`--shard 2/3`) the first alone has benchmarks and traces.

The noxfile reads this module from `src/` before the package is installed, so that only the standard
library is needed.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import MEANINGS
from quantmatrix.files import whole
from quantmatrix.hardware.packages import DISTRIBUTIONS
from quantmatrix.proof.bench_results import BenchmarkError, read_pytest

if TYPE_CHECKING:
    from quantmatrix.tables.rows import HardwareRow, Matrix

DRY_RUN = "--dry-run"
"""Says what a session would run, without its hardware."""
FULL_SIZE = "--full-size"
"""Takes the real checkpoints instead of tiny stand-ins."""
LIMITS = {False: 900, True: 3600}
"""Seconds that one check may take, with tiny stand-ins and with real checkpoints."""
GRACE = 60
"""Seconds after which a check that did not stop at its limit ends the run."""
ELSEWHERE: Mapping[str, str] = {"nunchaku": "NUNCHAKU_WHEEL"}
"""Packages that no public index has, and the variable that names their wheel (a path or address)."""
TORCH_INDEX = "TORCH_INDEX_URL"
"""The variable that names the index of a torch build which the default index does not have."""


@dataclass(frozen=True)
class Session:
    """One session of one hardware."""

    row: HardwareRow

    @property
    def name(self) -> str:
        """Name of the CI job and of the nox session."""
        return self.row.job

    @property
    def description(self) -> str:
        """The line of `nox -l`."""
        packages = f", with {' and '.join(self.row.packages)}" if self.row.packages else ""
        return (
            f"On {self.row.wanted}{packages}: suites, benchmarks, traces, an archive of it all; "
            f"`-- {DRY_RUN}` anywhere."
        )


def list_sessions(tables: Matrix) -> list[Session]:
    """The sessions that need a device of their own, in the order of hardware.csv."""
    rows = tables.hardware.values()
    return [Session(row) for row in rows if row.vendor != "cpu" and row.job]


def list_requirements(
    row: HardwareRow, torch: str, variables: Mapping[str, str]
) -> list[tuple[str, ...]]:
    """Arguments of each `pip install` that a row needs, torch's build first.

    Raises UsageError where a package is on no public index and no variable names its wheel.
    """
    index = variables.get(TORCH_INDEX)
    if row.vendor == "amd" and not index:
        raise UsageError(
            f"{row.job} wants torch's ROCm build: set {TORCH_INDEX} to the index that has {torch}"
        )
    steps: list[tuple[str, ...]] = [("--index-url", index, torch) if index else (torch,)]
    for package in row.packages:
        variable = ELSEWHERE.get(package)
        if variable is None:
            steps.append((torch, DISTRIBUTIONS.get(package, package)))
        elif variables.get(variable):
            steps.append((variables[variable],))
        else:
            raise UsageError(
                f"{row.job} wants the {package} engine, which no public index has: set {variable} "
                "to the wheel for your Python, torch and CUDA from its project's releases"
            )
    return steps


def suites_command(row: HardwareRow, folder: Path, arguments: Sequence[str]) -> list[str]:
    """The run of the suites; `arguments` are the caller's (`--shard 1/3`, `--full-size`).

    A check that is not done at its limit is stopped, and the run goes on; one that hangs in a driver,
    where no signal reaches it, ends the run a little later. What was finished is kept.
    """
    limit = LIMITS[FULL_SIZE in arguments]
    command = ["pytest", "--pyargs", "quantmatrix.suites", "-q", "-p", "no:cacheprovider"]
    command += ["--hardware", row.id]
    return [
        *command,
        f"--timeout={limit}",
        *("-o", f"faulthandler_timeout={limit + GRACE}", "-o", "faulthandler_exit_on_timeout=true"),
        "--evidence-dir",
        str(folder / "evidence"),
        f"--junitxml={folder / 'junit.xml'}",
        *arguments,
    ]


def bench_command(folder: Path) -> list[str]:
    """The run of the benchmarks; never with workers, which would leave an empty file."""
    command = ["pytest", "benchmarks", "-q", "-p", "no:xdist", "--benchmark-only"]
    command += ["--hardware", "auto", f"--bench-dir={folder / 'benchmarks'}"]
    return [*command, f"--benchmark-json={folder / 'bench.json'}"]


def trace_command(row: HardwareRow, folder: Path, arguments: Sequence[str]) -> list[str]:
    """The trace of one cell of each family and model, at the size that the suites have."""
    tiny = [] if FULL_SIZE in arguments else ["--tiny"]
    where = ["--hardware", row.id, "--output-path", str(folder / "traces")]
    return ["quantmatrix", "trace", *where, *tiny]


def is_first(arguments: Sequence[str]) -> bool:
    """Whether benchmarks and traces belong to this part of the rows: the first, or the only one."""
    found = re.search(r"--shard[ =](\d+)/", " ".join(arguments))
    return found is None or int(found[1]) == 1


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether a command line of nox is `nox -l --json`; what follows `--` is not nox's."""
    return "--json" in arguments[: arguments.index("--") if "--" in arguments else None]


def explain_code(code: int) -> str:
    """An exit code as text."""
    return f"exit code {code} ({MEANINGS.get(code, 'a test failed or could not run')})"


def list_gaps(folder: Path, *, first: bool = True) -> list[str]:
    """What a finished session should have left in its folder, and did not."""
    gaps = []
    if not any((folder / "evidence").rglob("*.json")):
        gaps.append(f"{folder / 'evidence'} has no record")
    if not first:
        return gaps
    try:
        read_pytest(folder / "bench.json")
    except BenchmarkError as error:
        gaps += str(error).splitlines()
    if not any((folder / "traces").glob("*.gz")):
        gaps.append(f"{folder / 'traces'} has no trace")
    return gaps


def pack(folder: Path, archive: Path) -> Path:
    """Write the files of a folder, and their digests as SHA256SUMS, to one .tar.gz archive.

    The archive appears when it is complete. Raises UsageError for an empty folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path.name != "SHA256SUMS"]
    if not files:
        raise UsageError(f"{folder}: no file to pack: nothing was run")
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}"
        for path in files
    ]
    sums = folder / "SHA256SUMS"
    sums.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with whole(archive) as temporary, tarfile.open(temporary, "w:gz") as packed:
        for path in [*files, sums]:
            packed.add(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return archive
