"""The streaming writer: readable by the library, deterministic, honest about what it is given."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix.checkpoints.header import read_header
from quantmatrix.checkpoints.writer import Item, write_file
from quantmatrix.errors import CheckpointError

TENSORS = {
    "b.weight": (torch.arange(15).view(3, 5).to(torch.int8), "I8"),
    "a.scale": (torch.rand(3), "F32"),
    "c.weight": (torch.rand(4, 6).bfloat16().t(), "BF16"),
    "d.bits": (torch.tensor([2**40]), "I64"),
    "e.codes": (torch.rand(2, 2).to(torch.float8_e4m3fn), "F8_E4M3"),
    "f.scalar": (torch.tensor(2.5), "F32"),
    "g.empty": (torch.empty(0, 4), "F32"),
}


def make_items(order=tuple(TENSORS)) -> list[Item]:
    return [
        Item(name, TENSORS[name][1], tuple(TENSORS[name][0].shape), lambda n=name: TENSORS[n][0])
        for name in order
    ]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_library_reads_it(tmp_path):
    path = tmp_path / "w.safetensors"
    size = write_file(path, make_items(), {"format": "pt"})
    assert size == path.stat().st_size
    found = load_file(path)
    assert set(found) == set(TENSORS)
    for name, (tensor, _) in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), bytes_of(tensor))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert set(read_header(path)[0]) == set(TENSORS)


def test_bytes_do_not_depend_on_the_order(tmp_path):
    write_file(tmp_path / "a", make_items())
    write_file(tmp_path / "b", make_items(tuple(reversed(TENSORS))))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_it_writes_what_the_library_writes(tmp_path):
    plain = {name: tensor.contiguous() for name, (tensor, _) in TENSORS.items() if tensor.numel()}
    save_file(plain, tmp_path / "library")
    write_file(tmp_path / "ours", [item for item in make_items() if item.name in plain])
    ours, library = (read_header(tmp_path / name)[0] for name in ("ours", "library"))
    assert {n: (h.dtype, h.shape) for n, h in ours.items()} == {
        n: (h.dtype, h.shape) for n, h in library.items()
    }
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "library").stat().st_size


def test_one_tensor_at_a_time(tmp_path):
    events = []

    def load(name: str) -> torch.Tensor:
        events.append(name)
        return torch.zeros(4)

    items = [Item(name, "F32", (4,), lambda name=name: load(name)) for name in "cab"]
    assert not events
    write_file(tmp_path / "w", items)
    assert events == ["a", "b", "c"]


def test_a_tensor_of_another_size_is_an_error(tmp_path):
    item = Item("a", "F32", (4,), lambda: torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"a was announced as F32 \[4\]"):
        write_file(tmp_path / "w", [item])


def test_one_name_twice_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="twice"):
        write_file(tmp_path / "w", make_items(("a.scale", "a.scale")))
