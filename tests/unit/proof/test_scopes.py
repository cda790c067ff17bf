"""Scopes: derived from what ran, one record each, and never a weaker pass over a failure."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from observed import PROVEN, REFUSED, find, observe
from tables import CHECKPOINTS, write_tables

from quantmatrix.proof import offers, scopes, store
from quantmatrix.proof import record as records
from quantmatrix.proof.agreement import measure
from quantmatrix.proof.record import CheckResult, Evidence, EvidenceError
from quantmatrix.proof.scopes import COMPILED, PUBLISHED, SCOPES, STAND_IN, TRUE_SIZE
from quantmatrix.proof.states import STATES, stand
from quantmatrix.report import render
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

PROGRAM = {
    **dict.fromkeys(("kernel", "arch", "specialised", "digest"), "x"),
    **dict.fromkeys(("registers", "spilled", "shared", "shared_limit", "warps"), 0),
    "faults": [],
}
BUILT = {
    **dict.fromkeys(("arch", "triton", "kernels"), "x"), "programs": [PROGRAM], "problems": []
}  # fmt: skip
REPOSITORY = {"repository": "some/flux1-fp8", "revision": "a" * 40}


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    rows = read.read(write_tables(tmp_path / "matrix"))
    cells = tuple(
        replace(cell, checks=(*cell.checks, "true-size", "compile")) if cell.id == PROVEN else cell
        for cell in rows.cells
    )
    return replace(rows, cells=cells)


def make(tables: Matrix, scope: str, *, fails: bool = False, **changes: Any) -> Evidence:
    """A record of the proven cell of a scope."""
    checks = scopes.list_checks(find(tables, PROVEN), scope)
    results = {name: CheckResult("pass", BUILT if name == "compile" else {}) for name in checks}
    if fails:
        results[checks[0]] = CheckResult("fail", message="too far")
    checkpoint = REPOSITORY if scope == PUBLISHED else {}
    tiny = "" if scope == PUBLISHED else " --tiny"
    return observe(
        tables, PROVEN, **{
            "checks": results, "checkpoint": checkpoint,
            "command": f"quantmatrix generate{tiny}", **changes,
        }
    )  # fmt: skip


def by_key(*made: Evidence) -> dict[str, Evidence]:
    return {scopes.key_of(record): record for record in made}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_is_derived_and_has_a_file_of_its_own(
    tables: Matrix, scope: str, tmp_path: Path
) -> None:
    record = make(tables, scope)
    assert scopes.read_scope(record) == scope
    path = store.write(record, tmp_path)
    suffix = "" if scope == STAND_IN else f".{scope.replace(' ', '-')}"
    assert path == tmp_path / "cpu" / f"fp8-flux-1+decode{suffix}.json"
    assert store.read_folder(tmp_path) == {scopes.key_of(record): record}
    assert scopes.cell_of(scopes.key_of(record)) == PROVEN
    assert records.path_of(f"fp8-flux-2@cpu{':true-size' * (scope == TRUE_SIZE)}").name == (
        "fp8-flux-2.true-size.json" if scope == TRUE_SIZE else "fp8-flux-2.json"
    )


def test_a_record_under_the_name_of_another_scope_is_refused(
    tables: Matrix, tmp_path: Path
) -> None:
    path = store.write(make(tables, STAND_IN), tmp_path)
    with pytest.raises(EvidenceError, match="holds the record of"):
        store.read(path.rename(path.with_name("fp8-flux-1+decode.published.json")))


def test_nothing_is_taken_for_more_than_it_shows(tables: Matrix) -> None:
    tiny = make(tables, PUBLISHED, command="quantmatrix generate --tiny")
    unknown = make(tables, PUBLISHED, checkpoint={"digest": "sha256:0", "files": []})
    assert scopes.read_scope(tiny) == scopes.read_scope(unknown) == STAND_IN
    refusal = observe(tables, REFUSED, command="quantmatrix plan --hardware h100 --tiny")
    assert scopes.read_scope(refusal) == STAND_IN


def test_checks_of_two_scopes_make_two_records(tables: Matrix) -> None:
    both = {**make(tables, STAND_IN).checks, **make(tables, TRUE_SIZE).checks}
    with pytest.raises(EvidenceError, match="true-size makes a record of its own"):
        store.encode(make(tables, STAND_IN, checks=both))


def test_a_snapshot_of_the_hub_has_an_origin_and_a_stand_in_has_none(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--flux1-fp8" / "snapshots" / ("a" * 40)
    files = [snapshot / "transformer" / name for name in ("a.safetensors", "b.safetensors")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_bytes(b"0")
    assert scopes.find_origin(files) == {}
    (tmp_path / "models--some--flux1-fp8" / "blobs").mkdir()
    assert scopes.find_origin(files) == REPOSITORY
    assert records.describe_files(iter(files))["revision"] == "a" * 40
    assert scopes.find_origin([*files, tmp_path / "c.safetensors"]) == {}
    assert scopes.find_origin([]) == {}


@pytest.mark.parametrize(
    ("given", "expected", "others"),
    [
        ({STAND_IN: False}, "proven · stand-in", ()),
        ({STAND_IN: False, TRUE_SIZE: False}, "proven · true size", ("stand-in",)),
        ({STAND_IN: False, PUBLISHED: False}, "proven · published", ("stand-in",)),
        ({STAND_IN: False, TRUE_SIZE: True}, "failing · true size", ("stand-in",)),
        ({STAND_IN: True, PUBLISHED: False}, "failing · stand-in", ("published",)),
        ({STAND_IN: True, TRUE_SIZE: True}, "failing · true size", ("stand-in",)),
        ({TRUE_SIZE: False}, "proven · true size", ()),
        ({COMPILED: False}, "proven · compiled", ()),
        ({COMPILED: False, STAND_IN: False}, "proven · stand-in", ("compiled",)),
        ({COMPILED: True, PUBLISHED: False}, "failing · compiled", ("published",)),
        ({}, "unproven", ()),
    ],
)
def test_the_strongest_pass_names_the_cell_and_no_failure_is_hidden(
    tables: Matrix, given: dict[str, bool], expected: str, others: tuple[str, ...]
) -> None:
    found = by_key(*(make(tables, scope, fails=fails) for scope, fails in given.items()))
    standing = stand(find(tables, PROVEN), found, tables)
    assert standing.label == expected
    assert tuple(scope for scope, _ in standing.others) == others
    counted = measure(tables, found).by_scope
    assert counted == ({standing.scope: 1} if standing.state == "proven" else {})


def test_what_is_stale_hides_no_pass(tables: Matrix) -> None:
    old = make(tables, PUBLISHED)
    old = replace(old, cell={**old.cell, "row_digest": "sha256:other"})
    standing = stand(find(tables, PROVEN), by_key(old, make(tables, STAND_IN)), tables)
    assert (standing.label, standing.others) == ("proven · stand-in", (("published", "stale"),))
    assert stand(find(tables, PROVEN), by_key(old), tables).label == "stale · published"


def test_every_scope_is_on_every_surface(tables: Matrix) -> None:
    found = by_key(*(make(tables, scope) for scope in (COMPILED, STAND_IN, TRUE_SIZE)))
    pages = render.render(tables, found)
    for name in ("support-matrix.md", "support-matrix.csv", "families/fp8.md", "index.html"):
        text = pages[name].decode()
        assert "true size" in text, name
        if name != "support-matrix.md":  # which links to the family's page
            assert "evidence/cpu/fp8-flux-1+decode.true-size.json" in text, name
    assert "1 proven · true size" in pages["support-matrix.svg"].decode()
    for other in ("json", "compiled.json"):
        assert f"evidence/cpu/fp8-flux-1+decode.{other}" in pages["index.html"].decode()
    assert "true size" in pages["badge.json"].decode()


def test_labels_go_from_strong_to_weak() -> None:
    labels = scopes.order_labels(STATES)
    words = ("published", "true size", "stand-in", "compiled")
    assert labels[:5] == (*(f"proven · {word}" for word in words), "proven")
    assert len(set(labels)) == len(STATES) * (len(SCOPES) + 1)
    assert [scopes.split_label(text) for text in ("proven · true size", "planned")] == [
        ("proven", "true size"), ("planned", "")
    ]  # fmt: skip


INVENTED = {"id": "flux-1-own", "reference": "quantmatrix/flux-1-own"}


@pytest.mark.parametrize(
    ("changes", "made", "used"),
    [
        ({}, "", "some/flux1-fp8"),
        (INVENTED, "--output-path ./flux-1-own", "--transformer-path ./flux-1-own"),
        (
            {**INVENTED, "base": "/path/to/base-model", "reference": "/path/to/it"},
            "--model-path some/flux-1 ",
            "--model-path some/flux-1 --transformer-path ./it",
        ),
    ],
)
def test_what_nobody_can_download_is_made(
    tmp_path: Path, changes: dict[str, str], made: str, used: str
) -> None:
    row = {**CHECKPOINTS[0], **changes}
    rows = [row, *CHECKPOINTS[1:], *([CHECKPOINTS[0]] if changes else [])]
    tables = read.read(write_tables(tmp_path / "m", checkpoints=rows))
    cell = replace(tables.cells[0], checkpoint=row["id"])
    found = offers.offer(cell, tables)
    assert bool(made) == bool(found.make)
    assert made in found.make
    assert used in found.run
    assert not any("quantmatrix/" in c or "/path/to" in c for c in found.commands)
    assert offers.NOT_RUN in found.title


def test_offers_of_all_cells_can_be_copied() -> None:
    """Every `quantmatrix quantize` of the real tables is one that its command takes."""
    from quantmatrix.cli.main import build_parser
    from quantmatrix.tools.quantize import find_scheme

    tables = read.read()
    made = {command for c in tables.cells if (command := offers.offer(c, tables).make)}
    assert len(made) > 30
    for command in sorted(made):
        given, rest = build_parser().parse_known_args(shlex.split(command)[1:])
        assert not rest
        assert not offers.is_invented(given.model_path)
        find_scheme(given.family, given.scheme, given.precision, given.rank)
        if given.family == "nunchaku-svdq":
            word = "int4" if given.precision == "int4" else "fp4"
            assert f"svdq-{word}_r{given.rank}-" in given.output_path
