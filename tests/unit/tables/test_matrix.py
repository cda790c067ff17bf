"""Reading and linting: typed rows, cells, and every problem named with file and line."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tables import CASES, write_tables

from quantmatrix.proof import joined
from quantmatrix.proof.scopes import Standing
from quantmatrix.tables import read, source
from quantmatrix.tables.rows import Matrix, MatrixError

Edit = Callable[[list[str], list[list[str]]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tables(tmp_path / "matrix")


@pytest.fixture
def tables(folder: Path) -> Matrix:
    return read.read(folder)


def set_cell(folder: Path, table: str, line: int, column: str, text: str) -> None:
    """Change one cell; line 1 is the header."""
    path = folder / f"{table}.csv"
    rows = list(csv.reader(path.open(newline="")))
    rows[line - 1][rows[0].index(column)] = text
    with path.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(MatrixError) as caught:
        read.read(folder)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_rows_are_typed(tables: Matrix) -> None:
    assert tables.families["fp8"].models == ("flux-1", "flux-2")
    assert tables.models["flux-1"].transformers == ("transformer",)
    assert tables.hardware["h100"].memory_gib == 0.0
    assert tables.checkpoints["flux-1-fp8"].components == ("transformer",)
    assert tables.cells[0].checks == ("load", "latents")


def test_a_line_becomes_one_cell_per_hardware_and_backend(tables: Matrix) -> None:
    ids = [cell.id for cell in tables.cells if cell.row == "fp8-flux-1"]
    assert ids == [
        "fp8-flux-1@cpu+reference",
        "fp8-flux-1@cpu+decode",
        "fp8-flux-1@h100+reference",
        "fp8-flux-1@h100+decode",
    ]
    assert {cell.backend for cell in tables.cells if cell.row == "fp8-flux-2"} == {""}
    assert {cell.line for cell in tables.cells if cell.row == "fp8-flux-2"} == {3}


def test_one_backend_is_not_part_of_the_id(folder: Path) -> None:
    set_cell(folder, "cases", 2, "backend", "decode")
    ids = [(cell.id, cell.backend) for cell in read.read(folder).cells[:2]]
    assert ids == [("fp8-flux-1@cpu", "decode"), ("fp8-flux-1@h100", "decode")]


@pytest.mark.parametrize(("word", "count"), [("all", 3), ("cuda", 2), ("cuda cpu", 3)])
def test_groups_stand_for_their_hardware(folder: Path, word: str, count: int) -> None:
    for line in (3, 4):
        set_cell(folder, "hardware", line, "group", "cuda fast")
    set_cell(folder, "cases", 3, "hardware", word)
    tables = read.read(folder)
    assert len([cell for cell in tables.cells if cell.row == "fp8-flux-2"]) == count
    assert tables.groups["fast"] == ("h100", "b200")
    assert len(tables.select(hardware=["fast"])) == len(tables.select(hardware=["h100", "b200"]))


def test_select_combines_its_filters(tables: Matrix) -> None:
    assert len(tables.select()) == len(tables.cells) == 8
    assert {cell.row for cell in tables.select(family=["fp8"], hardware=["cpu"])} == {
        "fp8-flux-1",
        "fp8-flux-2",
    }
    assert [c.id for c in tables.select(claim=["refused"])] == ["svdq-flux-1-hopper@h100"]
    assert [c.id for c in tables.select(check=["generate", "bench"])] == ["fp8-flux-2@cpu"]
    assert tables.select(model=["z-image"]) == []


def test_command_is_checkpoint_flags_backend_and_prompt(folder: Path) -> None:
    set_cell(folder, "cases", 2, "flags", "SOME_BACKEND=cudnn --seed 3")
    set_cell(folder, "cases", 3, "flags", "--prompt 'two words' --save-output")
    tables = read.read(folder)
    first, other = tables.cells[0], tables.cells[4]
    given = "quantmatrix generate --model-path some/flux-1 --transformer-path some/flux1-fp8"
    tail = "--seed 3 --backend reference --prompt 'a curious pikachu'"
    assert first.environment == {"SOME_BACKEND": "cudnn"}
    assert first.shell(tables) == f"SOME_BACKEND=cudnn {given} {tail}"
    assert first.command(tables)[:2] == ["quantmatrix", "generate"]
    assert other.command(tables)[-3:] == ["--prompt", "two words", "--save-output"]


def test_a_checkpoint_named_by_model_path_replaces_the_base(folder: Path) -> None:
    set_cell(folder, "checkpoints", 2, "form", "pipeline")
    set_cell(folder, "checkpoints", 2, "selector", "--model-path")
    tables = read.read(folder)
    assert tables.checkpoints["flux-1-fp8"].arguments == ("--model-path", "some/flux1-fp8")
    assert "some/flux-1" in tables.checkpoints["flux-1-fp8"].repositories


def test_repositories_are_what_runs_read(folder: Path) -> None:
    set_cell(folder, "cases", 4, "hardware", "b200")
    set_cell(folder, "cases", 4, "claim", "planned")
    for column, text in (("rule", ""), ("checks", "load")):
        set_cell(folder, "cases", 4, column, text)
    set_cell(folder, "cases", 5, "hardware", "cpu")
    names = read.read(folder).repositories
    assert "some/flux1-fp8" in names
    assert "some/svdq/svdq-int4_r32-flux1.safetensors" not in names
    assert len(names) == len(set(names))


def test_rows_as_dicts_have_states_and_commands(tables: Matrix) -> None:
    rows = joined.rows_as_dicts(
        tables, {c.id: Standing("proven", "", "stand-in") for c in tables.cells}
    )
    assert rows[0]["id"] == "fp8-flux-1@cpu+reference"
    assert (rows[0]["state"], rows[0]["scope"]) == ("proven", "stand-in")
    assert rows[0]["command"].startswith("quantmatrix generate --model-path some/flux-1 ")
    with pytest.raises(KeyError):
        joined.rows_as_dicts(tables, {})


ONE_EDIT = [
    ("cases", 2, "claim", "suported", r'claim: "suported" is not one of validated, expected, '),
    ("cases", 2, "claim", "", "claim: blank"),
    ("cases", 2, "id", "fp8-flux-2", 'id: "fp8-flux-2" is the id of line 2, too', 3),
    ("cases", 2, "id", "FP8@x", 'id: "FP8@x" is not made of'),
    ("cases", 2, "checkpoint", "flux-9", 'checkpoint: "flux-9" is not one of flux-1-fp8, '),
    ("cases", 2, "family", "msmodelslim", "family: msmodelslim, but flux-1-fp8 is of fp8"),
    ("cases", 2, "model", "flux-2", "model: flux-2, but flux-1-fp8 is of flux-1"),
    ("cases", 2, "hardware", "cpu h300", r'hardware: "h300" is not one of cpu, h100, b200, all'),
    ("cases", 2, "hardware", "cpu cpu", 'hardware: "cpu" is repeated'),
    ("cases", 2, "hardware", "cpu all", "hardware: cpu is named twice, once by a group"),
    (
        "cases",
        2,
        "backend",
        "decode decode",
        'backend: "decode" is not a valid name, or is repeated',
    ),
    ("cases", 2, "checks", "load lattents", 'checks: "lattents" is not one of load, latents, '),
    ("cases", 2, "checks", "", "checks: blank"),
    ("cases", 2, "checks", "load refuse", "checks: refuse, but the row is not refused"),
    ("cases", 2, "rule", "some-rule", "rule: some-rule, but the row is not refused"),
    ("cases", 4, "rule", "", "a refused row needs a rule, and the reason in notes"),
    ("cases", 4, "notes", "", "a refused row needs a rule, and the reason in notes"),
    ("cases", 2, "claim", "failing", "a failing row needs one of its checks as rule"),
    ("cases", 4, "checks", "load", "checks: a refused row has the check refuse"),
    ("cases", 5, "notes", "", "notes: blank; a planned row says what is missing"),
    ("cases", 2, "flags", "--prompt 'open", "flags: No closing quotation: --prompt 'open"),
    (
        "cases",
        2,
        "flags",
        "--transformer_path x",
        "flags: --transformer-path: the column checkpoint",
    ),
    ("cases", 2, "flags", "--backend=torch", "flags: --backend: the column backend says it"),
    ("cases", 2, "flags", "--seed 1 --seed 2", "flags: --seed is given twice"),
    ("cases", 2, "flags", "--enable-svdquant", "--enable-svdquant is for nunchaku-svdq, not fp8"),
    (
        "cases",
        2,
        "flags",
        "--dit-cpu-offload --dit-layerwise-offload",
        "--dit-layerwise-offload and --dit-cpu-offload exclude each other",
    ),
    (
        "cases",
        2,
        "flags",
        "--quantization-ignored-layers a",
        "--quantization-ignored-layers is for --quantization, not a component-folder",
    ),
    ("checkpoints", 2, "form", "folder", 'form: "folder" is not one of component-folder, '),
    (
        "checkpoints",
        2,
        "selector",
        "--model-path",
        'selector of a component-folder: "--model-path" is not one of --transformer-path, ',
    ),
    ("checkpoints", 2, "components", "transformer_2", '"transformer_2" is not one of transformer'),
    ("checkpoints", 2, "revision", "main", 'revision: "main" is not a commit of 40 digits'),
    ("checkpoints", 2, "scheme", "", "scheme: blank"),
    (
        "checkpoints",
        3,
        "reference",
        "some/flux1-fp8",
        "reference: some/flux1-fp8 has another content in line 2",
    ),
    ("families", 2, "models", "flux-1 flux-3", 'models: "flux-3" is not one of flux-1, flux-2, '),
    ("families", 2, "id", "fp9", 'id: "fp9" is not one of comfyui-int8, fp8, '),
    ("models", 2, "id", "flux-one", 'id: "flux-one" is not one of flux-1, flux-2, '),
    ("hardware", 2, "vendor", "nvdia", 'vendor: "nvdia" is not one of cpu, nvidia, amd, ascend'),
    ("hardware", 2, "memory_gib", "80 GB", 'memory_gib: "80 GB" is not a number of GiB'),
    ("hardware", 2, "memory_gib", "-1", 'memory_gib: "-1" is not a number of GiB'),
    ("hardware", 2, "devices", "0", 'devices: "0" is not a number from 1'),
    ("hardware", 2, "group", "h100", 'group: "h100" is the id of a hardware'),
    ("cases", 2, "id", "x" * 101, "id: 101 characters, a file name takes 100"),
    ("cases", 2, "flags", "--no-such-flag 3", "flags: unrecognized arguments: --no-such-flag 3"),
    ("cases", 2, "flags", "a-word", "flags: unrecognized arguments: a-word"),
    ("cases", 2, "flags", "--help", "flags: unrecognized arguments: --help"),
    ("cases", 2, "flags", "--seed", "flags: argument --seed: expected at least one argument"),
    ("cases", 2, "flags", "--seed x", "flags: argument --seed: invalid int value: 'x'"),
    ("cases", 2, "flags", "--height=-5", "flags: --height -5: expected 1 or more"),
    ("cases", 2, "flags", "--revision main", "flags: --revision: the column revision of"),
    ("cases", 2, "flags", "--seed 1 A=b", "flags: A=b: a setting of the environment stands before"),
    ("cases", 2, "flags", "A=b A=c", "flags: A is set twice"),
    ("cases", 4, "rule", "no units!", 'rule: "no units!" is not made of a-z'),
    ("checkpoints", 2, "reference", "--flag", 'reference: "--flag" is neither a hub id nor a path'),
    ("checkpoints", 2, "base", "two words", 'base: "two words" is neither a hub id nor a path'),
    ("checkpoints", 2, "reference", "some/flux-1", "reference: some/flux-1 is its own base"),
    ("models", 2, "repo", "some/flux-2", "repo: some/flux-2 is the repo of line 2, too", 3),
    ("models", 2, "repo", "a b", 'repo: "a b" is neither a hub id nor a path'),
    ("models", 3, "transformers", "b b", 'transformers: "b" is repeated'),
    ("hardware", 2, "vendor", "nvidia", 'arch: "cpu" is none of nvidia, expected sm'),
    ("hardware", 3, "arch", "gfx942", 'arch: "gfx942" is none of nvidia, expected sm'),
    ("hardware", 3, "arch", "sm9000", 'arch: "sm9000" is none of nvidia, expected sm'),
    ("hardware", 3, "group", "all", '"all" already stands for other hardware; choose another name'),
    (
        "hardware",
        3,
        "group",
        "auto",
        '"auto" already stands for other hardware; choose another name',
    ),
    ("hardware", 4, "id", "auto", '"auto" already stands for other hardware; choose another name'),
    ("hardware", 3, "group", "fast fast", 'group: "fast" is repeated'),
    ("hardware", 3, "group", "Fast!", 'group: "Fast!" is not a valid name'),
    ("hardware", 3, "packages", "a/b", 'packages: "a/b" is not a valid name'),
    ("hardware", 3, "memory_gib", "1_0", 'memory_gib: "1_0" is not a number of GiB'),
    ("hardware", 3, "devices", "9" * 5000, "is not a number from 1"),
]


@pytest.mark.parametrize("edit", ONE_EDIT, ids=lambda edit: "-".join(map(str, edit[:4]))[:60])
def test_each_problem_names_file_and_line(
    folder: Path, edit: tuple[str, int, str, str, str] | tuple[str, int, str, str, str, int]
) -> None:
    table, line, column, text, expected = edit[:5]
    set_cell(folder, table, line, column, text)
    where = f"matrix/{table}.csv:{edit[5] if len(edit) == 6 else line}: "
    found = problems_of(folder)
    assert any(problem.startswith(where) and expected in problem for problem in found), found


def test_all_problems_are_named_at_once(folder: Path) -> None:
    set_cell(folder, "cases", 2, "claim", "suported")
    set_cell(folder, "cases", 3, "checks", "lode")
    set_cell(folder, "checkpoints", 2, "revision", "main")
    set_cell(folder, "hardware", 3, "vendor", "intel")
    found = [problem.split(": ")[0] for problem in problems_of(folder)]
    assert found == [
        "matrix/hardware.csv:3",
        "matrix/checkpoints.csv:2",
        "matrix/cases.csv:2",
        "matrix/cases.csv:3",
    ]


def test_one_mistake_is_one_problem(folder: Path) -> None:
    set_cell(folder, "cases", 2, "claim", "suported")
    words = "validated, expected, refused, failing, planned"
    assert problems_of(folder) == [f'matrix/cases.csv:2: claim: "suported" is not one of {words}']


def test_a_module_without_a_row_is_a_problem_of_our_own_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "families.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert len(read.read(folder).families) == 6
    monkeypatch.setattr(source, "own_folder", lambda: folder)
    assert problems_of(folder) == [
        "matrix/families.csv: no row for msmodelslim, the module families/msmodelslim"
    ]


def test_validated_needs_the_guide(folder: Path) -> None:
    set_cell(folder, "families", 2, "models", "flux-2")
    set_cell(folder, "cases", 2, "claim", "validated")
    [problem] = problems_of(folder)
    assert problem.startswith("matrix/cases.csv:2: claim: the guide does not name flux-1 for fp8")


def test_a_cell_stands_in_one_line_only(tmp_path: Path) -> None:
    twin = {**CASES[1], "id": "twin"}
    folder = write_tables(tmp_path / "matrix", [*CASES, twin])
    assert problems_of(folder) == ["matrix/cases.csv:6: flux-2-fp8 cpu: the same cell as in line 3"]
    folder = write_tables(tmp_path / "matrix", [*CASES, {**twin, "flags": "--seed 1"}])
    assert len(read.read(folder).cells) == 9


def test_no_cell_is_refused_and_claimed(tmp_path: Path) -> None:
    opposite = {"id": "opposite", "checkpoint": "flux-1-svdq", "hardware": "h100"}
    opposite |= {"checks": "load", "claim": "expected", "flags": "--seed 1"}
    refused = {**CASES[2], "id": "later", "hardware": "b200"}
    allowed = {**opposite, "id": "allowed", "hardware": "b200"}
    folder = write_tables(tmp_path / "matrix", [CASES[2], opposite, allowed, refused])
    assert [p.partition(": ")[2] for p in problems_of(folder)] == [
        "flux-1-svdq h100: line 2 claims the opposite",
        "flux-1-svdq b200: line 4 claims the opposite",
    ]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "matrix/cases.csv: no such file; the folder is "),
        (lambda path: path.write_text(""), "matrix/cases.csv:1: expected the columns id,family,"),
        (
            lambda path: path.write_text("id,claim\n"),
            "matrix/cases.csv:1: expected the columns id,",
        ),
        (lambda path: (path.unlink(), path.mkdir()), "matrix/cases.csv: cannot be read: Is a dir"),
        (
            lambda path: path.write_text(path.read_text().splitlines()[0]),
            "matrix/cases.csv:1: no row below the columns: is the file whole?",
        ),
        (lambda path: path.write_bytes(b"\xff\xfe"), "matrix/cases.csv: not a CSV file in UTF-8: "),
        (
            lambda path: path.write_text(path.read_text() + "a,b\n"),
            "matrix/cases.csv:6: found 2 cells, expected 11",
        ),
        (
            lambda path: path.write_text(path.read_text() + '"open,\n'),
            "matrix/cases.csv: not a CSV file in UTF-8: ",
        ),
    ],
    ids=["missing", "empty", "header", "folder", "no-row", "encoding", "cells", "quote"],
)
def test_files_that_are_no_tables(
    folder: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(folder / "cases.csv")
    [problem] = problems_of(folder)
    assert problem.startswith(expected)


def test_lines_are_counted_through_empty_lines_and_line_breaks(folder: Path) -> None:
    path = folder / "cases.csv"
    lines = path.read_text().splitlines(keepends=True)
    first = lines[1].replace("\n", '"a\nnote"\n')
    path.write_text("".join([lines[0], "\n", first, *lines[2:]]))
    set_back = path.read_text().replace("validated", "valid")
    path.write_text(set_back)
    [problem] = problems_of(folder)
    assert re.match(r'matrix/cases\.csv:5: claim: "valid" is not one of', problem)


@pytest.mark.parametrize(
    ("flags", "devices", "problem"),
    [
        ("", "", None),
        ("--nproc-per-node 4", "4", None),
        ("--nproc_per_node=4", "4", None),
        ("--nproc-per-node 2", "4", "flags: --nproc-per-node 2, but h100 has devices: 4"),
        ("", "4", "flags: --nproc-per-node 1, but h100 has devices: 4"),
        ("--nproc-per-node 2", "", "flags: --nproc-per-node 2, but h100 has devices: 1"),
    ],
)
def test_processes_are_the_devices_of_the_hardware(
    flags: str, devices: str, problem: str | None, tmp_path: Path
) -> None:
    case = {**CASES[0], "hardware": "cpu h100", "flags": flags}
    folder = write_tables(tmp_path / "matrix", [case])
    set_cell(folder, "hardware", 3, "devices", devices)
    if problem is None:
        assert {row.devices for row in read.read(folder).hardware.values()} <= {1, 4}
        return
    with pytest.raises(MatrixError) as raised:
        read.read(folder)
    assert raised.value.problems == (f"matrix/cases.csv:2: {problem}",)
