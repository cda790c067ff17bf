"""Which row of hardware.csv a machine is; another machine is an error with a code of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import shards

from quantmatrix.errors import MachineError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE
from quantmatrix.hardware import probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.tables import identify, read

ROWS = read.read().hardware
GIB = 2**30
FOUND = {
    "a100": Machine("NVIDIA A100-SXM4-80GB", "nvidia", "sm80", 79 * GIB),
    "rtx-4090": Machine("NVIDIA GeForce RTX 4090", "nvidia", "sm89", int(23.5 * GIB)),
    "h100": Machine("NVIDIA H100 80GB HBM3", "nvidia", "sm90", 79 * GIB),
    "h200": Machine("NVIDIA H200", "nvidia", "sm90", 140 * GIB),
    "b200": Machine("NVIDIA B200", "nvidia", "sm100", 178 * GIB),
    "rtx-5090": Machine("NVIDIA GeForce RTX 5090", "nvidia", "sm120", int(31.4 * GIB)),
    "mi300x": Machine("AMD Instinct MI300X", "amd", "gfx942", 191 * GIB),
    "ascend-910b": Machine("Ascend910B2", "ascend", "910b", 61 * GIB),
    "cpu": Machine("cpu", "cpu", "cpu", 3 * GIB),
}


@pytest.mark.parametrize("name", FOUND)
def test_auto_is_the_row_of_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda device=None: FOUND[name])
    assert identify.resolve("auto", ROWS) == name
    assert identify.resolve("b200", ROWS) == "b200"


@pytest.mark.parametrize(
    "machine",
    [
        Machine("NVIDIA Tesla T4", "nvidia", "sm75", 15 * GIB),
        Machine("NVIDIA H20", "nvidia", "sm90", 96 * GIB),
        Machine("NVIDIA RTX PRO 6000", "nvidia", "sm120", 96 * GIB),
    ],
)
def test_a_machine_that_is_no_row_says_what_it_is(machine: Machine) -> None:
    said = rf"{machine.name} \({machine.vendor} {machine.arch}, {machine.memory_bytes // GIB} GiB\)"
    with pytest.raises(MachineError, match=rf"^{said} is not a row of"):
        identify.find_row(machine, ROWS.values())


def test_the_nearest_memory_decides_between_rows_that_fit() -> None:
    rows = [replace(ROWS["h100"], id=f"m{gib}", memory_gib=gib) for gib in (90.0, 80.0, 72.0)]
    assert identify.find_row(FOUND["h100"], rows).id == "m80.0"


def test_several_devices_must_be_there_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["rtx-5090-x4"]
    for count, name in ((1, "rtx-5090"), (4, "rtx-5090")):
        machine = replace(FOUND["rtx-5090"], count=count, packages=frozenset({"flashinfer"}))
        monkeypatch.setattr(probe, "probe", lambda device=None, found=machine: found)
        for rows in (list(ROWS.values()), list(ROWS.values())[::-1]):
            assert identify.find_row(machine, rows).id == name
        if count == 4:
            assert identify.require(row) is machine
            continue
        with pytest.raises(MachineError, match=r"gpu-rtx-5090-x4 wants 4x NVIDIA .* 1 x NVIDIA"):
            identify.require(row)


def test_a_wrong_machine_or_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda device=None: FOUND["h100"])
    with pytest.raises(MachineError, match=r"wants one NVIDIA B200 .*; here: architecture sm90"):
        identify.require(ROWS["b200"])
    assert identify.require(ROWS["h100"]) is FOUND["h100"]
    monkeypatch.setattr(probe, "probe", lambda device=None: FOUND["b200"])
    with pytest.raises(MachineError, match="here is one, without flashinfer: see `quantmatrix doc"):
        identify.require(ROWS["b200"])


def test_a_driver_is_looked_for_without_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(identify.shutil, "which", lambda name: None)
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr(identify, "DRIVERS", {"nvidia": (str(device),)})
    with pytest.raises(MachineError, match="no nvidia driver"):
        identify.require_driver(ROWS["b200"])
    device.touch()
    identify.require_driver(ROWS["b200"])
    identify.require_driver(ROWS["cpu"])


def ask(*words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "quantmatrix.tables.identify", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_the_program_has_codes_and_one_line() -> None:
    assert ask("cpu") == (0, "cpu", "")
    code, out, error = ask("ascend-910b")
    assert (code, out) == (ENVIRONMENT_UNUSABLE, "")
    assert error.startswith(
        "ascend-910b wants one Ascend 910B (910b, 64 GiB), with torch_npu; here"
    )
    assert "\n" not in error
    assert ask("b201")[0] == 2


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose rows are also of an accelerator that is hardly ever here."""
    folder = tmp_path_factory.mktemp("project")
    shards.make_project(folder)
    cases = folder / "matrix" / "cases.csv"
    cases.write_text(cases.read_text().replace(",cpu,", ",cpu b200,"))
    places = folder / "matrix" / "hardware.csv"
    text = places.read_text().replace("b200,B200,nvidia,sm100", "b200,B200,nvidia,sm100-ours")
    assert "sm100-ours" in text
    places.write_text(text)
    return folder


@pytest.mark.parametrize("how", [("-p", "no:xdist"), ("-n", "2")], ids=["alone", "spread"])
def test_a_run_on_a_wrong_machine_stops_with_one_line(project: Path, how: tuple[str, ...]) -> None:
    code, output = shards.run(project, None, "--hardware", "b200", *how)
    assert code == ENVIRONMENT_UNUSABLE, output
    assert "wants one B200 (sm100-ours); here: " in output
    assert "failed" not in output


def test_a_run_on_auto_tests_the_rows_of_this_machine(project: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine is not a row of the small tables")
    words = ["--hardware", "auto", "--backend", "reference", "-n", "2"]
    code, output = shards.run(project, tmp_path, *words)
    assert code == 0, output
    assert {name.partition("/")[0] for name in shards.read_bytes(tmp_path)} == {"cpu"}


def test_tables_that_are_none_are_told_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert identify.main(["cpu", "--tables", str(tmp_path / "none")]) == 2
    assert "families.csv: no such file" in capsys.readouterr().err
