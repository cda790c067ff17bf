"""The tables' readers at their edges: sizes of devices, names, numbers, and whose tables are read."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tables import CASES, write_tables

from quantmatrix.errors import MachineError, UsageError
from quantmatrix.hardware import probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.tables import (
    identify,
    lint,
    lint_flags,
    read,
    rows,
    schema,
    source,
    starter,
    table,
)
from quantmatrix.tables.rows import (
    Cell,
    CheckpointRow,
    HardwareRow,
    MatrixError,
    group_hardware,
    split_flags,
)

GIB = 2**30
ROW = HardwareRow("h", "A card", "nvidia", "sm90", 80.0, 1, ("fast",), (), "gpu-h", "label")
HERE = Machine("Some card", "nvidia", "sm90", 80 * GIB, device="cuda")


@pytest.mark.parametrize(
    ("machine", "row", "why"),
    [
        ({}, {}, None),
        ({"memory_bytes": 92 * GIB}, {}, None),
        (
            {"memory_bytes": 92 * GIB + GIB // 2},
            {},
            "Some card has 92 GiB of memory, A card has 80",
        ),
        ({"memory_bytes": 68 * GIB}, {}, None),
        (
            {"memory_bytes": 67 * GIB + GIB // 4},
            {},
            "Some card has 67 GiB of memory, A card has 80",
        ),
        ({"memory_bytes": 0}, {"memory_gib": 0.0}, None),
        ({"vendor": "amd"}, {}, "vendor amd (Some card), A card has nvidia"),
        ({"vendor": "zz"}, {}, "vendor zz (Some card), A card has nvidia"),
        ({"arch": "sm100"}, {}, "architecture sm100 (Some card), A card has sm90"),
        ({"arch": "sm91"}, {}, "architecture sm91 (Some card), A card has sm90"),
        ({"count": 3}, {"devices": 4}, "3 x Some card, but 4 are needed"),
        ({"count": 4}, {"devices": 4}, None),
        ({"count": 5}, {"devices": 4}, None),
    ],
)
def test_differences(machine: dict[str, Any], row: dict[str, Any], why: str | None) -> None:
    assert identify.find_difference(replace(HERE, **machine), replace(ROW, **row)) == why


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({}, "gpu-h wants one A card (sm90, 80 GiB)"),
        ({"devices": 2, "name": "2x A card"}, "gpu-h wants 2x A card (sm90, 80 GiB)"),
        (
            {"job": "", "memory_gib": 0.0, "packages": ("a", "b")},
            "h wants one A card (sm90), with a and b",
        ),
    ],
)
def test_what_a_row_wants(row: dict[str, Any], text: str) -> None:
    assert identify.describe(replace(ROW, **row)) == text


def test_the_nearest_row() -> None:
    small, large = replace(ROW, id="s", memory_gib=76.0), replace(ROW, id="l", memory_gib=83.0)
    several = replace(ROW, id="two", devices=2)
    two = replace(HERE, count=2)
    assert identify.find_row(two, [several, small, large]).id == "l"
    assert identify.find_row(two, [several]).id == "two"
    assert identify.find_row(replace(HERE, memory_bytes=79 * GIB), [small, large]).id == "s"
    said = (
        "Some card (nvidia sm90, 40 GiB) is not a row of matrix/hardware.csv: add a line for it, or "
        "name a row with --hardware"
    )
    with pytest.raises(MachineError, match=f"^{re.escape(said)}$"):
        identify.find_row(replace(HERE, memory_bytes=40 * GIB), [several, small])


def test_what_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def find(device: str | None = None) -> Machine:
        asked.append(device)
        return replace(HERE, packages=frozenset({"b"}))

    monkeypatch.setattr(probe, "probe", find)
    said = (
        "gpu-h wants one A card (sm90, 80 GiB), with d and b and a; here is one, without a, d: see "
        "`quantmatrix doctor`"
    )
    with pytest.raises(MachineError, match=f"^{re.escape(said)}$"):
        identify.require(replace(ROW, packages=("d", "b", "a")))
    assert identify.require(replace(ROW, packages=("b",))).name == "Some card"
    said = "gpu-h wants one A card (cpu, 80 GiB); here: vendor nvidia (Some card), A card has cpu"
    with pytest.raises(MachineError, match=f"^{re.escape(said)}$"):
        identify.require(replace(ROW, vendor="cpu", arch="cpu"))
    assert asked == [None, None, "cpu"]


@pytest.mark.parametrize(
    ("vendor", "tool", "first", "last"),
    [
        ("nvidia", "nvidia-smi", "/proc/driver/nvidia/version", "/dev/dxg"),
        ("amd", "rocminfo", "/dev/kfd", "/dev/kfd"),
        ("ascend", "npu-smi", "/dev/davinci_manager", "/dev/davinci0"),
    ],
)
def test_drivers(
    vendor: str, tool: str, first: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(ROW, vendor=vendor)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(identify.shutil, "which", lambda name: None)
    files = " or ".join(identify.DRIVERS[vendor])
    said = f"here: no {vendor} driver ({tool} is not found, nor is {files})"
    with pytest.raises(MachineError, match=f"; {re.escape(said)}$"):
        identify.require_driver(row)
    monkeypatch.setattr(identify.shutil, "which", lambda name: "x" if name == tool else None)
    identify.require_driver(row)
    monkeypatch.setattr(identify.shutil, "which", lambda name: None)
    for file in (first, last):
        monkeypatch.setattr(Path, "exists", lambda self, file=file: str(self) == file)
        identify.require_driver(row)


def test_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tables(tmp_path / "matrix")
    given = ["--tables", str(folder)]
    cpu = Machine("A processor", "cpu", "cpu", 3 * GIB)
    monkeypatch.setattr(probe, "probe", lambda device=None: cpu)
    assert identify.main(given) == 0
    assert identify.main(["cpu", *given]) == 0
    assert capsys.readouterr().out == "cpu\ncpu\n"
    assert identify.main(["h100", *given]) == 14
    wants = "j wants one H100 (sm90)"
    assert capsys.readouterr().err == (
        f"{wants}; here: vendor cpu (A processor), H100 has nvidia\n"
    )
    assert identify.main(["zzz", *given]) == 2
    assert capsys.readouterr().err == "zzz: not a row of hardware.csv; known: cpu, h100, b200\n"
    monkeypatch.setattr(identify.shutil, "which", lambda name: "there")
    assert identify.main(["h100", "--drivers", *given]) == 0
    monkeypatch.setattr(identify.shutil, "which", lambda name: None)
    monkeypatch.setattr(identify, "DRIVERS", {"nvidia": ("/none",)})
    assert identify.main(["h100", "--drivers", *given]) == 14
    assert capsys.readouterr().err.startswith(f"{wants}; here: no nvidia driver (nvidia-smi")
    monkeypatch.setattr(probe, "probe", lambda device=None: HERE)
    assert identify.main(["b200", *given]) == 14


@pytest.mark.parametrize(
    ("vendor", "device", "packages"),
    [
        ("nvidia", "cuda", {"triton", "x"}),
        ("amd", "cuda", {"triton", "x"}),
        ("ascend", "npu", {"x"}),
        ("cpu", "cpu", {"x"}),
    ],
)
def test_a_machine_of_a_row(vendor: str, device: str, packages: set[str]) -> None:
    row = replace(ROW, vendor=vendor, memory_gib=1.5, devices=3, packages=("x",))
    found = identify.from_row(row)
    assert found == Machine(
        "A card", vendor, "sm90", 3 * GIB // 2, frozenset(packages), device, count=3
    )


def test_groups() -> None:
    hardware = {
        "a": replace(ROW, id="a", group=("x", "y")),
        "b": replace(ROW, id="b", group=()),
        "c": replace(ROW, id="c", group=("x",)),
    }
    assert group_hardware(hardware) == {"all": ("a", "b", "c"), "x": ("a", "c"), "y": ("a",)}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("", ()),
        ("--a 1  --b", ("--a", "1", "--b")),
        ("--a 'x y'", ("--a", "x y")),
        ('--a "x y"', ("--a", "x y")),
        ("--a x\\ y", ("--a", "x y")),
        ("A=b --c", ("A=b", "--c")),
    ],
)
def test_flags_of_a_cell(text: str, flags: tuple[str, ...]) -> None:
    assert split_flags(text) == flags


CHECKPOINT = CheckpointRow(
    *("c", "fp8", "flux-1", "single-file", "--transformer-weights-path", "some/c", "some/base"),
    *("", "FP8", "", ("transformer",), "", "", "", ""),
)


def test_the_command_of_a_cell(tmp_path: Path) -> None:
    tables = read.read(write_tables(tmp_path / "matrix"))
    cell = replace(tables.cells[1], flags=("A=1", "B=x;y", "--seed", "3"), backend="decode")
    assert cell.environment == {"A": "1", "B": "x;y"}
    argv = (
        "quantmatrix generate --model-path some/flux-1 --transformer-path some/flux1-fp8 --seed 3"
    )
    end = "--backend decode --prompt 'a curious pikachu'"
    assert cell.shell(tables) == f"A=1 B='x;y' {argv} {end}"
    own = replace(cell, flags=("--seed", "3", "--prompt", "x"), backend="")
    assert own.shell(tables) == f"{argv} --prompt x"
    assert CHECKPOINT.arguments == (
        *("--model-path", "some/base", "--transformer-weights-path", "some/c"),
    )
    whole = replace(CHECKPOINT, selector="--model-path")
    assert whole.arguments == ("--model-path", "some/c")
    assert whole.repositories == ("some/base", "some/c")
    assert replace(CHECKPOINT, form="online").repositories == ("some/base",)


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({}, 8), ({"hardware": ["cpu"]}, 4), ({"hardware": ["all"]}, 8), ({"claim": ["planned"]}, 2),
        ({"check": ["refuse", "generate"]}, 2), ({"family": ["fp8"], "hardware": ["h100"]}, 2),
        ({"model": ["flux-2"], "check": ["load"]}, 1), ({"model": ["flux-9"]}, 0),
        ({"family": ["fp8", "nunchaku-svdq"], "claim": ["refused"]}, 1),
    ],
)  # fmt: skip
def test_selected_cells(filters: dict[str, Any], count: int, tmp_path: Path) -> None:
    tables = read.read(write_tables(tmp_path / "matrix"))
    assert len(tables.select(**filters)) == count


def note() -> table.Table[Any]:
    return table.Table("matrix/t.csv", [])


@pytest.mark.parametrize(
    ("values", "good", "problems"),
    [
        (["a"], True, []),
        ([], True, []),
        ([""], False, []),
        (["a", "b"], True, []),
        (["c"], False, ['matrix/t.csv:7: x: "c" is not one of a, b']),
        (["a", "a"], False, ['matrix/t.csv:7: x: "a" is repeated']),
        (
            ["c", "a", "c"],
            False,
            ['matrix/t.csv:7: x: "c" is not one of a, b', 'matrix/t.csv:7: x: "c" is repeated'],
        ),
    ],
)
def test_values_of_a_column(values: list[str], good: bool, problems: list[str]) -> None:
    one = note()
    assert one.check(7, "x", values, ("a", "b")) is good
    assert one.problems == problems


@pytest.mark.parametrize(
    ("text", "memory", "problem"),
    [
        ("", 0.0, ""), ("0", 0.0, ""), ("80", 80.0, ""), ("999999.999999", 999999.999999, ""),
        ("1000000", 0.0, "GiB"), ("1.1234567", 0.0, "GiB"), ("1.", 0.0, "GiB"), (".5", 0.0, "GiB"),
        ("1e3", 0.0, "GiB"),
    ],
)  # fmt: skip
def test_memory_of_a_row(text: str, memory: float, problem: str, tmp_path: Path) -> None:
    one = note()
    build = table.choose_builder(HardwareRow, one, ("memory_gib", "devices", "group", "packages"))
    row = build(5, ["h", "H", "cpu", "cpu", text, "", "", "", "j", "l"])
    assert row.memory_gib == memory
    said = f'matrix/t.csv:5: memory_gib: "{text}" is not a number of GiB'
    assert one.problems == ([said] if problem else [])


@pytest.mark.parametrize(
    ("text", "count", "good"),
    [("", 1, True), ("1", 1, True), ("8", 8, True), ("999999", 999999, True),
     ("1000000", 1, False), ("0", 1, False), ("08", 1, False), ("-2", 1, False)],
)  # fmt: skip
def test_devices_of_a_row(text: str, count: int, good: bool) -> None:
    one = note()
    build = table.choose_builder(HardwareRow, one, ("memory_gib", "devices", "group", "packages"))
    row = build(5, ["h", "H", "cpu", "cpu", "", text, "a b", "", "j", ""])
    assert (row.devices, row.group) == (count, ("a", "b"))
    blank = "matrix/t.csv:5: label: blank"
    said = f'matrix/t.csv:5: devices: "{text}" is not a number from 1'
    assert one.problems == ([blank] if good else [said, blank])


def test_ids() -> None:
    def ids(*names: str) -> list[str]:
        one = note()
        one.rows = [(n + 2, replace(ROW, id=name)) for n, name in enumerate(names)]
        assert list(one.by_id()) == list(dict.fromkeys(names))
        return [problem.removeprefix("matrix/t.csv:") for problem in one.problems]

    made = "is not made of a-z, 0-9, dot, dash, underscore"
    assert ids("a", "b.c_d-1", "0") == []
    assert ids("x" * 100) == []
    assert ids("a", "x" * 101) == ["3: id: 101 characters, a file name takes 100"]
    assert ids("a", "b", "a", "a") == [
        '4: id: "a" is the id of line 2, too',
        '5: id: "a" is the id of line 2, too',
    ]
    assert ids("-a", "A", "a b") == [
        f'2: id: "-a" {made}',
        f'3: id: "A" {made}',
        f'4: id: "a b" {made}',
    ]
    assert ids("") == []


@pytest.mark.parametrize(
    ("first", "problem"),
    [
        ("# quantmatrix tables, version 1\n", ""),
        (
            "\ufeff# quantmatrix tables, version 3\n",
            "matrix/models.csv:1: version 3 of the tables; this quantmatrix reads version 1",
        ),
        ("# some comment, version 2\n", ""),
        ("# quantmatrix tables, version 0\n", ""),
        (
            "# quantmatrix tables, version 2\n",
            "matrix/models.csv:1: version 2 of the tables; this quantmatrix reads version 1",
        ),
        (
            "# quantmatrix tables, version 10\n",
            "matrix/models.csv:1: version 10 of the tables; this quantmatrix reads version 1",
        ),
    ],
)
def test_versions_of_tables(first: str, problem: str, tmp_path: Path) -> None:
    path = write_tables(tmp_path / "matrix") / "models.csv"
    text = first + path.read_text()
    path.write_text(text)
    problems: list[str] = []
    found = table.read_table(path, rows.ModelRow, problems)
    assert problems == ([problem] if problem else [])
    assert [line for line, _ in found.rows] == ([] if problem else [3, 4, 5, 6, 7])


@pytest.mark.parametrize("first", ["", "# quantmatrix tables, version 1\n"])
def test_a_table_that_a_spreadsheet_wrote(first: str, tmp_path: Path) -> None:
    """Excel puts a byte-order mark before the text."""
    path = write_tables(tmp_path / "matrix") / "models.csv"
    plain = first + path.read_text()
    path.write_text(plain)
    expected = table.read_table(path, rows.ModelRow, [])
    path.write_bytes(b"\xef\xbb\xbf" + plain.encode())
    problems: list[str] = []
    found = table.read_table(path, rows.ModelRow, problems)
    assert (problems, found.rows) == ([], expected.rows)
    assert found.rows


def test_tables_from_before_a_column(tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "matrix")
    path = folder / "hardware.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    at = lines[0].index("devices")
    path.write_text("".join(",".join(line[:at] + line[at + 1 :]) + "\n" for line in lines))
    assert {row.devices for row in read.read(folder).hardware.values()} == {1}
    at = lines[0].index("group")
    path.write_text("".join(",".join(line[:at] + line[at + 1 :]) + "\n" for line in lines))
    with pytest.raises(
        MatrixError, match=r"^matrix/hardware\.csv:1: expected the columns id,name,"
    ):
        read.read(folder)


def test_checks_of_backends_without_kernels() -> None:
    checks = ("load", "compile", "latents")
    for backend in ("reference", "decode", "merged"):
        assert lint.list_checks(checks, backend) == ("load", "latents")
    for backend in ("", "triton", "torch"):
        assert lint.list_checks(checks, backend) == checks


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        (["--seed", "1"], []),
        (["A=1", "B=2", "--seed", "1"], []),
        (["A=1", "A=2", "B=1", "B=2", "B=3"], ["A is set twice", "B is set twice"]),
        (
            ["A=1", "--seed", "1", "B=2"],
            [f"{f}: a setting of the environment stands before every flag" for f in ("A=1", "B=2")],
        ),
        (["--rank", "1", "--rank", "2", "--rank", "3"], ["--rank is given twice"]),
        (["--tiny"], ["--tiny: whoever runs the row says it"]),
        (["--device", "cpu"], ["--device: the column hardware says it"]),
        (["--quantization", "x"], ["--quantization: the column checkpoint says it"]),
        (
            ["--quantization_rank=3"],
            ["--quantization-rank is for nunchaku-svdq, not fp8"],
        ),
        (
            ["--quantization-ignored-layers", "a"],
            ["--quantization-ignored-layers is for --quantization, not a single-file"],
        ),
        (
            ["--dit-cpu-offload", "--dit-layerwise-offload"],
            ["--dit-layerwise-offload and --dit-cpu-offload exclude each other"],
        ),
        (["--dit-cpu-offload"], []),
        (["--num-frames", "0"], ["--num-frames 0: expected 1 or more"]),
    ],
)
def test_flags_of_a_row(flags: list[str], problems: list[str]) -> None:
    assert list(lint_flags.list_flag_problems(flags, CHECKPOINT)) == problems
    svdq = replace(CHECKPOINT, family="nunchaku-svdq")
    assert list(lint_flags.list_flag_problems(["--quantization-rank", "3"], svdq)) == []
    online = replace(CHECKPOINT, form="online")
    words = ["--quantization-ignored-layers", "a"]
    assert list(lint_flags.list_misplaced([words[0]], online)) == []


@pytest.mark.parametrize(
    ("vendor", "good", "bad"),
    [
        ("nvidia", ("sm90", "sm100", "sm90a", "sm120-x-1"), ("sm9", "sm1000", "sm90aa", "SM90")),
        ("amd", ("gfx942", "gfx90a"), ("gfx", "gfxg", "sm90")),
        ("ascend", ("910b", "310"), ("b910", "910bb", "")),
        ("cpu", ("cpu", "mps"), ("cpus", "x86")),
    ],
)
def test_architectures(vendor: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    form = lint.ARCHITECTURES[vendor]
    assert all(re.fullmatch(form, name) for name in good)
    assert not any(re.fullmatch(form, name) for name in bad)


@pytest.mark.parametrize(
    ("text", "good"),
    [("2026-11-29", True), ("1999-11-29", False), ("2026-21-29", False), ("2026-11-49", False),
     ("26-11-29", False), ("2026-1-29", False)],
)  # fmt: skip
def test_days(text: str, good: bool) -> None:
    assert bool(lint.DAY.fullmatch(text)) is good


def test_whose_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(source.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert source.find() == source.own()
    assert source.find().named_by == "the tables of this checkout"
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    with source.use(None):
        assert source.VARIABLE not in os.environ
    with source.use(str(one)):
        assert (source.find().folder, source.find().named_by) == (one, "--tables")
        with source.use(str(two)):
            assert str(source.find()) == f"{two} (--tables)"
        assert source.find().folder == one
    assert source.VARIABLE not in os.environ
    monkeypatch.setenv(source.VARIABLE, str(two))
    assert str(source.find()) == f"{two} (QUANTMATRIX_TABLES)"
    with source.use(str(one)):
        assert source.find().folder == one
    assert os.environ[source.VARIABLE] == str(two)
    monkeypatch.delenv(source.VARIABLE)
    (tmp_path / "pyproject.toml").write_text('[tool.quantmatrix]\ntables = "one"\nreports = "r"\n')
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "pyproject.toml").write_text("[project]\n")
    found = source.find_in_project(inner)
    path = tmp_path / "pyproject.toml"
    assert found == source.Source(one, f"[tool.quantmatrix] of {path}", tmp_path / "r")
    path.write_text('[tool.quantmatrix]\ntables = "none"\n')
    said = (
        f"[tool.quantmatrix] of {path} {tmp_path / 'none'}: not a directory; expected one that "
        f"holds cases.csv; `quantmatrix init {tmp_path / 'none'}` writes a first set of tables"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        source.find_in_project(inner)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'tables = "a"\nfolder = "b"',
            "[tool.quantmatrix] folder: unknown; known: tables, reports",
        ),
        ("tables = 3", "[tool.quantmatrix] tables: expected a folder, found 3"),
        (
            'reports = "r"',
            '[tool.quantmatrix] lacks tables = "DIR", the folder of the tables',
        ),
    ],
)
def test_settings_of_a_project(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[tool.quantmatrix]\n{text}\n")
    with pytest.raises(UsageError, match=f"^{re.escape(f'{path}: {said}')}$"):
        source.read_settings(path, 1)
    path.write_text("[tool.quantmatrix\n")
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))}: not valid TOML: "):
        source.read_settings(path, 2)
    path.write_text("[tool.quantmatrix]\n")
    assert source.read_settings(path, 3) == {}
    path.write_text("[tool.other]\n")
    assert source.read_settings(path, 4) == {}


def test_columns_of_the_schema() -> None:
    columns = {column["name"]: column for column in schema.list_columns("hardware", HardwareRow)}
    assert columns["vendor"] == {
        "name": "vendor", "type": "text", "may_be_blank": False, "may_be_missing": False,
        "choices": ["cpu", "nvidia", "amd", "ascend"],
        "description": "Who makes it; decides how it is probed.",
    }  # fmt: skip
    devices = columns["devices"]
    assert (devices["type"], devices["may_be_blank"], devices["may_be_missing"]) == (
        *("whole number", True, True),
    )
    assert columns["memory_gib"]["type"] == "number"
    assert columns["group"]["type"] == "names, separated by blanks"
    assert schema.first_line(HardwareRow) == "A machine that claims are made about."
    text = schema.write_markdown()
    assert text.startswith(
        "Version 1 of the columns.\n\n## families.csv\n\nA quant family, as the "
    )
    vendor = (
        "| `vendor` | `cpu`, `nvidia`, `amd`, `ascend` | Who makes it; decides how it is probed. |"
    )
    assert f"\n{vendor}\n" in text
    assert "\n| `group` | names, separated by blanks; may be blank | Groups that it belongs" in text
    assert text.endswith(
        "| `pipeline` | `--model-path`, `--transformer-path` |\n| `online` | `--quantization` |\n"
    )


def test_the_first_tables(tmp_path: Path) -> None:
    assert starter.change("cases", {"id": "modelopt-fp8-flux-1-native", "hardware": "x", "a": "b"}) == {
        "id": "modelopt-fp8-flux-1-native", "hardware": "h100", "a": "b", "claim": "expected",
    }  # fmt: skip
    assert starter.change("families", {"id": "f", "models": "a b"}) == {
        "id": "f",
        "models": "flux-1",
    }
    column = {"description": "What.", "choices": ["a", "b"], "may_be_blank": True}
    assert starter.explain(column) == "What. One of a, b. May be blank."
    assert starter.explain({**column, "choices": [], "may_be_blank": False}) == "What."
    text = starter.write_table("models")
    lines = text.splitlines()
    assert lines[:3] == [
        "# quantmatrix tables, version 1: A base model.",
        "#",
        "# id: Name of a model that the package has, such as `flux-1`.",
    ]
    assert lines[7] == "id,name,repo,transformers,notes"
    assert len(lines) == 9
    place = tmp_path / "new" / "matrix"
    written = starter.write(place)
    assert [path.name for path in written] == [
        *("families.csv", "models.csv", "hardware.csv", "checkpoints.csv", "cases.csv"),
        "README.md",
    ]
    assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in written)
    assert len(read.read(place).cells) == 4
    assert (
        f"--tables {place} --evidence-dir {tmp_path / 'new' / 'reports'}/evidence"
        in (place / "README.md").read_text()
    )
    said = (
        f"{place}: holds families.csv, models.csv, hardware.csv, checkpoints.csv, cases.csv, "
        "README.md already; name a new folder"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        starter.write(place)


def test_one_backend_has_no_suffix(tmp_path: Path) -> None:
    cases = [
        {**CASES[0], "backend": backend, "id": f"r{n}"} for n, backend in enumerate(("decode", ""))
    ]
    cells: tuple[Cell, ...] = read.read(write_tables(tmp_path / "matrix", cases)).cells
    assert [cell.id for cell in cells] == ["r0@cpu", "r0@h100", "r1@cpu", "r1@h100"]
    assert [cell.line for cell in cells] == [2, 2, 3, 3]


def test_the_tables_of_a_package_lie_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "quantmatrix"
    monkeypatch.setattr(source, "PACKAGE", package)
    assert source.own_folder() == package / "tables"
    (tmp_path / "matrix").mkdir()
    assert source.own_folder() == package / "tables"
    (tmp_path / "matrix" / "cases.csv").touch()
    assert source.own_folder() == tmp_path / "matrix"


def test_a_folder_without_runtimes_has_two_empty_tables(tmp_path: Path) -> None:
    found = read.read_runtimes(tmp_path, [])
    assert [table.name for table in found] == [
        f"{tmp_path.name}/runtimes.csv",
        f"{tmp_path.name}/statements.csv",
    ]
