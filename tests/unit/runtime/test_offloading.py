"""Streamed blocks give all of their memory back; diffusers' own hooks run, on a device made of copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from torch import nn

from quantmatrix.hardware import probe
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime import offloading

FORMS = [("modelopt-fp8", "FP8", "reference"), ("modelopt-nvfp4", "NVFP4", "reference"),
         ("msmodelslim", "W8A8", "int8")]  # fmt: skip


class Device:
    """Copies stand for tensors on a device; the most bytes of them that a model held at once."""

    def __init__(self) -> None:
        self.copies: dict[int, torch.Tensor] = {}
        self.model: nn.Module | None = None
        self.peak = 0

    def take(self, group: Any, tensor: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        tensor.data = source.clone()
        self.copies[tensor.data.data_ptr()] = tensor.data
        self.peak = max(self.peak, self.count())

    def count(self) -> int:
        """Bytes of the model that lie on the device now."""
        assert self.model is not None
        held = {
            t.data_ptr(): t.nbytes
            for t in [*self.model.parameters(), *self.model.buffers()]
            if t.data_ptr() in self.copies
        }
        return sum(held.values())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device()
    stream = SimpleNamespace(synchronize=lambda: None)
    backend = SimpleNamespace(
        Stream=lambda: stream, stream=lambda _: nullcontext(), current_stream=lambda: stream
    )
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda _: backend)
    monkeypatch.setattr(group_offloading, "send_to_device", lambda value, *_, **__: value)
    monkeypatch.setattr(
        group_offloading.ModuleGroup, "_transfer_tensor_to_device",
        lambda group, tensor, source, stream: made.take(group, tensor, source, stream),
    )  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    return made


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_only_a_few_blocks_are_on_the_device(form: tuple[str, str, str], device: Device) -> None:
    family, scheme, backend = form
    machine = probe.probe("cpu")
    model = synthesize(
        "flux-1", machine, family=family, scheme=scheme, backend=backend, size="tiny"
    )
    inputs = make_inputs("flux-1", model, "cpu", torch.bfloat16, size="tiny")
    tensors = [*model.parameters(), *model.buffers()]
    whole = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    with torch.no_grad():
        expected = model(**inputs)[0]
        device.model = model
        offloading.stream_blocks(model, "cuda")
        for _ in range(2):  # the second one prefetches
            device.peak = 0
            assert torch.equal(model(**inputs)[0], expected)
            blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
            largest = max(sum(t.nbytes for t in [*b.parameters(), *b.buffers()]) for b in blocks)
            outside = whole - sum(t.nbytes for b in blocks for t in [*b.parameters(), *b.buffers()])
            assert 0 < device.peak <= outside + 2 * largest < whole
    left = [t for b in blocks for t in [*b.parameters(), *b.buffers()]]
    assert not [t for t in left if t.data_ptr() in device.copies]


def test_without_a_stream_nothing_is_changed() -> None:
    model = synthesize("flux-1", probe.probe("cpu"), size="tiny")
    offloading.stream_blocks(model, "cpu")
    hooks = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    groups = [h.get_hook("group_offloading").group for h in hooks if h.get_hook("group_offloading")]
    assert groups
    assert not any("offload_" in vars(group) for group in groups)
