"""The fuzzer: 500 cases, and proof that its sandbox sees every kind of bad ending."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fuzz_mutations
import fuzz_sandbox
import pytest

HERE = Path(__file__).parent
CASES = 500
SEED = 20261128
BIG = 600 * 2**20


def test_damaged_files_end_in_words() -> None:
    words = ["--cases", str(CASES), "--seed", str(SEED), "--json"]
    command = [sys.executable, str(HERE / "run_fuzz.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["bad"] == []
    assert found["cases"] == CASES
    codes = {name.rpartition(" ")[2] for name in found["endings"]}
    assert {"0", "1"} <= codes  # some of what is damaged is refused, and some is not
    assert len({name.split(" ")[0] for name in found["endings"]}) > 12


def spin() -> int:
    while True:
        pass


def grow() -> int:
    return len(bytearray(b"x") * BIG) and 0


def fail() -> int:
    raise ValueError("nobody expected this")


def write() -> int:
    Path("made").write_text("x", encoding="utf-8")
    return 0


def leave() -> int:
    Path("out/half").write_text("x", encoding="utf-8")
    print("quantmatrix: no", file=sys.stderr)
    return 1


def read_outside() -> int:
    Path(f"../{fuzz_mutations.OUTSIDE}/secret.json").read_text(encoding="utf-8")
    return 0


def remove() -> int:
    os.remove("good.txt")
    return 0


def start() -> int:
    return subprocess.run(["true"], check=False).returncode


def say(text: str, code: int = 1) -> Callable[[], int]:
    def act() -> int:
        print(text, file=sys.stderr)
        return code

    return act


BAD = {
    "hangs": (spin, "hangs, or was killed"),
    "grows": (grow, "grows by 6"),
    "traceback": (fail, "ends in a traceback"),
    "writes": (write, "open for writing 'made'"),
    "leaves": (leave, "left behind: half"),
    "reads outside": (read_outside, "open '../outside/secret.json'"),
    "removes": (remove, "os.remove for writing"),
    "starts": (start, "subprocess.Popen"),
    "silent": (lambda: 1, "fails silently"),
    "code": (say("quantmatrix: x", 77), "exit code 77"),
    "long message": (say("quantmatrix: " + "word " * 600), "a message of 300"),
    "long value": (say("quantmatrix: " + "Q" * 201), "a value of 201 characters"),
    "control": (say("quantmatrix: \x1b[31m"), "control characters"),
    "command": (say("quantmatrix: x\n ::error::y"), "a command to a CI"),
    "broken command": (say("quantmatrix: x\n\\::error::y"), "a command to a CI"),
    "secret": (say(f"quantmatrix: {fuzz_mutations.SECRET}"), "shows what is in another folder"),
}


@pytest.fixture
def case(tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "good.txt").write_text("x")
    (tmp_path / fuzz_mutations.OUTSIDE).mkdir()
    (tmp_path / fuzz_mutations.OUTSIDE / "secret.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", BAD)
def test_the_sandbox_sees_bad_endings(
    case: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_sandbox, "SECONDS", 1)
    act, expected = BAD[kind]
    ending = fuzz_sandbox.run(act, case, fuzz_sandbox.list_allowed())
    assert any(expected in problem for problem in fuzz_sandbox.judge(ending)), ending


def test_the_sandbox_takes_good_endings(case: Path) -> None:
    def act() -> int:
        print(Path("good.txt").read_text(encoding="utf-8"))
        Path("out/made").write_text("x", encoding="utf-8")
        return 0

    for good in (act, say("quantmatrix: a.safetensors: no tensor in it")):
        ending = fuzz_sandbox.run(good, case, fuzz_sandbox.list_allowed())
        assert fuzz_sandbox.judge(ending) == []
        fuzz_sandbox.clear(case / "out")


def test_what_is_no_json_is_seen() -> None:
    for text, problems in (("{}", 0), ('{"a": NaN}', 1), ("words", 1)):
        ending = fuzz_sandbox.Ending(0, text, "", 0.1, 0, ())
        assert len(fuzz_sandbox.judge(ending, as_json=True)) == problems


def test_a_case_depends_on_its_number_alone(tmp_path: Path) -> None:
    made = []
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        (folder / "case").mkdir(parents=True)
        (folder / fuzz_mutations.OUTSIDE).mkdir()
        found = []
        for number in range(40):
            path = folder / "case" / f"{number}.json"
            path.write_text('{"a": [1, {"b": "c"}], "d": null}')
            rng = random.Random(f"1:{number}")
            found.append(fuzz_mutations.change(rng, folder / "case", [path.name]))
            if path.is_file() and path.stat().st_size < 10**6:
                found.append([path.read_bytes().hex()])
        made.append(found)
    assert made[0] == made[1]
    assert len({str(found) for found in made[0]}) > 30
