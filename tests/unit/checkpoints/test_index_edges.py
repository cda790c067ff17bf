"""Indexes and hub caches that are almost right, each beside the nearest one that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from weight_files import COMMIT, make_cache, write_json, write_weights

from quantmatrix.checkpoints import opening
from quantmatrix.checkpoints.hub import find_cached_commit
from quantmatrix.errors import CheckpointError
from quantmatrix.request import Hub

INDEX = "diffusion_pytorch_model.safetensors.index.json"
OTHER_COMMIT = "f" * 40


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        ({"a.weight": "a.safetensors"}, ""),
        ({}, "no weight_map in it: expected a safetensors index"),
        ([], "no weight_map in it"),
        (["a.safetensors"], "no weight_map in it"),
        ("a.safetensors", "no weight_map in it"),
        (None, "no weight_map in it"),
        ({"a.weight": "b.safetensors"}, "lists 1 shards, 1 are missing: b.safetensors"),
    ],
)
def test_indexes(weight_map: Any, text: str, tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors")
    write_json(tmp_path / INDEX, {"metadata": {}, "weight_map": weight_map})
    if not text:
        found = opening.open_weights(str(tmp_path), Hub())
        assert [Path(file).name for file in found.files] == ["a.safetensors"]
        return
    with pytest.raises(CheckpointError, match=text) as caught:
        opening.open_weights(str(tmp_path), Hub())
    assert INDEX in str(caught.value)


def test_an_index_that_is_a_list(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors")
    write_json(tmp_path / INDEX, ["a.safetensors"])
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        opening.open_weights(str(tmp_path), Hub())


def test_a_cache_without_a_snapshot_is_told_by_its_cause(tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path, "o/r")
    cache = snapshot.parents[1]
    write_weights(snapshot / "x.safetensors")
    hub = Hub(cache_dir=str(tmp_path), offline=True)
    assert find_cached_commit("o/r", hub) == COMMIT
    assert opening.open_weights(str(cache), hub).files == (str(snapshot / "x.safetensors"),)
    (snapshot / "x.safetensors").unlink()
    snapshot.rmdir()
    assert find_cached_commit("o/r", hub) is None
    with pytest.raises(CheckpointError, match=f"refs/main names {COMMIT} and with 0 snapshots"):
        opening.open_weights(str(cache), hub)
    with pytest.raises(CheckpointError, match=r"o/r: not in the cache .* we are offline"):
        opening.open_weights("o/r", hub)
    (cache / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match="without refs/main and with 0 snapshots; download"):
        opening.open_weights(str(cache), hub)


def test_a_reference_decides_between_snapshots(tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path, "o/r")
    other = make_cache(tmp_path, "o/r", OTHER_COMMIT, ref=None)
    cache = snapshot.parents[1]
    for folder, name in ((snapshot, "x"), (other, "y")):
        write_weights(folder / f"{name}.safetensors")
    hub = Hub(cache_dir=str(tmp_path), offline=True)
    assert opening.open_weights(str(cache), hub).files == (str(snapshot / "x.safetensors"),)
    (cache / "refs" / "main").write_text(OTHER_COMMIT)
    assert opening.open_weights(str(cache), hub).files == (str(other / "y.safetensors"),)
    (cache / "refs" / "main").write_text("e" * 40)
    with pytest.raises(
        CheckpointError, match=r"names e+ and with 2 snapshots; name one of them:\n"
    ):
        opening.open_weights(str(cache), hub)
    pinned = Hub(cache_dir=str(tmp_path), offline=True, revision=OTHER_COMMIT)
    assert find_cached_commit("o/r", pinned) == OTHER_COMMIT
