"""Carry: which twins are run for which records, and when a pair of digests is written."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import context_parallel
import pytest
from observed import PROVEN, REFUSED, observe
from tables import CASES, write_tables

import quantmatrix
from quantmatrix.cli.main import main
from quantmatrix.errors import QuantmatrixError
from quantmatrix.measure import carry
from quantmatrix.measure.carry import (
    Candidates,
    Twin,
    explain_difference,
    judge,
    list_candidates,
    name_twin,
)
from quantmatrix.proof import store
from quantmatrix.proof.carried import CARRIED, Carried, Pair
from quantmatrix.proof.code_digest import own_code
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.proof.scopes import STAND_IN, TRUE_SIZE, key_of
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix
from quantmatrix.tiny import hub

OLD, NEW, OTHER = (f"sha256:{letter * 64}" for letter in "abc")
REFERENCE = "fp8-flux-1@cpu+reference"


class FakeCode:
    """Code that gives every cell one shared digest."""

    def __init__(self, shared: str) -> None:
        self.shared = shared

    def describe(self, *_: Any) -> dict[str, str]:
        return {"device_digest": "", "shared_digest": self.shared}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    return read.read(write_tables(tmp_path / "matrix"))


def make(tables: Matrix, name: str, shared: str) -> Evidence:
    record = observe(tables, name)
    return replace(record, cell={**record.cell, "shared_digest": shared})


def candidates(tables: Matrix, shared: dict[str, str], *pairs: Pair) -> Candidates:
    found = {name: make(tables, name, digest) for name, digest in shared.items()}
    before: Any = FakeCode(OLD)
    after: Any = FakeCode(NEW)
    return list_candidates(tables, found, before, after, Carried(pairs))


def test_records_of_the_code_before_have_twins(tables: Matrix) -> None:
    found = candidates(tables, {PROVEN: OLD, REFERENCE: NEW, REFUSED: OLD})
    assert found.cells == {(OLD, NEW): (PROVEN,)}
    [twin] = found.list_twins()
    assert twin.row == ""
    assert twin.argv[-1] == "--tiny"
    assert "decode" in twin.argv
    assert found.foreign == ()


def test_a_record_of_true_size_has_a_twin_of_its_own(tables: Matrix) -> None:
    stand_in = make(tables, PROVEN, OLD)
    large = replace(stand_in, checks={"true-size": CheckResult("pass", {})})
    before: Any = FakeCode(OLD)
    after: Any = FakeCode(NEW)
    found = list_candidates(
        tables, {key_of(one): one for one in (stand_in, large)}, before, after, Carried()
    )
    assert found.cells == {(OLD, NEW): (PROVEN, f"{PROVEN}:true-size")}
    one, other = found.list_twins()
    assert (one.row, other.row) == ("", stand_in.cell["checkpoint"])
    assert one.argv == other.argv
    assert other.name().startswith(f"true size of {other.row}: ")
    compiled = replace(stand_in, checks={"compile": CheckResult("pass", {})})
    none = list_candidates(tables, {key_of(compiled): compiled}, before, after, Carried())
    assert (none.twins, none.foreign) == ({}, ())


def test_records_of_neither_code_are_named(tables: Matrix) -> None:
    found = candidates(tables, {PROVEN: OTHER})
    assert (found.twins, found.foreign) == ({}, (PROVEN,))
    led = Pair(OTHER, OLD, "1", "a", OLD, "1")
    assert candidates(tables, {PROVEN: OTHER}, led).cells == {(OLD, NEW): (PROVEN,)}
    done = Pair(OLD, NEW, "1", "a", OLD, "1")
    assert candidates(tables, {PROVEN: OTHER}, led, done).cells == {}


def test_a_twin_is_the_command_without_what_only_an_accelerator_has(tmp_path: Path) -> None:
    flags = "--cuda-graph --seed 7"
    case = {**CASES[0], "hardware": "h100 cpu", "backend": "torch", "flags": flags}
    tables = read.read(write_tables(tmp_path / "other", [case]))
    far, here = (
        next(cell for cell in tables.cells if cell.hardware == place) for place in ("h100", "cpu")
    )
    twin = name_twin(far, tables, STAND_IN).argv
    assert "--backend" not in twin
    assert "torch" not in twin
    assert "--cuda-graph" not in twin
    assert twin[twin.index("--seed") + 1] == "7"
    assert "torch" in name_twin(here, tables, STAND_IN).argv


GOOD = {"latents": "sha256:1", "files": "sha256:2"}


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (GOOD, GOOD, ""),
        (GOOD, {**GOOD, "latents": "sha256:3"}, "other latents"),
        (GOOD, {**GOOD, "files": "sha256:3"}, "other weights of the checkpoint"),
        ({**GOOD, "errors": "1"}, {**GOOD, "errors": "2"}, "other layer errors"),
        ({"error": "ValueError: bad\nmore"}, GOOD, "before: ValueError: bad"),
        (GOOD, {"error": "ValueError: bad"}, "after: ValueError: bad"),
    ],
)
def test_a_difference_is_named(old: dict[str, str], new: dict[str, str], why: str) -> None:
    assert explain_difference(old, new) == why


def test_one_twin_that_differs_leaves_its_pairs_out() -> None:
    one, two, three = (Twin(("--seed", seed)) for seed in "123")
    found = Candidates(
        {(OLD, NEW): (one, two), (OTHER, NEW): (two, three)},
        {(OLD, NEW): ("a@cpu",), (OTHER, NEW): ("b@cpu", "c@cpu")},
        (),
    )
    moved = {**GOOD, "latents": "sha256:9"}
    outcome = judge(found, [GOOD] * 3, [moved, GOOD, GOOD])
    assert [(pair.old, pair.new, pair.twins) for pair in outcome.pairs] == [(OTHER, NEW, "2")]
    assert outcome.cells == ("b@cpu", "c@cpu")
    assert outcome.differing == {"quantmatrix generate --seed 1": "other latents"}
    [other] = judge(found, [GOOD, GOOD, moved], [GOOD, GOOD, moved]).pairs[1:]
    assert other.latents != outcome.pairs[0].latents
    assert judge(found, [GOOD] * 3, [moved] * 3).pairs == ()


STUB = {
    "measure.latents": "def digest_latents(latents):\n    return 'sha256:' + repr(latents)\n",
    "proof.record": "def describe_files(files):\n    return {'digest': repr(files)}\n",
    "request": "class Request:\n    @classmethod\n    def from_words(cls, words, device):\n"
    "        if 'bad' in words:\n            raise ValueError('bad words')\n        return words\n",
    "runtime.generate": "class Run:\n    latents = [7]\n    class plan:\n        components = {}\n\n\n"
    "def generate(request):\n    return Run\n",
}
FORMER = {"measure.latents": "compare", "proof.record": "evidence", "runtime.generate": "run"}


def write_stub(folder: Path, names: Mapping[str, str]) -> Path:
    """A package that has the modules of `STUB`, some under other names."""
    for name, text in STUB.items():
        path = folder.joinpath("quantmatrix", *names.get(name, name).split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
        for above in (path.parent, folder / "quantmatrix"):
            (above / "__init__.py").touch()
    return folder


@pytest.mark.parametrize("names", [{}, FORMER], ids=["today", "before the moves"])
def test_twins_are_run_by_the_package_below_a_folder(tmp_path: Path, names: dict[str, str]) -> None:
    sources = write_stub(tmp_path / "src", names)
    said: list[str] = []
    found = carry.run_twins(sources, [Twin(("good",)), Twin(("bad",))], said.append)
    assert found == [{"latents": "sha256:[7]", "files": "[]"}, {"error": "ValueError: bad words"}]
    assert len(said) == 2


@pytest.mark.parametrize("lines", [0, 2])
def test_a_process_that_gives_another_number_of_results_is_an_error(
    tmp_path: Path, lines: int
) -> None:
    sources = write_stub(tmp_path / "src", {})
    text = 'print("{}", flush=True)\n' * lines + "raise SystemExit(5)\n"
    (sources / "quantmatrix" / "request.py").write_text(text)
    with pytest.raises(QuantmatrixError, match=f"ended with 5 after {lines} of 1"):
        carry.run_twins(sources, [Twin(("good",))], lambda _: None)


ROOT = Path(quantmatrix.__file__).parents[2]
EDITS = {
    "wording": ("kernels/number_formats.py", '"""', '"""In other words: ', ()),
    "constant": (
        "kernels/number_formats.py", "E4M3_MAX = 448.0", "E4M3_MAX = 240.0",
        ("latents", "files", "errors"),
    ),
    "seed": ("measure/true_size.py", "seed: int = 0", "seed: int = 1", ("latents", "files", "errors")),
}  # fmt: skip


def run_true_twin(sources: Path, folder: Path) -> dict[str, str]:
    """What a twin gives, by the program of `run_twins` in a process that has imported its libraries."""
    tables = read.read(ROOT / "matrix")
    cell = next(
        c
        for c in tables.cells
        if c.hardware == "h200" and c.family == "fp8" and "true-size" in c.checks
    )
    given = json.dumps(name_twin(cell, tables, TRUE_SIZE))

    def act() -> None:
        default = hub.default_folder()  # its name is no matter of the edits
        for name in [name for name in sys.modules if name.partition(".")[0] == "quantmatrix"]:
            del sys.modules[name]
        sys.argv = ["-c", str(sources)]
        sys.path.insert(0, str(sources))
        import_module("quantmatrix.tiny.hub").default_folder = lambda: default
        sys.stdin = io.StringIO(f"{given}\n")
        with (folder / "gave").open("w") as sys.stdout:
            exec(carry.RUNNER, {"__name__": "__main__"})

    from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401

    assert context_parallel.fork(act, 0) == [0]
    return dict(json.loads((folder / "gave").read_text()))


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_true_twin(ROOT / "src", tmp_path_factory.mktemp("unchanged"))


@pytest.mark.parametrize("name", EDITS)
def test_what_is_computed_at_true_size_decides(
    tmp_path: Path, unchanged: dict[str, str], name: str
) -> None:
    file, old, new, changed = EDITS[name]
    assert set(unchanged) == {"latents", "files", "errors"}
    package = shutil.copytree(ROOT / "src/quantmatrix", tmp_path / "src/quantmatrix")
    shutil.copytree(ROOT / "matrix", tmp_path / "matrix")
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new, 1))
    found = run_true_twin(tmp_path / "src", tmp_path)
    assert {key for key in unchanged if found[key] != unchanged[key]} == set(changed)
    assert bool(explain_difference(unchanged, found)) == bool(changed)


def test_the_command_writes_pairs(
    tables: Matrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reports = tmp_path / "reports"
    store.write(observe(tables, PROVEN), reports / "evidence")
    digest = observe(tables, PROVEN).cell["shared_digest"]
    monkeypatch.setattr(carry, "own_code", lambda: FakeCode(NEW))
    monkeypatch.setattr(carry, "Code", lambda folder: own_code())
    monkeypatch.setattr(carry, "find_commit", lambda revision, root: revision)
    monkeypatch.setattr(carry, "extract", lambda commit, root, folder: None)
    gave: list[dict[str, str]] = [GOOD, {**GOOD, "latents": "sha256:5"}, GOOD, GOOD]
    monkeypatch.setattr(carry, "run_twins", lambda sources, twins, say: [gave.pop(0)])
    words = ["evidence", "carry", "HEAD", "--reports", str(reports)]
    assert main([*words, "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["pairs"]
    assert not (reports / CARRIED).exists()
    assert main(words) == 0
    assert "1 pairs carry 1 records" in capsys.readouterr().out
    [pair] = Carried.read(reports / CARRIED).pairs
    assert (pair.old, pair.new, pair.twins) == (digest, NEW, "1")
    assert main(words) == 0  # known already: nothing is run
    assert "0 pairs carry 0 records" in capsys.readouterr().out


def test_a_revision_that_is_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evidence", "carry", "no-such-revision"]) == 2
    assert "no-such-revision: no such revision" in capsys.readouterr().err
