"""`quantmatrix bench`: measured on a tiny checkpoint, kept, and every way out of its gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tqdm
from benched import DEVICE, make_result

from quantmatrix.cli import bench, main
from quantmatrix.measure.bench.timing import BURST_MS
from quantmatrix.proof import bench_results
from quantmatrix.proof.ratios import VERDICTS

BASE = "black-forest-labs/FLUX.1-dev"
FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
WORDS = ["bench", "--tiny", "--model-path", BASE, "--transformer-path", FP8, "--device", "cpu",
         "--backend", "reference", "--repeats", "6", "--height", "32", "--width", "32"]  # fmt: skip


def test_a_tiny_checkpoint_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kept.json"
    assert main.main([*WORDS, "--output-path", str(file)]) == 0
    shown = capsys.readouterr().out
    [result] = bench_results.read(file)
    assert shown.startswith(f"{result['what']}, tiny, on {result['device']}")
    assert FP8 in result["what"]
    assert "tiny=True" in result["what"]
    part = result["components"]["transformer"]
    assert sum(layer["count"] for layer in part["layers"]) == 26
    assert {layer["backend"] for layer in part["layers"]} == {"reference"}
    assert {layer["rows"] for layer in part["layers"]} == {4, 32, 36}  # 2 x 2 patches, text, both
    for name, timing in bench_results.list_comparisons(result):
        assert f"  {name}" in shown
        assert timing["verdict"] in VERDICTS
        assert len(timing["milliseconds"]["bf16"]) == 6
    assert max(part["step"]["median"].values()) > BURST_MS / 100
    assert part["memory"]["quantized"]["weights"] < part["memory"]["bf16"]["weights"]
    assert part["memory"]["weights_verdict"] == "smaller"
    assert "smaller" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what a measurement will give."""

    def give(*results: dict[str, Any]) -> None:
        monkeypatch.setattr("quantmatrix.cli.bench.measure", lambda *_: list(results))

    return give


def keep(path: Path, *results: dict[str, Any]) -> str:
    return str(bench_results.write(results, [result["what"] for result in results], path))


ANY = ["bench", "--model-path", "any"]


@pytest.mark.parametrize(
    ("step", "words", "code"),
    [
        (0.8, [], 0),
        (0.6, [], 0),
        (1.2, [], 1),
        (0.95, [], 1),
        (0.95, ["--tolerance", "1.5"], 0),
        (0.8, ["--tolerance", "0.5"], 2),
    ],
)
def test_the_gate(
    step: float,
    words: list[str],
    code: int,
    tmp_path: Path,
    measured: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = keep(tmp_path / "kept.json", make_result())
    measured(make_result(step=step))
    assert main.main([*ANY, "--baseline", kept, *words]) == code
    said = capsys.readouterr()
    if code == 1:
        assert (
            "quantmatrix: some-row@cpu (tiny): transformer step: ratio to BF16 was 0.8" in said.err
        )
        assert "1 worse; 0 better; 4 no measurable change" in said.out
    if code == 0:
        assert "0 worse" in said.out
    capsys.readouterr()
    assert main.main([*ANY, "--baseline", kept, *words, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    if code != 2:
        assert len(found["comparison"]) == 5


@pytest.mark.parametrize(
    ("kept", "results", "said"),
    [
        ([make_result("other@cpu")], [make_result()], "the kept results do not have it"),
        ([make_result(device="Other")], [make_result()], f"kept for Other, measured on {DEVICE}"),
        ([make_result(), make_result("b@cpu")], [make_result()], "not measured now: partial"),
        ([make_result()], [], "nothing was measured"),
    ],
)
def test_what_cannot_be_judged_is_an_error(
    kept: list[Any],
    results: list[Any],
    said: str,
    tmp_path: Path,
    measured: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured(*results)
    file = keep(tmp_path / "kept.json", *kept)
    assert main.main([*ANY, "--baseline", file]) == 2
    assert said in capsys.readouterr().err


def test_a_baseline_that_is_none_stops_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").touch()
    assert main.main([*ANY, "--baseline", str(tmp_path / "empty.json")]) == 2
    assert "empty file" in capsys.readouterr().err
    assert main.main([*ANY, "--baseline", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_nothing_is_kept_of_an_empty_measurement(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    measured()
    assert main.main([*ANY, "--output-path", str(tmp_path / "kept.json")]) == 2
    assert list(tmp_path.iterdir()) == []
    assert main.main(ANY) == 2


def test_two_saved_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = keep(tmp_path / "old.json", make_result())
    new = keep(tmp_path / "new.json", make_result(step=1.2))
    assert main.main(["bench", "--compare", old, old]) == 0
    assert main.main(["bench", "--compare", new, old]) == 0
    capsys.readouterr()
    assert main.main(["bench", "--compare", old, new]) == 1
    said = capsys.readouterr()
    assert "transformer step: ratio to BF16 was 0.8, is 1.2" in said.err
    assert said.out.splitlines()[-1] == "1 worse; 0 better; 4 no measurable change"
    assert len(said.out.splitlines()) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "found none of them"),
        (["--model-path", "a", "--row", "b"], "found both --model-path and --row"),
        (["--model-path", "a", "--repeats", "5"], "--repeats 5: expected 6 or more"),
        (["--compare", "a", "b", "--baseline", "c"], "leave out --baseline"),
        (["--model-path", "a", "--tolerance", "2"], "--tolerance is for --baseline"),
        (["--row", "nothing"], "--row nothing: no such cell"),
        (["--synthetic", "tiny", "--model-id", "x"], "--model-id x: --synthetic expects"),
        (
            ["--synthetic", "tiny", "--model-id", "flux-1", "--family", "fp9"],
            "--family fp9: --synthetic expects",
        ),
        (
            ["--synthetic", "tiny", "--model-id", "flux-1", "--family", "fp8", "--scheme", "x"],
            "--scheme x: fp8 has",
        ),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_random_weights_have_no_load(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--synthetic", "tiny", "--model-id", "wan-2-2", "--family", "msmodelslim"]
    assert main.main([*words, "--device", "cpu", "--repeats", "6", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert result["what"].startswith("synthetic tiny wan-2-2 msmodelslim W8A8")
    part = result["components"]["transformer"]
    assert "load" not in part
    assert part["step"]["ratio"] > 0


def test_a_refusal_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS[:8], "--backend", "torch"]
    assert main.main(words) == 3
    assert "nvidia" in capsys.readouterr().err


def test_the_bar_has_a_place_for_every_stage_of_every_component(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first place is the loading; another component adds its own stages."""
    seen: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            self.n, self.total = 0, total

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def set_postfix_str(self, text: str) -> None: ...

        def update(self) -> None:
            self.n += 1
            seen.append((self.n, self.total))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with bench.progress_bar("bench", 2) as say:
        for stage in ("load", "layers", "forward", "layers", "forward"):
            say(stage)
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 5), (5, 5)]
