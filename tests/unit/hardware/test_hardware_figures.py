"""Machines by value: what a probe reads, whole texts about packages, and what a fingerprint says."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.hardware import packages, probe
from quantmatrix.hardware.machine import Flaw, Machine

ADVICE = (
    "uninstall it, and install the engine's wheel for your Python, torch and CUDA from its project's "
    "releases"
)


@pytest.mark.parametrize(
    ("files", "kind", "text"),
    [
        (("_C.so", "ops/gemm.py", "models/linear.py"), "engine", "the SVDQuant engine 1.2"),
        (("_C1.pyd", "ops/gemm.py", "models/linear.py"), "engine", "the SVDQuant engine 1.2"),
        (
            ("ops/gemm.py", "models/linear.py"),
            "look-alike",
            f"nunchaku 1.2 lacks its compiled extension _C: not a working engine; {ADVICE}",
        ),
        (
            ("_C.so",),
            "look-alike",
            "nunchaku 1.2 lacks ops/gemm.py, models/linear.py: not a working engine; " + ADVICE,
        ),
        (
            (),
            "look-alike",
            "nunchaku 1.2 lacks its compiled extension _C, ops/gemm.py, models/linear.py: not a "
            "working engine; " + ADVICE,
        ),
        (
            ("nunchaku.py", "_C.so", "ops/gemm.py"),
            "look-alike",
            "nunchaku 1.2 is an unrelated statistics package (piece-wise linear fitting), not the "
            "SVDQuant engine: " + ADVICE,
        ),
        (
            ("gibbs_sampler.py",),
            "look-alike",
            "nunchaku 1.2 is an unrelated statistics package (piece-wise linear fitting), not the "
            "SVDQuant engine: " + ADVICE,
        ),
    ],
)
def test_what_is_installed_as_nunchaku(
    files: tuple[str, ...], kind: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    versions = {"nunchaku": "1.2"}
    monkeypatch.setattr(packages, "find_package", lambda name: tmp_path)
    monkeypatch.setattr(packages, "read_versions", lambda names: versions)
    assert packages.inspect_nunchaku() == (kind, text)
    versions.clear()
    assert packages.inspect_nunchaku() == (kind, text.replace("1.2", "of unknown version"))
    monkeypatch.setattr(packages, "find_package", lambda name: None)
    assert packages.inspect_nunchaku() == (None, "no package named nunchaku is installed")


@pytest.mark.parametrize(("kind", "there"), [("engine", True), ("a", False), ("look-alike", False)])
def test_packages_that_are_there(kind: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: name in ("triton", "nunchaku"))
    monkeypatch.setattr(packages, "inspect_nunchaku", lambda: (kind, ""))
    expected = {"triton", "nunchaku"} if there else {"triton"}
    assert packages.installed_packages() == expected


def test_versions_by_the_name_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("gone", "torch"):
            raise packages.metadata.PackageNotFoundError(name)
        return f"of {name}"

    monkeypatch.setattr(packages.metadata, "version", version)
    asked = ("flashinfer", "gone", "humming", "torch_npu", "comfy_kitchen", "other")
    assert packages.read_versions(asked) == {
        "flashinfer": "of flashinfer-python",
        "humming": "of humming-kernels",
        "torch_npu": "of torch-npu",
        "comfy_kitchen": "of comfy-kitchen",
        "other": "of other",
    }
    assert list(packages.read_versions()) == [
        "diffusers", "transformers", "safetensors", "accelerate", "huggingface_hub",
    ]  # fmt: skip


def pretend(monkeypatch: pytest.MonkeyPatch, **counts: int) -> list[Any]:
    """Devices by their kind; returns the numbers of those that are asked for."""
    asked: list[Any] = []

    def ask(index: int) -> Any:
        asked.append(index)
        return SimpleNamespace(
            name=f"GPU {index}", total_memory=1000.0 + index, major=9, minor=index
        )

    monkeypatch.setattr(probe, "count_devices", lambda kind: counts.get(kind, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", ask)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(get_device_properties=ask), raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(probe, "installed_packages", lambda: frozenset({"p"}))
    return asked


@pytest.mark.parametrize(
    ("device", "counts", "index", "found"),
    [
        ("cuda:2", {"cuda": 3}, 2, ("GPU 2", "nvidia", "sm92", 1002, "cuda:2", 3)),
        ("cuda", {"cuda": 3}, 0, ("GPU 0", "nvidia", "sm90", 1000, "cuda", 3)),
        ("npu:1", {"npu": 2}, 1, ("GPU 1", "ascend", "1", 1001, "npu:1", 2)),
        (None, {"npu": 2, "cuda": 1, "cpu": 1}, 0, ("GPU 0", "nvidia", "sm90", 1000, "cuda", 1)),
        (None, {"npu": 2, "cpu": 1}, 0, ("GPU 0", "ascend", "0", 1000, "npu", 2)),
        ("mps", {"mps": 1}, None, ("Apple GPU", "apple", "mps", 77, "mps", 1)),
        (None, {"mps": 1, "cpu": 1}, None, ("cpu", "cpu", "cpu", 77, "cpu", 1)),
    ],
)
def test_the_machine_of_a_device(
    device: str | None,
    counts: dict[str, int],
    index: int | None,
    found: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = pretend(monkeypatch, **counts)
    monkeypatch.setattr(probe, "read_memory", lambda: 77)
    flaws = (Flaw("op", "backend", "rule", "why"),)
    monkeypatch.setattr(probe, "find_flaws", lambda: flaws)
    name, vendor, arch, memory, place, count = found
    own = flaws if vendor == "cpu" else ()
    expected = Machine(name, vendor, arch, memory, frozenset({"p"}), place, count, own)
    assert probe.probe(device) == expected
    assert asked == ([] if index is None else [index])


@pytest.mark.parametrize("device", ["cuda:3", "cuda:03", "cuda:x", "npu", "mps", "tpu:0"])
def test_a_device_that_is_not_here(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=3, cpu=1)
    with pytest.raises(probe.UsageError) as caught:
        probe.probe(device)
    assert str(caught.value) == (
        f"--device {device}: no such device here; found: cpu (1), cuda (3)"
    )


@pytest.mark.parametrize(
    ("available", "count", "found"), [(True, 3, 3), (False, 3, 0), (True, 0, 0)]
)
def test_devices_are_counted(
    available: bool, count: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SimpleNamespace(is_available=lambda: available, device_count=lambda: count)
    monkeypatch.setattr(torch, "npu", own, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", own.is_available)
    monkeypatch.setattr(torch.cuda, "device_count", own.device_count)
    monkeypatch.setattr(torch.backends.mps, "is_available", own.is_available)
    kinds = ("cuda", "npu", "mps", "cpu", "a", "z")
    assert [probe.count_devices(kind) for kind in kinds] == [found, found, int(available), 1, 0, 0]
    monkeypatch.setattr(torch, "npu", None, raising=False)
    assert probe.count_devices("npu") == 0


@pytest.mark.parametrize(
    ("name", "arch"), [("Ascend910B4", "910b"), ("Ascend 310 P", "310"), ("NPU", "unknown")]
)
def test_the_generation_of_an_npu(name: str, arch: str) -> None:
    found = probe._probe_npu(SimpleNamespace(name=name, total_memory=3.0), frozenset(), "npu", 2)
    assert found == Machine(name, "ascend", arch, 3, frozenset(), "npu", 2)


def test_memory_is_pages_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(probe.os, "sysconf", lambda name: sizes[name])
    assert probe.read_memory() == 4_096_000


@pytest.mark.parametrize("exact", [True, False])
def test_flaws_of_a_processor(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "multiplies_int8_exactly", lambda: exact)
    why = (
        "torch's integer product is not exact on this processor: without VNNI instructions sums of "
        "two products saturate at 16 bits"
    )
    found = tuple(
        Flaw(op, "int8", "int8-exact-cpu", why) for op in ("linear.int8", "linear.convrot")
    )
    assert probe.find_flaws() == (() if exact else found)


@pytest.mark.parametrize(("offset", "exact"), [(0, True), (1, False), (-1, False)])
def test_a_product_of_integers_is_tried(
    offset: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked.append((tuple(left.shape), tuple(right.shape), left.dtype, int(left.float().mean())))
        found = left.int() @ right.int()
        found[3, 5] += offset
        return found

    monkeypatch.setattr(torch, "_int_mm", multiply)
    assert probe.multiplies_int8_exactly.__wrapped__() is exact
    assert asked == [((32, 64), (64, 32), torch.int8, 127)]


def test_a_fingerprint_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "read_processor", lambda: "p")
    monkeypatch.setattr(probe, "read_instruction_sets", lambda: ["avx2"])
    monkeypatch.setattr(probe.os, "cpu_count", lambda: None)
    monkeypatch.setattr(probe, "read_memory", lambda: 5)
    monkeypatch.setattr(probe.platform, "system", lambda: "Linux")
    monkeypatch.setattr(probe.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(probe.platform, "python_version", lambda: "3.9")
    monkeypatch.setattr(probe, "read_versions", lambda: {"torch": "2"})
    own = SimpleNamespace(
        get_num_threads=lambda: 7,
        cuda=SimpleNamespace(get_device_name=lambda n: f"cuda {n}"),
        npu=SimpleNamespace(get_device_name=lambda n: f"npu {n}"),
    )
    monkeypatch.setitem(sys.modules, "torch", own)  # type: ignore[arg-type]
    monkeypatch.setattr(probe, "count_devices", lambda kind: {"cuda": 2, "npu": 1}[kind])
    plain = {
        "processor": "p",
        "instruction_sets": ["avx2"],
        "processors": 0,
        "memory_bytes": 5,
        "system": "Linux x86_64",
        "python": "3.9",
        "versions": {"torch": "2"},
    }
    devices = ["cuda 0", "cuda 1", "npu 0"]
    assert probe.fingerprint() == {**plain, "threads": 7, "devices": devices}
    monkeypatch.delitem(sys.modules, "torch")
    assert probe.fingerprint() == plain


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [("flags", "sve avx512f_x avx2"), ("Features", "i8mm")]
    monkeypatch.setattr(probe, "_read_cpuinfo", lambda: lines)
    assert probe.read_instruction_sets() == ["avx2", "sve"]
    names = {"processor": "", "machine": ""}
    monkeypatch.setattr(probe.platform, "processor", lambda: names["processor"])
    monkeypatch.setattr(probe.platform, "machine", lambda: names["machine"])
    assert probe.read_processor() == "unknown"
    names["machine"] = "arm64"
    assert probe.read_processor() == "arm64"
    names["processor"] = "M9"
    assert probe.read_processor() == "M9"
    lines += [("model name", "first"), ("model name", "second")]
    assert probe.read_processor() == "first"


def test_machines_do_not_change() -> None:
    machine = Machine("n", "cpu", "cpu", 1)
    assert (machine.packages, machine.device, machine.count, machine.flaws) == (
        frozenset(), "cpu", 1, (),
    )  # fmt: skip
    for value, name in ((machine, "name"), (probe.SATURATING, "op")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, "x")
