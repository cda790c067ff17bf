"""The plugin, run by pytest inside pytest on small tables and suites that need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tables import CASES, write_tables

from quantmatrix.exit_codes import CLAIM_VIOLATED, NOTHING_COLLECTED
from quantmatrix.proof import record as records
from quantmatrix.proof import store

pytest_plugins = ["pytester"]

SUITE = """
    import pytest

    @pytest.mark.check("load")
    def test_load(cell, proof):
        proof.metrics["layers"] = 12
        proof.timings["load"] = 0.5

    @pytest.mark.check("latents")
    def test_latents(cell, proof):
        proof.metrics["psnr_db"] = 40.0
        proof.latents_digest = "sha256:1"
        assert cell.backend != "decode", "too far away"

    @pytest.mark.check("generate")
    def test_generate(cell, proof):
        pass

    @pytest.mark.check("refuse")
    def test_refuse(cell, proof):
        proof.plan = {"ok": False, "refusal": {"rule": cell.rule, "message": "no"}}
"""
INI = """
    [pytest]
    quantmatrix_tables = matrix
    strict_parametrization_ids = true
    addopts = --strict-markers --strict-config
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with tables and suites, in which the plugin is asked for."""
    pytester.makeini(INI)
    pytester.makepyfile(test_suites=SUITE)
    write_tables(pytester.path / "matrix")
    return pytester


def names(result: pytest.RunResult) -> list[str]:
    return [line.partition("::")[2] for line in result.outlines if "::" in line and "[" in line]


def collect(project: pytest.Pytester, *words: str) -> list[str]:
    result = project.runpytest("--collect-only", "-q", *words)
    assert result.ret == 0, result.stderr.str()
    return names(result)


def test_cells_are_tests_and_checks_choose_them(project: pytest.Pytester) -> None:
    assert collect(project) == [
        "test_load[fp8-flux-1@cpu+reference]",
        "test_latents[fp8-flux-1@cpu+reference]",
        "test_load[fp8-flux-1@cpu+decode]",
        "test_latents[fp8-flux-1@cpu+decode]",
        "test_load[fp8-flux-2@cpu]",
        "test_generate[fp8-flux-2@cpu]",
        "test_refuse[svdq-flux-1-hopper@h100]",
    ]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--family", "fp8"], 6),
        (["--family", "fp8,nunchaku-svdq"], 7),
        (["--family", "fp8", "--family", "nunchaku-svdq"], 7),
        (["--model", "flux-2"], 2),
        (["--check", "load"], 3),
        (["--check", "load", "--check", "refuse"], 4),
        (["--backend", "decode"], 2),
        (["--hardware", "h100"], 5),
        (["--hardware", "h100", "--check", "refuse"], 1),
        (["--hardware", "cpu", "--model", "flux-1", "--backend", "reference"], 2),
    ],
)
def test_filters(project: pytest.Pytester, words: list[str], count: int) -> None:
    assert len(collect(project, *words)) == count


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--family", "fp9"], "--family fp9: not in the tables; known: comfyui-int8, fp8", 4),
        (["--hardware", "b200"], "no claimed cell of the matrix", NOTHING_COLLECTED),
        (["--model", "flux-2", "--check", "refuse"], "no claimed cell", NOTHING_COLLECTED),
        (["--backend", "decode", "-k", "nothing-like-it", "x.py"], "x.py", 4),
    ],
)
def test_an_empty_selection_is_an_error(
    project: pytest.Pytester, words: list[str], message: str, code: int
) -> None:
    result = project.runpytest(*words)
    assert result.ret == code
    assert message in result.stderr.str()


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ("fp8-flux-1@h100+decode", [], 4),
        ("fp8-flux-1@h100+decode", ["--hardware", "h100"], 0),
        ("fp8-flux-1", [], 0),
        ("svdq-flux-1-hopper@h100", [], 0),
    ],
)
def test_a_listed_row_is_run_or_told(
    project: pytest.Pytester, line: str, words: list[str], code: int
) -> None:
    (project.path / "rows").write_text(f"{'' if words else 'fp8-flux-2@cpu'}\n{line}\n")
    result = project.runpytest("--collect-only", "-q", "--rows=rows", *words)
    assert result.ret == code, result.stdout.str()
    said = f"--rows rows: {line} runs on h100 only: add --hardware h100"
    assert (said in result.stderr.str()) == (code == 4)


def test_a_part_does_not_change_how_the_parts_are_cut(project: pytest.Pytester) -> None:
    words = ("--collect-only", "-q", "--shard=1/2")
    result = project.runpytest(*words, "--evidence-dir=reports/evidence")
    assert result.ret == 4
    assert "would change them between two parts" in result.stderr.str()
    assert project.runpytest(*words, "--evidence-dir=part-1").ret == 0


def test_a_selection_that_no_suite_runs_is_an_error(project: pytest.Pytester) -> None:
    project.makepyfile(test_other="def test_nothing(): pass")
    result = project.runpytest("--family", "fp8", "test_other.py")
    assert result.ret == NOTHING_COLLECTED
    assert "no test was collected for these cells" in result.stdout.str()
    assert project.runpytest("test_other.py").ret == 0


def test_damaged_tables_are_a_usage_error(project: pytest.Pytester) -> None:
    write_tables(project.path / "matrix", [{**CASES[0], "hardware": "h101"}])
    result = project.runpytest()
    assert result.ret != 0
    assert "cases.csv:2: hardware" in result.stdout.str() + result.stderr.str()


def test_one_record_per_cell(project: pytest.Pytester) -> None:
    result = project.runpytest("--evidence-dir", "evidence")
    result.assert_outcomes(passed=6, failed=1)
    folder = project.path / "evidence"
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))
    assert written == [
        "cpu/fp8-flux-1+decode.json",
        "cpu/fp8-flux-1+reference.json",
        "cpu/fp8-flux-2.json",
        "h100/svdq-flux-1-hopper.json",
    ]
    good = json.loads((folder / "cpu/fp8-flux-1+reference.json").read_text())
    assert {name: check["verdict"] for name, check in good["checks"].items()} == {
        "load": "pass",
        "latents": "pass",
    }
    assert good["checks"]["latents"]["metrics"] == {"psnr_db": 40.0}
    assert (good["timings"], good["latents_digest"]) == ({"load": 0.5}, "sha256:1")
    bad = json.loads((folder / "cpu/fp8-flux-1+decode.json").read_text())
    assert bad["checks"]["load"]["verdict"] == "pass"
    assert bad["checks"]["latents"]["verdict"] == "fail"
    assert "too far away" in bad["checks"]["latents"]["message"]
    refusal = json.loads((folder / "h100/svdq-flux-1-hopper.json").read_text())
    assert refusal["plan"]["refusal"]["rule"] == "svdq-arch"
    result.stdout.fnmatch_lines(["evidence: 4 records in *evidence"])


def test_evidence_goes_to_a_temporary_folder(project: pytest.Pytester) -> None:
    result = project.runpytest("-k", "load")
    result.stdout.fnmatch_lines(["evidence: 3 records in *"])
    assert not list(project.path.rglob("*.json"))


def test_a_fixture_that_fails_is_a_failed_check(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_suites="""
        import pytest

        @pytest.fixture
        def broken():
            raise RuntimeError("no checkpoint")

        @pytest.mark.check("load")
        def test_load(cell, proof, broken): pass
        """
    )
    project.runpytest("--evidence-dir", "evidence", "--model", "flux-2").assert_outcomes(errors=1)
    record = json.loads((project.path / "evidence/cpu/fp8-flux-2.json").read_text())
    assert record["checks"]["load"]["verdict"] == "fail"
    assert "no checkpoint" in record["checks"]["load"]["message"]


def test_a_skipped_check_proves_nothing(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_suites="""
        import pytest

        @pytest.mark.check("load")
        def test_load(cell, proof): pytest.skip("not here")
        """
    )
    project.runpytest("--evidence-dir", "evidence", "--model", "flux-2").assert_outcomes(skipped=1)
    assert not list(project.path.glob("evidence/*/*.json"))


def test_verdicts_must_be_those_that_are_committed(project: pytest.Pytester) -> None:
    project.runpytest("--evidence-dir", "reports/evidence")
    committed = project.path / "reports" / "evidence"
    before = {path: path.read_bytes() for path in committed.rglob("*.json")}
    # Of another length: bytecode of a file that is as long and as old to the second would be taken.
    project.makepyfile(test_suites=SUITE.replace(' != "decode"', ""))
    result = project.runpytest()
    result.assert_outcomes(passed=6, failed=1)
    result.stdout.fnmatch_lines(["*fp8-flux-1@cpu+decode: latents fails in the evidence*"])
    assert {path: path.read_bytes() for path in committed.rglob("*.json")} == before
    project.runpytest("--expect-evidence", "none").assert_outcomes(passed=7)
    # a row that changed since is no longer held to its old verdict
    write_tables(project.path / "matrix", [{**CASES[0], "flags": "--seed 3"}])
    project.runpytest().assert_outcomes(passed=4)


def claim_failing(project: pytest.Pytester, suite: str) -> pytest.RunResult:
    """One cell, run on a suite, whose row says that its latents check fails."""
    words = {"claim": "failing", "rule": "latents", "notes": "codes are read wrongly"}
    row = {**CASES[0], "hardware": "cpu", "backend": "decode", **words}
    write_tables(project.path / "matrix", [row])
    project.makepyfile(test_suites=suite)
    return project.runpytest("--evidence-dir", "evidence")


def test_a_row_that_is_claimed_to_fail_must_fail(project: pytest.Pytester) -> None:
    result = claim_failing(project, SUITE)
    result.assert_outcomes(passed=2)
    assert result.ret == 0
    [path] = (project.path / "evidence").rglob("*.json")
    checks = store.read(path).checks
    assert {name: check.verdict for name, check in checks.items()} == {
        "load": "pass",
        "latents": "fail",
    }
    assert "too far away" in checks["latents"].message


def test_a_row_that_is_claimed_to_fail_and_works_fails(project: pytest.Pytester) -> None:
    result = claim_failing(project, SUITE.replace('!= "decode"', "is not None"))
    result.assert_outcomes(passed=1, failed=1)
    assert result.ret == CLAIM_VIOLATED
    result.stdout.fnmatch_lines(["*claimed to fail, but it passes: change the claim*"])
    [path] = (project.path / "evidence").rglob("*.json")
    assert store.read(path).checks["latents"].verdict == "pass"


def test_another_check_of_a_failing_row_must_pass(project: pytest.Pytester) -> None:
    broken = SUITE.replace('proof.timings["load"] = 0.5', "raise OSError")
    claim_failing(project, broken).assert_outcomes(passed=1, failed=1)
    unable = SUITE.replace("def test_latents(cell, proof):", "def test_latents(cell, nothing):")
    claim_failing(project, unable).assert_outcomes(passed=1, errors=1)


def test_a_test_id_selects_one_cell(project: pytest.Pytester) -> None:
    result = project.runpytest("test_suites.py::test_load[fp8-flux-2@cpu]")
    result.assert_outcomes(passed=1)


def test_a_suite_without_a_check_is_refused(project: pytest.Pytester) -> None:
    project.makepyfile(test_suites="def test_load(cell): pass")
    result = project.runpytest()
    assert result.ret != 0
    assert "asks for `cell`: mark it with" in result.stdout.str() + result.stderr.str()


def test_junit_names_carry_the_cell(project: pytest.Pytester) -> None:
    project.runpytest("--junit-xml", "out.xml", "--check", "refuse")
    text = (project.path / "out.xml").read_text()
    assert 'name="test_refuse[svdq-flux-1-hopper@h100]"' in text
    assert '<property name="row" value="svdq-flux-1-hopper"' in text


def test_other_projects_see_nothing_of_it(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        def pytest_addoption(parser):
            parser.addoption("--model")
            parser.addoption("--backend")

        @pytest.fixture(params=["a", "b"])
        def cell(request): return request.param
        """
    )
    pytester.makepyfile(
        """
        def test_mine(cell, pytestconfig):
            assert pytestconfig.getoption("--model") == "x"
            assert not pytestconfig.pluginmanager.has_plugin("quantmatrix-harness")
        """
    )
    pytester.runpytest("--model", "x").assert_outcomes(passed=2)


def test_a_cell_fixture_of_ones_own_is_left_alone(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_suites="""
        import pytest

        @pytest.fixture
        def cell(): return "mine"

        def test_mine(cell): assert cell == "mine"
        """
    )
    project.runpytest().assert_outcomes(passed=1)


XDIST_SUITE = """
    import os, pytest

    @pytest.mark.check("load")
    def test_load(cell, proof):
        proof.metrics["worker"] = os.environ["PYTEST_XDIST_WORKER"]

    @pytest.mark.check("latents")
    def test_latents(cell, proof):
        proof.metrics["worker"] = os.environ["PYTEST_XDIST_WORKER"]
"""


def test_a_checkpoint_stays_on_one_worker(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    project.makepyfile(test_suites=XDIST_SUITE)
    cases = [
        {**CASES[0], "id": f"{c}-{i}", "checkpoint": c, "hardware": "cpu", "flags": f"--seed {i}"}
        for i in range(4)
        for c in ("flux-1-fp8", "flux-2-fp8")
    ]
    write_tables(project.path / "matrix", cases)
    words = ["-p", "xdist", "-n", "2", "--evidence-dir", "evidence"]
    result = project.runpytest_subprocess(*words)
    result.assert_outcomes(passed=32)
    workers: dict[str, set[str]] = {}
    for path in (project.path / "evidence").rglob("*.json"):
        record = json.loads(path.read_text())
        for check in record["checks"].values():
            checkpoint = record["cell"]["checkpoint"]
            workers.setdefault(checkpoint, set()).add(check["metrics"]["worker"])
    assert {len(found) for found in workers.values()} == {1}
    assert len(set.union(*workers.values())) == 2


def test_collecting_imports_no_torch(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import sys

        def pytest_collection_finish(session):
            heavy = {"torch", "diffusers", "transformers", "pandas", "numpy"} & set(sys.modules)
            assert not heavy, heavy
        """
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_real_suites_collect_without_torch() -> None:
    root = Path(__file__).parents[3]
    code = (
        "import pytest, sys; code = pytest.main(['--pyargs', 'quantmatrix.suites', '--collect-only', '-q']); "
        "heavy = {'torch', 'diffusers', 'pandas'} & set(sys.modules); sys.exit(str(heavy or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr


def test_results_that_are_no_record_fail_their_cell_alone(project: pytest.Pytester) -> None:
    suite = SUITE.replace(
        'proof.metrics["layers"] = 12',
        'proof.metrics["error"] = float("nan" if cell.backend == "reference" else 1.0)',
    ).replace('assert cell.backend != "decode", "too far away"', "pass")
    project.makepyfile(test_suites=suite)
    result = project.runpytest("-q", "--evidence-dir=ev")
    assert result.ret == CLAIM_VIOLATED
    result.stdout.fnmatch_lines(["*fp8-flux-1@cpu+reference: no evidence is kept of it:*nan*"])
    assert set(store.read_folder(project.path / "ev")) == {
        "fp8-flux-1@cpu+decode",
        "fp8-flux-2@cpu",
        "svdq-flux-1-hopper@h100",
    }


def test_damaged_records_end_no_session(project: pytest.Pytester) -> None:
    place = records.path_of("fp8-flux-2@cpu")
    for folder in ("ev", "reports/evidence"):
        path = project.path / folder / place
        path.parent.mkdir(parents=True)
        path.write_text("{")
    words = ("-q", "--check", "load,generate")
    result = project.runpytest(*words)
    assert result.ret == CLAIM_VIOLATED
    result.stdout.fnmatch_lines(["*fp8-flux-2@cpu: no evidence is kept of it:*not JSON*"])
    result = project.runpytest(*words, "--evidence-dir=ev")
    assert result.ret == 0, result.stdout.str()
    assert "fp8-flux-2@cpu" in store.read_folder(project.path / "ev")


def test_true_size_runs_on_request_and_leaves_a_record_of_its_own(
    project: pytest.Pytester,
) -> None:
    checks = {**CASES[0], "hardware": "cpu", "backend": "decode", "checks": "load true-size"}
    write_tables(project.path / "matrix", [checks])
    project.makepyfile(
        test_suites="""
        import pytest

        @pytest.mark.check("load")
        def test_load(cell, proof): pass

        @pytest.mark.check("true-size")
        def test_true_size(cell, proof): proof.command = "quantmatrix true-size"
        """
    )
    project.runpytest("--evidence-dir=ev").assert_outcomes(passed=1)
    assert set(store.read_folder(project.path / "ev")) == {"fp8-flux-1@cpu"}
    done = project.runpytest("--evidence-dir=ev", "--check", "true-size")
    done.assert_outcomes(passed=1)
    found = store.read_folder(project.path / "ev")
    assert {key: set(record.checks) for key, record in found.items()} == {
        "fp8-flux-1@cpu": {"load"},
        "fp8-flux-1@cpu:true-size": {"true-size"},
    }
