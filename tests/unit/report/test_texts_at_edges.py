"""Small functions of the pages on made-up values: whole texts, and the values at which they change."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benched import make_result

from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.report import (
    answers,
    bench_pages,
    changes,
    fragments,
    history,
    into,
    job_summary,
    markdown,
    overview,
    page_data,
    picture,
    programs,
    ranking,
    runtimes,
    table,
    transformer_classes,
)
from quantmatrix.report.answers import No, Option
from quantmatrix.report.history import Skipped, Version
from quantmatrix.report.job_summary import Shown
from quantmatrix.report.recommend import Recommendation, describe, list_commands, show_mib

VERSION = Version("stand-in", "2026-11-20", "a" * 40, "pass", 40.0, 0.8)


def test_a_table() -> None:
    rows = [("a|b", "c\\|d"), ("e\nf", "")]
    assert table.write_table(["x", "y"], rows) == (
        "| x | y |\n| --- | --- |\n| a\\|b | c\\|d |\n| e f |  |"
    )
    assert table.write_table(["x"], []) == "| x |\n| --- |"


@pytest.mark.parametrize(
    ("before", "now", "trend"),
    [
        ({}, {}, "same"),
        ({}, {"psnr_db": 40.5}, "better"),
        ({}, {"psnr_db": 40.4375}, "same"),
        ({}, {"psnr_db": 39.5}, "worse"),
        ({}, {"psnr_db": 39.5625}, "same"),
        ({"psnr_db": None}, {"psnr_db": 10.0}, "same"),
        ({}, {"psnr_db": None}, "same"),
        ({"step": 1.0}, {"step": 0.97}, "better"),
        ({"step": 1.0}, {"step": 0.975}, "same"),
        ({"step": 1.0}, {"step": 1.03125}, "worse"),
        ({"step": 1.0}, {"step": 1.025}, "same"),
        ({"step": 2.0}, {"step": 2.05}, "same"),
        ({"step": 2.0}, {"step": 2.0625}, "worse"),
        ({"step": None}, {"step": 0.1}, "same"),
        ({}, {"step": None}, "same"),
        ({}, {"psnr_db": 41.0, "step": 2.0}, "better"),
        ({}, {"psnr_db": 40.1, "step": 2.0}, "worse"),
        ({}, {"verdict": "load: fail", "psnr_db": 90.0}, "worse"),
        ({"verdict": "load: fail"}, {"psnr_db": 1.0}, "better"),
        ({"verdict": "refused"}, {"psnr_db": 1.0}, "better"),
        ({"verdict": "refused"}, {"verdict": "load: fail"}, "worse"),
        ({"verdict": "load: fail"}, {"verdict": "latents: fail", "psnr_db": 41.0}, "better"),
    ],
)
def test_trends(before: dict[str, Any], now: dict[str, Any], trend: str) -> None:
    assert history.find_trend(replace(VERSION, **before), replace(VERSION, **now)) == trend


def test_verdicts_and_their_first_version() -> None:
    assert history.find_trend(None, VERSION) == "first"
    ranks = [history.rank_verdict(v) for v in ("load: fail", "refused", "pass")]
    assert ranks == [0, 1, 2]


@pytest.mark.parametrize(
    ("trends", "text"),
    [
        ([("stand-in", "first")], "stand-in: as it was first seen, 2026-11-01 (000000000000)"),
        (
            [("stand-in", "first"), ("stand-in", "better"), ("stand-in", "same")],
            "stand-in: better since 2026-11-02 (111111111111)",
        ),
        (
            [("true size", "first"), ("true size", "worse"), ("stand-in", "first")],
            "true size: worse since 2026-11-02 (111111111111)",
        ),
        (
            [("compiled", "first"), ("published", "first"), ("true size", "better")],
            "published: as it was first seen, 2026-11-02 (111111111111)",
        ),
        ([], "no record was ever committed"),
    ],
)
def test_since_when(trends: list[tuple[str, str]], text: str) -> None:
    versions = [
        Version(scope, f"2026-11-0{n + 1}", str(n) * 40, "pass", None, None, trend)
        for n, (scope, trend) in enumerate(trends)
    ]
    assert history.say_since(versions) == text


def test_versions_that_could_not_be_read() -> None:
    skipped = [
        Skipped("2026-11-03", "a", "no JSON"),
        Skipped("2026-11-01", "b", "no JSON"),
        Skipped("2026-11-02", "c", "no JSON"),
        Skipped("2026-11-05", "d", "schema 0"),
        Skipped("2026-11-04", "e", "one day"),
        Skipped("2026-11-04", "f", "one day"),
    ]
    assert history.tell_skipped(skipped) == [
        "skipped 3 versions (2026-11-01 to 2026-11-03): no JSON",
        "skipped 1 version (2026-11-05): schema 0",
        "skipped 2 versions (2026-11-04): one day",
    ]
    assert history.tell_skipped([]) == []


@pytest.mark.parametrize(
    ("hardware", "timings", "step"),
    [
        ("h100", {"step quantized": 2.0, "step bf16": 3.0}, 0.667),
        ("cpu", {"step quantized": 2.0, "step bf16": 3.0}, None),
        ("a100", {"step quantized": 7.0, "step bf16": 2.0}, 3.5),
        ("h100", {"step quantized": 2.0}, None),
        ("h100", {"step bf16": 2.0}, None),
        ("h100", {"step quantized": 0.0, "step bf16": 2.0}, None),
        ("h100", {"step quantized": 2.0, "step bf16": 0.0}, None),
        ("h100", {}, None),
    ],
)
def test_a_step_beside_bf16(hardware: str, timings: dict[str, float], step: float | None) -> None:
    record: Any = SimpleNamespace(cell={"hardware": hardware}, timings=timings)
    assert history.read_step(record) == step


HEAD = "cell,scope,date,commit,verdict,psnr_db,step,trend\n"


def test_lines_of_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    assert history.read_lines(path) == {}
    lines = {
        "b@cpu": [VERSION, replace(VERSION, psnr_db=None, step=None, trend="worse")],
        "a@cpu": [replace(VERSION, scope="published", verdict="load: fail, latents: fail")],
    }
    text = history.write_lines(lines)
    assert text == (
        HEAD
        + f'a@cpu,published,2026-11-20,{"a" * 40},"load: fail, latents: fail",40.0,0.8,first\n'
        + f"b@cpu,stand-in,2026-11-20,{'a' * 40},pass,40.0,0.8,first\n"
        + f"b@cpu,stand-in,2026-11-20,{'a' * 40},pass,,,worse\n"
    )
    path.write_text(text)
    assert history.read_lines(path) == lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": columns are [], expected {}"),
        ("cell,scope\n", ": columns are ['cell', 'scope'], expected {}"),
        (f"{HEAD}a,b\n", ":2: not enough values to unpack (expected 7, got 1)"),
        (
            f"{HEAD}a,stand-in,d,c,pass,,,first\na,huge,d,c,pass,,,first\n",
            ":3: 'huge' and 'first' are no scope and trend",
        ),
        (f"{HEAD}a,compiled,d,c,pass,,,same\n", ":2: 'compiled' and 'same' are no scope and trend"),
        (
            f"{HEAD}a,compiled,d,c,pass,x,,first\n",
            ":2: could not convert string to float: 'x'",
        ),
    ],
)
def test_lines_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text(text)
    said = said.format(list(history.COLUMNS))
    remedy = f"take it from git, or write it again with `python -m {history.MODULE} {tmp_path}`"
    with pytest.raises(history.HistoryError, match=f"^{re.escape(f'{path}{said}; {remedy}')}$"):
        history.read_lines(path)


CELLS = [Shown(f"c{n}@cpu", "unproven", "proven · stand-in", "a|b", n < 2) for n in range(5)]


def test_a_summary() -> None:
    text = job_summary.write_summary(CELLS[1:3], ["one\ntwo", "x*y"])
    assert text == (
        "## quantmatrix: 2 cells, 1 changed\n\n"
        "- one\n\n"
        "- x\\*y\n\n"
        "| state | cells |\n| --- | --- |\n| proven · stand-in | 2 |\n\n"
        "| cell | before | now | why |\n| --- | --- | --- | --- |\n"
        "| `c1@cpu` | unproven | proven · stand-in | a\\|b |\n"
        "| `c2@cpu` | unproven | proven · stand-in | a\\|b |\n"
    )


@pytest.mark.parametrize("shown", [0, 1, 4])
def test_a_summary_takes_the_room_that_there_is(shown: int) -> None:
    whole = job_summary.write_summary(CELLS)
    rest = "\nand {} more cells: see the evidence of this job\n"
    line = "| `c0@cpu` | unproven | proven · stand-in | a\\|b |\n"
    need = len(whole.encode()) - (5 - shown) * len(line.encode()) + len(rest.format(5).encode())
    cut = job_summary.write_summary(CELLS, room=need)
    assert cut.count("@cpu") == shown
    assert cut.endswith(rest.format(5 - shown))
    assert len(cut.encode()) == need
    if shown:
        assert job_summary.write_summary(CELLS, room=need - 1).count("@cpu") == shown - 1


def test_a_file_that_takes_no_summary(tmp_path: Path) -> None:
    assert job_summary.LIMIT == 1_047_552
    path = tmp_path / "summary"
    size = len(job_summary.write_summary(CELLS).encode())
    path.write_bytes(b"x" * 100)
    assert job_summary.append(path, CELLS, []) == size
    assert path.stat().st_size == 100 + size
    path.write_bytes(b"x" * (job_summary.LIMIT - 50))
    said = f"{path}: {job_summary.LIMIT - 50} of {job_summary.LIMIT} bytes are taken, a summary does not fit"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        job_summary.append(path, CELLS, [])
    assert job_summary.append(tmp_path / "new", CELLS, []) == size
    path.write_bytes(b"x" * (job_summary.LIMIT - size + 1))
    cut = job_summary.append(path, CELLS, [])
    assert cut < size
    assert path.read_bytes().endswith(b" more cells: see the evidence of this job\n")
    assert path.stat().st_size <= job_summary.LIMIT


def test_marks_of_a_page(tmp_path: Path) -> None:
    page = (
        b"top\n<!-- quantmatrix:begin cells -->\nold\n<!-- quantmatrix:end cells -->\r\n"
        b"# quantmatrix:begin families\r\nold\r\n# quantmatrix:end families\r\nlast"
    )
    assert into.list_marked(page) == ["cells", "families"]
    filled = into.fill(page, "p", lambda name: f"{name} 1\n2", ("cells", "families"))
    assert filled == (
        b"top\n<!-- quantmatrix:begin cells -->\ncells 1\n2\n<!-- quantmatrix:end cells -->\r\n"
        b"# quantmatrix:begin families\r\nfamilies 1\r\n2\r\n# quantmatrix:end families\r\nlast"
    )
    only = into.fill(page, "p", lambda name: "new", ("families",))
    assert only == page.replace(b"\r\nold\r\n", b"\r\nnew\r\n")
    path = tmp_path / "p.md"
    path.write_bytes(page)
    render = {"cells": "old", "families": "new"}.__getitem__
    change = f"{path}:6: differs from claims and evidence; run the same without --check"
    assert into.update(path, render, (), check=True) == [change]
    assert path.read_bytes() == page
    assert into.update(path, render, ("cells",), check=True) == []
    assert into.update(path, render, ("cells",), check=False) == [f"{path}: unchanged"]
    assert into.update(path, render, (), check=False) == [f"{path}: written"]
    assert path.read_bytes() == only
    later = {"cells": "older", "families": "zzz"}.__getitem__
    assert into.update(path, later, ("families",), check=True) == [change]
    assert into.update(path, later, (), check=False) == [f"{path}: written"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nquantmatrix:begin cells\n", "p:2: no line `quantmatrix:end cells` closes this mark"),
        ("quantmatrix:end cells\n", "p:1: the end of cells, which was not opened"),
        (
            "quantmatrix:begin cells\n\nquantmatrix:end families\n",
            "p:3: the end of families, which was not opened",
        ),
        (
            "\nquantmatrix:begin cells\nquantmatrix:begin families\n",
            "p:3: cells of line 2 is not closed yet",
        ),
    ],
)
def test_marks_that_do_not_fit(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        into.fill(text.encode(), "p", lambda name: "", ("cells",))


@pytest.mark.parametrize("names", [(), ("families",), ("cells",)])
def test_a_page_without_marks(names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "p.md"
    path.write_text("nothing\n")
    name = names[0] if names else "families"
    said = (
        f"--into {path}: no mark for {name}; write the lines <!-- quantmatrix:begin {name} --> and "
        f"<!-- quantmatrix:end {name} --> where it belongs"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        into.update(path, lambda name: "", names, check=False)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("a\nb\nc", "a\nx\nc", 2), ("x", "y", 1), ("a\nb", "a\nb\nc\nd", 3), ("a\nb\nc", "a", 2)],
)
def test_the_first_line_that_differs(old: str, new: str, line: int) -> None:
    assert into.find_difference(old.encode(), new.encode()) == line


def test_formats_of_pages() -> None:
    names = ("a.md", "a.MDX", "a.rst", "a.html", "a.htm", "a.csv")
    found = [into.choose_format(Path(name)) for name in names]
    assert found == ["md", "md", "rst", "html", "html", "csv"]
    with pytest.raises(
        UsageError, match=r"^--into a\.txt: of which format\? Say it with --format$"
    ):
        into.choose_format(Path("a.txt"))


@pytest.mark.parametrize(
    ("text", "form", "code", "marked"),
    [
        ("", "md", True, ""),
        ("a`b`", "md", False, "a`b`"),
        ("a", "md", True, "`a`"),
        ("a <`b_c`> d", "html", False, "a &lt;<code>b_c</code>&gt; d"),
        ("a`b", "html", True, "<code>a`b</code>"),
        (
            "x_y `p_q` \\| |*",
            "rst",
            False,
            "x\\_y ``p_q`` \\|\\|\\*".replace(" \\|\\|", " \\| \\|"),
        ),
        ("p\\|q", "rst", True, "``p|q``"),
        ("`a`", "html", False, "<code>a</code>"),
        ("`a`", "rst", False, "``a``"),
    ],
)
def test_marks_of_a_format(text: str, form: str, code: bool, marked: str) -> None:
    assert fragments.mark(text, form, code=code) == marked


def test_writers_of_formats() -> None:
    head, rows = ["x<", "y"], [["1", ""], ["2,3", "4"]]
    assert fragments.write_rst(head, rows) == (
        ".. list-table::\n   :header-rows: 1\n\n   * - x<\n     - y\n   * - 1\n     -\n"
        "   * - 2,3\n     - 4"
    )
    assert fragments.write_html(head, rows) == (
        '<table>\n<thead><tr><th scope="col">x&lt;</th><th scope="col">y</th></tr></thead>\n<tbody>\n'
        "<tr><td>1</td><td></td></tr>\n<tr><td>2,3</td><td>4</td></tr>\n</tbody>\n</table>"
    )
    assert fragments.write_csv(head, rows) == 'x<,y\n1,\n"2,3",4'
    assert [fragments.show(v) for v in (None, 0.0, 41.23456)] == ["", "0", "41.23"]
    assert [markdown.show_number(v) for v in (None, 0.0, 0.99954321)] == ["", "0", "0.9995"]


@pytest.mark.parametrize(
    ("value", "text"), [(["a", 1], "a 1"), ([], ""), ("a b", "a b"), (None, "None")]
)
def test_values_of_a_change(value: Any, text: str) -> None:
    assert changes.show(value) == text


def now(**given: Any) -> changes.CellNow:
    """A cell as it is."""
    about = {name: given.pop(name) for name in ("digest", "state", "scope") if name in given}
    columns = {**dict.fromkeys(changes.COLUMNS, ""), "claim": "expected", "checks": [], **given}
    return changes.CellNow(columns, **{"digest": "1", "state": "proven", "scope": "s", **about})


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({}, {}),
        ({"claim": "refused", "digest": "2"}, {"claim": ("expected", "refused")}),
        ({"digest": "2"}, {"checkpoint row": ("", "changed")}),
        (
            {"digest": "2", "checks": ["load"]},
            {"checks": ([], ["load"]), "checkpoint row": ("", "changed")},
        ),
        (
            {"digest": "2", "checks": ["load"], "claim": "a"},
            {"checks": ([], ["load"]), "claim": ("expected", "a")},
        ),
        ({"checks": ["load"]}, {"checks": ([], ["load"])}),
        ({"state": "failing"}, {"state": ("proven", "failing")}),
        ({"scope": "r"}, {"scope": ("s", "r")}),
        ({"state": "a", "scope": "z"}, {"state": ("proven", "a"), "scope": ("s", "z")}),
    ],
)
def test_columns_of_a_change(change: dict[str, Any], columns: dict[str, Any]) -> None:
    assert changes.list_columns(now(), now(**change)) == columns


def test_changes_for_a_review() -> None:
    before = {"a@cpu": now(), "b@cpu": now(claim="planned", state="planned"), "c@cpu": now()}
    after = {"c@cpu": now(checks=["load", "latents"]), "a@cpu": now(), "d@cpu": now(state="stale")}
    found = changes.compare(before, after)
    assert changes.write_markdown(found, "A..B") == (
        "## Matrix A..B: 1 gained, 1 lost, 1 changed\n\n"
        "### Gained\n\n| cell | claim | state |\n| --- | --- | --- |\n"
        "| `d@cpu` | expected | stale |\n\n"
        "### Lost\n\n| cell | claim | state |\n| --- | --- | --- |\n"
        "| `b@cpu` | planned | planned |\n\n"
        "### Changed\n\n| cell | what | before | after |\n| --- | --- | --- | --- |\n"
        "| `c@cpu` | checks |  | load latents |"
    )
    assert found.to_json()["changed"] == {
        "c@cpu": {"checks": {"before": [], "after": ["load", "latents"]}}
    }
    assert found.to_json()["gained"]["d@cpu"]["state"] == "stale"
    none = changes.compare(before, before)
    assert changes.write_markdown(none, "x") == "## Matrix x: 0 gained, 0 lost, 0 changed"


@pytest.mark.parametrize("span", ["", "A", "A.B", "..B", "A...B", "A..."])
def test_spans_of_revisions(span: str) -> None:
    said = f"{span}: expected two revisions, A..B"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        changes.compare_revisions(span, Path())


def test_lines_of_a_benchmark() -> None:
    cell: Any = SimpleNamespace(id="some-row@cpu+decode")
    other: Any = SimpleNamespace(id="none@cpu")
    result = make_result("w", step=0.8, weights=2**23)
    part = result["components"]["transformer"]
    part["step"] = {**part["step"], "detectable": 0.0345, "verdict": "faster"}
    [line] = bench_pages.list_lines({cell.id: result}, {cell.id: "the code changed"}, [other, cell])
    assert line[:4] == [
        "[some-row@cpu+decode](../benchmarks/cpu/some-row+decode.json)",
        *("tiny", "Some CPU, 1 thread", "transformer"),
    ]
    assert line[5:7] == ["3.5%", "faster"]
    assert line[8:] == ["0.250", "0.273", "2026-11-26; the code changed"]
    del part["load"]
    [line] = bench_pages.list_lines({cell.id: result}, {cell.id: ""}, [cell])
    assert (line[7], line[10]) == ("not measured", "2026-11-26")
    found = bench_pages.describe_result(result, cell, "old")
    assert found["file"] == "benchmarks/cpu/some-row+decode.json"
    assert found["memory"] == [
        ["transformer weights", 2**25, 2**23],
        ["transformer step memory", 2**20, 2**20],
    ]
    assert [timing[0] for timing in found["timings"]] == [
        *("transformer layer 16x256->512 FP8 decode", "transformer step"),
    ]
    assert found["timings"][1][1:3] == [10.0, part["step"]["median"]["quantized"]]
    assert (found["clock"], found["counted"], found["old"]) == ("wall clock", "live tensors", "old")


def test_signs() -> None:
    counts = {
        "planned": 3, "proven · stand-in": 4, "proven · compiled": 5, "refused · compiled": 2,
        "proven · true size": 6, "failing · stand-in": 0,
    }  # fmt: skip
    assert overview.show_signs(counts) == "✓ 10 ⚙ 5 ⊘ 2 … 3"
    assert overview.show_signs({}) == "–"
    assert markdown.show_counts({"proven": 4, "stale": 1}) == "4 proven, 1 stale"
    assert markdown.show_counts({}) == "–"


def test_cells_of_the_overview_are_cut_at_a_word() -> None:
    assert overview.shorten("a" * 120) == "a" * 120
    text = f"{'a' * 60} `{'b' * 40} c` {'d' * 40}"
    assert overview.shorten(text) == f"{'a' * 60} `{'b' * 40} c` ..."
    open_code = f"{'a' * 60} `{'b' * 40} {'c' * 40}`"
    assert overview.shorten(open_code) == f"{'a' * 60} `{'b' * 40}` ..."
    words = "a" * 116 + " bbbb"
    assert overview.shorten(words) == " ..."
    assert overview.shorten("a" * 115 + " bbbbb") == "a" * 115 + " ..."


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("quantmatrix plan", ["quantmatrix plan"]),
        (
            "A=1 B='2;3' quantmatrix generate --prompt 'a fox' --seed 1 2",
            ["A=1", "B='2;3'", "quantmatrix generate", "--prompt 'a fox'", "--seed 1 2"],
        ),
    ],
)
def test_commands_to_copy(command: str, lines: list[str]) -> None:
    assert markdown.wrap_command(command) == " \\\n  ".join(lines)
    block = " \\\n  ".join(lines)
    assert markdown.show_commands([command, "x"]) == f"```bash\n{block}\nx\n```"


def test_docstrings_of_families() -> None:
    assert markdown.read_docstring("no-such-family") == ""
    assert markdown.read_docstring("fp8").startswith("fp8: ")
    assert markdown.read_docstring("modelopt-nvfp4") != ""


@pytest.mark.parametrize(
    ("value", "without", "pairs"),
    [
        ({"b": 1, "a": "x"}, (), [("a", "x"), ("b", 1)]),
        ({"a": None, "b": "", "c": 0, "d": False, "e": []}, (), [("c", 0), ("d", False)]),
        ({"a": {"c": 1.5, "b": {"d": 2}}}, ("c",), [("a.b.d", 2), ("a.c", 1.5)]),
        ({"a": [1, "b"], "c": (2,)}, ("a",), [("c", "2")]),
        ({"a": [1, "b"]}, (), [("a", "1, b")]),
    ],
)
def test_flat_facts(value: Any, without: tuple[str, ...], pairs: list[Any]) -> None:
    assert page_data.flatten(value, without) == pairs


def test_values_that_stand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data, "PICTURE_BYTES", 10)
    shared = page_data.Shared()
    assert [shared.put(v) for v in ("a", 1, "1", "a", [2], [2])] == [0, 1, 2, 0, 3, 3]
    assert shared.put_pictures(["wxyz", "ab", "ab"]) == [4, 5, 5]
    assert shared.put_pictures(["ab", "lmnop"]) == []
    assert shared.put_pictures(["ab", "lmno"]) == [5, 6]
    assert shared.put_pictures(["q"]) == []
    assert shared.put_pictures(["wxyz"]) == [4]
    assert shared.values == ["a", 1, "1", [2], "wxyz", "ab", "lmno"]


def test_programs_that_were_built() -> None:
    program = {
        "kernel": "decode", "arch": "sm90", "registers": 48, "spilled": 3, "shared": 12,
        "shared_limit": 99, "warps": 8, "digest": "sha256:0123456789abcdef", "faults": [],
        "specialised": "M 16",
    }  # fmt: skip
    text = (
        "48 registers, 3 bytes spilled, 12 of 99 bytes of shared memory, 8 warps, "
        "code sha256:0123456789ab (M 16)"
    )
    assert page_data.describe_program(program) == ("decode for sm90", text)
    program["faults"] = ["too much", "too long"]
    assert page_data.describe_program(program)[1] == "too much; too long (M 16)"


def test_the_history_of_a_cell() -> None:
    later = replace(VERSION, scope="published", commit="b" * 40, trend="better", step=None)
    assert page_data.describe_history([VERSION, later]) == [
        "published: better since 2026-11-20 (bbbbbbbbbbbb)",
        ["2026-11-20", "b" * 12, 3, "better", "pass", 40.0, None],
        ["2026-11-20", "a" * 12, 1, "first", "pass", 40.0, 0.8],
    ]


def test_a_box_of_the_picture() -> None:
    counts = {"proven · stand-in": 3, "refused": 2, "proven · true size": 1}
    assert picture.draw_box(10, 20, 108, counts) == [
        '<rect class="box" x="10" y="20" width="108" height="54" rx="4"/>',
        '<text x="16" y="33">1 true size',
        "<title>1 proven · true size</title></text>",
        '<text x="16" y="45">3 stand-in',
        "<title>3 proven · stand-in</title></text>",
        '<text x="16" y="57">2 refused',
        "<title>2 refused</title></text>",
        '<rect class="proven true-size" x="14" y="66" width="17" height="5"/>',
        '<rect class="proven stand-in" x="31" y="66" width="50" height="5"/>',
        '<rect class="refused" x="81" y="66" width="33" height="5"/>',
    ]
    assert picture.draw_box(1, 2, 92, {"planned": 0}) == [
        '<rect class="none" x="1" y="2" width="92" height="54" rx="4"/>'
    ]
    more = picture.draw_box(0, 0, 92, {**counts, "planned": 4})
    assert more[5] == '<text x="6" y="37">2 refused ...'


@pytest.mark.parametrize(
    ("families", "hardware", "width", "height"),
    [(0, 0, 560, 140), (2, 3, 888, 314), (7, 1, 882, 198), (9, 1, 976, 198), (1, 2, 888, 256)],
)
def test_the_size_of_the_picture(families: int, hardware: int, width: int, height: int) -> None:
    names = [f"f{n}" for n in range(families)], [f"h{n}" for n in range(hardware)]
    text = picture.draw_matrix(*names, {}).decode()
    assert f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"' in text


def test_the_picture_in_words() -> None:
    counts = {("a", "x"): {"planned": 2, "proven · published": 1}, ("a", "y"): {"stale": 3}}
    said = picture.describe_counts(["a", "b"], ["x", "y", "z"], counts)
    assert said == "a: x: 1 proven · published, 2 planned; y: 3 stale. b: no cell."


CLASS = SimpleNamespace(
    class_name="A", family="fp8", scheme="dyn", reason="", quantized=7, linear=9, error=0.01234,
    witness="agrees", diffusers="0.42",
)  # fmt: skip


def line(**given: Any) -> Any:
    return SimpleNamespace(**{**vars(CLASS), **given})


def test_transformer_classes() -> None:
    lines = [
        line(),
        line(scheme="static", quantized=5, error=0.5, witness="was not asked"),
        line(class_name="B", quantized=3, linear=4),
        line(class_name="C", family="", scheme="", reason="too|large"),
    ]
    assert transformer_classes.summarize([]) == ""
    assert transformer_classes.summarize(lines) == (
        "2 of the 3 transformer classes of diffusers 0.42 load quantized, small and with random "
        "weights: [the list](transformer-classes.md)."
    )
    parts = transformer_classes.write_classes(lines).split("\n\n")
    assert parts[3:] == [
        "| class | quantized of linear layers | fp8 dyn | fp8 static |\n| --- | --- | --- | --- |\n"
        "| `A` | 5-7 of 9 | 0.012 | 0.500 (witness was not asked) |\n"
        "| `B` | 3 of 4 | 0.012 |  |",
        "## Not shown",
        "| class | why |\n| --- | --- |\n| `C` | too\\|large |\n",
    ]
    assert "Not shown" not in transformer_classes.write_classes(lines[:3])


OPTION = Option("c", "m", "h200", "fp8", "some/c", "torch", cell="a@h200", proof=0)


@pytest.mark.parametrize(
    ("given", "memory", "fit"),
    [
        ({}, 1, 0),
        ({"weights_mib": 100}, 0, 0),
        ({"weights_mib": 100}, 100, 0),
        ({"weights_mib": 101, "largest_mib": 60, "layerwise_mib": 10}, 100, 2),
        ({"weights_mib": 101, "largest_mib": 60, "layerwise_mib": 10, "movable": True}, 100, 1),
        ({"weights_mib": 101, "largest_mib": 100, "layerwise_mib": 9, "movable": True}, 100, 1),
        ({"weights_mib": 101, "largest_mib": 101, "layerwise_mib": 9, "movable": True}, 100, 2),
        ({"weights_mib": 300, "largest_mib": 200, "layerwise_mib": 100}, 100, 2),
        ({"weights_mib": 300, "largest_mib": 200, "layerwise_mib": 101}, 100, 3),
        ({"weights_mib": 90, "largest_mib": 50, "peak_mib": 100, "layerwise_mib": 10}, 100, 0),
        ({"weights_mib": 90, "largest_mib": 50, "peak_mib": 101, "layerwise_mib": 10}, 100, 2),
        ({"weights_mib": 90, "largest_mib": 50, "peak_mib": 60, "layerwise_mib": 9}, 100, 0),
        ({"weights_mib": 90, "largest_mib": 50, "peak_mib": 61, "layerwise_mib": 9}, 100, 2),
        ({"weights_mib": 90, "largest_mib": 50, "peak_mib": 40, "layerwise_mib": 9}, 90, 0),
        ({"weights_mib": 90, "largest_mib": 50, "peak_mib": 90, "layerwise_mib": 9}, 90, 0),
    ],
)
def test_what_fits(given: dict[str, Any], memory: float, fit: int) -> None:
    assert ranking.find_fit(replace(OPTION, **given), memory) == fit


def test_what_is_preferred() -> None:
    one = replace(OPTION, psnr_db=44.0, step=0.62, weights_mib=1300, made=True, proof=1)
    assert [ranking.weigh(one, p) for p in ranking.PREFERENCES] == [-44.0, 0.62, 1300]
    assert ranking.order(one, "quality") == (1, -15, True, -44.0)
    assert ranking.order(one, "speed") == (1, 12, True, 0.62)
    assert ranking.order(one, "memory") == (1, 2, True, 1300)
    none = ranking.order(OPTION, "quality")
    assert none == (0, float("inf"), False, float("inf"))
    with pytest.raises(UsageError, match=r"^--prefer looks: known: quality, speed, memory$"):
        ranking.rank([], prefer="looks")
    near = replace(OPTION, checkpoint="d", psnr_db=42.5, made=False, proof=1)
    assert [o.checkpoint for _, o in ranking.rank([replace(one, psnr_db=44.9), near])] == ["d", "c"]


@pytest.mark.parametrize(
    ("fit", "last", "shown"),
    [
        (0, "run", "run"),
        (1, "run", "run --dit-cpu-offload"),
        (2, "run", "run --dit-layerwise-offload"),
        (3, "run", "run"),
        (2, "run --dit-layerwise-offload", "run --dit-layerwise-offload"),
        (2, "run --dit-cpu-offload", "run --dit-cpu-offload --dit-layerwise-offload"),
    ],
)
def test_commands_with_their_offload(fit: int, last: str, shown: str) -> None:
    assert list_commands(fit, replace(OPTION, commands=("make", last))) == ("make", shown)
    assert list_commands(fit, replace(OPTION, commands=(last,))) == (shown,)
    assert list_commands(fit, OPTION) == ()


def test_an_option_as_plain_data() -> None:
    found = describe(1, replace(OPTION, proof=2, commands=("run",)))
    assert (found["proof"], found["fits"]) == ("claimed, not run", "fits with --dit-cpu-offload")
    assert (found["commands"], found["checkpoint"]) == (["run --dit-cpu-offload"], "c")
    assert [show_mib(v) for v in (None, 0, 1024, 11980)] == ["", "0.0 GiB", "1.0 GiB", "11.7 GiB"]


@pytest.mark.parametrize(
    ("ranked", "refused", "reason"),
    [
        ([(2, {})], [], ""),
        (
            [(3, {"layerwise_mib": 5000}), (3, {"checkpoint": "d", "layerwise_mib": 4000})],
            [],
            "nothing fits into 1.5 GiB: d needs the least, 3.9 GiB with --dit-layerwise-offload",
        ),
        (
            [(3, {"layerwise_mib": 4044})],
            [],
            "nothing fits into 1.5 GiB: c needs the least, 3.9 GiB with --dit-layerwise-offload",
        ),
        (
            [(3, {"layerwise_mib": 4045})],
            [],
            "nothing fits into 1.5 GiB: c needs the least, 4.0 GiB with --dit-layerwise-offload",
        ),
        (
            [],
            [("x", "a rule", "no units"), ("y", "", "")],
            "no checkpoint of m runs on h: x [a rule]: no units",
        ),
        ([], [("x", "", "no row")], "no checkpoint of m runs on h: x: no row"),
        (
            [],
            [],
            "the tables have no checkpoint of m: see `quantmatrix inspect` for one of yours",
        ),
    ],
)
def test_why_there_is_no_answer(ranked: Any, refused: Any, reason: str) -> None:
    options = tuple((fit, replace(OPTION, **given)) for fit, given in ranked)
    nos = tuple(No(name, "m", "h", rule, message) for name, rule, message in refused)
    found = Recommendation("h", "m", 1.5, "quality", options, nos)
    assert found.reason == reason
    assert found.to_json()["reason"] == reason
    assert len(found.usable) == sum(fit < 3 for fit, _ in options)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"step": 0.6449, "step_on": "h200"}, "0.64 of BF16's time"),
        ({"step": 0.0, "step_on": "h200"}, "0.00 of BF16's time"),
        ({"step": 0.5, "step_on": "h100", "psnr_db": 40.06, "error_on": "h200, x"}, "40.1 dB"),
        ({"psnr_db": 40.06, "error_on": "h20, x"}, ""),
        ({"psnr_db": 40.06, "error_on": "h2000, x"}, ""),
        ({"step": 0.5, "step_on": "h200", "proof": 1}, ""),
        ({"step": 0.5, "step_on": "cpu", "hardware": "cpu"}, ""),
        ({}, ""),
    ],
)
def test_the_number_that_is_most_worth_knowing(given: dict[str, Any], text: str) -> None:
    assert page_data.show_number(replace(OPTION, **given)) == text


def test_numbers_of_other_programs() -> None:
    def shown(metrics: Any) -> Any:
        return SimpleNamespace(record=metrics and SimpleNamespace(metrics=metrics))

    found = [{"worst": {"psnr_db": 41.26}}, {"worst": {"psnr_db": 0}}, {"worst": {}}, {"a": 1}]
    texts = [programs.show_number(shown(metrics)) for metrics in found]
    assert texts == ["41.3 dB", "0.0 dB", "", ""]
    assert programs.show_number(shown(None)) == ""


def test_words_of_others_are_cut_to_what_fits() -> None:
    assert runtimes.fit("a" * 120) == "a" * 120
    assert len(runtimes.fit("a" * 121)) == 120
    assert runtimes.fit("*" * 60) == "\\*" * 60
    cut = runtimes.fit("*" * 61)
    assert len(cut) <= 120
    assert "...(61 characters)..." in cut


@pytest.mark.parametrize(
    ("state", "said", "scope", "text", "contradicts"),
    [
        ("works", "", "stand-in", "works · stand-in", False),
        ("works", "undocumented", "stand-in", "works · stand-in (undocumented)", True),
        ("refuses", "documented to work", "", "refuses (documented to work)", True),
        ("works", "documented to refuse", "", "works (documented to refuse)", True),
        ("works", "as documented", "", "works (as documented)", False),
    ],
)
def test_a_cell_of_another_program(
    state: str, said: str, scope: str, text: str, contradicts: bool
) -> None:
    cell: Any = SimpleNamespace(id="c@cpu~sglang")
    record: Any = SimpleNamespace(scope=scope)
    shown = runtimes.Shown(cell, state, "", said, record, ())
    assert (shown.text, shown.contradicts) == (text, contradicts)
    unproven = runtimes.Shown(cell, "unproven", "", said, None, ())
    assert unproven.text == (said or "–")
    assert unproven.file == ""


def test_answers_survive_their_file() -> None:
    found = answers.Answers(
        (replace(OPTION, commands=("a", "b")), replace(OPTION, checkpoint="d", psnr_db=1.5)),
        (No("x", "m", "h", "r", "w"),),
        "sha256:1",
    )
    data = answers.encode(found)
    assert answers.decode(data, "answers.json") == found
    text = data.decode()
    assert text.startswith('{\n "schema": 1,\n "inputs": "sha256:1",\n "option": ["checkpoint",')
    assert text.endswith('"refused": [\n  ["x", "m", "h", "r", "w"]\n ]\n}\n')
    assert len(text.splitlines()) == 13
    none = answers.Answers((), ())
    assert answers.decode(answers.encode(none), "") == none
    remedy = "; write it again with `quantmatrix report`"
    said = f"answers.json: no answers of this version: schema 2 has other columns than 1{remedy}"
    other = text.replace('"schema": 1', '"schema": 2').encode()
    with pytest.raises(QuantmatrixError, match=f"^{re.escape(said)}$"):
        answers.decode(other, "answers.json")
    with pytest.raises(QuantmatrixError, match="has other columns than 1"):
        answers.decode(text.replace('"rule"', '"law"').encode(), "answers.json")
    with pytest.raises(QuantmatrixError, match="has other columns than 1"):
        answers.decode(text.replace('"psnr_db"', '"db"').encode(), "answers.json")


@pytest.mark.parametrize(
    ("metrics", "value"),
    [
        ({"worst": {"a": 1.5}}, 1.5),
        ({"worst": {"a": 0}}, 0),
        ({"worst": {"a": "1"}}, None),
        ({"worst": {"b": 1}}, None),
        ({"worst": [1]}, None),
        ({}, None),
    ],
)
def test_numbers_of_metrics(metrics: Any, value: float | None) -> None:
    assert answers.read_number(metrics, "worst", "a") == value


def test_a_name_stands_above_the_middle_of_its_boxes() -> None:
    families, hardware = ["fp8", "gguf", "nunchaku-svdq"], ["cpu", "h200"]
    text = picture.draw_matrix(families, hardware, {}).decode()
    names = re.findall(r'<text class="name" x="(\d+)" y="(\d+)" text-anchor="middle">', text)
    boxes = re.findall(r'<rect [^>]*?x="(\d+)" y="(\d+)"[^>]*?width="(\d+)"', text)
    middles = sorted({int(x) + int(width) // 2 for x, _, width in boxes[: len(families)]})
    assert [int(x) for x, _ in names] == middles
    assert {int(y) for _, y in names} == {min(int(y) for _, y, _ in boxes) - 8}
    assert len(middles) == 3
