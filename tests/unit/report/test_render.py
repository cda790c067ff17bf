"""The report: states of cells, the files that show them, and drift."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tables import CASES, CHECKPOINTS, write_tables

from quantmatrix.errors import UsageError
from quantmatrix.proof import record as records
from quantmatrix.proof import reports_folder, store
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.report import overview, picture
from quantmatrix.report import render as report_render
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell, Matrix

WORST = {"psnr_db": 41.25, "cosine": 0.9991, "relative_l2": 0.01234}
COMPONENT = {"quantized_layers": 10, "total_layers": 12, "backends": {"decode": 10}}


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


def find(tables: Matrix, name: str) -> Cell:
    return next(cell for cell in tables.cells if cell.id == name)


def observe(tables: Matrix, name: str, *, fails: str = "", leaves_out: str = "") -> Evidence:
    """A record of a cell as it stands, all its checks passed but for one."""
    cell = find(tables, name)
    checks = {c: CheckResult("pass", {"worst": WORST}) for c in cell.checks if c != leaves_out}
    if fails:
        checks[fails] = CheckResult("fail", message="psnr_db 3 at the worst step\nmore")
    refusal = {"rule": cell.rule, "message": "no kernel | use cpu"} if cell.rule else None
    plan = {"refusal": refusal, "components": {} if refusal else {"transformer": COMPONENT}}
    record = Evidence(
        cell=records.describe_cell(cell, tables),
        checks=checks,
        command=f"{cell.shell(tables)} --tiny",
        plan=plan,
        versions={"torch": "2.13.0"},
        made="2026-11-23T10:00:00Z",
    )
    return sign(record, tables.hardware[cell.hardware])


PROVEN = "fp8-flux-1@cpu+decode"


def test_states(tables: Matrix) -> None:
    def state(name: str, record: Evidence | None) -> str:
        return report_render.state_of(find(tables, name), record, tables)

    assert state(PROVEN, None) == "unproven"
    assert state(PROVEN, observe(tables, PROVEN)) == "proven"
    assert state(PROVEN, observe(tables, PROVEN, fails="latents")) == "failing"
    assert state(PROVEN, observe(tables, PROVEN, leaves_out="latents")) == "unproven"
    refused = "svdq-flux-1-hopper@h100"
    assert state(refused, None) == "unproven"
    assert state(refused, observe(tables, refused)) == "refused"
    assert state(refused, observe(tables, refused, fails="refuse")) == "failing"
    planned = "svdq-flux-1@b200"
    assert state(planned, None) == "planned"
    assert state(planned, observe(tables, planned)) == "planned"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("flags", "--seed 7", "flags was"),
        ("claim", "validated", "claim was 'expected', is 'validated'"),
    ],
)
def test_a_changed_row_makes_its_evidence_stale(
    tables: Matrix, tmp_path: Path, column: str, value: str, reason: str
) -> None:
    record = observe(tables, PROVEN)
    cases = [{**CASES[0], column: value}, *CASES[1:]]
    changed = read.read(write_tables(tmp_path / "changed" / "matrix", cases))
    state, why = report_render.explain_state(find(changed, PROVEN), record, changed)
    assert state == "stale"
    assert reason in why
    other = "fp8-flux-2@cpu"
    assert report_render.state_of(find(changed, other), observe(tables, other), changed) == "proven"


@pytest.mark.parametrize("column", ["reference", "scheme", "revision"])
def test_a_changed_checkpoint_makes_evidence_stale(
    tables: Matrix, tmp_path: Path, column: str
) -> None:
    record = observe(tables, PROVEN)
    rows = [{**CHECKPOINTS[0], column: "0" * 40}, *CHECKPOINTS[1:]]
    changed = read.read(write_tables(tmp_path / "changed" / "matrix", checkpoints=rows))
    state, why = report_render.explain_state(find(changed, PROVEN), record, changed)
    assert (state, why) == ("stale", "the row of checkpoint flux-1-fp8 changed")


@pytest.mark.parametrize(
    ("table", "name", "change", "state"),
    [
        ("hardware", "cpu", {"memory_gib": 8.0}, "stale"),
        ("hardware", "cpu", {"packages": ("flashinfer",)}, "stale"),
        ("hardware", "cpu", {"name": "any CPU", "label": "large"}, "proven"),
        ("hardware", "h100", {"arch": "sm100"}, "proven"),
        ("models", "flux-1", {"repo": "other/flux-1"}, "stale"),
        ("models", "flux-1", {"notes": "new"}, "proven"),
    ],
)
def test_a_changed_hardware_or_model_makes_its_evidence_stale(
    tables: Matrix, table: str, name: str, change: dict[str, object], state: str
) -> None:
    record = observe(tables, PROVEN)
    rows = getattr(tables, table)
    changed = replace(tables, **{table: {**rows, name: replace(rows[name], **change)}})
    assert report_render.state_of(find(changed, PROVEN), record, changed) == state
    older = replace(record, cell={k: v for k, v in record.cell.items() if k != "place_digest"})
    assert report_render.state_of(find(changed, PROVEN), older, changed) == "proven"


def test_a_record_of_another_architecture_proves_nothing(tables: Matrix) -> None:
    cell = find(tables, "fp8-flux-1@h100+decode")
    for machine, state in (("nvidia sm90", "proven"), ("cpu cpu", "stale")):
        vendor, arch = machine.split()
        record = observe(tables, cell.id)
        said = {**record.plan, "machine": {"vendor": vendor, "arch": arch, "name": "x"}}
        found = report_render.explain_state(cell, replace(record, plan=said), tables)
        assert found[0] == state
    assert found[1] == "made on cpu cpu, h100 is nvidia sm90"


def test_notes_may_change_and_checks_may_be_added(tables: Matrix, tmp_path: Path) -> None:
    record = observe(tables, PROVEN)
    rows = [{**CHECKPOINTS[0], "notes": "new", "scope": "new"}, *CHECKPOINTS[1:]]
    cases = [{**CASES[0], "notes": "new", "checks": "load latents generate"}, *CASES[1:]]
    changed = read.read(write_tables(tmp_path / "changed" / "matrix", cases, rows))
    found = report_render.explain_state(find(changed, PROVEN), record, changed)
    assert found == ("unproven", "not run: generate")


@pytest.fixture
def observed(tables: Matrix) -> dict[str, Evidence]:
    names = [PROVEN, "svdq-flux-1-hopper@h100"]
    found = {name: observe(tables, name) for name in names}
    failing = "fp8-flux-2@cpu"
    return {**found, failing: observe(tables, failing, fails="generate")}


def test_rendering_is_pure(tables: Matrix, observed: dict[str, Evidence]) -> None:
    first = report_render.render(tables, observed)
    assert first == report_render.render(tables, dict(reversed(observed.items())))
    assert set(first) == {
        "support-matrix.md",
        "support-matrix.csv",
        "answers.json",
        "support-matrix.svg",
        "badge.json",
        "history.csv",
        "index.html",
        *(f"families/{name}.md" for name in tables.families),
    }
    assert all(data.endswith(b"\n") for data in first.values())


def test_overview(tables: Matrix, observed: dict[str, Evidence]) -> None:
    text = report_render.render(tables, observed)["support-matrix.md"].decode()
    assert "2 of 6 claims (33.3 %)" in text
    link = "families/fp8.md#flux-1-fp8"
    assert (
        f"| `FP8` | `some/flux-1` | `--transformer-path` | `some/flux1-fp8` | [✓ 1 ? 3]({link}) |"
        in text
    )
    assert "| `cpu` | ✓ 1 ✗ 1 ? 1 |" in text
    assert "| `stand-in` | random weights at a tiny size | 2 |" in text
    assert "| `fp8` | svdq-{int4\\|fp4}_r{rank}-... |" in text  # bars do not break the table
    assert "- `some/flux1-fp8`: single-transformer override; a | b" in text
    rows = text.partition("| state and scope | cells |")[2].splitlines()
    assert "| proven · stand-in | 1 |" in rows


def list_cells(line: str) -> list[str]:
    """Cells of a line of a table as they are shown: without the targets of links."""
    cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell.strip()) for cell in cells]


def test_nothing_is_wider_than_github_shows() -> None:
    """Of the project's own matrix: its lines had up to 4,266 characters."""
    tables = read.read()
    evidence = report_render.read_evidence()
    pages = report_render.render(tables, evidence)
    for name, data in pages.items():
        if not name.endswith(".md") or name == "runtimes.md":
            continue
        for number, line in enumerate(data.decode().splitlines(), 1):
            if line.startswith("|"):
                assert max(map(len, list_cells(line))) <= overview.LONGEST, f"{name}:{number}"
            assert len(line) <= overview.LONGEST_LINE or name != "support-matrix.md", number
    heads = {
        name: {line.removeprefix("### ") for line in data.decode().splitlines()}
        for name, data in pages.items()
        if name.startswith("families/")
    }
    links = re.findall(r"\((families/[^)#]*)#([^)]*)\)", pages["support-matrix.md"].decode())
    assert links
    for page, anchor in links:
        assert anchor in heads[page]


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("a" * 120, "a" * 120),
        ("word " * 30, f"{'word ' * 22}word ..."),
        (f"{'word ' * 21}`code in the middle`", f"{'word ' * 21}`code in` ..."),
    ],
)
def test_what_is_cut_stays_markdown(text: str, short: str) -> None:
    assert overview.shorten(text) == short
    assert len(overview.shorten(text)) <= overview.LONGEST


def test_a_claimed_failure_counts_as_agreement(tmp_path: Path) -> None:
    words = {"claim": "failing", "rule": "latents", "notes": "codes are read wrongly"}
    row = {**CASES[0], "hardware": "cpu", "backend": "decode", **words}
    tables = read.read(write_tables(tmp_path / "failing", [row]))
    [cell] = tables.cells
    for fails, count in (("latents", 1), ("", 0), ("load", 0)):
        page = report_render.render(tables, {cell.id: observe(tables, cell.id, fails=fails)})
        assert f"{count} of 1 claims" in page["support-matrix.md"].decode(), fails


def test_family_page(tables: Matrix, observed: dict[str, Evidence]) -> None:
    pages = report_render.render(tables, observed)
    text = pages["families/fp8.md"].decode()
    assert (
        f"| [{PROVEN}](../evidence/cpu/fp8-flux-1+decode.json) | stand-in | 10 of 12 | decode (10) |"
        in text
    )
    assert "| 41.25 | 0.9991 | 0.01234 | 2.13.0 | 2026-11-23 |" in text
    assert "generate: psnr_db 3 at the worst step\\\\nmore" in text
    assert "\n### flux-1-fp8\n" in text
    said = text.split("`fp8-flux-1`\n\n")[1]
    ran, offered = said.split("With the published repository: not yet run")[:2]
    assert f"Ran (stand-in, `{PROVEN}`)" in ran
    for part in (ran, offered):
        assert "quantmatrix generate \\\n  --model-path some/flux-1 \\\n" in part
    refusals = pages["families/nunchaku-svdq.md"].decode()
    link = "[h100](../evidence/h100/svdq-flux-1-hopper.json)"
    assert f"- `svdq-flux-1-hopper` on {link}: `svdq-arch`: no kernel \\| use cpu" in refusals


def test_family_page_has_the_docstring_of_its_module(tables: Matrix) -> None:
    for name in tables.families:
        text = report_render.render(tables, {})[f"families/{name}.md"].decode()
        module = Path(report_render.__file__).parent / "families" / f"{name.replace('-', '_')}.py"
        if module.is_file():
            first = module.read_text().splitlines()[0].removeprefix('"""').removesuffix('"""')
            assert f"## Format\n\n{first}" in text


def test_csv_has_a_line_per_cell(tables: Matrix, observed: dict[str, Evidence]) -> None:
    text = report_render.render(tables, observed)["support-matrix.csv"].decode()
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(text))}
    assert list(rows) == [cell.id for cell in tables.cells]
    assert rows[PROVEN]["state"] == "proven"
    assert rows[PROVEN]["worst_psnr_db"] == "41.25"
    assert rows[PROVEN]["evidence"] == "evidence/cpu/fp8-flux-1+decode.json"
    assert rows[PROVEN]["scope"] == "stand-in"
    for column in ("command_run", "command_offered"):
        assert rows[PROVEN][column].startswith("quantmatrix generate --model-path some/flux-1")
    assert rows["svdq-flux-1@b200"]["scope"] == ""
    assert rows["fp8-flux-2@cpu"]["reason"] == "generate: psnr_db 3 at the worst step"
    assert rows["svdq-flux-1@b200"]["state"] == "planned"


def test_picture_is_wellformed_and_says_its_content(
    tables: Matrix, observed: dict[str, Evidence]
) -> None:
    root = ElementTree.fromstring(report_render.render(tables, observed)["support-matrix.svg"])
    texts = ["".join(node.itertext()) for node in root.iter()]
    assert "1 proven · stand-in" in texts  # the title of a line that says `1 stand-in`
    assert any(text.startswith("1 stand-in") for text in texts)
    assert int(root.get("width", "0")) <= 900  # of GitHub's text
    assert "prefers-color-scheme:dark" in "".join(texts)
    [words] = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}desc")]
    cells = "fp8: cpu: 1 proven · stand-in, 1 failing · stand-in, 1 unproven; h100: 2 unproven."
    assert cells in words
    assert "nunchaku-svdq: cpu: 1 planned; h100: 1 refused · stand-in; b200: 1 planned." in words


@pytest.fixture
def reports(tables: Matrix, observed: dict[str, Evidence], tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "reports"
    for record in observed.values():
        store.write(record, folder / "evidence")
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    return folder


def test_write_then_check(reports: Path) -> None:
    assert {line.rpartition(": ")[2] for line in report_render.write(reports)} == {"written"}
    assert {line.rpartition(": ")[2] for line in report_render.write(reports)} == {"unchanged"}
    assert report_render.check(reports) == []
    assert report_render.check() == []  # reports/ beside the tables is the default


def test_a_misspelt_folder_is_not_made(reports: Path) -> None:
    missing = reports.with_name("reprots")
    for render in (report_render.write, report_render.check):
        with pytest.raises(UsageError, match="no such folder"):
            render(missing)
    assert not missing.exists()


@pytest.mark.parametrize("name", ["support-matrix.md", "support-matrix.svg", "families/fp8.md"])
def test_check_finds_a_hand_edit_and_a_missing_file(reports: Path, name: str) -> None:
    report_render.write(reports)
    path = reports / name
    path.write_bytes(path.read_bytes().replace(b"unproven", b"proven", 1))
    assert report_render.check(reports) == [
        f"{path}: differs from claims and evidence; run `quantmatrix report`"
    ]
    path.unlink()
    assert "missing" in report_render.check(reports)[0]


def test_check_finds_new_evidence_and_orphans(reports: Path, tables: Matrix) -> None:
    report_render.write(reports)
    reference = "fp8-flux-1@cpu+reference"
    store.write(observe(tables, reference), reports / "evidence")
    assert any("differs" in line for line in report_render.check(reports))
    report_render.write(reports)
    stray = observe(tables, reference)
    stray = replace(stray, cell={**stray.cell, "id": "gone@cpu", "row": "gone"})
    path = store.write(stray, reports / "evidence")
    assert report_render.check(reports) == [f"{path}: no cell gone@cpu in the tables; delete it"]
    for name in ("old.md", "fp8.html"):
        (reports / "families" / name).write_text("x")
        assert any(f"{name}: no such family" in line for line in report_render.check(reports))


def test_read_standings_joins(reports: Path, tables: Matrix) -> None:
    found = report_render.read_standings(tables, reports)
    assert set(found) == {cell.id for cell in tables.cells}
    assert {one.state for one in found.values()} <= set(report_render.STATES)
    assert found[PROVEN].label == "proven · stand-in"


def test_frame_holds_every_cell(reports: Path, tables: Matrix) -> None:
    import quantmatrix

    frame = quantmatrix.matrix_frame(reports)
    assert list(frame["id"]) == [cell.id for cell in tables.cells]
    assert set(frame.loc[frame["state"] == "proven", "id"]) == {PROVEN}


def test_overview_and_badge_say_the_same_share() -> None:
    """The overview counted claims whose kernels were only compiled as backed by a run."""
    folder = reports_folder.default_folder()
    badge = json.loads((folder / "badge.json").read_text())["message"]
    overview = (folder / "support-matrix.md").read_text()
    share = re.search(r"claims \(([\d.]+ %)\) are backed by a run", overview)
    assert share is not None
    assert badge.startswith(share[1])


def test_boxes_of_the_picture_stand_in_their_row_and_column() -> None:
    counts = {("fp8", "cpu"): {"refused": 1, "unproven": 3}, ("gguf", "h200"): {"refused": 2}}
    drawn = ElementTree.fromstring(picture.draw_matrix(["fp8", "gguf"], ["cpu", "h200"], counts))
    page = [drawn.find("{*}rect[@class='page']").get(name) for name in ("width", "height")]  # type: ignore[union-attr]
    box = (888 - 108 - 4) // 2 - 4
    assert page == [str(max(108 + 2 * (box + 4) + 4, picture.LEGEND_WIDTH)), str(64 + 2 * 58 + 76)]

    def places(kind: str) -> list[tuple[int, ...]]:
        found = drawn.iterfind(f"{{*}}rect[@class='{kind}']")
        return [tuple(int(one.get(n, "")) for n in ("x", "y", "width", "height")) for one in found]

    assert places("box") == [(108, 64, box, 54), (108 + box + 4, 64 + 58, box, 54)]
    assert places("none") == [(108 + box + 4, 64, box, 54), (108, 64 + 58, box, 54)]
    order = [label for label in picture.LABELS if label in ("refused", "unproven")]
    first = round((box - 8) * counts["fp8", "cpu"][order[0]] / 4)
    bars = [bar for name in order for bar in places(name) if bar[3] == 5 and bar[1] == 64 + 54 - 8]
    assert bars == [(112, 110, first, 5), (112 + first, 110, box - 8 - first, 5)]


def read_texts(drawn: ElementTree.Element) -> dict[str, tuple[int, int]]:
    """Where each line of text begins."""
    found = drawn.iterfind("{*}text")
    return {one.text or "": (int(one.get("x", "")), int(one.get("y", ""))) for one in found}


def test_the_legend_stands_below_the_boxes_in_two_columns() -> None:
    drawn = ElementTree.fromstring(picture.draw_matrix(["fp8"], ["cpu", "h200"], {}))
    texts, y = read_texts(drawn), 64 + 2 * 58 + 22
    for column, state in enumerate(picture.COLOURS):
        assert texts.pop(state) == (12 + 76 * column + 15, y)
    assert [place for text, place in texts.items() if text.partition(":")[0] in picture.SCOPES] == [
        *((27, y + 18), (27 + 268, y + 18)),
        *((27, y + 34), (27 + 268, y + 34)),
    ]
    squares = [
        tuple(int(one.get(name, "")) for name in ("x", "y"))
        for one in drawn.iterfind("{*}rect[@height='10']")
    ]
    assert squares == [
        *((12 + 76 * column, y - 9) for column in range(len(picture.COLOURS))),
        *((12, y + 9), (280, y + 9), (12, y + 25), (280, y + 25)),
    ]


@pytest.mark.parametrize("states", range(1, 6))
def test_a_box_has_three_lines_the_last_of_which_says_that_there_is_more(states: int) -> None:
    labels = [x for x in picture.LABELS if x in picture.COLOURS and x != "proven"][:states]
    counts = {label: 7 + n for n, label in enumerate(labels)}
    drawn = picture.draw_box(100, 200, 90, counts)
    texts = [line for line in drawn if line.startswith("<text")]
    lines = [f"{7 + n} {label}" for n, label in enumerate(labels[:3])]
    if states > 3:
        lines[-1] += " ..."
    assert texts == [f'<text x="106" y="{213 + 12 * n}">{line}' for n, line in enumerate(lines)]
