"""A pipeline on a numbered device makes it the current one, on which Triton starts its kernels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quantmatrix.api import plan
from quantmatrix.request import Request
from quantmatrix.runtime import pipeline
from quantmatrix.runtime.plan.types import Plan


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:1", [1]), ("npu:3", [3]), ("cuda", []), ("cpu", [])]
)
def test_numbered_accelerators_become_current(
    device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    module = SimpleNamespace(set_device=chosen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    pipeline.make_current(device)
    assert chosen == expected


def test_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(Request(model_path="black-forest-labs/FLUX.1-dev", tiny=True, device="cpu"))
    assert isinstance(planned, Plan)
    elsewhere = replace(planned, machine=replace(planned.machine, device="cuda:1"))

    def stop(device: str) -> None:
        raise LookupError(device)

    monkeypatch.setattr(pipeline, "make_current", stop)
    monkeypatch.setattr(pipeline, "load_component", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(LookupError, match="cuda:1"):
        pipeline.build_pipeline(elsewhere)


@pytest.mark.parametrize(("offloaded", "moved"), [(False, ["transformer", "vae"]), (True, ["vae"])])
def test_what_is_moved_to_the_device(offloaded: bool, moved: list[str]) -> None:
    """An offloaded transformer stays; what is no network has no place."""
    parts = {"transformer": torch.nn.Linear(2, 3), "vae": torch.nn.Linear(2, 3)}
    loaded = SimpleNamespace(components={**parts, "tokenizer": object(), "image_encoder": None})
    planned = SimpleNamespace(
        components={"transformer": None}, layerwise_offload=False, cpu_offload=False
    )
    pipeline.place(loaded, planned, "meta", offloaded)  # type: ignore[arg-type]
    assert [name for name, part in parts.items() if part.weight.is_meta] == moved
