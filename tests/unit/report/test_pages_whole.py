"""Pages of small tables with three records, section by section, and the options that come of them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from observed import PROVEN, REFUSED, observe
from tables import write_tables

from quantmatrix.errors import UsageError
from quantmatrix.proof.joined import Joined
from quantmatrix.proof.plans import PlanLine
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.proof.scopes import Standing
from quantmatrix.proof.states import stand_all
from quantmatrix.report import (
    answers,
    explain,
    fragments,
    markdown,
    overview,
    page_data,
    render,
)
from quantmatrix.report.history import Version
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

FAILING = "fp8-flux-1@h100+decode"
PARTS = {
    "transformer": {
        "quantized_layers": 26,
        "total_layers": 31,
        "backends": {"torch": 6, "decode": 20},
    },
    "transformer_2": {"quantized_layers": 2, "total_layers": 3, "backends": {"decode": 2}},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return read.read(write_tables(tmp_path_factory.mktemp("project") / "matrix"))


@pytest.fixture(scope="module")
def evidence(tables: Matrix) -> dict[str, Evidence]:
    plan = {"refusal": None, "components": PARTS}
    return {
        PROVEN: observe(tables, PROVEN, plan=plan),
        FAILING: observe(tables, FAILING, fails="latents"),
        REFUSED: observe(tables, REFUSED),
    }


@pytest.fixture(scope="module")
def joined(tables: Matrix, evidence: dict[str, Evidence]) -> Joined:
    return Joined(tables, stand_all(tables, evidence))


def sections(text: str) -> dict[str, str]:
    """What stands below each heading of two marks."""
    parts = text.split("\n## ")
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def test_the_page_of_a_family(joined: Joined) -> None:
    text = markdown.write_family(joined, joined.tables.families["fp8"])
    found = sections(text)
    assert list(found)[1:] == [
        *("Checkpoints", "What was measured", "To be looked at", "Commands", "Format")
    ]
    assert text.partition("\n\n## ")[0] == (
        "<!-- Rendered by `quantmatrix report` from matrix/ and reports/evidence/: do not edit. -->"
        "\n\n# fp8\n\n[All families](../support-matrix.md)\n\n"
        "- checkpoint form: svdq-{int4|fp4}_r{rank}-...\n"
        "- canonical CLI: `--transformer-path`\n"
        "- supported models: some\n"
        "- extra dependency: None\n"
        "- platform / notes: about fp8\n"
        "- cells: 1 proven · stand-in, 1 failing · stand-in, 3 unproven"
    )
    head = (
        "| row | hardware | backend | claim | state | PSNR dB | proof |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    assert found["Checkpoints"] == (
        "### flux-1-fp8\n\n"
        "flux-1: `some/flux1-fp8`. single-transformer override. a | b\n\n"
        f"{head}"
        "| `fp8-flux-1` | cpu | reference | expected | ? unproven |  |  |\n"
        "| `fp8-flux-1` | cpu | decode | expected | ✓ proven · stand-in | 41.25 | "
        "[record](../evidence/cpu/fp8-flux-1+decode.json) |\n"
        "| `fp8-flux-1` | h100 | reference | expected | ? unproven |  |  |\n"
        "| `fp8-flux-1` | h100 | decode | expected | ✗ failing · stand-in |  | "
        "[record](../evidence/h100/fp8-flux-1+decode.json) |\n\n"
        "### flux-2-fp8\n\n"
        "flux-2: `some/flux2-fp8`\n\n"
        f"{head}"
        "| `fp8-flux-2` | cpu |  | validated | ? unproven |  |  |"
    )
    assert found["What was measured"] == (
        "With random weights at a tiny size.\n\n"
        "| cell | scope | layers | kernels | PSNR dB | cosine | relative L2 | torch | made |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| [fp8-flux-1@cpu+decode](../evidence/cpu/fp8-flux-1+decode.json) | stand-in | "
        "26 of 31 + 2 of 3 | decode (22), torch (6) | 41.25 | 0.9991 | 0.01234 | 2.13.0+cpu | "
        "2026-11-23 |"
    )
    assert found["To be looked at"] == (
        "- [fp8-flux-1@h100+decode](../evidence/h100/fp8-flux-1+decode.json): latents: too far"
    )
    assert found["Commands"] == "\n\n".join(
        [
            "`fp8-flux-1`",
            "Ran (stand-in, `fp8-flux-1@cpu+decode`):",
            show_command(1, "  --backend decode \\\n"),
            "With the published repository: not yet run:",
            show_command(1, "  --backend reference \\\n"),
            "`fp8-flux-2`",
            "With the published repository: not yet run:",
            show_command(2, ""),
        ]
    )


def show_command(number: int, backend: str) -> str:
    """A command of the page, one flag a line."""
    return (
        f"```bash\nquantmatrix generate \\\n  --model-path some/flux-{number} \\\n"
        f"  --transformer-path some/flux{number}-fp8 \\\n{backend}"
        "  --prompt 'a curious pikachu'\n```"
    )


def test_the_page_of_a_family_that_is_refused(joined: Joined) -> None:
    found = sections(markdown.write_family(joined, joined.tables.families["nunchaku-svdq"]))
    assert list(found)[1:] == ["Checkpoints", "Refusals", "Commands", "Format"]
    link = "[h100](../evidence/h100/svdq-flux-1-hopper.json)"
    assert found["Refusals"] == (
        f"- `svdq-flux-1-hopper` on {link}: `svdq-arch`: no integer units; use cpu"
    )
    assert found["Checkpoints"].splitlines()[-3:] == [
        "| `svdq-flux-1-hopper` | h100 |  | refused (`svdq-arch`) | ⊘ refused · stand-in |  | "
        "[record](../evidence/h100/svdq-flux-1-hopper.json) |",
        "| `svdq-flux-1` | cpu |  | planned | … planned |  |  |",
        "| `svdq-flux-1` | b200 |  | planned | … planned |  |  |",
    ]


def test_the_overview(joined: Joined) -> None:
    text = overview.write_overview(joined, "CLASSES")
    found = sections(text)
    assert "\n2 of 6 claims (33.3 %) are backed by a run of the row as it stands. " in text
    first = found[
        "<!-- Rendered by `quantmatrix report` from matrix/ and reports/evidence/: do not edit. -->"
    ]
    assert first.partition("[index.html](index.html).\n\n")[2] == (
        "| scope | what was run | claims |\n| --- | --- | --- |\n"
        "| `compiled` | kernels built, nothing run | 0 |\n"
        "| `stand-in` | random weights at a tiny size | 2 |\n"
        "| `true size` | random weights at true size | 0 |\n"
        "| `published` | published weights | 0 |\n\n"
        "![Support matrix: quant family by hardware](support-matrix.svg)\n\n"
        "| state and scope | cells |\n| --- | --- |\n"
        "| proven · stand-in | 1 |\n| refused · stand-in | 1 |\n| failing · stand-in | 1 |\n"
        "| unproven | 3 |\n| planned | 2 |"
    )
    assert found["Families and hardware"].splitlines()[-3:] == [
        "| `cpu` | ✓ 1 ? 2 | – | – | … 1 | – | – | – |",
        "| `h100` | ✗ 1 ? 1 | – | – | ⊘ 1 | – | – | – |",
        "| `b200` | – | – | – | … 1 | – | – | – |",
    ]
    families = found["Quant families"].splitlines()
    form = "svdq-{int4\\|fp4}_r{rank}-... | `--transformer-path` | some | None"
    assert f"| `fp8` | {form} | [✓ 1 ✗ 1 ? 3](families/fp8.md) |" in families
    assert f"| `gguf` | {form} | [–](families/gguf.md) |" in families
    assert families[-3:] == ["- `msmodelslim`: about msmodelslim", "", "CLASSES"]
    assert found["Validated ModelOpt checkpoints"] == (
        "| Quant Algo | Base Model | Preferred CLI | HF Repo | Proof |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `FP8` | `some/flux-1` | `--transformer-path` | `some/flux1-fp8` | "
        "[✓ 1 ✗ 1 ? 2](families/fp8.md#flux-1-fp8) |\n\n"
        "- `some/flux1-fp8`: single-transformer override; a | b"
    )
    assert "Other programs" not in found
    assert "CLASSES" not in overview.write_overview(joined)


def test_a_share_is_a_tenth_of_a_percent_at_most_too_small(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "agrees", lambda cell: cell.id != FAILING)
    assert "\n5 of 6 claims (83.3 %) are backed by a run" in overview.write_overview(joined)


def test_the_overview_of_tables_without_a_claim(tables: Matrix) -> None:
    none = replace(tables, cells=tables.cells[-2:])
    joined = Joined(none, stand_all(none, {}))
    assert "\n0 of 0 claims (no) are backed by a run" in overview.write_overview(joined)
    assert overview.write_carried(joined) == []


def test_records_that_are_carried(joined: Joined) -> None:
    like: Any = SimpleNamespace(
        reasons={"a": f"{overview.CARRYING} x", "b": "", "c": f"{overview.CARRYING} y"}
    )
    assert overview.write_carried(like) == [
        "2 of these records are *carried*: the code has changed since, and the latents of the same "
        "cells on a CPU have not, to the last bit ([carried.csv](carried.csv))."
    ]


def test_tables_for_other_pages(joined: Joined) -> None:
    columns = ("cell", "psnr_db", "cosine", "made", "reason=Why", "state")
    rows = list(csv.reader(io.StringIO(fragments.render(joined, "cells", "csv", columns))))
    assert rows[0] == ["cell", "PSNR dB", "cosine", "date", "Why", "state"]
    assert rows[2] == [PROVEN, "41.25", "0.9991", "2026-11-23", "", "proven"]
    assert rows[4] == [FAILING, "", "", "2026-11-23", "latents: too far", "failing"]
    assert rows[8] == ["svdq-flux-1@b200", "", "", "", "", "planned"]
    assert fragments.render(joined, "checkpoints", "md") == (
        "\n| Quant Algo | Base Model | Preferred CLI | HF Repo | Current Scope | Notes |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| `FP8` | `some/flux-1` | `--transformer-path` | `some/flux1-fp8` | "
        "single-transformer override | a \\| b |\n"
    )
    states = fragments.render(joined, "checkpoints", "csv", ("checkpoint", "states=How"))
    assert states == (
        'Checkpoint,How\nflux-1-fp8,"1 proven · stand-in, 1 failing · stand-in, 2 unproven"'
    )
    families = fragments.render(joined, "families", "csv", ("family", "states", "notes=N"))
    lines = families.splitlines()
    assert lines[0] == "quant_family,states,N"
    assert lines[4] == 'nunchaku-svdq,"1 refused · stand-in, 2 planned",about nunchaku-svdq'
    assert lines[6] == "gguf,,about gguf"
    assert len(lines) == 8
    assert fragments.render(joined, "cells", "html", ("cell", "rule")).count("<code>") == 9


@pytest.mark.parametrize(
    ("name", "form", "columns", "said"),
    [
        ("rows", "md", (), "rows: no such table; known: families, checkpoints, cells"),
        ("cells", "pdf", (), "--format pdf: known: md, rst, html, csv"),
        (
            "checkpoints",
            "md",
            ("algo", "state=X"),
            "--columns state: not a column of checkpoints; known: algo, base, cli, reference, scope, "
            "notes, states, checkpoint, family",
        ),
    ],
)
def test_tables_that_there_are_not(
    name: str, form: str, columns: tuple[str, ...], said: str, joined: Joined
) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        fragments.render(joined, name, form, columns)


def test_the_table_of_all_cells(joined: Joined) -> None:
    rows = list(csv.DictReader(io.StringIO(render.write_csv(joined))))
    assert len(rows) == 8
    proven, failing, refused = rows[1], rows[3], rows[5]
    assert (proven["worst_psnr_db"], proven["worst_cosine"]) == ("41.25", "0.9991")
    assert (proven["evidence"], proven["made"]) == (
        "evidence/cpu/fp8-flux-1+decode.json", "2026-11-23T10:00:00Z",
    )  # fmt: skip
    assert (failing["reason"], failing["scope"]) == ("latents: too far", "stand-in")
    assert (refused["rule"], refused["state"], refused["worst_cosine"]) == (
        "svdq-arch",
        "refused",
        "",
    )
    assert (rows[0]["made"], rows[0]["command_run"], rows[0]["evidence"]) == ("", "", "")


def standing(joined: Joined, cell: str, state: str, scope: str, record: Any = None) -> Joined:
    """The tables with one cell in another state."""
    standings: Mapping[str, Standing] = {
        **joined.standings, cell: Standing(state, "why\nmore", scope, record)
    }  # fmt: skip
    return Joined(joined.tables, dict(standings))


@pytest.mark.parametrize(
    ("state", "scope", "proof"),
    [
        ("proven", "stand-in", 0),
        ("proven", "published", 0),
        ("proven", "compiled", 1),
        ("unjudged", "true size", 0),
        ("unjudged", "compiled", 1),
        ("stale", "stand-in", 2),
        ("unproven", "compiled", 2),
        ("unproven", "", 2),
    ],
)
def test_how_much_of_a_cell_ran(state: str, scope: str, proof: int, joined: Joined) -> None:
    cell = joined.tables.cells[1]
    changed = standing(joined, cell.id, state, scope)
    known = answers.Measured(changed, {})
    found = answers.describe_cell(changed, known, None, cell)
    assert (found.proof, found.state, found.scope) == (proof, state, scope)
    assert (found.kernel, found.evidence, found.weights_mib) == ("decode", "", None)


def plan_line(**given: Any) -> Any:
    fields = {
        "rule": "", "message": "", "backends": ("torch", "decode"), "numerics": ("n",),
        "whole_mib": 300, "largest_mib": 200, "layerwise_mib": 100, "movable": True,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **given})


def test_an_option_of_a_record_and_of_a_plan(joined: Joined, evidence: dict[str, Evidence]) -> None:
    known = answers.Measured(joined, evidence)
    cell = joined.tables.cells[1]
    found = answers.describe_cell(joined, known, plan_line(), cell)
    assert found.kernel == "torch + decode"
    assert (found.weights_mib, found.largest_mib, found.layerwise_mib, found.movable) == (
        *(300, 200, 100, True),
    )
    assert (found.psnr_db, found.relative_l2, found.error_on) == (41.25, 0.01234, "cpu, stand-in")
    assert found.evidence == "evidence/cpu/fp8-flux-1+decode.json"
    refused = answers.describe_cell(joined, known, plan_line(rule="r"), joined.tables.cells[0])
    assert (refused.weights_mib, refused.kernel) == (None, "torch + decode")
    option = answers.describe_plan(joined, known, plan_line(), ("flux-1-fp8", "b200"))
    assert (option.cell, option.proof, option.kernel) == ("", 3, "torch + decode")
    assert (option.hardware, option.scope_label) == ("b200", "plan alone")
    assert option.commands[-1].endswith("--prompt 'a curious pikachu'")
    assert "--backend" not in option.commands[-1]


@pytest.mark.parametrize(
    ("claim", "state", "line", "kinds"),
    [
        ("expected", "proven", None, ["cell"]),
        ("expected", "proven", plan_line(rule="r"), ["cell"]),
        ("expected", "stale", plan_line(rule="r"), []),
        ("expected", "stale", plan_line(), ["cell"]),
        ("expected", "failing", plan_line(), ["plan"]),
        ("expected", "failing", plan_line(rule="r"), []),
        ("expected", "failing", None, []),
        ("refused", "proven", plan_line(), ["plan"]),
        ("failing", "proven", plan_line(), ["plan"]),
        ("planned", "unproven", None, []),
    ],
)
def test_options_of_a_checkpoint(
    claim: str, state: str, line: PlanLine | None, kinds: list[str], joined: Joined
) -> None:
    cell = replace(joined.tables.cells[4], claim=claim)
    changed = standing(joined, cell.id, state, "stand-in")
    pair = (cell.checkpoint, cell.hardware)
    plans: Any = {(*pair, ""): line} if line else {}
    known = answers.Measured(changed, {})
    found = list(answers.list_options(changed, known, plans, pair, [cell]))
    assert ["cell" if one.cell else "plan" for one in found] == kinds


@pytest.mark.parametrize(
    ("cells", "line", "rule", "message"),
    [
        ([5], plan_line(rule="r", message="m"), "r", "m"),
        ([3], plan_line(), "failing", "latents: too far"),
        ([5], None, "svdq-arch", "no 4-bit integer matrix units"),
        ([5, 3], None, "failing", "latents: too far"),
        ([0], None, "", "no row claims it, and no plan was made: see `quantmatrix plan`"),
        ([], None, "", "no row claims it, and no plan was made: see `quantmatrix plan`"),
    ],
)
def test_why_a_checkpoint_is_no_option(
    cells: list[int], line: Any, rule: str, message: str, joined: Joined
) -> None:
    pair = ("flux-1-fp8", "h100")
    given = [joined.tables.cells[n] for n in cells]
    found = answers.say_no(joined, {(*pair, ""): line} if line else {}, pair, given)
    assert (found.checkpoint, found.model, found.hardware) == ("flux-1-fp8", "flux-1", "h100")
    assert (found.rule, found.message) == (rule, message)


def timed(hardware: str, **given: Any) -> Any:
    metrics = {"peak": {"quantized_bytes": 5 * 2**30 + 2**19 + 1}}
    fields = {
        "timings": {"step quantized": 2.0, "step bf16": 3.0},
        "checks": {"true-size": CheckResult("pass", metrics)},
        "plan": {"components": {"transformer": {"backends": {"torch": 1}, "numerics": {"n": 1}}}},
        "cell": {"hardware": hardware},
    }
    return SimpleNamespace(**{**fields, **given})


def measured(tables: Matrix, records: list[tuple[int, str, Any]]) -> answers.Measured:
    """Records of cells by their number and scope."""
    like: Any = SimpleNamespace(tables=replace(tables, cells=()))
    found = answers.Measured(like, {})
    for number, scope, record in records:
        cell = tables.cells[number]
        found.by_checkpoint.setdefault(cell.checkpoint, []).append((cell, scope, record))
    return found


def test_steps_and_peaks_of_the_nearest_record(tables: Matrix) -> None:
    cpu, gpu, here = (
        tables.cells[0],
        tables.cells[3],
        replace(tables.cells[3], id="", hardware="b200"),
    )
    slow = timed("cpu", timings={"step quantized": 9.0, "step bf16": 2.0})
    known = measured(tables, [(1, "true size", slow), (3, "true size", timed("h100"))])
    assert known.find_step(here, "torch") == {"step": 0.667, "step_on": "h100"}
    assert known.find_step(cpu, "torch") == {"step": 4.5, "step_on": "cpu"}
    assert known.find_step(gpu, "decode") == {}
    assert known.find_peak(here, "torch") == {"peak_mib": 5121, "peak_on": "h100"}
    known.transformers[here.model] = 2
    assert known.find_peak(here, "torch")["peak_on"] == "h100, one transformer"
    tiny = measured(tables, [(3, "stand-in", timed("h100"))])
    assert tiny.find_step(here, "torch") == {}
    for times in ({"step quantized": 2.0}, {"step bf16": 2.0}, {}):
        bare = measured(tables, [(3, "true size", timed("h100", timings=times))])
        assert bare.find_step(here, "torch") == {}
    none = timed(
        "h100", checks={"true-size": CheckResult("pass", {"peak": {"quantized_bytes": 0}})}
    )
    assert measured(tables, [(3, "true size", none)]).find_peak(here, "torch") == {}


def test_errors_of_the_nearest_record(tables: Matrix) -> None:
    def near(value: float, numerics: tuple[str, ...] = ("n",)) -> Any:
        metrics = {"worst": {"psnr_db": value, "relative_l2": value / 100}}
        part = {"backends": {"torch": 1}, "numerics": dict.fromkeys(numerics, 1)}
        return SimpleNamespace(
            checks={"latents": CheckResult("pass", metrics)},
            plan={"components": {"transformer": part}},
        )

    here = tables.cells[3]
    records = [
        (0, "published", near(30.0)),
        (2, "stand-in", near(40.0)),
        (2, "true size", near(50.0)),
    ]
    known = measured(tables, records)
    assert known.find_error(here, ("n",)) == {
        "psnr_db": 50.0, "relative_l2": 0.5, "error_on": "h100, true size",
    }  # fmt: skip
    assert known.find_error(here, ("other",)) == {}
    assert known.find_error(here, ()) == {}
    own = measured(tables, [*records, (3, "stand-in", near(20.0, ("other",)))])
    assert own.find_error(here, ("n",))["psnr_db"] == 20.0
    far = replace(here, id="x", hardware="b200")
    assert measured(tables, records[:1]).find_error(far, ("n",))["error_on"] == "cpu, published"
    assert known.find_error(far, ("n",))["error_on"] == "h100, true size"
    compiled = measured(tables, [(3, "compiled", near(20.0))])
    assert compiled.find_error(here, ("n",)) == {}


def test_kernels_and_numerics_of_a_record() -> None:
    parts = {
        "b": {"backends": {"torch": 1, "decode": 2}, "numerics": {"z": 1, "a": 2}},
        "c": {"backends": {}, "numerics": {"x": 1}},
        "a": {"backends": {"decode": 1, "native": 1}, "numerics": ["old"]},
    }
    record: Any = SimpleNamespace(plan={"components": parts})
    assert answers.list_kernels(record) == ("torch", "decode", "native")
    assert answers.list_numerics(record) == ("a", "z")
    assert (answers.list_kernels(None), answers.list_numerics(None)) == ((), ())


def test_why_a_cell_is_as_it_is(tables: Matrix, evidence: dict[str, Evidence]) -> None:
    asked = explain.Explainer(tables, evidence)
    cells = {cell.id: cell for cell in tables.cells}
    said = "load and latents passed on 2026-11-23 with random weights at a tiny size"
    assert asked.say_why(cells[PROVEN]) == f"{said}, 41.25 dB from BF16 at the worst step"
    assert asked.say_why(cells[REFUSED]) == "rule svdq-arch: no integer units; use cpu"
    assert asked.say_why(cells[FAILING]) == "latents: too far"
    assert asked.say_why(cells["svdq-flux-1@cpu"]) == "no kernel yet"
    assert asked.say_why(cells["fp8-flux-2@cpu"]) == "no run yet"
    asked.standings[PROVEN] = replace(asked.standings[PROVEN], reason="carried")
    assert asked.say_why(cells[PROVEN]).endswith("at the worst step; carried")
    record: Any = SimpleNamespace(
        made="2026-11-23T10:00:00Z",
        checks={
            "compile": CheckResult("pass", {"arch": "sm90", "triton": "3.3", "kernels": "a x 2"})
        },
    )
    asked.standings[PROVEN] = Standing("proven", "", "compiled", record)
    assert asked.say_why(cells[PROVEN]) == (
        "compiled for sm90, never run: Triton 3.3 built the kernels at true size on 2026-11-23, and "
        "they fit (a x 2); their numbers are proven on a CPU only, by Triton's interpreter and the "
        "backend reference"
    )
    asked.standings[REFUSED] = Standing("unproven", "no run yet")
    assert asked.say_why(cells[REFUSED]) == (
        "rule svdq-arch: no 4-bit integer matrix units (no run yet)"
    )
    asked.standings["svdq-flux-1@b200"] = Standing("planned", "")
    bare = replace(cells["svdq-flux-1@b200"], notes="")
    assert asked.say_why(bare) == "planned"


def test_what_may_be_used_instead(tables: Matrix, evidence: dict[str, Evidence]) -> None:
    asked = explain.Explainer(tables, evidence)

    def instead(cell: str) -> list[tuple[str, str, str]]:
        [found] = [one for one in explained if one.cell == cell]
        return [(one.how, one.cell, one.state) for one in found.alternatives]

    explained = asked.explain("flux-1-fp8", "all")
    assert [one.cell for one in explained] == [
        "fp8-flux-1@cpu+reference", PROVEN, "fp8-flux-1@h100+reference", FAILING, "",
    ]  # fmt: skip
    assert instead(PROVEN) == []
    assert instead("fp8-flux-1@cpu+reference") == [
        ("other backend", PROVEN, "proven"),
        ("other hardware", "fp8-flux-1@h100+reference", "unproven"),
    ]
    assert instead(FAILING) == [
        ("other hardware", PROVEN, "proven"),
        ("other backend", "fp8-flux-1@h100+reference", "unproven"),
    ]
    gap = explained[-1]
    assert (gap.state, gap.title, gap.hardware) == ("unclaimed", "To plan it", "b200")
    assert gap.why == "no row of cases.csv names flux-1-fp8 on b200; the command plans it"
    assert gap.commands == (
        "quantmatrix plan --model-path some/flux-1 --transformer-path some/flux1-fp8 --hardware b200",
    )
    assert [one.how for one in gap.alternatives] == ["other hardware"]
    [refused] = asked.explain("flux-1-svdq", "h100")
    assert [one.how for one in refused.alternatives] == ["other checkpoint"]
    assert refused.alternatives[0].cell == "fp8-flux-1@h100+reference"


def test_records_whose_numbers_count(joined: Joined, evidence: dict[str, Evidence]) -> None:
    def list_cells(given: Joined) -> dict[str, list[str]]:
        found = answers.Measured(given, evidence).by_checkpoint
        return {name: [cell.id for cell, _, _ in lines] for name, lines in found.items()}

    assert list_cells(joined) == {"flux-1-fp8": [PROVEN]}
    assert list_cells(standing(joined, REFUSED, "proven", "stand-in")) == {"flux-1-fp8": [PROVEN]}
    assert list_cells(standing(joined, PROVEN, "stale", "stand-in")) == {}
    unjudged = standing(joined, FAILING, "unjudged", "stand-in")
    assert list_cells(unjudged) == {"flux-1-fp8": [PROVEN, FAILING]}


def test_what_the_page_knows(joined: Joined, evidence: dict[str, Evidence]) -> None:
    option = answers.Option(
        *("flux-1-fp8", "flux-1", "cpu", "fp8", "r", "k"),
        cell=PROVEN,
        proof=0,
        psnr_db=41.26,
        error_on="cpu, stand-in",
    )
    found = answers.Answers((option, replace(option, cell="", psnr_db=1.0)), ())
    past = {REFUSED: [Version("stand-in", "2026-11-20", "a" * 40, "refused", None, None)]}
    data = page_data.collect(joined, found, past)
    assert data["rows"] == [
        ["fp8-flux-1", 0, 0, 0],
        ["fp8-flux-2", 0, 1, 1],
        ["svdq-flux-1-hopper", 3, 0, 2],
        ["svdq-flux-1", 3, 0, 2],
    ]
    states, scopes = data["states"], data["scopes"]
    cells = data["cells"]
    assert [line[:3] for line in cells] == [
        *([0, 0, "reference"], [0, 0, "decode"], [0, 1, "reference"], [0, 1, "decode"]),
        *([1, 0, ""], [2, 1, ""], [3, 0, ""], [3, 2, ""]),
    ]
    assert [states[line[3]] for line in cells[:2]] == ["unproven", "proven"]
    assert [line[4] for line in cells] == [-1, 1, -1, 1, -1, 1, -1, -1]
    assert scopes[1] == "stand-in"
    assert [line[5] for line in cells[3:6]] == ["expected", "validated", "refused"]
    assert [line[6] for line in cells[4:6]] == ["", "svdq-arch"]
    assert [line[7] for line in cells[4:]] == [
        *("no run yet", "no 4-bit integer matrix units", "no kernel yet", "no kernel yet")
    ]
    assert [line[9] for line in cells] == [None, 0, None, 1, None, 2, None, None]
    assert [line[11] for line in cells] == ["", "41.3 dB", "", "", "", "", "", ""]
    shared = data["shared"]
    assert shared[cells[4][8]][0] == "With the published repository: not yet run"
    assert data["checkpoints"] == [
        ["flux-1-fp8", "some/flux1-fp8", "some/flux-1", 0, 0],
        ["flux-2-fp8", "some/flux2-fp8", "some/flux-2", 0, 1],
        ["flux-1-svdq", "some/svdq/svdq-int4_r32-flux1.safetensors", "some/flux-1", 3, 0],
    ]
    assert data["hardware"][1] == ["h100", "H100", "sm90", 0.0]
    assert data["models"][2] == ["wan-2-2", "wan-2-2"]
    assert list(data["history"]) == ["5"]
    assert (data["benchmarks"], data["speed"]) == ({}, [])
    record = data["records"][0]
    assert record["file"] == "evidence/cpu/fp8-flux-1+decode.json"
    parts = dict(shared[record["plan"]]["transformer"])
    assert parts == {
        "backends.decode": 20, "backends.torch": 6, "quantized_layers": 26, "total_layers": 31,
    }  # fmt: skip
    assert [check["name"] for check in record["checks"]] == ["latents", "load"]
    assert data["records"][2]["refusal"] == "no integer units; use cpu"


def test_what_was_timed_on_the_page(joined: Joined) -> None:
    metrics = {
        "weights": {"bf16_bytes": 8, "quantized_bytes": 5},
        "peak": {"bf16_bytes": 9, "quantized_bytes": "?"},
    }
    record: Any = SimpleNamespace(
        checks={"true-size": CheckResult("pass", metrics)},
        timings={"step bf16": 2.5, "step quantized": 1.5},
    )

    def list_speeds(state: str, scope: str, given: Any) -> list[list[Any]]:
        changed: Any = SimpleNamespace(
            tables=joined.tables,
            standings={**joined.standings, FAILING: Standing(state, "", scope, given)},
        )
        return page_data.list_speeds(changed)

    assert list_speeds("proven", "true size", record) == [[3, 2.5, 1.5, 8, 5, 9, None]]
    assert list_speeds("stale", "true size", record) == []
    assert list_speeds("proven", "published", record) == []
    assert list_speeds("proven", "true size", None) == []
