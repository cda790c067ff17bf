"""A project of somebody else: from nothing to its own tables rendered in a page of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantmatrix.cli.main import main
from quantmatrix.exit_codes import EXIT_PROBLEM, EXIT_USAGE
from quantmatrix.tables import read, schema, source, table

pytest_plugins = ["pytester"]

GUIDE = """# Quantization

Before\ttabs and trailing blanks  \r
## Quant Families

<!-- quantmatrix:begin families -->

| quant_family | checkpoint form |
|--------------|-----------------|
| `fp8`        | kept by hand    |
<!-- quantmatrix:end families -->

## Validated ModelOpt Checkpoints

<!-- quantmatrix:begin checkpoints -->
<!-- quantmatrix:end checkpoints -->
last line without an end"""
"""A page in the form of the quantization guide, its two tables marked."""


@pytest.fixture(scope="module")
def first_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `init` writes, once: it reads the source of every class of rows."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["init", "claims"]) == 0
    return folder


@pytest.fixture
def project(first_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with those tables, as the current folder."""
    shutil.copytree(first_tables, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(source.VARIABLE, raising=False)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1, f"{old} is not in {path}"
    path.write_text(text.replace(old, new))


def test_the_first_tables_are_sound_and_commented(project: Path) -> None:
    tables = read.read(project / "claims")
    assert list(tables.families) == ["modelopt-fp8"]
    assert {cell.claim for cell in tables.cells} == {"expected", "refused"}
    for name, kind in schema.KINDS.items():
        text = (project / "claims" / f"{name}.csv").read_text()
        assert text.startswith(f"# quantmatrix tables, version {table.VERSION}")
        for column in schema.list_columns(name, kind):
            assert f"\n# {column['name']}: {column['description']}" in text


def test_init_overwrites_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "claims" / "cases.csv").write_text("mine")
    assert main(["init", "claims"]) == EXIT_USAGE
    assert "claims: holds families.csv" in capsys.readouterr().err
    assert (project / "claims" / "cases.csv").read_text() == "mine"


def test_a_broken_row_of_theirs_is_named_by_file_and_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = project / "claims" / "cases.csv"
    edit(cases, "generate trace true-size,expected", "generate trace true-size,suported")
    [line] = [n for n, text in enumerate(cases.read_text().splitlines(), 1) if "suported" in text]
    assert main(["matrix", "check", "--tables", "claims"]) == EXIT_PROBLEM
    assert f'claims/cases.csv:{line}: claim: "suported" is not one of' in capsys.readouterr().err


def test_tables_of_a_later_version_are_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project / "claims" / "models.csv", "tables, version 1", "tables, version 2")
    assert main(["matrix", "check", "--tables", "claims"]) == EXIT_PROBLEM
    assert (
        "models.csv:1: version 2 of the tables; this quantmatrix reads" in capsys.readouterr().err
    )


WAYS = ["--tables", source.VARIABLE, "[tool.quantmatrix]"]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_name_tables_is_obeyed_and_said(
    way: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["matrix", "list"]
    if way == "--tables":
        argv += ["--tables", "claims"]
    elif way == source.VARIABLE:
        monkeypatch.setenv(way, "claims")
    else:
        (project / "pyproject.toml").write_text('[tool.quantmatrix]\ntables = "claims"\n')
        (project / "below").mkdir()
        monkeypatch.chdir(project / "below")
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(read.read(project / "claims").cells)
    assert f"tables: {project / 'claims'} ({way}" in said.err
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"].startswith(f"{project / 'claims'} ({way}")


def test_a_flag_wins_over_the_variable_for_one_command(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["init", "others"]) == 0
    monkeypatch.setenv(source.VARIABLE, "others")
    with source.use("claims"):
        assert source.find().folder == project / "claims"
    assert source.find().folder == project / "others"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.quantmatrix]\ntabels = 'x'", "[tool.quantmatrix] tabels: unknown"),
        ("[tool.quantmatrix]\ntables = 1", "tables: expected a folder, found 1"),
        ("[tool.quantmatrix]\nreports = 'x'", 'lacks tables = "DIR"'),
        ("[tool.quantmatrix", "not valid TOML"),
        ("[tool.quantmatrix]\ntables = 'nowhere'", "nowhere: not a directory; expected one"),
    ],
)
def test_settings_that_say_nothing_are_refused(
    text: str, message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "pyproject.toml").write_text(text)
    assert main(["matrix", "list"]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_the_two_tables_of_a_guide_are_kept_up_to_date(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = project / "quantization.md"
    page.write_bytes(GUIDE.encode())
    command = ["report", "--tables", "claims", "--into", "quantization.md"]
    assert main([*command, "--check"]) == EXIT_PROBLEM
    assert "quantization.md:8: differs from claims" in capsys.readouterr().out
    assert page.read_bytes() == GUIDE.encode()
    assert main(command) == 0
    text = page.read_bytes().decode()
    assert "kept by hand" not in text
    assert "| `modelopt-fp8` | Converted ModelOpt FP8 transformer directory" in text
    assert "| `FP8` | `black-forest-labs/FLUX.1-dev` | `--transformer-path` |" in text
    outside = text.split("<!-- quantmatrix:begin families -->")[0]
    assert GUIDE.startswith(outside)
    assert text.endswith(GUIDE.rpartition("<!-- quantmatrix:end checkpoints -->")[2])
    assert main([*command, "--check"]) == 0
    edit(project / "claims" / "families.csv", "Converted ModelOpt FP8", "Converted")
    assert main([*command, "--check"]) == EXIT_PROBLEM
    assert main(command) == 0
    assert "| Converted transformer directory" in page.read_text()
    assert not (project / "reports").exists()


@pytest.mark.parametrize(
    ("name", "mark", "expected"),
    [
        ("a.md", "<!-- {} -->", "| Hardware | state |"),
        ("a.rst", ".. {}", "   * - Hardware\n     - state\n   * - cpu\n     - unproven"),
        ("a.html", "<!-- {} -->", "<tr><td>cpu</td><td>unproven</td></tr>"),
        ("a.csv", "# {}", "\nHardware,state\ncpu,unproven\n"),
    ],
)
def test_each_format_has_the_columns_asked_for(
    name: str, mark: str, expected: str, project: Path
) -> None:
    marks = [mark.format(f"quantmatrix:{kind} cells") for kind in ("begin", "end")]
    (project / name).write_bytes("\r\n".join([*marks, "rest"]).encode())
    command = ["report", "--tables", "claims", "--into", name, "--table", "cells", "--columns"]
    assert main([*command, "hardware=Hardware", "state"]) == 0
    data = (project / name).read_bytes()
    assert expected.replace("\n", "\r\n").encode() in data
    assert data.startswith(f"{marks[0]}\r\n".encode())
    assert data.endswith(f"{marks[1]}\r\nrest".encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no mark for families"),
        ("<!-- quantmatrix:begin families -->\n", "page.md:1: no line"),
        ("\n<!-- quantmatrix:end families -->\n<!-- quantmatrix:begin families -->", "page.md:2: the end"),
        ("<!-- quantmatrix:begin cells -->\n<!-- quantmatrix:begin families -->\n", "page.md:2: cells of line 1"),
        ("<!-- quantmatrix:begin famlies -->\n<!-- quantmatrix:end famlies -->", "famlies: no such table"),
    ],
)  # fmt: skip
def test_marks_that_are_wrong_are_named_by_line_and_nothing_is_written(
    text: str, message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "page.md").write_text(text)
    assert main(["report", "--tables", "claims", "--into", "page.md"]) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert (project / "page.md").read_text() == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--table", "cells"], "--table is about a page"),
        (["--into", "x.md", "--columns", "a"], "--columns: of which table"),
        (["--into", "x.txt"], "of which format"),
        (["--into", "x.md"], "no such file"),
        (["--into", "claims/README.md", "--table", "cells", "--columns", "psnr"], "psnr: not a column"),
    ],
)  # fmt: skip
def test_flags_of_a_page_that_do_not_fit(
    argv: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project / "claims" / "README.md", "families -->", "cells -->")
    assert main(["report", "--tables", "claims", *argv]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_report_renders_their_rows_alone(project: Path) -> None:
    assert main(["report", "--tables", "claims"]) == 0
    rows = (project / "reports" / "support-matrix.csv").read_text().splitlines()
    assert len(rows) == 1 + len(read.read(project / "claims").cells)


SUITE = """
import pytest
from quantmatrix.errors import UnjudgedError

@pytest.mark.check("load")
def test_load(cell, proof, reports):
    assert reports.name == "reports"

@pytest.mark.check("latents")
def test_latents(cell, proof):
    proof.metrics["class"] = "int3 W3A3"
    raise UnjudgedError("no limits for int3 W3A3 on flux-1")
"""


def test_a_row_without_a_limit_is_unjudged_and_not_failing(
    project: Path,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    (project / "test_suite.py").write_text(SUITE)
    words = ["--tables", "claims", "--check", "load", "--check", "latents", "-q"]
    evidence = f"--evidence-dir={project / 'reports' / 'evidence'}"
    done = pytester.runpytest(
        *words, evidence, f"--rootdir={project}", str(project / "test_suite.py")
    )
    assert done.ret == 0, done.stdout.str()
    done.stdout.fnmatch_lines(
        ["tables: */claims (--tables)", "unjudged, for want of a limit: modelopt-fp8-flux-1@cpu*"]
    )  # fmt: skip
    edit(
        project / "claims" / "cases.csv", "load latents generate trace true-size,", "load latents,"
    )
    for record in (project / "reports" / "evidence").rglob("*.json"):
        record.unlink()
    pytester.runpytest(*words, evidence, f"--rootdir={project}", str(project / "test_suite.py"))
    capsys.readouterr()
    assert main(["matrix", "list", "--tables", "claims", "--state", "unjudged"]) == 0
    assert "2 cells" in capsys.readouterr().err


def test_the_suites_are_collected_from_the_package(project: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--pyargs", "quantmatrix.suites", "--collect-only"]
    words = ["-q", "-p", "no:cacheprovider", "--tables", "claims"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_refuse[modelopt-fp8-flux-1-no-units@cpu]" in done.stdout
    assert "test_latents[modelopt-fp8-flux-1@cpu+decode]" in done.stdout
    assert "svdq" not in done.stdout
