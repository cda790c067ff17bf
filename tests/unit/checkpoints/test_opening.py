"""Which files a reference leads to: folders, hub caches, hub ids, addresses, downloads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import SafetensorsParsingError
from weight_files import COMMIT, link_blob, make_cache, write_index, write_json, write_weights

from quantmatrix.checkpoints import folders, opening
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.hub import is_unreachable, list_repository, translate_hub_errors
from quantmatrix.errors import CheckpointError, UnreachableError, UnusableError
from quantmatrix.request import Hub

INDEX = "d.safetensors.index.json"
OTHER_COMMIT = "f" * 40


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here may reach the hub; those that need one put their own in its place."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network in tests")

    for name in ("model_info", "parse_safetensors_file_metadata"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    list_repository.cache_clear()
    yield
    list_repository.cache_clear()


def fill(root: Path, content: str) -> Path:
    """Files of a folder as text: `x.safetensors`, or `i.index.json=a,b` for an index of two."""
    root.mkdir(parents=True, exist_ok=True)
    for word in content.split():
        name, _, shards = word.partition("=")
        if shards:
            write_index(root / name, shards.split(","))
        elif name.endswith(".safetensors"):
            write_weights(root / name)
        else:
            write_json(root / name, {})
    return root


def names(checkpoint: Checkpoint, root: Path) -> list[str]:
    return [Path(file).relative_to(root).as_posix() for file in checkpoint.files]


# content of a folder -> files of a weights reference, or of a component folder; `!` begins an error
SELECTIONS = {
    "one file": ("x.safetensors", "x.safetensors", "x.safetensors"),
    "index": (f"{INDEX}=a.safetensors,b.safetensors a.safetensors b.safetensors", "a b", "a b"),
    "index and strays": (
        f"{INDEX}=a.safetensors a.safetensors stray.safetensors other-mixed.safetensors",
        "a",
        "a",
    ),
    "missing shard": (
        f"{INDEX}=a.safetensors,b.safetensors a.safetensors",
        "!lists 2 shards, 1 are missing: b.safetensors",
        "!lists 2 shards, 1 are missing: b.safetensors",
    ),
    "two indexes": (
        f"{INDEX}=a.safetensors e.safetensors.index.json=b.safetensors a.safetensors b.safetensors",
        "!2 indexes",
        "!2 indexes",
    ),
    "two equal indexes": (
        f"{INDEX}=a.safetensors e.safetensors.index.json=a.safetensors a.safetensors",
        "a",
        "a",
    ),
    "two indexes, one left behind": (
        f"{INDEX}=a.safetensors,b.safetensors e.safetensors.index.json=a.safetensors a.safetensors",
        "a",
        "a",
    ),
    "one mixed": ("x.safetensors x-mixed.safetensors", "x-mixed", "x-mixed"),
    "only mixed": ("x-mixed.safetensors", "x-mixed", "x-mixed"),
    "two mixed": (
        "a-mixed.safetensors b-mixed.safetensors c.safetensors",
        "!2 mixed checkpoints",
        "a-mixed b-mixed",
    ),
    "mixed pair": (
        "m-mixed-00001-of-00002.safetensors n-mixed-00002-of-00002.safetensors c.safetensors",
        "!2 mixed checkpoints",
        "m-mixed-00001-of-00002 n-mixed-00002-of-00002",
    ),
    "mixed in the name only": ("a-mixed-up.safetensors", "a-mixed-up", "a-mixed-up"),
    "several plain": ("a.safetensors b.safetensors", "!2 weight files and no index", "a b"),
    "older svdquant folder": (
        "transformer_blocks.safetensors unquantized_layers.safetensors config.json",
        "transformer_blocks unquantized_layers",
        "transformer_blocks unquantized_layers",
    ),
    "fp16 copy": ("d.safetensors d.fp16.safetensors", "d", "d"),
    "bf16 and fp32 copies": ("d.safetensors d.bf16.safetensors d.fp32.safetensors", "d", "d"),
    "only a suffixed file": ("d.fp16.safetensors", "d.fp16", "d.fp16"),
    "two suffixed files": (
        "d.fp16.safetensors e.bf16.safetensors",
        "!2 weight files",
        "d.fp16 e.bf16",
    ),
    "copy of another": ("d.safetensors e.fp16.safetensors", "!2 weight files", "d e.fp16"),
    "fp16 index": (
        f"{INDEX}=a.safetensors d.fp16.safetensors.index.json=b.safetensors "
        "a.safetensors b.safetensors",
        "a",
        "a",
    ),
    "fp16 index, another spelling": (
        f"{INDEX}=a.safetensors d.safetensors.index.fp16.json=b.safetensors "
        "a.safetensors b.safetensors",
        "a",
        "a",
    ),
    "fp16 index beside a plain file": (
        "d.fp16.safetensors.index.json=b.safetensors d.safetensors b.safetensors",
        "!2 weight files",
        "b d",
    ),
    "only a fp16 index": (
        "d.fp16.safetensors.index.json=b.safetensors b.safetensors c.safetensors",
        "b",
        "b",
    ),
    "nested": ("transformer/a.safetensors", "transformer/a", "!no .safetensors weights"),
    "two nested": (
        "transformer/a.safetensors vae/b.safetensors",
        "!2 weight files",
        "!no .safetensors weights",
    ),
    "nested index": (
        f"sub/{INDEX}=a.safetensors,b.safetensors sub/a.safetensors sub/b.safetensors",
        "sub/a sub/b",
        "!no .safetensors weights",
    ),
    "nested beside": ("a.safetensors vae/b.safetensors", "!2 weight files", "a"),
    "hidden": (".cache/a.safetensors b.safetensors .c.safetensors", "b", "b"),
    "no weights": ("config.json", "!no .safetensors weights", "!no .safetensors weights"),
    "only a pickle": ("model.bin", "!model.bin is a pickle", "!model.bin is a pickle"),
    "empty index": (f"{INDEX} a.safetensors", "!no weight_map", "!no weight_map"),
    "index of pickles": (f"{INDEX}=a.bin a.bin", "!pickle file can run", "!pickle file can run"),
    "shard outside": (
        f"sub/{INDEX}=../../a.safetensors",
        "!index.json: the name sub/../../a.safetensors leads out",
        "!no .safetensors weights",
    ),
}


def check_selection(found: Callable[[], Checkpoint], root: Path, expected: str) -> None:
    if expected.startswith("!"):
        with pytest.raises(CheckpointError) as caught:
            found()
        assert expected[1:] in str(caught.value)
        assert str(root) in str(caught.value) or "pickle" in expected
        return
    listed = [n if n.endswith(".safetensors") else f"{n}.safetensors" for n in expected.split()]
    assert names(found(), root) == listed


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("case", SELECTIONS)
def test_files_of_a_weights_reference(tmp_path: Path, case: str, slash: str) -> None:
    content, expected, _ = SELECTIONS[case]
    root = fill(tmp_path / "here", content)
    check_selection(lambda: opening.open_weights(f"{root}{slash}", Hub()), root, expected)


@pytest.mark.parametrize("case", SELECTIONS)
def test_files_of_a_component_folder(tmp_path: Path, case: str) -> None:
    content, _, expected = SELECTIONS[case]
    root = fill(tmp_path / "here", content)
    check_selection(lambda: opening.open_component(str(root), Hub()), root, expected)


def test_two_candidates_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a.safetensors b.safetensors")
    with pytest.raises(CheckpointError, match="name one of them") as caught:
        opening.open_weights(str(tmp_path), Hub())
    for name in ("a.safetensors", "b.safetensors"):
        assert str(tmp_path / name) in str(caught.value)


def test_named_files_are_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, f"{INDEX}=a.safetensors a.safetensors d.safetensors d.fp16.safetensors")
    for name, expected in (("d.fp16.safetensors", "d.fp16"), ("d.safetensors", "d"), (INDEX, "a")):
        found = opening.open_weights(str(tmp_path / name), Hub())
        assert names(found, tmp_path) == [f"{expected}.safetensors"]
    monkeypatch.chdir(tmp_path)
    for reference in ("./d.safetensors", "d.safetensors", f"../{tmp_path.name}/d.safetensors"):
        assert Path(opening.open_weights(reference, Hub()).files[0]).is_absolute()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(opening.open_weights("~/d.safetensors", Hub()), tmp_path) == ["d.safetensors"]


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="pickle file can run code"):
        opening.open_weights(str(tmp_path / "x.pt"), Hub())


def test_index_and_shards_of_two_checkpoints(tmp_path: Path) -> None:
    fill(tmp_path, f"{INDEX}=a.safetensors,b.safetensors a.safetensors")
    write_weights(tmp_path / "b.safetensors", {"c.weight": ("F32", (1,))})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: the index promises .*b\.weight"):
        opening.open_weights(str(tmp_path), Hub())


def test_component_files_that_hold_one_tensor_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_weights(tmp_path / f"{name}.safetensors", {"same": ("F32", (1,))})
    with pytest.raises(CheckpointError, match=r"tensor same is in .*one.* and in .*two"):
        opening.open_component(str(tmp_path), Hub())


def test_a_component_is_a_folder(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="weights-path"):
        opening.open_component(str(path), Hub())


def test_a_whole_pipeline_stands_for_its_component_of_the_name(tmp_path: Path) -> None:
    """ModelOpt exports both experts of Wan into one folder; each flag takes its own."""
    for part in ("transformer", "transformer_2"):
        fill(tmp_path / part, "config.json x.safetensors")
    write_json(tmp_path / "model_index.json", {})
    for part in ("transformer", "transformer_2"):
        found = opening.open_component(str(tmp_path), Hub(), name=part)
        assert found.files == (str(tmp_path / part / "x.safetensors"),)
        _, file = opening.read_component_config(str(tmp_path), Hub(), name=part)
        assert file == str(tmp_path / part / "config.json")
    (tmp_path / "transformer_2").rename(tmp_path / "other")
    found = opening.open_component(str(tmp_path), Hub(), name="transformer_2")
    assert found.files == (str(tmp_path / "transformer" / "x.safetensors"),)


def test_an_index_that_was_left_behind(tmp_path: Path) -> None:
    fill(tmp_path, f"{INDEX}=a.safetensors,b.safetensors d.safetensors")
    for read in (opening.open_component, opening.open_weights):
        with pytest.raises(CheckpointError, match=r"there is d\.safetensors instead.*remove it"):
            read(str(tmp_path), Hub())
    write_weights(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors; download them again"):
        opening.open_component(str(tmp_path), Hub())


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    """JSON files count where the weights are, not where the search began."""
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "wrong"}})
    write_json(tmp_path / "t" / "config.json", {"_class_name": "X"})
    write_json(
        tmp_path / "t" / "hf_quant_config.json",
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["proj_out"]}},
    )
    for name in ("_w8a8", "-a", ""):
        write_json(tmp_path / "t" / f"quant_model_description{name}.json", {"x.weight": name})
    write_weights(tmp_path / "t" / "x.safetensors", metadata={"format": "pt"})
    found = opening.open_weights(str(tmp_path), Hub())
    assert found.config == {"_class_name": "X"}
    assert found.config_file == str(tmp_path / "t" / "config.json")
    assert found.quantization == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["proj_out"],
    }
    assert found.quantization_from == str(tmp_path / "t" / "hf_quant_config.json")
    assert found.description == {"x.weight": ""}
    assert found.metadata == {"format": "pt"}
    assert found.remote is None
    (tmp_path / "t" / "quant_model_description.json").unlink()
    found = opening.open_weights(str(tmp_path / "t" / "x.safetensors"), Hub())
    assert found.description_file == str(tmp_path / "t" / "quant_model_description-a.json")


def test_headers_of_shards_disagree(tmp_path: Path) -> None:
    for name, method in (("a", "fp8"), ("b", "modelopt")):
        block = json.dumps({"quant_method": method})
        write_weights(tmp_path / f"{name}.safetensors", metadata={"quantization_config": block})
    write_index(tmp_path / INDEX, ["a.safetensors", "b.safetensors"])
    with pytest.raises(CheckpointError) as caught:
        opening.open_weights(str(tmp_path), Hub())
    for word in ("quant_method", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")):
        assert word in str(caught.value)


def test_a_huge_folder_is_not_searched_for_a_named_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_weights(tmp_path / "x.safetensors")

    def refuse(*_: Any) -> Any:
        raise AssertionError("searched the whole folder")

    monkeypatch.setattr(Path, "rglob", refuse)
    assert opening.open_weights(str(path), Hub()).files == (str(path),)


class TestCompat:
    """`--model-path` of a repository that holds weights only."""

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("x.safetensors x-mixed.safetensors", "x-mixed"),
            ("b-mixed.safetensors a-mixed.safetensors", "a-mixed"),
            (f"{INDEX}=a.safetensors a.safetensors b-mixed.safetensors", "b-mixed"),
            ("x.safetensors", "x"),
            ("sub/x-mixed.safetensors", "sub/x-mixed"),
            ("x.safetensors y.safetensors", "!2 weight files"),
        ],
    )
    def test_mixed_is_looked_for_first(self, tmp_path: Path, content: str, expected: str) -> None:
        root = fill(tmp_path / "FLUX.2-dev-NVFP4", content)
        check_selection(lambda: opening.open_compat(str(root), Hub()), root, expected)

    def test_named_file(self, tmp_path: Path) -> None:
        fill(tmp_path, "x.safetensors x-mixed.safetensors")
        found = opening.open_compat(str(tmp_path / "x.safetensors"), Hub())
        assert names(found, tmp_path) == ["x.safetensors"]

    @pytest.mark.parametrize("whole", [True, False])
    def test_cache_folder(self, tmp_path: Path, whole: bool) -> None:
        snapshot = make_cache(tmp_path, "black-forest-labs/FLUX.2-dev-NVFP4")
        make_cache(tmp_path, "black-forest-labs/FLUX.2-dev-NVFP4", OTHER_COMMIT, ref=None)
        fill(snapshot, "x.safetensors x-mixed.safetensors")
        folder = snapshot.parents[1] if whole else snapshot
        found = opening.open_compat(str(folder), Hub())
        assert names(found, snapshot) == ["x-mixed.safetensors"]


def test_cache_folder_of_unknown_commit(tmp_path: Path) -> None:
    snapshot = fill(make_cache(tmp_path, "o/r", ref=None), "x.safetensors")
    cache = snapshot.parents[1]
    assert names(opening.open_weights(str(cache), Hub()), snapshot) == ["x.safetensors"]
    make_cache(tmp_path, "o/r", OTHER_COMMIT, ref=None)
    with pytest.raises(CheckpointError, match="without refs/main and with 2 snapshots"):
        opening.open_weights(str(cache), Hub())


class TestPipeline:
    """Model folders."""

    def test_model_index(self, tmp_path: Path) -> None:
        index = {
            "_class_name": "FluxPipeline",
            "_diffusers_version": "0.42.1",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "image_encoder": [None, None],
            "boundary_ratio": 0.875,
        }
        write_json(tmp_path / "model_index.json", index)
        found = opening.open_pipeline(str(tmp_path), Hub())
        assert found.class_name == "FluxPipeline"
        assert found.components == {"transformer": ("diffusers", "FluxTransformer2DModel")}

    def test_bare_component(self, tmp_path: Path) -> None:
        write_json(tmp_path / "config.json", {"_class_name": "FluxTransformer2DModel"})
        found = opening.open_pipeline(str(tmp_path), Hub())
        assert (found.class_name, found.components) == ("FluxTransformer2DModel", {})
        config, file = opening.read_component_config(str(tmp_path), Hub())
        assert (config["_class_name"], file) == (found.class_name, str(tmp_path / "config.json"))

    def test_neither(self, tmp_path: Path) -> None:
        path = write_weights(tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"neither model_index\.json nor config\.json"):
            opening.open_pipeline(str(tmp_path), Hub())
        with pytest.raises(CheckpointError, match="a base model is a folder"):
            opening.open_pipeline(str(path), Hub())
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            opening.read_component_config(str(tmp_path), Hub())

    def test_components_lie_in_their_folders(self, tmp_path: Path) -> None:
        for part in ("transformer", "transformer_2"):
            fill(tmp_path / part, f"{part}.safetensors config.json")
        for part in ("transformer", "transformer_2"):
            found = opening.open_component(str(tmp_path), Hub(), part)
            assert names(found, tmp_path) == [f"{part}/{part}.safetensors"]
        found = opening.open_component(str(tmp_path), Hub())
        assert names(found, tmp_path) == ["transformer/transformer.safetensors"]
        with pytest.raises(CheckpointError, match=r"transformer_3: no \.safetensors"):
            opening.open_component(str(tmp_path), Hub(), "transformer_3")


# reference, --revision -> (repository, path in it, revision), or the text of an error
HUB_REFERENCES: dict[str, tuple[str, str | None, Any]] = {
    "id": ("o/r.1", None, ("o/r.1", "", None)),
    "id with slash": ("o/r/", None, ("o/r", "", None)),
    "revision": ("o/r", "v1", ("o/r", "", "v1")),
    "folder": ("o/r/sub/folder", None, ("o/r", "sub/folder", None)),
    "file": ("o/r/sub/x.safetensors", None, ("o/r", "sub/x.safetensors", None)),
    "address": ("https://huggingface.co/o/r", None, ("o/r", "", None)),
    "address, revision": ("https://huggingface.co/o/r/", "v1", ("o/r", "", "v1")),
    "short host": ("https://hf.co/o/r/tree/main", None, ("o/r", "", "main")),
    "tree": ("https://huggingface.co/o/r/tree/main/t", None, ("o/r", "t", "main")),
    "blob": ("https://huggingface.co/o/r/blob/v1/t/x.y", None, ("o/r", "t/x.y", "v1")),
    "resolve": (
        "https://huggingface.co/o/r/resolve/main/x%20y?download=true",
        None,
        ("o/r", "x y", "main"),
    ),
    "pull request": (
        "https://huggingface.co/o/r/tree/refs%2Fpr%2F1",
        None,
        ("o/r", "", "refs/pr/1"),
    ),
    "same revision": ("https://huggingface.co/o/r/tree/v1", "v1", ("o/r", "", "v1")),
    "conflict": (
        "https://huggingface.co/o/r/tree/main",
        "v1",
        "the address names revision main, --revision says v1",
    ),
    "other host": ("https://example.com/o/r", None, "not an address of the hub"),
    "look-alike host": ("https://huggingface.co.example.com/o/r", None, "not an address of the"),
    "other scheme": ("s3://huggingface.co/o/r", None, "not an address of the hub"),
    "data set": ("https://huggingface.co/datasets/o/r", None, "names a dataset, expected a model"),
    "space": ("https://huggingface.co/spaces/o/r", None, "names a space, expected a model"),
    "owner": ("https://huggingface.co/o", None, "an owner and a name"),
    "other page": ("https://huggingface.co/o/r/discussions/1", None, "expected /tree/, /blob/"),
    "tree without revision": ("https://huggingface.co/o/r/tree", None, "and a revision after o/r"),
    "odd name": ("o o/r", None, "o o/r is not a hub id"),
}


@pytest.mark.parametrize("case", HUB_REFERENCES)
def test_hub_references(case: str) -> None:
    reference, revision, expected = HUB_REFERENCES[case]
    hub = Hub(revision=revision)
    if isinstance(expected, tuple):
        assert folders.find_local(reference, hub) is None
        assert folders.parse_hub_reference(reference, hub) == expected
    else:
        with pytest.raises(CheckpointError) as caught:
            opening.open_weights(reference, hub)
        assert expected in str(caught.value)
        assert reference in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "an empty path"),
        (" ", "an empty path"),
        ("gpt2", "not a hub id, which has the form"),
        ("gpt2/", "not a hub id, which has the form"),
        ("/nowhere/x.safetensors", "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("../nowhere/at/all", "no such file or folder"),
        ("~/nowhere-at-all", "no such file or folder"),
        ("~nobody-of-that-name/x", "no such user"),
        ("/path/to/model", "a placeholder of the guide: name a path of yours, or add --tiny"),
    ],
)
def test_paths_that_are_not_there(reference: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opening.open_weights(reference, Hub())
    assert message in str(caught.value)
    assert "hub" not in message or "owner/repo" in str(caught.value)


def test_placeholders_lead_to_stand_ins(tmp_path: Path) -> None:
    fill(tmp_path / "path/to/folder", "config.json x.safetensors")
    fill(tmp_path / "path/to", "y.safetensors")
    hub = Hub(local_root=str(tmp_path))
    for reference, name in (
        ("/path/to/folder", "folder/x"),
        ("/path/to/folder/", "folder/x"),
        ("/path/to/folder/x.safetensors", "folder/x"),
        ("/path/to/y.safetensors", "y"),
    ):
        found = opening.open_weights(reference, hub)
        assert names(found, tmp_path / "path/to") == [f"{name}.safetensors"]
        assert found.reference == reference
    with pytest.raises(CheckpointError, match="a placeholder of the guide"):
        opening.open_weights("/path/to/other", hub)


def test_a_folder_of_that_name_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "o/r", "x.safetensors")
    monkeypatch.chdir(tmp_path)
    assert names(opening.open_weights("o/r", Hub()), tmp_path / "o/r") == ["x.safetensors"]


class TestCache:
    """Repositories in the cache, offline and without a network."""

    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        snapshot = make_cache(tmp_path, "o/r")
        fill(snapshot, "x.safetensors sub/a.safetensors sub/config.json")
        link_blob(snapshot, "x.safetensors", "abc")
        return snapshot

    @pytest.mark.parametrize("offline", [True, False])
    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            ("o/r/x.safetensors", "x"),
            ("o/r/sub", "sub/a"),
            ("o/r/sub/", "sub/a"),
            ("o/r/sub/a.safetensors", "sub/a"),
            ("https://huggingface.co/o/r/blob/main/x.safetensors", "x"),
            (f"https://huggingface.co/o/r/tree/{COMMIT}/sub", "sub/a"),
        ],
    )
    def test_found(
        self, tmp_path: Path, snapshot: Path, reference: str, expected: str, offline: bool
    ) -> None:
        found = opening.open_weights(reference, Hub(str(tmp_path), offline=offline))
        assert names(found, snapshot) == [f"{expected}.safetensors"]
        assert found.remote is None
        assert opening.fetch(found, Hub(str(tmp_path))) is found

    def test_not_in_the_cache_and_offline(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            opening.open_weights("o/missing", Hub(str(tmp_path), offline=True))
        for word in ("o/missing", str(tmp_path), "offline", "hf download", "--tiny", "tiny-hub"):
            assert word in str(caught.value)

    def test_not_in_the_cache_and_no_network(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            opening.open_weights("o/missing", Hub(str(tmp_path)))
        for word in ("o/missing", "no network in tests", "--tiny", "hf auth login"):
            assert word in str(caught.value)

    def test_another_revision_is_another_snapshot(self, tmp_path: Path, snapshot: Path) -> None:
        other = fill(make_cache(tmp_path, "o/r", OTHER_COMMIT, ref="v2"), "y.safetensors")
        for revision in ("v2", OTHER_COMMIT):
            found = opening.open_weights("o/r", Hub(str(tmp_path), True, revision=revision))
            assert names(found, other) == ["y.safetensors"]
        with pytest.raises(CheckpointError, match="not in the cache"):
            opening.open_weights("o/r", Hub(str(tmp_path), True, revision="v3"))

    def test_the_users_own_cache(
        self, tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        found = opening.open_weights("o/r/x.safetensors", Hub(offline=True))
        assert names(found, snapshot) == ["x.safetensors"]

    def test_nothing_of_that_name_inside(self, tmp_path: Path, snapshot: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            opening.open_weights("o/r/nothing", Hub(str(tmp_path), offline=True))
        for word in ("has no file or folder nothing", "sub, x.safetensors", "cached snapshot"):
            assert word in str(caught.value)

    @pytest.mark.parametrize("offline", [True, False])
    def test_a_partial_snapshot_says_so(self, tmp_path: Path, offline: bool) -> None:
        fill(make_cache(tmp_path, "o/r"), f"config.json {INDEX}=a.safetensors")
        with pytest.raises(CheckpointError, match="a cached snapshot, which may hold a part"):
            opening.open_component("o/r", Hub(str(tmp_path), offline=offline))

    def test_offline_opens_no_connection(self, tmp_path: Path, snapshot: Path) -> None:
        """The hub client is not even imported: the cache is plain folders."""
        code = (
            "import sys; from quantmatrix.checkpoints import opening\n"
            "from quantmatrix.request import Hub\n"
            f"opening.open_weights('o/r/sub', Hub({str(tmp_path)!r}, offline=True))\n"
            "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@dataclass
class FakeHub:
    """A hub of one repository: what it holds, and what was asked of it."""

    files: Path
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)

    def model_info(self, repo: str, *, revision: str | None = None) -> Any:
        self.asked.append(f"info {repo} {revision}")
        found = sorted(p.relative_to(self.files).as_posix() for p in self.files.rglob("*.*"))
        siblings = [SimpleNamespace(rfilename=name) for name in found]
        return SimpleNamespace(sha=self.commit, siblings=siblings)

    def parse_safetensors_file_metadata(self, repo: str, name: str, *, revision: str) -> Any:
        assert revision == COMMIT
        self.asked.append(f"header {name}")
        content = (self.files / name).read_bytes()
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except ValueError as error:
            raise SafetensorsParsingError(str(error)) from error
        tensors = {key: SimpleNamespace(**value) for key, value in header.items()}
        metadata = vars(tensors.pop("__metadata__", SimpleNamespace()))
        return SimpleNamespace(tensors=tensors, metadata=metadata)

    def hf_hub_download(self, repo: str, name: str, *, revision: str, cache_dir: str | None) -> str:
        assert revision == COMMIT
        assert cache_dir is not None
        self.asked.append(f"file {name}")
        folder = Path(cache_dir) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((self.files / name).read_bytes())
        return str(path)

    def snapshot_download(
        self, repo: str, *, revision: str, cache_dir: str | None, allow_patterns: list[str]
    ) -> str:
        for name in allow_patterns:
            path = self.hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir)
        return path.removesuffix(f"/{name}")


class TestRemote:
    """Repositories that are on the hub only, or there in part."""

    @pytest.fixture
    def remote(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        remote = FakeHub(tmp_path / "remote")
        for name in ("model_info", "parse_safetensors_file_metadata"):
            method = getattr(remote, name)
            monkeypatch.setattr(
                huggingface_hub.HfApi,
                name,
                lambda _, *args, method=method, **named: method(*args, **named),
            )
        for name in ("hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(remote, name))
        return remote

    @pytest.fixture
    def hub(self, tmp_path: Path) -> Hub:
        return Hub(str(tmp_path / "cache"))

    def test_headers_only_then_everything(self, remote: FakeHub, hub: Hub) -> None:
        fill(remote.files / "t", f"{INDEX}=a.safetensors,b.safetensors a.safetensors b.safetensors")
        write_json(remote.files / "t/config.json", {"quantization_config": {"quant_method": "fp8"}})
        found = opening.open_component("o/r/t", hub)
        assert remote.asked == [
            "info o/r None",
            f"file t/{INDEX}",
            "header t/a.safetensors",
            "header t/b.safetensors",
            "file t/config.json",
        ]
        address = f"hf://o/r@{COMMIT}/t/a.safetensors"
        assert found.tensors["a.weight"] == TensorHeader("a.weight", "BF16", (2, 3), address)
        assert found.files == (address, address.replace("/a.", "/b."))
        assert found.quantization == {"quant_method": "fp8"}
        assert found.remote is not None
        assert (found.remote.repo, found.remote.commit) == ("o/r", COMMIT)
        remote.asked.clear()
        local = opening.fetch(found, hub)
        assert remote.asked == ["file t/a.safetensors", "file t/b.safetensors"]
        assert local.remote is None
        assert all(Path(file).is_file() for file in local.files)
        assert {t.file for t in local.tensors.values()} == set(local.files)
        assert local.nbytes == found.nbytes == 24

    def test_shards_of_one_name_in_two_folders(self, remote: FakeHub, hub: Hub) -> None:
        shards = {"x.weight": "one/s.safetensors", "y.weight": "two/s.safetensors"}
        for tensor, shard in shards.items():
            write_weights(remote.files / shard, {tensor: ("F32", (1,))})
        write_json(remote.files / INDEX, {"weight_map": shards})
        local = opening.fetch(opening.open_weights("o/r", hub), hub)
        assert {n: Path(t.file).parent.name for n, t in local.tensors.items()} == {
            "x.weight": "one",
            "y.weight": "two",
        }

    def test_cached_shards_are_not_downloaded_again(self, remote: FakeHub, hub: Hub) -> None:
        fill(remote.files, f"{INDEX}=a.safetensors,b.safetensors a.safetensors b.safetensors")
        assert hub.cache_dir is not None
        snapshot = fill(make_cache(Path(hub.cache_dir), "o/r"), "a.safetensors")
        found = opening.open_weights("o/r", hub)
        assert found.files[0] == str(snapshot / "a.safetensors")
        assert found.remote is not None
        assert found.remote.files == ("b.safetensors",)
        assert "header a.safetensors" not in remote.asked
        local = opening.fetch(found, hub)
        assert names(local, snapshot) == ["a.safetensors", "b.safetensors"]
        assert remote.asked.count("file a.safetensors") == 0

    def test_a_cached_commit_is_kept(self, remote: FakeHub, hub: Hub) -> None:
        """A part in the cache pins the commit, but does not decide which files there are."""
        fill(remote.files, "x.safetensors x-mixed.safetensors")
        assert hub.cache_dir is not None
        fill(make_cache(Path(hub.cache_dir), "o/r"), "x.safetensors")
        found = opening.open_weights("o/r", hub)
        assert found.files == (f"hf://o/r@{COMMIT}/x-mixed.safetensors",)
        assert remote.asked[0] == f"info o/r {COMMIT}"

    def test_one_commit_per_process(self, remote: FakeHub, hub: Hub) -> None:
        fill(remote.files, "x.safetensors")
        first = opening.open_weights("o/r", hub)
        remote.commit = OTHER_COMMIT
        assert opening.open_weights("o/r", hub).files == first.files
        assert sum(word.startswith("info") for word in remote.asked) == 1

    def test_revision(self, remote: FakeHub, hub: Hub) -> None:
        fill(remote.files, "x.safetensors")
        opening.open_weights("o/r", Hub(hub.cache_dir, revision="v1"))
        opening.open_weights("https://huggingface.co/o/r/tree/v2", hub)
        infos = [word for word in remote.asked if word.startswith("info")]
        assert infos == ["info o/r v1", "info o/r v2"]

    @pytest.mark.parametrize("revision", [None, "v1", "refs/pr/1", COMMIT])
    def test_what_was_downloaded_is_found_offline(
        self, remote: FakeHub, hub: Hub, revision: str | None
    ) -> None:
        fill(remote.files, "x.safetensors")
        online = Hub(hub.cache_dir, revision=revision)
        fetched = opening.fetch(opening.open_weights("o/r", online), online)
        offline = Hub(hub.cache_dir, offline=True, revision=revision)
        assert opening.open_weights("o/r", offline).files == fetched.files
        remote.asked.clear()
        list_repository.cache_clear()
        opening.open_weights("o/r", online)
        assert remote.asked == [f"info o/r {COMMIT}"]

    def test_no_such_file(self, remote: FakeHub, hub: Hub) -> None:
        fill(remote.files, "x.safetensors sub/y.safetensors")
        with pytest.raises(CheckpointError, match="o/r has no file or folder z; o/r has sub, x"):
            opening.open_weights("o/r/z", hub)

    def test_a_damaged_remote_header(self, remote: FakeHub, hub: Hub) -> None:
        path = write_weights(remote.files / "x.safetensors")
        path.write_bytes(path.read_bytes().replace(b"BF16", b"F99x"))
        with pytest.raises(CheckpointError, match=r"hf://o/r@.*x\.safetensors: tensor x\.weight"):
            opening.open_weights("o/r", hub)
        path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))
        with pytest.raises(CheckpointError, match=r"o/r/x\.safetensors: its header cannot be read"):
            opening.open_weights("o/r", hub)

    def test_errors_of_the_client_are_ours(
        self, remote: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        http_error = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
        fill(remote.files, "x.safetensors")
        found = opening.open_weights("o/r", hub)
        for error in (http_error("refused\nmore"), OSError("refused"), ValueError("refused")):

            def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
                raise error

            monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
            with pytest.raises(CheckpointError) as caught:
                opening.fetch(found, hub)
            assert "o/r/x.safetensors: cannot be downloaded" in str(caught.value)
            assert "refused)" in str(caught.value)

    def test_only_what_a_pipeline_needs_is_downloaded(self, remote: FakeHub, hub: Hub) -> None:
        fill(
            remote.files,
            "flux1-dev.safetensors ae.safetensors README.md dev_grid.jpg.json "
            f"transformer/config.json transformer/{INDEX}=a.safetensors transformer/a.safetensors "
            "vae/config.json vae/d.safetensors vae/d.fp16.safetensors vae/d.bin "
            "tokenizer/vocab.json onnx/model.onnx.json",
        )
        parts = {name: ["diffusers", "X"] for name in ("transformer", "vae", "tokenizer")}
        write_json(remote.files / "model_index.json", {"_class_name": "P", **parts})
        root = Path(opening.fetch_pipeline("o/r", hub, without=("transformer",)))
        here = {path.relative_to(root).as_posix() for path in root.rglob("*.*")}
        assert here == {
            "model_index.json",
            "README.md",
            "dev_grid.jpg.json",
            "transformer/config.json",
            "vae/config.json",
            "vae/d.safetensors",
            "tokenizer/vocab.json",
        }

    def test_a_pipeline_that_is_there_by_commit_is_noted_by_name(
        self, remote: FakeHub, hub: Hub
    ) -> None:
        write_json(remote.files / "model_index.json", {"_class_name": "P", "vae": ["d", "X"]})
        root = opening.fetch_pipeline("o/r", Hub(hub.cache_dir, revision=COMMIT))
        assert opening.fetch_pipeline("o/r", hub) == root
        assert opening.fetch_pipeline("o/r", Hub(hub.cache_dir, offline=True)) == root

    def test_a_component_of_a_repository_is_downloaded(self, remote: FakeHub, hub: Hub) -> None:
        fill(remote.files, "vae/config.json vae/d.safetensors other/x.safetensors")
        root = Path(opening.fetch_pipeline("o/r/vae", hub))
        assert {path.name for path in root.rglob("*.*")} == {"config.json", "d.safetensors"}
        assert root.name == "vae"

    def test_a_local_pipeline_stays_where_it_is(self, tmp_path: Path) -> None:
        write_json(tmp_path / "model_index.json", {})
        assert opening.fetch_pipeline(str(tmp_path), Hub()) == str(tmp_path)


class HubServer(BaseHTTPRequestHandler):
    """As much of the hub's protocol as the real client needs for one repository."""

    files: Path
    sent: list[tuple[str, int]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        folder = path.partition(f"/tree/{COMMIT}/")[2]
        if folder:
            paths = [p for p in (self.files / folder).iterdir() if p.is_file()]
            said = [{"path": f"{folder}/{p.name}", "size": p.stat().st_size} for p in paths]
            tree = [{"type": "file", "oid": "0", **entry} for entry in said]
            self.answer("tree", json.dumps(tree).encode(), {})
            return
        if path.startswith("/api/models/o/r"):
            found = sorted(p.relative_to(self.files).as_posix() for p in self.files.rglob("*.*"))
            listing = {"id": "o/r", "sha": COMMIT, "siblings": [{"rfilename": n} for n in found]}
            self.answer("listing", json.dumps(listing).encode(), {})
            return
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if not name:
            self.send_error(404, path)
            return
        content = (self.files / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(content).hexdigest()}"'}
        self.answer(name, content, headers)

    def answer(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        part = self.headers.get("Range")
        if part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            total = len(content)
            content = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{total}"
        self.send_response(206 if part else 200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.sent.append((name, len(content)))
            self.wfile.write(content)


def run_client(server_class: type[HubServer], code: str, home: Path) -> list[Any]:
    """Lines of JSON that a process printed which talks to a server with the real client."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), server_class)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_real_client_transfers_headers_first_and_weights_when_fetched(tmp_path: Path) -> None:
    class Server(HubServer):
        files = tmp_path / "remote"

    Server.sent = []
    big = {"big.weight": ("F32", (1000, 1000))}
    block = {"quantization_config": json.dumps({"quant_method": "fp8"})}
    write_weights(Server.files / "t/x.safetensors", big, block)
    write_json(Server.files / "t/config.json", {"_class_name": "X"})
    code = (
        "import json\n"
        "from quantmatrix.checkpoints import opening\n"
        "from quantmatrix.request import Hub\n"
        f"hub = Hub({str(tmp_path / 'cache')!r})\n"
        "found = opening.open_weights('o/r/t', hub)\n"
        "print(json.dumps([found.files, found.nbytes, found.quantization, found.config]))\n"
        "print(json.dumps(opening.fetch(found, hub).files), flush=True)\n"
    )
    first, second = run_client(Server, code, tmp_path / "home")
    address = f"hf://o/r@{COMMIT}/t/x.safetensors"
    assert first == [[address], 4_000_000, {"quant_method": "fp8"}, {"_class_name": "X"}]
    assert Path(second[0]).stat().st_size > 4_000_000
    sizes = [size for name, size in Server.sent if name == "t/x.safetensors"]
    assert len(sizes) == 2
    assert sizes[0] < 200_000 < 4_000_000 < sizes[1]
    offline = Hub(str(tmp_path / "cache"), offline=True)
    assert opening.open_weights("o/r/t/x.safetensors", offline).files == tuple(second)


def test_the_real_client_reads_small_tensors_alone(tmp_path: Path) -> None:
    class Server(HubServer):
        files = tmp_path / "remote"

    Server.sent = []
    entry = json.dumps({"format": "float8_e4m3fn"})
    marker = "b.comfy_quant"
    tensors = {
        "a.weight": ("F8_E4M3", (1000, 4000)),
        marker: ("U8", (len(entry),)),
        "c.weight": ("F8_E4M3", (1000, 4000)),
    }
    path = write_weights(Server.files / "t/x.safetensors", tensors)
    content = path.read_bytes()
    begin = len(content) - 4_000_000 - len(entry)
    path.write_bytes(content[:begin] + entry.encode() + content[begin + len(entry) :])
    code = (
        "import json\n"
        "from quantmatrix.checkpoints import opening\n"
        "from quantmatrix.request import Hub\n"
        f"found = opening.open_weights('o/r/t', Hub({str(tmp_path / 'cache')!r}))\n"
        "print(json.dumps([found.quantization['layers'], found.quantization_from]))\n"
    )
    [found] = run_client(Server, code, tmp_path / "home")
    address = f"hf://o/r@{COMMIT}/t/x.safetensors"
    assert found == [{"b": json.loads(entry)}, f"{address}: tensors *.comfy_quant"]
    sizes = [size for name, size in Server.sent if name == "t/x.safetensors"]
    assert sizes[-1] == len(entry)
    assert sum(sizes) < 200_000


class TestWhoIsToBlame:
    """The hub that cannot be read is no fault of a checkpoint; a name that is wrong is."""

    @pytest.mark.parametrize(
        ("kind", "status", "token", "unreachable"),
        [
            ("GatedRepoError", 403, "t", True),
            ("RepositoryNotFoundError", 401, None, True),
            ("RepositoryNotFoundError", 404, "t", False),
            ("RevisionNotFoundError", 404, "t", False),
            ("RemoteEntryNotFoundError", 404, "t", False),
            ("HfHubHTTPError", 503, "t", True),
            ("HfHubHTTPError", 401, "t", True),
            ("HfHubHTTPError", 400, "t", False),
        ],
    )
    def test_answers(
        self,
        kind: str,
        status: int,
        token: str | None,
        unreachable: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import huggingface_hub
        from huggingface_hub import errors

        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        error = getattr(errors, kind).__new__(getattr(errors, kind), "no")
        error.response = SimpleNamespace(status_code=status)
        assert is_unreachable(error) == unreachable
        with pytest.raises(CheckpointError) as caught, translate_hub_errors("o/r", "o/r"):
            raise error
        assert isinstance(caught.value, UnusableError) == unreachable

    def test_no_connection_and_no_file(self) -> None:
        from huggingface_hub import errors

        assert is_unreachable(OSError("no route"))
        assert is_unreachable(errors.LocalEntryNotFoundError("offline"))
        assert not is_unreachable(ValueError("no header"))

    def test_offline_without_a_copy(self, tmp_path: Path) -> None:
        with pytest.raises(UnreachableError, match="we are offline"):
            opening.open_weights("o/missing", Hub(str(tmp_path), offline=True))
