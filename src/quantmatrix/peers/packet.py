"""Packet: a column as one folder and one archive, to send in.

| file                                    | content |
| --------------------------------------- | ------- |
| `runtimes/<runtime>/<hardware>/*.json`  | the records, as `reports/runtimes` keeps them |
| `runs/<number>-<name>/`                 | latents, pictures and the whole log of each run |
| `runs.json`                             | which run a record is about, and which one it was compared with |
| `<folder>.tar.gz`                       | all of it, with `SHA256SUMS` |

The folder is left as it is when a run is stopped, for each record is written once it is known.
`packet_check` holds the records of a packet against its runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.files import check_writable
from quantmatrix.peers.column import Column, Outcome, Pair
from quantmatrix.peers.session import Bounds
from quantmatrix.proof import columns
from quantmatrix.tables import identify

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Matrix

ABOUT = "runs.json"
"""File that names the runs of each record, by the id of its cell."""
SHARE = 0.9
"""Of this machine's memory, what a run may take where nothing is said."""


@dataclass(frozen=True)
class Asked:
    """What a column is to be made of."""

    runtime: str
    hardware: str
    checkpoints: tuple[str, ...] = ()
    """Ids; none: every checkpoint of the tables."""
    tiny: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    workers: int = 1
    """Models that run at once."""


def find_hardware(tables: Matrix, runtime: str, name: str) -> str:
    """The hardware of a name, if the runtime runs there and this machine is it.

    UsageError for an unknown name and for hardware that the runtime's row does not have, MachineError
    where this machine is another one.
    """
    hardware = identify.resolve(name, tables.hardware)
    if hardware not in tables.hardware:
        raise UsageError(
            f"--hardware {name}: not in hardware.csv; known: {', '.join(tables.hardware)}"
        )
    if runtime in tables.runtimes:
        groups = tables.groups
        known = [h for w in tables.runtimes[runtime].hardware for h in groups.get(w, (w,))]
        if hardware not in known:
            raise UsageError(
                f"--hardware {hardware}: {runtime} does not run there; its row of runtimes.csv has "
                f"{', '.join(known)}"
            )
    identify.require(tables.hardware[hardware])
    return hardware


def check_names(tables: Matrix, names: Sequence[str]) -> tuple[str, ...]:
    """The same names; UsageError for one that is no checkpoint."""
    for name in names:
        if name not in tables.checkpoints:
            raise UsageError(
                f"--checkpoint {name}: not in checkpoints.csv; see `quantmatrix matrix list`"
            )
    return tuple(names)


def read_memory() -> int:
    """Bytes that a run may take where nothing is said."""
    from quantmatrix.hardware import probe

    return int(SHARE * probe.read_memory())


def choose_workers(asked: int | None, vendor: str, *, tiny: bool) -> int:
    """How many models run at once on hardware of a vendor: as asked; UsageError for fewer than one.

    Where nothing is said, stand-ins on the cores of a CPU two, anything else one: a device has one run
    at a time, and the memory of a model at true size is wanted whole.
    """
    if asked is None:
        return min(2, os.cpu_count() or 1) if tiny and vendor == "cpu" else 1
    if asked < 1:
        raise UsageError(f"--workers {asked}: at least 1")
    return asked


def describe_pair(pair: Pair) -> dict[str, Any]:
    """The runs behind a record, as `runs.json` has them."""
    sides = {"run": pair.ran, "beside": pair.beside}
    found: dict[str, Any] = {
        name: {"folder": one.folder.name, "media": one.answer.media, "latents": one.answer.latents}
        for name, one in sides.items()
    }
    return {**found, "decoded": pair.decoded}


def make(
    tables: Matrix,
    asked: Asked,
    folder: Path,
    record_folder: Path | None = None,
    show: Callable[[Outcome], None] | None = None,
) -> tuple[list[Outcome], Path]:
    """Run a column into a new folder; returns what came of each checkpoint, and the archive.

    Records go to `record_folder`, too, where there is one; `show` is called as each is known. Raises
    UsageError for a folder that exists, UnusableError where the runtime is not installed.
    """
    from quantmatrix.harness import sessions

    if folder.exists():
        raise UsageError(f"--output-path {folder} exists; name a new folder")
    check_writable(folder)
    outcomes: list[Outcome] = []
    about: dict[str, dict[str, Any]] = {}
    runs = (folder / "runs").resolve()
    with Column(
        tables,
        asked.runtime,
        asked.hardware,
        runs,
        tiny=asked.tiny,
        bounds=asked.bounds,
        workers=asked.workers,
    ) as column:
        for outcome in column.run(asked.checkpoints):
            outcomes.append(outcome)
            if outcome.pair is not None:
                about[outcome.cell.id] = describe_pair(outcome.pair)
            if outcome.record is not None:
                columns.write(outcome.record, folder / columns.RUNTIMES)
                if record_folder is not None:
                    columns.write(outcome.record, record_folder)
            if show is not None:
                show(outcome)
    text = json.dumps(about, indent=1, sort_keys=True)
    (folder / ABOUT).write_text(f"{text}\n", encoding="utf-8")
    return outcomes, sessions.pack(folder, folder.with_name(f"{folder.name}.tar.gz"))
