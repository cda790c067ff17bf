"""Evidence records: what may stand in one, and that a file is whole or not there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from observed import fake_pictures

from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.record import CheckResult, Evidence, EvidenceError

CELL = {
    "id": "flux-1-fp8@cpu+decode",
    "row": "flux-1-fp8",
    "family": "fp8",
    "model": "flux-1",
    "checkpoint": "flux-1-fp8-folder",
    "hardware": "cpu",
    "backend": "decode",
    "flags": ["--prompt", "a curious pikachu"],
    "checks": ["load", "latents"],
    "claim": "expected",
    "rule": "",
    "row_digest": "sha256:0",
}


def make(**changes: object) -> Evidence:
    whole = Evidence(
        cell=CELL,
        checks={"load": CheckResult("pass", {"layers": 12}, {"layers": 12})},
        command="quantmatrix generate --tiny",
        machine={"cpu": "a"},
        versions={"torch": "2.13.0"},
        commit="abc",
        checkpoint={"digest": "sha256:1", "files": ["x.safetensors"], "bytes": 3},
        plan={"ok": True, "components": {}},
        timings={"load": 0.25},
        latents_digest="sha256:2",
        made="2026-11-23T10:00:00Z",
    )
    return replace(whole, **changes)


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = store.write(make(), tmp_path)
    assert path == tmp_path / "cpu" / "flux-1-fp8+decode.json"
    assert store.read(path) == make()
    assert store.read_folder(tmp_path) == {"flux-1-fp8@cpu+decode": make()}


def test_bytes_are_sorted_and_equal_for_equal_records() -> None:
    shuffled = dict(sorted(CELL.items(), reverse=True))
    assert store.encode(make()) == store.encode(make(cell=shuffled))
    record = json.loads(store.encode(make()))
    assert list(record) == sorted(record)
    assert record["schema"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_numbers(value: float, tmp_path: Path) -> None:
    check = CheckResult("pass", {"steps": [{"psnr_db": value}]})
    with pytest.raises(
        EvidenceError, match=r"checks\.load\.metrics\.steps\[0\]\.psnr_db: .*finite"
    ):
        store.write(make(checks={"load": check}), tmp_path)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_file_with_other_numbers_is_refused(word: str, tmp_path: Path) -> None:
    path = store.write(make(), tmp_path)
    path.write_text(path.read_text().replace("0.25", word))
    with pytest.raises(EvidenceError, match=r"decode\.json: timings\.load: .*not a finite number"):
        store.read(path)


def test_pictures_of_a_record_are_exactly_thumbnails(tmp_path: Path) -> None:
    def hold(pictures: object) -> Evidence:
        return make(checks={"latents": CheckResult("pass", {"thumbnails": pictures})})

    whole = fake_pictures("a")
    path = store.write(hold(whole), tmp_path)
    assert store.read(path).checks["latents"].metrics["thumbnails"] == whole
    where = r"checks\.latents\.metrics\.thumbnails: "
    for wrong, why in (
        ({**whole, "quantized": "https://example.org/x.png"}, "quantized: 'https"),
        ({**whole, "trace": whole["baseline"]}, "expected an object with baseline"),
        (None, "expected an object with baseline"),
    ):
        with pytest.raises(EvidenceError, match=where + why):
            store.write(hold(wrong), tmp_path)
    path.write_text(path.read_text().replace('"gain": 8', '"gain": "8"'))
    with pytest.raises(EvidenceError, match=where + "gain: '8'"):
        store.read(path)


def test_only_plain_data() -> None:
    with pytest.raises(EvidenceError, match=r"Path|Posix"):
        store.encode(make(plan={"file": Path("x")}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 2}, "schema: found 2, expected 1"),
        ({"checks": {}}, "checks: empty"),
        ({"timings": []}, "timings: expected an object, found []"),
        ({"extra": 1}, "extra: not a known key"),
        ({"cell": {"id": "a@cpu"}}, "cell.row: missing"),
        ({"checks": {"load": {"verdict": "pass"}}}, "checks.load.metrics: missing"),
        (
            {"checks": {"load": {"verdict": "ok", "metrics": {}, "limits": {}, "message": ""}}},
            "checks.load.verdict: expected pass or fail or unjudged, found 'ok'",
        ),
        (
            {"checks": {"load": {"verdict": "fail", "metrics": {}, "limits": {}, "message": ""}}},
            "checks.load.message: empty",
        ),
    ],
)
def test_problems_are_named(change: dict[str, object], problem: str) -> None:
    record = {**json.loads(store.encode(make())), **change}
    with pytest.raises(EvidenceError, match=r"some\.json") as caught:
        store.decode(json.dumps(record).encode(), "some.json")
    assert problem in str(caught.value)


def test_a_missing_key_and_torn_json_are_named() -> None:
    record = json.loads(store.encode(make()))
    del record["machine"]
    with pytest.raises(EvidenceError, match="machine: missing"):
        store.decode(json.dumps(record).encode())
    with pytest.raises(EvidenceError, match="not JSON"):
        store.decode(store.encode(make())[:-20])


def test_a_record_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    path = store.write(make(), tmp_path)
    other = path.with_name("other.json")
    path.rename(other)
    with pytest.raises(EvidenceError, match=r"holds the record of flux-1-fp8@cpu\+decode"):
        store.read_folder(tmp_path)


def test_a_failed_write_leaves_the_old_record(tmp_path: Path, monkeypatch) -> None:
    path = store.write(make(), tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(make(commit="def"), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


WRITER = """
import sys
from pathlib import Path
from quantmatrix.proof import store
record = store.read(Path(sys.argv[1]) / "cpu" / "flux-1-fp8+decode.json")
print("ready", flush=True)
while True:
    store.write(record, Path(sys.argv[1]))
"""


def test_a_killed_writer_leaves_a_whole_record(tmp_path: Path) -> None:
    big = CheckResult("pass", {"steps": [{"psnr_db": 30.0 + i} for i in range(3000)]})
    path = store.write(make(checks={"latents": big}), tmp_path)
    random.seed(0)
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(random.random() * 0.05)
            writer.send_signal(signal.SIGKILL)
        assert store.read(path).checks["latents"] == big
    store.remove_leftovers(tmp_path, older_than=-1.0)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_merge_joins_checks_of_the_same_thing_only() -> None:
    later = make(checks={"latents": CheckResult("fail", message="far")}, timings={"generate": 1.0})
    both = records.merge(make(), later)
    assert set(both.checks) == {"load", "latents"}
    assert both.timings == {"load": 0.25, "generate": 1.0}
    for name, value in (
        ("commit", "def"),
        ("versions", {"torch": "2.14.0"}),
        ("checkpoint", {"digest": "sha256:9"}),
        ("machine", {"cpu": "b"}),
        ("cell", {**CELL, "claim": "validated"}),
    ):
        other = replace(later, **{name: value})
        assert records.merge(make(), other) == other


def test_file_digest_follows_names_and_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one.write_bytes(b"12")
    two.write_bytes(b"345")
    found = records.describe_files([two, one])
    assert found["files"] == ["a.safetensors", "b.safetensors"]
    assert found["bytes"] == 5
    assert found == records.describe_files([str(one), str(two)])
    one.write_bytes(b"13")
    assert records.describe_files([one, two])["digest"] != found["digest"]


def test_folders_of_the_machine_are_replaced() -> None:
    places = {"/home/me": "$HOME", "/home/me/hub": "$HUB"}
    plan = {"files": ["/home/me/hub/x", "/home/me/y"], "bytes": 3}
    assert records.make_portable(plan, places) == {"files": ["$HUB/x", "$HOME/y"], "bytes": 3}


def test_commit_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    package = tmp_path / "src" / "quantmatrix"
    package.mkdir(parents=True)
    assert records.find_commit(package) == ""

    def git(*words: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True
        )

    (package / "a.py").write_text("1")
    git("init")
    git("add", "src")
    git("commit", "-m", "one")
    commit = records.find_commit(package)
    assert len(commit) == 40
    (package / "a.py").write_text("2")
    assert records.find_commit(package) == f"{commit}+changes"
