"""How a run of the suites ends: one exit code per way in which a proof is not there."""

from __future__ import annotations

import errno
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import shards

from quantmatrix import exit_codes
from quantmatrix.errors import CheckpointError, MachineError, MissingPackageError, UnreachableError
from quantmatrix.exit_codes import (
    CLAIM_VIOLATED,
    ENVIRONMENT_UNUSABLE,
    GATE_LOOSENED,
    NOT_EXECUTED,
    NOTHING_COLLECTED,
)
from quantmatrix.harness import outcomes

ALONE = ("-p", "no:xdist")
SPREAD = ("-n", "2")
GOOD = "row-1@cpu+reference"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with committed evidence, one record of which is a failure."""
    folder = tmp_path_factory.mktemp("project")
    shards.make_project(folder)
    code, output = shards.run(folder, folder / "reports" / "evidence", *ALONE)
    assert code == CLAIM_VIOLATED, output
    return folder


ENDS = [
    ("wrong", [], CLAIM_VIOLATED),
    ("hang", ["--timeout", "1"], NOT_EXECUTED),
    ("", ["-k", "nothing_like_it"], NOTHING_COLLECTED),
    ("skip", [], NOT_EXECUTED),
    ("media", [], ENVIRONMENT_UNUSABLE),
    ("loose", [], GATE_LOOSENED),
    ("", ["--model", "flux-2"], NOTHING_COLLECTED),
    ("", [], 0),
    ("", ["--model", "flux-1", "-k", "nothing_like_it"], NOTHING_COLLECTED),
    ("interrupt", [], pytest.ExitCode.INTERRUPTED),
    ("", ["--model", "flux-7"], pytest.ExitCode.USAGE_ERROR),
]


@pytest.mark.parametrize(
    ("fault", "words", "code", "how"),
    [*((*end, ALONE) for end in ENDS), *((*end, SPREAD) for end in ENDS[:3])],
)
def test_each_end_has_a_code_of_its_own(
    fault: str, words: list[str], code: int, how: tuple[str, ...], project: Path
) -> None:
    # The row that fails in the committed evidence is left out.
    words = [*(words or ["--backend", "reference"]), *how]
    found, output = shards.run(project, None, *words, fault=f"{fault} {GOOD}")
    assert found == code, output
    if code in exit_codes.MEANINGS and code != NOTHING_COLLECTED:
        line = f"{exit_codes.MEANINGS[code]} (exit code {code}): {GOOD}"
        assert line in output.splitlines(), output


def test_a_dead_worker_leaves_a_row_that_was_not_executed(project: Path, tmp_path: Path) -> None:
    evidence, slots = tmp_path / "evidence", tmp_path / "slots"
    slots.mkdir()
    words = ["--backend", "reference", *SPREAD]
    said = {"fault": f"kill {GOOD}", "SLOTS": str(slots)}
    found, output = shards.run(project, evidence, *words, **said)
    assert found == NOT_EXECUTED, output
    assert f"row not executed (exit code 12): {GOOD}" in output.splitlines()
    others = [f"row-{i}@cpu+reference" for i in range(shards.COUNT)]
    others.remove(GOOD)
    assert set(shards.read_bytes(evidence)) == shards.names_of(others)
    # The worker in its place has a number of its own, and the dead one's device.
    pairs = [path.name.split() for path in slots.iterdir()]
    assert {slot for slot, _ in pairs} == {"0", "1"}
    assert {worker for _, worker in pairs} >= {"gw0", "gw1"}


def test_a_full_disk_under_workers_is_no_success(project: Path, tmp_path: Path) -> None:
    words = ["--backend", "reference", *SPREAD]
    found, output = shards.run(project, tmp_path, *words, fault=f"disk {GOOD}")
    assert found == ENVIRONMENT_UNUSABLE, output
    assert "No space left on device" in output
    written = shards.read_bytes(tmp_path)
    assert shards.names_of([GOOD]).isdisjoint(written)
    assert not [name for name in written if not name.endswith(".json")]


def test_the_worst_end_wins(project: Path) -> None:
    found, output = shards.run(project, None, *ALONE, "--expect-evidence", "none", fault="")
    assert found == CLAIM_VIOLATED, output
    words = [*ALONE, "--expect-evidence", "none"]
    found, output = shards.run(project, None, *words, fault=f"skip {GOOD}")
    assert found == NOT_EXECUTED, output
    assert "claim violated (exit code 11): row-5@cpu+decode" in output.splitlines()


def test_a_failed_test_that_is_no_cell_keeps_pytests_code(project: Path, tmp_path: Path) -> None:
    shards.make_project(tmp_path)
    (tmp_path / "test_other.py").write_text("def test_other(): assert 0")
    found, output = shards.run(tmp_path, None, *ALONE, "--backend", "reference")
    assert found == pytest.ExitCode.TESTS_FAILED, output


@pytest.mark.parametrize("workers", [ALONE, SPREAD], ids=["alone", "workers"])
def test_a_parameter_that_is_a_cells_id_makes_no_cell(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    shards.make_project(tmp_path)
    other = tmp_path / "test_other.py"
    other.write_text(
        "import pytest\n\n"
        f"@pytest.mark.parametrize('word', ['{GOOD}'])\n"
        "def test_other(word): assert word\n"
    )
    words = [*workers, "-k", "test_other", "--expect-evidence", "none"]
    code, output = shards.run(tmp_path, None, *words)
    assert code == 0, output


def test_a_skip_before_anything_else_is_no_success(tmp_path: Path) -> None:
    shards.make_project(tmp_path)
    with (tmp_path / "conftest.py").open("a") as stream:
        stream.write(
            "import pytest\n\n"
            "@pytest.hookimpl(tryfirst=True)\n"
            "def pytest_runtest_setup(item):\n"
            "    pytest.skip('not here')\n"
        )
    code, output = shards.run(tmp_path, None, *ALONE, "--backend", "reference")
    assert code == NOT_EXECUTED, output


def test_collecting_is_no_run(project: Path) -> None:
    assert shards.run(project, None, *ALONE, "--collect-only")[0] == 0


def test_junit_tells_cell_check_and_problem(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    words = [*ALONE, "--backend", "reference", f"--junit-xml={path}"]
    shards.run(project, None, *words, fault=f"media {GOOD}")
    cases = {case.get("name"): case for case in ElementTree.parse(path).iter("testcase")}
    assert len(cases) == 2 * shards.COUNT
    said = {p.get("name"): p.get("value") for p in cases[f"test_latents[{GOOD}]"].iter("property")}
    assert said == {
        "row": "row-1",
        "cell": GOOD,
        "check": "latents",
        "evidence": "cpu/row-1+reference.json",
        "problem": "environment unusable",
    }


@pytest.mark.parametrize(
    ("older", "newer", "said"),
    [
        ({"psnr_db": {"at_least": 30.0}}, {"psnr_db": {"at_least": 30.0}}, []),
        ({"psnr_db": {"at_least": 30.0}}, {"psnr_db": {"at_least": 31.0}}, []),
        (
            {"psnr_db": {"at_least": 30.0}},
            {"psnr_db": {"at_least": 29.0}},
            ["psnr_db: at_least 30 became 29"],
        ),
        ({"l2": {"at_most": 0.1}}, {"l2": {"at_most": 0.05}}, []),
        ({"l2": {"at_most": 0.1}}, {"l2": {"at_most": 0.2}}, ["l2: at_most 0.1 became 0.2"]),
        ({"l2": {"at_most": 0.1}}, {}, ["l2: at_most 0.1 became None"]),
        ({"l2": {"at_most": 0.1}}, {"l2": {"at_most": 0.1 * (1 + 1e-9)}}, []),
        ({"frames": 1, "source": "x"}, {"frames": 2}, []),
    ],
)
def test_limits_that_got_wider_are_found(older: dict, newer: dict, said: list[str]) -> None:
    assert outcomes.find_loosened(older, newer) == said


def test_only_errors_of_the_machine_say_nothing_about_a_claim() -> None:
    def chain(cause: BaseException) -> Exception:
        error = RuntimeError("could not save")
        error.__cause__ = cause
        return error

    full = OSError(errno.ENOSPC, "No space left on device")
    assert outcomes.classify(full) == ENVIRONMENT_UNUSABLE
    assert outcomes.classify(chain(full)) == ENVIRONMENT_UNUSABLE
    assert outcomes.classify(MachineError("no B200")) == ENVIRONMENT_UNUSABLE
    assert outcomes.classify(UnreachableError("o/r: gated")) == ENVIRONMENT_UNUSABLE
    assert outcomes.classify(MissingPackageError("imageio-ffmpeg")) == ENVIRONMENT_UNUSABLE
    foreign, own = (ModuleNotFoundError(name=name) for name in ("ftfy", "quantmatrix.abacus"))
    assert outcomes.classify(chain(foreign)) == ENVIRONMENT_UNUSABLE
    assert outcomes.classify(own) is None
    assert outcomes.classify(CheckpointError("damaged")) is None
    assert outcomes.classify(FileNotFoundError(errno.ENOENT, "no such file")) is None
    assert outcomes.classify(AssertionError("too far away")) is None
    assert outcomes.classify(MemoryError()) is None


def test_codes_differ_from_each_other_and_from_others() -> None:
    codes = sorted(exit_codes.MEANINGS)
    assert len(set(exit_codes.MEANINGS.values())) == len(codes) == 5
    assert not set(codes) & {*range(6), 130}
    assert json.dumps(codes) == "[10, 11, 12, 13, 14]"


def test_the_contributors_guide_lists_the_codes() -> None:
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    listed = dict(re.findall(r"^\| (\d+) \| ([a-z ]+)", text, re.MULTILINE))
    assert {int(code): words.strip() for code, words in listed.items()} == exit_codes.MEANINGS


def test_names_that_fit_are_shown_and_others_counted() -> None:
    names = [f"n{number}" for number in range(outcomes.SHOWN + 2)]
    shown = ", ".join(names[: outcomes.SHOWN])
    assert outcomes.show_some(names[:1]) == "n0"
    assert outcomes.show_some(names[: outcomes.SHOWN]) == shown
    assert outcomes.show_some(names[: outcomes.SHOWN + 1]) == f"{shown} and 1 more"
    assert outcomes.show_some(names) == f"{shown} and 2 more"
