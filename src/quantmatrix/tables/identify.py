"""Identify: which row of hardware.csv this machine is, or why it is not the one that is wanted.

    python -m quantmatrix.tables.identify            prints the row of this machine
    python -m quantmatrix.tables.identify b200       exit code 14 and one line when it is not a B200
    python -m quantmatrix.tables.identify b200 --drivers    the same without torch, from the drivers alone

The last form is for the moment before anything is installed: it only looks whether a driver of the
vendor answers, so it may say yes to a GPU that the full form then refuses.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.errors import MachineError, UsageError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE
from quantmatrix.hardware.machine import Machine
from quantmatrix.tables.rows import AUTO

if TYPE_CHECKING:
    from quantmatrix.tables.rows import HardwareRow

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.tables.rows import HardwareRow

MEMORY_SLACK = 0.15
"""A device whose memory differs by more than this share from the row's is another product."""
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "nvidia": ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"),
    "amd": ("/dev/kfd",),
    "ascend": ("/dev/davinci_manager", "/dev/davinci0"),
}
"""Files that a vendor's driver makes; one of them is enough."""
TOOLS = {"nvidia": "nvidia-smi", "amd": "rocminfo", "ascend": "npu-smi"}
"""Programs that come with a vendor's driver."""


def find_difference(machine: Machine, row: HardwareRow) -> str | None:
    """Why this machine is not the hardware of a row, or None."""
    for what, found, wanted in (
        ("vendor", machine.vendor, row.vendor),
        ("architecture", machine.arch, row.arch),
    ):
        if found != wanted:
            return f"{what} {found} ({machine.name}), {row.name} has {wanted}"
    gib = machine.memory_bytes / 2**30
    if row.memory_gib and abs(gib - row.memory_gib) > MEMORY_SLACK * row.memory_gib:
        return f"{machine.name} has {gib:.0f} GiB of memory, {row.name} has {row.memory_gib:.0f}"
    if machine.count < row.devices:
        return f"{machine.count} x {machine.name}, but {row.devices} are needed"
    return None


def find_row(machine: Machine, rows: Iterable[HardwareRow]) -> HardwareRow:
    """The row of a machine, the nearest in memory of those that fit; MachineError when none does.

    A row of several devices is taken only where no row of one fits: it must be asked for by name.
    """
    fitting = [row for row in rows if find_difference(machine, row) is None]
    if not fitting:
        gib = machine.memory_bytes / 2**30
        raise MachineError(
            f"{machine.name} ({machine.vendor} {machine.arch}, {gib:.0f} GiB) is not a row of "
            "matrix/hardware.csv: add a line for it, or name a row with --hardware"
        )

    def rank(row: HardwareRow) -> tuple[int, float]:
        return row.devices, abs(row.memory_gib * 2**30 - machine.memory_bytes)

    return min(fitting, key=rank)


def resolve(name: str, rows: Mapping[str, HardwareRow]) -> str:
    """The id of a row: `auto` is that of this machine, any other name is left as it is."""
    if name != AUTO:
        return name
    from quantmatrix.hardware import probe

    return find_row(probe.probe(), rows.values()).id


def require(row: HardwareRow) -> Machine:
    """This machine, if it is the hardware of a row; MachineError says what is wanted instead."""
    from quantmatrix.hardware import probe

    machine = probe.probe("cpu" if row.vendor == "cpu" else None)
    if why := find_difference(machine, row):
        raise MachineError(f"{describe(row)}; here: {why}")
    if missing := sorted(set(row.packages) - machine.packages):
        raise MachineError(
            f"{describe(row)}; here is one, without {', '.join(missing)}: see `quantmatrix doctor`"
        )
    return machine


def ask(name: str, tables: Path) -> str | None:
    """Why this machine is not the hardware of a row of the tables, in one line, or None.

    Another process looks, so that this one neither imports torch nor holds memory of a device.
    """
    command = [sys.executable, "-m", "quantmatrix.tables.identify", name, "--tables", str(tables)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


def require_driver(row: HardwareRow) -> None:
    """MachineError when no driver of the row's vendor answers here; imports nothing heavy."""
    if row.vendor not in DRIVERS:
        return
    files = DRIVERS[row.vendor]
    if shutil.which(TOOLS[row.vendor]) is None and not any(Path(file).exists() for file in files):
        raise MachineError(
            f"{describe(row)}; here: no {row.vendor} driver ({TOOLS[row.vendor]} is not found, "
            f"nor is {' or '.join(files)})"
        )


def describe(row: HardwareRow) -> str:
    """What a row wants, as text."""
    memory = f", {row.memory_gib:.0f} GiB" if row.memory_gib else ""
    packages = f", with {' and '.join(row.packages)}" if row.packages else ""
    return f"{row.job or row.id} wants {row.wanted} ({row.arch}{memory}){packages}"


def main(argv: Sequence[str]) -> int:
    """Print the id of this machine's row, or one line that says what is missing."""
    from quantmatrix.tables import read
    from quantmatrix.tables.rows import MatrixError

    parser = argparse.ArgumentParser(prog="python -m quantmatrix.tables.identify")
    parser.add_argument(
        "hardware", nargs="?", help="a row of hardware.csv that this machine must be"
    )
    parser.add_argument("--drivers", action="store_true", help="look at drivers only, before torch")
    parser.add_argument("--tables", type=Path, help="folder of the tables (default: ours)")
    given = parser.parse_args(argv)
    try:
        rows = read.read(given.tables).hardware
        name = given.hardware or resolve(AUTO, rows)
        if name not in rows:
            raise UsageError(f"{name}: not a row of hardware.csv; known: {', '.join(rows)}")
        if given.drivers:
            require_driver(rows[name])
        elif given.hardware:
            require(rows[name])
    except MachineError as error:
        print(error, file=sys.stderr)
        return ENVIRONMENT_UNUSABLE
    except (UsageError, MatrixError) as error:
        print(error, file=sys.stderr)
        return 2
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))


def from_row(row: HardwareRow) -> Machine:
    """A machine as a row of hardware.csv describes it.

    Triton is not a package of a row: torch's own builds for NVIDIA and AMD bring it.
    """
    brought = frozenset({"triton"} if row.vendor in ("nvidia", "amd") else ())
    device = {"nvidia": "cuda", "amd": "cuda", "ascend": "npu"}.get(row.vendor, "cpu")
    return Machine(
        name=row.name,
        vendor=row.vendor,
        arch=row.arch,
        memory_bytes=int(row.memory_gib * 2**30),
        packages=frozenset(row.packages) | brought,
        device=device,
        count=row.devices,
    )
