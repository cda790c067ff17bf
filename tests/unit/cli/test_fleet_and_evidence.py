"""Small parts of `fleet`, `evidence`, `summary`, `agreement` and `recommend`, their work replaced."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from datetime import date, datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm
from tables import write_tables

from quantmatrix.cli import agreement, fleet
from quantmatrix.errors import UsageError
from quantmatrix.fleet import answers, cluster, engine
from quantmatrix.harness.completeness import Comparison
from quantmatrix.proof.agreement import Agreement, Share, Task
from quantmatrix.report import explain
from quantmatrix.report.answers import Option
from quantmatrix.report.recommend import Recommendation
from quantmatrix.tables import read

Run = Callable[..., tuple[int, str, str]]
Replace = Callable[..., list[Any]]


def test_the_bar_begins_with_what_needs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **given: Any) -> None:
            self.given, self.moved = given, []
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: int) -> None:
            self.moved.append(count)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    groups = [SimpleNamespace(cells="ab"), SimpleNamespace(cells="cde"), SimpleNamespace(cells="f")]
    waiting = {"cpu": groups[:2], "h100": groups[2:]}
    driver = SimpleNamespace(waiting=waiting, run=lambda move: move(4))
    fleet.run_with_bar(driver, 9)
    [bar] = bars
    assert bar.given == {"total": 9, "desc": "fleet", "unit": "cell", "disable": None}
    assert bar.moved == [3, 4]


def test_what_the_nodes_of_a_cluster_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def find_sites(nodes: Any, probes: Any, tables: Any, source: str) -> Any:
        seen.update(probes)
        return {}, {"x": "why"}

    def decode(data: bytes, kind: Any) -> str:
        assert kind is answers.Probe
        if data == b"bad":
            raise answers.AnswerError("no JSON")
        return f"read {data.decode()}"

    monkeypatch.setattr(cluster, "find_sites", find_sites)
    monkeypatch.setattr(answers, "read", decode)
    found = {"1": b"good", "2": b"bad", "3": engine.Failure("gone")}
    ray: Any = SimpleNamespace(list_nodes=lambda: ["n"], probe=lambda nodes: found)
    assert fleet.look_around(ray, "tables") == ({}, {"x": "why"})  # type: ignore[arg-type]
    assert seen == {"1": "read good", "2": "it gave no answer: no JSON", "3": "gone"}


def test_records_that_are_there(tmp_path: Path, replace: Replace) -> None:
    assert fleet.read_kept(tmp_path / "none", None, None) == ({}, {})  # type: ignore[arg-type]
    merged = replace("proof.merge.merge_folders", SimpleNamespace(records={"a": 1}))
    replace("harness.completeness.take_records", {"a": {"load": "pass"}})
    cleaned = replace("proof.store.remove_leftovers", None)
    found = fleet.read_kept(tmp_path, None, None)  # type: ignore[arg-type]
    assert found == ({"a": 1}, {"a": {"load": "pass"}})
    assert merged == [([tmp_path], {})]
    assert cleaned == [(tmp_path, {})]


def test_what_records_of_a_fleet_are_judged_by(tmp_path: Path, replace: Replace) -> None:
    replace("proof.code_digest.own_code", "the code")
    replace("proof.freshness.read_now", "limits and code")
    assert fleet.read_now(tmp_path).code == "the code"
    (tmp_path / "limits.csv").touch()
    assert fleet.read_now(tmp_path) == "limits and code"


class Progress:
    """What is noted of a run."""

    def __init__(self, folder: Path, about: Any) -> None:
        self.lanes: dict[str, Any] = {}
        self.written: list[bool] = []
        self.finished = False
        PROGRESS.append((self, folder, about))

    def lane(self, name: str) -> Any:
        return self.lanes.setdefault(name, SimpleNamespace(planned=0, kept=0))

    def write(self, *, at_once: bool = False) -> None:
        assert at_once
        self.written.append(self.finished)


PROGRESS: list[tuple[Progress, Path, Any]] = []


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_of_groups(
    *, fails: bool, tmp_path: Path, replace: Replace, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    PROGRESS.clear()
    caplog.set_level("INFO", "quantmatrix")
    outcome: list[Any] = []

    class Driver:
        def __init__(self, *given: Any, limit: int) -> None:
            outcome.append(given[4])
            assert limit == 33

        def plan(self, groups: Any, sites: Any) -> None: ...

    def work(driver: Any, cells: int) -> None:
        assert cells == 3
        if fails:
            raise KeyboardInterrupt
        outcome[0].written = 2

    site = SimpleNamespace(nodes=["n1", "n2"])
    replace("cli.fleet.look_around", ({"cpu": site}, {"n9": "too old"}))
    monkeypatch.setattr("quantmatrix.fleet.progress.Progress", Progress)
    monkeypatch.setattr("quantmatrix.fleet.driver.Driver", Driver)
    monkeypatch.setattr(fleet, "run_with_bar", work)
    replace("fleet.driver.describe", ["a line"])
    replace("fleet.driver.exit_code", 7)
    compared = Comparison(1, {}, {}, {}, nothing=False)
    monkeypatch.setattr("quantmatrix.fleet.driver.Outcome.compare", lambda *_: compared)
    given = argparse.Namespace(
        evidence_dir=tmp_path / "e", only=(), limit=33, full_size=False, json=False
    )
    cells: Any = [
        SimpleNamespace(id=name, hardware="h100" if name[0] == "h" else "cpu")
        for name in ("a", "b", "c", "d", "h1")
    ]
    groups: Any = [
        SimpleNamespace(hardware="cpu", cells=("a",)),
        SimpleNamespace(hardware="cpu", cells=("c",)),
        SimpleNamespace(hardware="h100", cells=("h1",)),
    ]
    ray: Any = SimpleNamespace(address="a:1", dashboard="b:2")
    tables: Any = SimpleNamespace(cells=())
    words: Any = (given, ray, tables, None, cells, groups, {})
    if fails:
        with pytest.raises(KeyboardInterrupt):
            fleet.run_groups(*words)
    else:
        assert fleet.run_groups(*words) == 7
        assert capsys.readouterr().out == (
            f"a line\n{tmp_path / 'e'}: 5 cells planned, 2 of them before, 2 records written\n"
        )
    [(progress, folder, about)] = PROGRESS
    assert progress.written == [False, not fails]
    assert folder == tmp_path / "e.fleet"
    assert about == {"address": "a:1", "dashboard": "b:2", "evidence": str(tmp_path / "e")}
    lanes = {name: (lane.planned, lane.kept) for name, lane in progress.lanes.items()}
    assert lanes == {"cpu": (4, 2), "h100": (1, 0)}
    assert caplog.messages == ["Ray's dashboard: http://b:2", "cpu: 2 groups for 2 nodes"]


@pytest.mark.parametrize(
    ("damaged", "records", "missing", "code"),
    [
        ([], {"a": 1, "b": 2}, {}, 0),
        (["x: no JSON"], {"a": 1}, {}, 1),
        ([], {}, {}, 1),
        ([], {"a": 1}, {"c@cpu": ("load", "latents")}, 1),
    ],
)
def test_merged_evidence(
    damaged: list[str], records: dict[str, int], missing: dict[str, tuple[str, ...]], code: int,
    tmp_path: Path, run: Run, replace: Replace, folder: Path,
) -> None:  # fmt: skip
    merged = SimpleNamespace(records=records, damaged=damaged)
    calls = replace("proof.merge.merge_folders", merged)
    output = tmp_path / "out"
    replace("proof.merge.write", [output / "cpu" / "a.json"] if records else [])
    replace("harness.completeness.list_stale", {"s@cpu": "the row changed"})
    replace("harness.completeness.take_records", {})
    replace("harness.completeness.read_planned", [])
    replace("harness.completeness.compare", Comparison(3, missing, {}, {}, nothing=False))
    words = ("evidence", "merge", "one", "two", "--output-path", str(output))
    words = (*words, "--tables", str(folder))
    count = f"{output}: {len(records)} records, {len(records) and 1} of them changed"
    lines = [f"damaged: {line}" for line in damaged]
    lines += [] if records else ["nothing collected: no record in these folders"]
    plain = 1 if damaged or not records else 0
    assert run(*words)[:2] == (plain, "\n".join([*lines, count]) + "\n")
    assert calls == [([Path("one"), Path("two")], {})] * 2
    output.mkdir()
    found, out, _ = run(*words, "--planned", "cpu")
    told = [f"damaged: {line}" for line in damaged]
    told += ["stale: s@cpu: the row changed"]
    told += [f"row not executed: {cell} ({', '.join(names)})" for cell, names in missing.items()]
    told += [] if records else ["nothing collected: no record in these folders"]
    assert (found, out) == (code, "\n".join([*told, count]) + "\n")
    assert calls[3] == ([Path("one"), Path("two"), output], {})
    found, out, _ = run(*words, "--planned", "cpu", "--json")
    about = json.loads(out)
    about.pop("tables")
    assert (found, about) == (
        code,
        {
            "ok": code == 0, "output": str(output), "records": len(records), "damaged": damaged,
            "written": ["cpu/a.json"] if records else [], "stale": {"s@cpu": "the row changed"},
            "missing": {cell: list(names) for cell, names in missing.items()},
        },
    )  # fmt: skip
    about = json.loads(run(*words, "--json")[1])
    assert "missing" not in about


def test_words_of_evidence_that_are_wrong(run: Run, folder: Path, tmp_path: Path) -> None:
    given = ("--planned", "cpu", "--tables", str(folder))
    none = tmp_path / "none"
    said = f"quantmatrix: {none}: no such folder of records, and no such JUnit file\n"
    assert run("evidence", "check", str(none), *given)[::2] == (2, said)
    known = "load, latents, generate, refuse, bench, trace, true-size, compile"
    said = f"quantmatrix: --check lode: known: {known}\n"
    (tmp_path / "empty").mkdir()
    words = ("evidence", "check", str(tmp_path / "empty"), "--check", "load", "lode", "zz")
    assert run(*words, *given)[::2] == (2, said)


def measured(percent: int, contradicting: int = 0, due: tuple[str, ...] = ()) -> Agreement:
    lives = {"fresh": percent, "contradicting": contradicting}
    task = Task("a@cpu", "fp8", "cpu", "expected", "missing", "no run")
    return Agreement(Share(100, lives), {}, {}, (task,) * 12, {}, dict.fromkeys(due, "old"))


@pytest.mark.parametrize(
    ("found", "words", "code"),
    [
        (measured(80), (), 0),
        (measured(80), ("--fail-under", "80"), 0),
        (measured(80), ("--fail-under", "80.1"), 1),
        (measured(80), ("--fail-under", "79.9"), 0),
        (measured(80, 1), (), 1),
        (measured(0), ("--fail-under", "0"), 0),
    ],
)
def test_how_many_claims_must_agree(
    found: Agreement, words: tuple[str, ...], code: int, run: Run, replace: Replace, folder: Path
) -> None:
    calls = replace("proof.agreement.measure", found)
    replace("proof.agreement.suggest_runs", {"cpu": "run it"})
    given = ("agreement", "--reports", str(folder.parent / "reports"), "--tables", str(folder))
    replace("proof.freshness.read_now", None)
    assert run(*given, *words, "--today", "2026-11-24")[0] == code
    assert calls[0][-1] == {"today": date(2026, 11, 24), "max_age_days": 90}
    out = run(*given, *words, "--max-age-days", "0", "--json")[1]
    assert json.loads(out)["ok"] == (code == 0)
    assert json.loads(out)["judged_against"]["max_age_days"] == 0
    assert calls[1][-1]["max_age_days"] == 0


def test_cells_that_agreement_names(run: Run, replace: Replace, folder: Path) -> None:
    replace("proof.agreement.measure", measured(80, due=("x", "y", "z")))
    replace("proof.agreement.suggest_runs", {"cpu": "run it"})
    replace("proof.freshness.read_now", None)
    given = ("agreement", "--reports", str(folder.parent / "reports"), "--tables", str(folder))
    lines = run(*given)[1].splitlines()
    assert lines.count("  a@cpu: no run") == 10
    assert lines[-3:] == [
        "  and 2 more: --all",
        "",
        "3 fresh records are older than 90 days: due for another run, see --json",
    ]
    assert run(*given, "--all")[1].splitlines().count("  a@cpu: no run") == 12


def test_days_that_ages_are_counted_to() -> None:
    assert agreement.read_today("2026-02-03") == date(2026, 2, 3)
    assert agreement.read_today(None) == datetime.now(timezone.utc).date()


def test_recommend(run: Run, replace: Replace, folder: Path) -> None:
    about = ("flux-1", "h100", "fp8", "some/c", "torch")
    fits = tuple((0, Option(f"c{n}", *about, commands=("run it",))) for n in range(9))
    good = Recommendation("h100", "flux-1", 80.0, "quality", fits, ())
    none = Recommendation("h100", "flux-2", 80.0, "quality", (), ())
    replace("report.recommend.read_answers", "answers")
    calls = replace("report.recommend.recommend", good)
    words = ("recommend", "--hardware", "h100", "--tables", str(folder))
    code, out, _ = run(*words, "--model", "flux-1", "--memory-gib", "24.5", "--prefer", "speed")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[1] for line in lines if re.match(r"\d ", line)] == [
        f"c{n}" for n in range(8)
    ]
    assert "  and 1 more: --model flux-1 --json" in lines
    note = "Weights and peak are of the transformers alone: text encoders and VAE come on top."
    assert lines[-2:] == ["", note]
    assert calls[0][2:] == ("h100", "flux-1", 24.5, "speed", {})
    lines = run(*words)[1].splitlines()
    assert sum(line.startswith("flux-1 on h100") for line in lines) == 5
    assert [line.split()[1] for line in lines if re.match(r"\d ", line)] == ["c0"] * 5
    assert [call[3] for call in calls[1:]] == [
        *("flux-1", "flux-2", "wan-2-2", "qwen-image", "z-image")
    ]
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)["ok"], len(json.loads(out)["answers"])) == (0, True, 5)
    replace("report.recommend.recommend", none)
    code, out, _ = run(*words, "--model", "flux-2")
    reason = "the tables have no checkpoint of flux-2: see `quantmatrix inspect` for one of yours"
    title = "flux-2 on h100, 80 GiB, by quality: nothing"
    assert (code, out) == (1, f"{title}\n  {reason}\n\n{note}\n")
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_recommend_is_no_failure_where_one_model_has_an_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, replace: Replace, folder: Path
) -> None:
    def advise(known: Any, tables: Any, hardware: str, model: str, *_: Any) -> Recommendation:
        option = Option("c", model, "h100", "fp8", "some/c", "torch")
        ranked = ((0, option),) if model == "wan-2-2" else ()
        return Recommendation("h100", model, 0, "quality", ranked, ())

    replace("report.recommend.read_answers", "answers")
    monkeypatch.setattr("quantmatrix.report.recommend.recommend", advise)
    words = ("recommend", "--hardware", "h100", "--tables", str(folder))
    assert run(*words)[0] == 0
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)["ok"]) == (0, False)


@pytest.mark.parametrize(
    ("name", "model", "said"),
    [
        ("", None, "--checkpoint: empty; see checkpoints.csv, or `quantmatrix matrix list`"),
        ("///", None, "--checkpoint: empty; see checkpoints.csv, or `quantmatrix matrix list`"),
        (
            "flux-1-fp8",
            "flux-9",
            "--model flux-9: not in the tables; known: flux-1, flux-2, wan-2-2, qwen-image, z-image",
        ),
        ("flux-1-fp8", "flux-2", "--checkpoint flux-1-fp8 is of flux-1, not of flux-2"),
        (
            "flux-3-fp8",
            None,
            "--checkpoint flux-3-fp8: not in checkpoints.csv; did you mean flux-2-fp8, flux-1-fp8, "
            "some/flux2-fp8, some/flux1-fp8, flux-1-svdq? A checkpoint of your own: "
            "`quantmatrix inspect`, then `quantmatrix plan`",
        ),
        (
            "0123456789",
            None,
            "--checkpoint 0123456789: not in checkpoints.csv. A checkpoint of your own: "
            "`quantmatrix inspect`, then `quantmatrix plan`",
        ),
    ],
)
def test_checkpoints_that_nobody_knows(
    name: str, model: str | None, said: str, tmp_path: Path
) -> None:
    tables = read.read(write_tables(tmp_path / "matrix"))
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        explain.find_checkpoints(tables, name, model)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("flux-1-fp8", ["flux-1-fp8"]),
        ("some/flux1-fp8/", ["flux-1-fp8"]),
        ("some/svdq", ["flux-1-svdq"]),
        ("elsewhere/flux2-fp8", ["flux-2-fp8"]),
        ("svdq-int4_r32-flux1.safetensors", ["flux-1-svdq"]),
    ],
)
def test_names_of_checkpoints(name: str, ids: list[str], tmp_path: Path) -> None:
    tables = read.read(write_tables(tmp_path / "matrix"))
    assert [row.id for row in explain.find_checkpoints(tables, name)] == ids
    assert explain.find_hardware(tables, "h100") == ("h100",)
    assert explain.find_hardware(tables, "all") == ("cpu", "h100", "b200")
    said = "--hardware h9: not in hardware.csv; known ids and groups: cpu, h100, b200, all"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        explain.find_hardware(tables, "h9")
