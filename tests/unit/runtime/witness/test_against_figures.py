"""Readings of a checkpoint beside a base model: which are planned, and what is said of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.errors import CheckpointError
from quantmatrix.families.layouts import Layout
from quantmatrix.request import Hub
from quantmatrix.runtime.witness import inspect_against


def refusal(act: Any, *given: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        act(*given)
    return str(caught.value)


def report(verdict: str, *layers: str, problems: tuple[str, ...] = (), layout: str = "") -> Any:
    found = [SimpleNamespace(to_json=lambda layer=layer: layer) for layer in layers]
    base = SimpleNamespace(reference="o/r", missing="gone" if not layers else "")
    return SimpleNamespace(
        verdict=verdict, findings=found, problems=problems, layout=layout, base=base, nbytes=len(layers) * 10
    )  # fmt: skip


def compare(monkeypatch: pytest.MonkeyPatch, *reports: Any, name: str = "transformer") -> Any:
    sources = SimpleNamespace(components={"transformer": 1, "second": 2}, model="m")
    monkeypatch.setattr(inspect_against, "describe_request", lambda *_: "request")
    monkeypatch.setattr(inspect_against, "find_sources", lambda request: sources)
    monkeypatch.setattr(inspect_against, "plan_readings", lambda *_: iter(reports))
    monkeypatch.setattr(inspect_against.verdict, "examine", lambda part, request: part)
    monkeypatch.setattr(inspect_against.verdict, "judge", lambda found, part, request: found)
    return inspect_against.compare_component("p", "b", Hub(), name)


def test_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    one = report("disagrees", "x", "y", problems=("p1", "p2"), layout="declared")
    assert compare(monkeypatch, one) == {
        "base": "o/r", "layout": "declared", "verdict": "disagrees", "problems": ["p1"],
        "layers": ["x", "y"], "bytes": 20,
    }  # fmt: skip
    assert compare(monkeypatch, report("agrees", "x"))["layout"] is None
    assert refusal(compare, monkeypatch, report("no base weights")) == (
        "p: transformer cannot be compared with b: gone; expected the weights of the model in full precision, "
        "on this machine"
    )
    assert refusal(lambda: compare(monkeypatch, name="third")) == (
        "b has no transformer component third; it has transformer, second"
    )


def test_several_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = report("disagrees", "x", problems=("p1",)), report("agrees", "y")
    found = compare(monkeypatch, bad, good)
    assert found == {
        "base": "o/r", "layout": "nothing declares it", "verdict": "agrees", "problems": [],
        "layers": ["x", "y"], "bytes": 20,
    }  # fmt: skip
    assert compare(monkeypatch, good, good, bad)["verdict"] == "more than one reading agrees"
    none = compare(monkeypatch, bad, report("not judged", "z", problems=("p2",)))
    assert (none["verdict"], none["problems"]) == ("disagrees", ["p1"])
    assert compare(monkeypatch, report("no base weights"), good)["bytes"] == 10


@pytest.mark.parametrize(
    ("path", "count", "component", "names"),
    [
        ("x.safetensors", 2, None, ["transformer"]), ("x.safetensors", 2, "second", ["second"]),
        ("x.gguf", 2, None, ["transformer"]), ("x.safetensors.index.json", 2, None, ["transformer"]),
        ("folder", 1, None, ["transformer"]), ("folder", 1, "second", ["second"]),
        ("folder", 2, None, ["c0", "c1"]), ("folder", 2, "second", ["c0", "c1"]),
    ],
)  # fmt: skip
def test_components_that_are_compared(
    path: str, count: int, component: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_against, "open_any", lambda *_: {f"c{n}": n for n in range(count)})
    monkeypatch.setattr(inspect_against, "compare_component", lambda *given: given[-1])
    assert inspect_against.compare(path, "b", Hub(), component) == {
        "reference": path, "against": "b", "components": {name: name for name in names},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "whole", "weights"),
    [("x.safetensors", True, True), ("x.gguf", True, True), ("x.safetensors.index.json", True, True),
     ("folder", True, False), ("folder", False, True)],
)  # fmt: skip
def test_a_folder_or_weights(
    path: str, whole: bool, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_sources(request: Any) -> None:
        assert request.component_paths == {"t": path}
        if not whole:
            raise CheckpointError("no config.json")

    monkeypatch.setattr(inspect_against, "find_sources", find_sources)
    request = inspect_against.describe_request(path, "b", Hub(), "t")
    assert (request.weights_paths, request.component_paths) == (
        ({"t": path}, {}) if weights else ({}, {"t": path})
    )
    assert (request.model_path, request.witness) == ("b", "auto")


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        (None, 1),
        (Layout("low", "rows", ""), 1),
        (Layout(None, "rows", ""), 2),
        (Layout(None, None, ""), 4),
    ],
)
def test_checkpoints_of_open_readings(
    layout: Layout | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_against.families, "find_layout", lambda checkpoint: layout)
    found = inspect_against.list_checkpoints(Checkpoint("here", (), {}))
    assert len(found) == count
    assert [bool(one.chosen) for one in found] == [count > 1] * count
    if count > 1:
        assert {one.chosen["why"] for one in found} == {"tried"}
