"""Records: their form, what carries them, what makes them, at the edges and in whole words."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.proof import carried, code_digest, form, offers, store
from quantmatrix.proof import record as records
from quantmatrix.proof.carried import Carried, CarriedError, Pair
from quantmatrix.proof.code_digest import Way
from quantmatrix.proof.offers import Offer
from quantmatrix.proof.record import CheckResult, Evidence

# --- form ------------------------------------------------------------------------------------------


def make(name: str = "load", verdict: str = "pass", **parts: Any) -> dict[str, Any]:
    check = {"verdict": verdict, "metrics": {}, "limits": {}, "message": ""}
    plan = parts.pop("plan", {})
    return {
        "cell": {"id": "r@cpu", "row": "r", "hardware": "cpu", "backend": "", "rule": "r1"},
        "checks": {name: {**check, **parts}}, "plan": plan,
    }  # fmt: skip


REFUSAL = {"refusal": {"rule": "r1"}, "ok": False}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (make(), []),
        (make(plan=REFUSAL), ["checks.load: passed, although the plan is a refusal: r1"]),
        (make(verdict="fail", plan=REFUSAL), []),
        (make("refuse", plan=REFUSAL, metrics={"rule": "r1"}), []),
        (make("refuse", plan={"refusal": {}, "ok": False}), []),
        (make("refuse", plan={"ok": True}), ["checks.refuse: passed, although the plan is not a refusal"]),
        (make("refuse", plan=REFUSAL, metrics={"rule": "r0"}),
         ["checks.refuse: passed, although 'r0' refused it, not 'r1'"]),
        (make("refuse", plan={"refusal": {"rule": "r2"}, "ok": True}),
         ["checks.refuse: passed, although 'r2' refused it, not 'r1'",
          "checks.refuse: passed, although the plan is not a refusal"]),
        (make("load", metrics={"a": 2.0}, limits={"a": {"at_most": 2.0}}), []),
        (make("load", metrics={"a": 2.0}, limits={"a": {"at_least": 2.0}}), []),
        (make("load", metrics={"a": 2.00001}, limits={"a": {"at_most": 2.0}}), []),
        (make("load", metrics={"a": 1.99999}, limits={"a": {"at_least": 2.0}}), []),
    ],
    ids=list("abcdefghijkl"),
)  # fmt: skip
def test_what_a_record_says_against_itself(record: dict[str, Any], said: list[str]) -> None:
    assert form.list_problems(record) == said


@pytest.mark.parametrize(
    ("found", "limits", "exceeded"),
    [
        ({"a": True}, {"a": {"at_least": 2.0}}, False),
        ({"layers": {"t": {"worst": 1.0}, "u": {"worst": 2.1}, "v": {}}},
         {"layer_error": {"at_most": 2.0}}, True),
        ({"layers": {"t": {"worst": 1.9}, "u": {"worst": "x"}}}, {"layer_error": {"at_most": 2.0}}, False),
        ({"repeats": False}, {"repeats": True}, True), ({"repeats": True}, {"repeats": True}, False),
        ({"identical": True}, {"identical": False}, True), ({}, {"constant": False}, False),
        ({"frames": 3}, {"frames": 4}, False),
        ({"a": 2.1}, {"a": {"at_most": 2.0}}, True), ({"a": 1.9}, {"a": {"at_least": 2.0}}, True),
        ({"a": 2.00003}, {"a": {"at_most": 2.0}}, True), ({"a": 1.99997}, {"a": {"at_least": 2.0}}, True),
        ({"a": -2.1}, {"a": {"at_least": -2.0}}, True), ({"a": -1.9}, {"a": {"at_least": -2.0}}, False),
        ({"a": 3.0}, {"b": {"at_most": 2.0}}, False), ({"worst": {"a": 2.1}}, {"a": {"at_most": 2.0}}, True),
    ],
)  # fmt: skip
def test_metrics_beyond_their_limits(found: Any, limits: Any, exceeded: bool) -> None:
    check = {"metrics": found, "limits": limits}
    assert bool(list(form.list_exceeded(check))) is exceeded


def test_metrics_beyond_limits_in_words() -> None:
    check = {
        "metrics": {"a": 1.25, "b": 9.0, "repeats": False},
        "limits": {"a": {"at_least": 2, "at_most": 1}, "b": {"at_most": 8.5}, "repeats": True},
    }
    assert list(form.list_exceeded(check)) == [
        "a is 1.25, at least 2 is allowed", "a is 1.25, at most 1 is allowed",
        "b is 9, at most 8.5 is allowed", "repeats is False, not True",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id": "r@cpu", "backend": ""}, []), ({"id": "r@cpu", "backend": "x"}, []),
        ({"id": "r@cpu+x", "backend": "x"}, []),
        ({"id": "r@cpu+y", "backend": "x"}, ["cell.id: 'r@cpu+y' is not a cell of r@cpu"]),
        ({"id": "a@cpu", "backend": ""}, ["cell.id: 'a@cpu' is not a cell of r@cpu"]),
        ({"id": "a@cpu", "backend": 7, "claim": [1]},
         ["cell.backend: expected a text, found 7", "cell.claim: expected a text, found [1]"]),
        ({"id": "r@cpu", "backend": "", "flags": [], "checks": ["a"]}, []),
    ],
)  # fmt: skip
def test_the_cell_of_a_record(columns: dict[str, Any], said: list[str]) -> None:
    assert list(form.check_cell({"row": "r", "hardware": "cpu", **columns})) == said


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0, True), (1.5, True), (True, False), (float("nan"), False), (float("inf"), False),
        (10**300, True), (10**300 + 1, False), (-(10**300), True), (-(10**301), False), ("1", False),
    ],
)  # fmt: skip
def test_numbers_of_a_record(value: Any, found: bool) -> None:
    assert form.is_number(value) is found


def test_programs_that_are_none() -> None:
    def find(arch: str | None = None, **metrics: Any) -> list[str]:
        plan = {"machine": {"arch": arch}} if arch else {}
        return list(form.find_faults({"checks": {"compile": {"metrics": metrics}}, "plan": plan}))

    program = {"kernel": "k", "arch": "sm90", "faults": []}
    assert find("sm90", programs=[program]) == find(programs=[program]) == []
    assert find() == find(programs=[]) == ["no program was built"]
    assert find("sm80", programs=[program, {**program, "faults": ["x", "y"]}], problems=["p", "q"]) == [
        "it reports problems: p", "k was built for sm90, the plan is for sm80", "k has a fault: x",
        "k was built for sm90, the plan is for sm80",
    ]  # fmt: skip
    assert find("sm95", programs=[program]) == ["k was built for sm90, the plan is for sm95"]


# --- records ---------------------------------------------------------------------------------------


def test_folders_of_a_machine_are_replaced_the_longest_first() -> None:
    folders = {"/a": "$A", "/a/b": "$B", "": "$NONE"}
    value = {"x": "/a/b/c and /a/d", "y": ["/a", ("/a/b",)], "z": 7, "/a": None}
    assert records.make_portable(value, folders) == {
        "x": "$B/c and $A/d", "y": ["$A", ["$B"]], "z": 7, "/a": None
    }  # fmt: skip


OLD = Evidence(
    {"id": "c"}, {"a": CheckResult("pass"), "b": CheckResult("pass")}, "old", {"m": 1}, {"t": "1"},
    "commit", {"d": 1}, {"p": 1}, {"w": 1}, {"a": 1.0, "b": 2.0}, "sha", "2026",
)  # fmt: skip


@pytest.mark.parametrize("part", ["cell", "checkpoint", "commit", "versions", "machine"])
@pytest.mark.parametrize("other", ["", "zzz"])
def test_records_of_two_programs_are_not_mixed(part: str, other: str) -> None:
    newer = replace(OLD, **{part: other}, checks={"b": CheckResult("fail")})  # type: ignore[arg-type]
    assert records.merge(OLD, newer) is newer


def test_records_of_one_program_are_joined() -> None:
    newer = replace(
        OLD, checks={"b": CheckResult("fail"), "c": CheckResult("pass")}, command="new", plan={},
        witness={}, timings={"b": 3.0}, latents_digest="", made="2027",
    )  # fmt: skip
    assert records.merge(OLD, newer) == replace(
        OLD, checks={"a": CheckResult("pass"), "b": CheckResult("fail"), "c": CheckResult("pass")},
        command="new", timings={"a": 1.0, "b": 3.0}, made="2027",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("r@cpu", "cpu/r.json"), ("r@cpu+x", "cpu/r+x.json"), ("r@h9+x:true-size", "h9/r+x.true-size.json"),
        ("r@h9:compiled", "h9/r.compiled.json"),
    ],
)  # fmt: skip
def test_where_a_record_lies(key: str, path: str) -> None:
    assert str(records.path_of(key)) == path


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    for name, data in (("b/z", b"12345"), ("a/z", b"678"), ("a/y", b"9")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    files = [tmp_path / name for name in ("b/z", "a/z", "a/y", "a/y")]
    found = records.describe_files(files)
    assert found["files"] == ["y", "z", "z"]
    assert found["bytes"] == 9
    assert set(found) == {"digest", "files", "bytes"}
    assert found == records.describe_files(reversed(files))
    assert found["digest"] != records.describe_files(files[:2])["digest"]


def test_numbers_that_are_no_json_have_a_place() -> None:
    found = store._number_problems(
        "", {"a": [1, float("nan")], "b": {"c": -float("inf"), "d": None}}
    )
    assert found == ["a[1]: nan is not a finite number", "b.c: -inf is not a finite number"]
    assert store._number_problems("x", {"y": (set(), True, "t")}) == ["x.y[0]: set is not JSON"]


# --- carried ---------------------------------------------------------------------------------------


def pair(old: str, new: str, commit: str = "c") -> Pair:
    return Pair(f"sha256:{old}", f"sha256:{new}", commit, "m", "sha256:l", "3")


PAIRS = Carried(tuple(pair(*names) for names in ("ab", "bc", "cd", "ac", "da", "xy")))


@pytest.mark.parametrize(
    ("old", "new", "way"),
    [
        ("a", "b", "ab"), ("a", "c", "ac"), ("a", "d", "ac cd"), ("b", "a", "bc cd da"), ("a", "x", ""),
        ("a", "a", ""), ("y", "x", ""), ("x", "y", "xy"), ("q", "a", ""),
    ],
)  # fmt: skip
def test_the_shortest_way_between_digests(old: str, new: str, way: str) -> None:
    found = PAIRS.find_way(f"sha256:{old}", f"sha256:{new}")
    assert " ".join(one.old[-1] + one.new[-1] for one in found) == way


def test_pairs_are_added_once() -> None:
    more = PAIRS.add([pair("a", "b", "other"), pair("b", "a")])
    assert more.pairs == (*PAIRS.pairs, pair("b", "a"))


HEAD = "old,new,commit,machine,latents,twins"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1), ("old,new\n", 1), (f"{HEAD}\nsha256:a,sha256:b,c,m,sha256:l\n", 2),
        (f"{HEAD}\nsha256:a,sha256:b,c,m,sha256:l,3\nsha256:a,sha256:b,,m,sha256:l,3\n", 3),
        (f"{HEAD}\na,sha256:b,c,m,sha256:l,3\n", 2), (f"{HEAD}\nsha256:a,b,c,m,sha256:l,3\n", 2),
        (f"{HEAD}\nsha256:a,sha256:b,c,m,l,3\n", 2), (f"{HEAD}\nsha256:a,sha256:b,c,m,sha256:l,3,4\n", 2),
    ],
)  # fmt: skip
def test_lines_that_carry_nothing(text: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "carried.csv"
    assert Carried.read(path) == Carried()
    path.write_text(text)
    words = (
        f"{path}:1: expected the columns {HEAD}"
        if line == 1
        else f"{path}:{line}: expected 6 values, digests as `sha256:...`; write this file with "
        "`quantmatrix evidence carry`"
    )
    with pytest.raises(CarriedError, match=f"^{re.escape(words)}$"):
        Carried.read(path)


def test_pairs_are_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / carried.CARRIED
    path.write_bytes(PAIRS.encode())
    assert Carried.read(path) == PAIRS
    assert PAIRS.encode().startswith(
        f"{HEAD}\nsha256:a,sha256:b,c,m,sha256:l,3\nsha256:b,".encode()
    )


# --- ways ------------------------------------------------------------------------------------------


CELL = {"family": "f", "model": "m", "backend": "", "claim": "expected", "rule": "", "flags": []}
PLAIN = Way("f", "m", "sm90", "nvidia", scope="stand-in")


@pytest.mark.parametrize(
    ("columns", "plan", "way"),
    [
        ({}, {}, PLAIN),
        ({}, {"machine": {"vendor": "amd", "arch": "gfx"}}, replace(PLAIN, vendor="amd", arch="gfx")),
        ({}, {"machine": None, "processes": 1}, PLAIN),
        ({}, {"processes": 2}, replace(PLAIN, several=True)),
        ({}, {"processes": 0}, replace(PLAIN, several=True)),
        ({"claim": "refused", "rule": "r"}, {}, replace(PLAIN, refused=True, rule="r")),
        ({"claim": "planned"}, {}, PLAIN), ({"claim": "zzz"}, {}, PLAIN),
        ({"backend": "torch"}, {}, replace(PLAIN, backend="torch")),
        ({"flags": ["--compile", "x"]}, {}, replace(PLAIN, accelerated=True)),
        ({"flags": ["--cuda-graph"]}, {}, replace(PLAIN, accelerated=True)),
        ({"flags": ["--seed"]}, {}, PLAIN),
        ({}, {"components": {
            "a": {"precision": "FP8 + NVFP4", "backends": {"torch": 1, "decode": 2}},
            "b": {"precision": "FP8", "backends": {"torch": 3}, "online": True},
            "c": {"precision": None, "backends": {}},
        }}, replace(PLAIN, schemes=("FP8", "NVFP4"), backends=("decode", "torch"), online=True)),
    ],
    ids=list("abcdefghijklm"),
)  # fmt: skip
def test_the_way_of_a_record(columns: dict[str, Any], plan: dict[str, Any], way: Way) -> None:
    found = code_digest.find_way({**CELL, **columns}, plan, ("nvidia", "sm90"), "stand-in")
    assert found == way


def test_modules_of_ids() -> None:
    assert code_digest.module_of("models", "flux-2-klein-4b") == "models.flux_2_klein_4b"


# --- offers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offer", "commands", "title"),
    [
        (Offer("r"), ("r",), "With the published repository: not yet run"),
        (Offer("r", ran=True), ("r",), "With the published repository"),
        (Offer("r", "m"), ("m", "r"), "Made from the base model: not yet run"),
        (Offer("r", "m", True), ("m", "r"), "Made from the base model"),
    ],
)
def test_what_stands_above_an_offer(offer: Offer, commands: tuple[str, ...], title: str) -> None:
    assert offer.commands == commands
    assert offer.title == title


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("quantmatrix/x", True),
        ("/path/to/x", True),
        ("quantmatrixx/x", False),
        ("a/quantmatrix/", False),
    ],
)
def test_references_that_lead_nowhere(reference: str, found: bool) -> None:
    assert offers.is_invented(reference) is found


def make_row(family: str, scheme: str, reference: str = "/path/to/x.safetensors") -> Any:
    return SimpleNamespace(
        family=family, scheme=scheme, model="m", reference=reference, base="o/base", kept="one two"
    )


@pytest.mark.parametrize(
    ("family", "scheme", "name", "command"),
    [
        ("fp8", "tensor-static", "x.safetensors", "--family fp8 --scheme tensor-static"),
        ("nunchaku-svdq", "int4_r32", "svdq-int4_r32-m.safetensors",
         "--family nunchaku-svdq --precision int4 --rank 32"),
        ("nunchaku-svdq", "nvfp4_r128", "svdq-fp4_r128-m.safetensors",
         "--family nunchaku-svdq --precision nvfp4 --rank 128"),
        ("zz", "int4_r32", "x.safetensors", "--family zz --scheme int4_r32"),
    ],
)  # fmt: skip
def test_how_a_checkpoint_is_made(family: str, scheme: str, name: str, command: str) -> None:
    row = make_row(family, scheme)
    assert offers.name_output(row) == name
    assert offers.write_quantize(row) == (
        f"quantmatrix quantize --model-path o/base {command} --keep one two --output-path "
        "/path/to/x.safetensors"
    )
