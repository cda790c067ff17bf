"""Pages of other programs, of made-up cells: which columns there are, and every line of a table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.proof.scopes import Standing
from quantmatrix.report import page_data, programs, runtimes
from quantmatrix.report.runtimes import Runtimes, Shown

WORST = {"psnr_db": 41.26, "cosine": 0.998765}


def record(**given: Any) -> Any:
    fields = {
        "scope": "stand-in", "metrics": {"worst": WORST}, "version": "1.2", "commit": "c" * 40,
        "made": "2026-11-29T10:00:00Z", "command": "run *it*", "weights": {"b": 2, "a": 1},
        "tried": ("x", "y"), "again": "again", "log": "the log",
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **given})


SAID = SimpleNamespace(
    id="s1", runtime="p", family="fp8", models=("m1", "m2"), forms=("raw",), says="works",
    quote="it *works*", source="http://x", version="1.1", date="2026-11-28",
)  # fmt: skip


def cell(checkpoint: str, hardware: str, runtime: str) -> Any:
    name = f"{checkpoint}@{hardware}~{runtime}"
    return SimpleNamespace(id=name, checkpoint=checkpoint, hardware=hardware, runtime=runtime)


def shown(where: Any, state: str = "unproven", **given: Any) -> Shown:
    fields = {"reason": "", "said": "", "record": None, "statements": (), **given}
    return Shown(where, state, **fields)


def join(*cells: Shown, own: dict[str, str] | None = None, claims: Any = ()) -> Runtimes:
    """Columns of these cells; `own` has states of our cells."""
    found = object.__new__(Runtimes)
    names = dict.fromkeys(one.cell.checkpoint for one in cells)
    rows = {
        one.cell.runtime: SimpleNamespace(id=one.cell.runtime, name=one.cell.runtime.upper())
        for one in cells
    }
    found.tables = SimpleNamespace(  # type: ignore[assignment]
        checkpoints=names, cells=claims, runtimes=rows, statements={"s1": SAID},
        hardware=dict.fromkeys(("cpu", "h100", "b200")),
    )  # fmt: skip
    found.standings = {name: Standing(state, "", "stand-in") for name, state in (own or {}).items()}
    found.cells = {one.cell.id: one for one in cells}
    return found


def test_columns_that_are_shown() -> None:
    ran = {"record": record()}
    found = join(
        shown(cell("a", "cpu", "p")),
        shown(cell("a", "h100", "p")),
        shown(cell("b", "cpu", "p")),
        shown(cell("b", "h100", "p"), "works", **ran),
        shown(cell("a", "h100", "q")),
        shown(cell("a", "cpu", "q")),
        shown(cell("a", "cpu", "r"), "works", **ran),
        shown(cell("a", "b200", "r"), "crashes", **ran),
    )
    assert found.heads == [("p", "h100"), ("q", "h100"), ("r", "cpu"), ("r", "b200")]
    assert [one.cell.id for one in found.list_recorded()] == ["b@h100~p", "a@cpu~r", "a@b200~r"]
    assert found.find("b", "p", "h100").state == "works"


def test_our_own_state_beside_them() -> None:
    claims = [
        SimpleNamespace(id=name, checkpoint="a", hardware=where, claim=claim)
        for name, where, claim in (
            ("1", "cpu", "expected"), ("2", "cpu", "expected"), ("3", "cpu", "refused"),
            ("4", "h100", "refused"),
        )
    ]  # fmt: skip
    own = {"1": "stale", "2": "unjudged", "3": "proven", "4": "refused"}
    found = join(shown(cell("a", "cpu", "p")), own=own, claims=claims)
    assert found.tell_own("a", "cpu") == "unjudged · stand-in"
    assert found.tell_own("a", "h100") == "refused · stand-in"
    assert found.tell_own("a", "b200") == "–"
    assert found.tell_own("b", "cpu") == "–"
    assert runtimes.write_columns(found) == (
        "| checkpoint | quantmatrix cpu | p cpu |\n| --- | --- | --- |\n"
        "| `a` | unjudged · stand-in | – |"
    )
    works = shown(cell("a", "h100", "p"), "works", record=record(), said="undocumented")
    lines = runtimes.write_columns(join(works, own=own, claims=claims)).splitlines()
    assert (
        lines[2]
        == "| `a` | refused · stand-in | [works · stand-in (undocumented)](runtimes/p/h100/a.json) |"
    )


def test_where_run_and_documentation_differ() -> None:
    assert runtimes.write_finds([]) == "Nowhere."
    one = shown(
        cell("a", "cpu", "p"), "refuses", record=record(), said="documented to work",
        statements=(SAID, SimpleNamespace(id="s2")),
    )  # fmt: skip
    assert runtimes.write_finds([one]) == (
        "| cell | run | documentation | statement |\n| --- | --- | --- | --- |\n"
        f"| [`a@cpu~p`]({one.file}) | refuses · stand-in | documented to work | `s1`, `s2` |"
    )


def test_what_runs_said() -> None:
    ran = shown(cell("a", "cpu", "p"), "works", record=record())
    failed = shown(
        cell("b", "cpu", "p"),
        "crashes",
        record=record(metrics={}, scope=""),
        reason="out | of memory",
    )
    bare = shown(cell("c", "cpu", "p"), "refuses", record=record(metrics={}))
    assert runtimes.write_runs([ran, failed, bare]).splitlines()[2:] == [
        f"| [`a@cpu~p`]({ran.file}) | works · stand-in | cosine 0.9988 | run \\*it\\* | 1.2 | 2026-11-29 |",
        f"| [`b@cpu~p`]({failed.file}) | crashes | out \\| of memory | run \\*it\\* | 1.2 | 2026-11-29 |",
        f"| [`c@cpu~p`]({bare.file}) | refuses · stand-in |  | run \\*it\\* | 1.2 | 2026-11-29 |",
    ]


def test_programs_and_statements() -> None:
    rows = {
        name: SimpleNamespace(
            id=name, name="N", kind="library", found="package x", minimum="0.4", home="http://y"
        )
        for name in ("quantmatrix", "p")
    }
    tables: Any = SimpleNamespace(runtimes=rows)
    assert runtimes.write_programs(tables).splitlines()[2:] == [
        "| `p` | N | library | package x | 0.4 | http://y | "
        "`quantmatrix run-column --runtime p --hardware auto` |"
    ]
    other: Any = SimpleNamespace(**{**vars(SAID), "models": (), "forms": (), "id": "s2"})
    said: Any = [SAID, other]
    assert runtimes.write_statements(said).splitlines()[2:] == [
        "| `s1` | p | `fp8` m1 m2 raw | works | it \\*works\\* | http:\\//x | 1.1 | 2026-11-28 |",
        "| `s2` | p | `fp8` | works | it \\*works\\* | http:\\//x | 1.1 | 2026-11-28 |",
    ]


def test_the_table_of_cells() -> None:
    ran = shown(cell("a", "cpu", "p"), "works", record=record(), said="x", reason="one\ntwo")
    text = runtimes.write_csv(join(ran, shown(cell("b", "cpu", "p"))))
    assert text.splitlines() == [
        "id,checkpoint,hardware,runtime,state,reason,said,version,scope,made,command,record",
        f"a@cpu~p,a,cpu,p,works,one,x,1.2,stand-in,2026-11-29T10:00:00Z,run *it*,{ran.file}",
        "b@cpu~p,b,cpu,p,unproven,,,,,,,",
    ]


@pytest.mark.parametrize(("states", "text"), [
    ((), "0 cells of other programs were run"),
    (("works", "works", "crashes"), "3 cells of other programs were run"),
])  # fmt: skip
def test_how_many_were_run(
    states: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "write_programs", lambda tables: "PROGRAMS")
    cells = [
        shown(cell(f"c{n}", "cpu", "p"), state, record=record()) for n, state in enumerate(states)
    ]
    page = runtimes.write_page(join(*cells, shown(cell("z", "cpu", "p"))))
    counts = "2 works, 1 crashes" if states else "none"
    end = f", each compared with the program's own run of the base model in BF16: {counts}. What a"
    assert f"\n\n{text}{end}" in page
    assert [part.partition("\n")[0] for part in page.split("\n## ")[1:]] == [
        *("Columns", "Where run and documentation differ", "Runs", "Programs", "What others say")
    ]


def test_lines_of_the_page_for_a_checkpoint() -> None:
    runs: list[dict[str, Any]] = [{"an": "earlier run"}]
    statements = (SimpleNamespace(id="s9", says="works"), SimpleNamespace(id="s1", says="works"))
    cells = [
        shown(cell("a", "cpu", "p"), "works", record=record(), said="x", statements=statements),
        shown(cell("a", "b200", "p"), "crashes", record=record(scope="odd", metrics={})),
    ]
    hardware, said = ["cpu", "h100", "b200"], ["s1", "s5", "s9"]
    lines = programs.list_cells(cells, hardware, said, runs)
    works, crashes = programs.SHOWN.index("works"), programs.SHOWN.index("crashes")
    assert lines == [
        [0, works, 1, "x", "41.3 dB", 1, [2, 0]],
        [2, crashes, -1, "", "", 2, []],
    ]
    assert runs[1]["weights"] == [("a", 1), ("b", 2)]
    assert runs[1]["worst"] == [["cosine", 0.998765], ["psnr_db", 41.26]]
    assert (runs[1]["tried"], runs[1]["log"]) == (["x", "y"], "the log")
    assert (len(runs), runs[2]["worst"]) == (3, [])
    unrun = [shown(cell("a", "cpu", "p"), statements=statements)]
    [line] = programs.list_cells(unrun, hardware, said, runs)
    documented = programs.SHOWN.index("documented")
    assert line[:3] == [-1, documented, -1]
    assert line[4:] == ["", -1, [2, 0]]
    assert programs.list_cells([shown(cell("a", "cpu", "p"))], hardware, said, runs) == []
    assert programs.is_known(cells[0])
    assert programs.is_known(unrun[0])
    assert not programs.is_known(shown(cell("a", "cpu", "p")))


def test_programs_of_the_page() -> None:
    ran = {"record": record()}
    found = programs.collect(
        join(
            shown(cell("a", "h100", "p")),
            shown(cell("a", "cpu", "p"), "works", **ran),
            shown(cell("a", "cpu", "q")),
            shown(cell("a", "b200", "quantmatrix"), "works", **ran),
        )
    )
    assert found["programs"] == [["p", "P", [0, 1]]]
    assert [line[:3] for line in found["others"]] == [[0, 0, 0]]
    assert found["verdicts"][0][0] == "works"
    assert found["verdicts"][-1] == ["documented", "its documentation says so"]
    assert found["statements"] == [["works", "it *works*", "http://x", "1.1", "2026-11-28"]]
    assert len(found["runs"]) == 1


def test_checks_of_a_record() -> None:
    shared = page_data.Shared()
    pictures = {**dict.fromkeys(page_data.KEYS, "png"), "gain": 8, "shown": "step 3"}
    check: Any = SimpleNamespace(
        verdict="pass", message="m", limits={"psnr_db": {"at_least": 20}},
        metrics={
            "worst": {"psnr_db": 41.0}, "steps": [{"psnr_db": 1, "cosine": 2}], "final": {"x": 1},
            "thumbnails": pictures,
        },
    )  # fmt: skip
    found = page_data.describe_check("latents", check, shared)
    assert found["metrics"] == [("worst.psnr_db", 41.0)]
    assert found["steps"] == [[1, 2, None]]
    assert (found["limits"], shared.values[0]) == (0, [("psnr_db.at_least", 20)])
    assert found["pictures"] == [1] * len(page_data.PICTURES)
    assert (found["gain"], found["shown"]) == (8, "step 3")
    check.metrics = {"steps": [], "thumbnails": {"gain": 1}}
    found = page_data.describe_check("latents", check, shared)
    assert set(found) == {"name", "verdict", "message", "metrics", "limits"}
    witness = page_data.describe_witness(
        {"verdict": "agrees", "bytes": 3, "seconds": 2, "kinds": [{"kind": "attn", "cosine": 0.5}]}
    )
    assert witness == [("verdict", "agrees"), ("cosine of attn", 0.5)]
