"""The doctor's findings on this machine, and on machines with something wrong."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quantmatrix import families
from quantmatrix.cli import main
from quantmatrix.hardware import packages as hardware_packages
from quantmatrix.hardware import probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.runtime import doctor


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return doctor.examine()


def test_this_machine(found: dict[str, Any]) -> None:
    import torch

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["error"] is None
    assert found["machine"]["device"] == probe.probe().device
    assert set(found["packages"]) == set(hardware_packages.OPTIONAL_PACKAGES)
    assert found["versions"]["quantmatrix"]
    assert Path(found["hub"]["cache"]).is_absolute()


def test_every_scheme_of_every_family_is_answered(found: dict[str, Any]) -> None:
    assert list(found["kernels"]) == list(families.IDS)
    for family, schemes in found["kernels"].items():
        assert list(schemes) == list(families.load(family).SCHEMES)
        assert all(bool(kernel["backend"]) != bool(kernel["why"]) for kernel in schemes.values())


def test_what_runs_depends_on_the_machine() -> None:
    hopper = doctor.list_kernels(Machine("H100", "nvidia", "sm90", 2**36, frozenset(), "cuda"))
    assert hopper["fp8"]["tensor-dynamic"]["backend"] == "torch"
    here = doctor.list_kernels(Machine("cpu", "cpu", "cpu", 2**34))
    assert here["fp8"]["tensor-dynamic"]["backend"] in ("decode", "reference")


def test_a_scheme_without_a_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantmatrix import kernels

    def refuse(op: str, *_: Any) -> Any:
        raise kernels.NoKernel("some-rule", f"{op}: needs more")

    monkeypatch.setattr(kernels, "choose", refuse)
    runs = doctor.list_kernels(Machine("cpu", "cpu", "cpu", 0))
    assert runs["fp8"]["tensor-dynamic"] == {"backend": None, "why": "linear.fp8: needs more"}
    text = doctor.to_text({**doctor.examine(), "kernels": runs})
    assert "nothing: linear.fp8: needs more" in text


def test_in_words(found: dict[str, Any]) -> None:
    text = doctor.to_text(found)
    for word in (*hardware_packages.OPTIONAL_PACKAGES, *families.IDS, found["torch"]["version"]):
        assert word in text
    assert text.endswith("no problems found") == (not found["problems"])
    assert "nan" not in text.split()


def test_a_gpu_in_words(found: dict[str, Any]) -> None:
    machine = {
        "name": "NVIDIA H100",
        "vendor": "nvidia",
        "arch": "sm90",
        "count": 2,
        "memory_bytes": 80 * 2**30,
        "flaws": [],
    }
    torch_found = {**found["torch"], "cuda": "13.0"}
    text = doctor.to_text({**found, "machine": machine, "torch": torch_found})
    assert "2 x NVIDIA H100 (sm90), 80.0 GiB" in text
    assert "(CUDA 13.0)" in text


def test_memory_in_words(found: dict[str, Any]) -> None:
    text = doctor.to_text({**found, "memory_bytes": 47.26 * 2**30})
    assert "memory        47.3 GiB" in text.splitlines()


def test_flaws_in_words(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "multiplies_int8_exactly", lambda: False)
    text = doctor.to_text(doctor.examine())
    assert "flaw          linear.int8: int8: torch's integer product is not exact" in text
    monkeypatch.setattr(probe, "multiplies_int8_exactly", lambda: True)
    assert "flaw" not in doctor.to_text(doctor.examine())


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_command(
    flags: list[str], capsys: pytest.CaptureFixture[str], found: dict[str, Any]
) -> None:
    assert main.main(["doctor", *flags]) == 0
    out = capsys.readouterr().out
    if flags:
        assert json.loads(out) == found
    else:
        assert out.strip() == doctor.to_text(found)


@pytest.mark.parametrize(
    ("kind", "state"), [("engine", "installed"), ("look-alike", "look-alike"), (None, "missing")]
)
def test_nunchaku(monkeypatch: pytest.MonkeyPatch, kind: str | None, state: str) -> None:
    monkeypatch.setattr(doctor, "inspect_nunchaku", lambda: (kind, "the explanation"))
    package = doctor.examine_package("nunchaku")
    assert package["state"] == state
    packages = {name: doctor.examine_package(name) for name in hardware_packages.OPTIONAL_PACKAGES}
    problems = doctor.find_problems(doctor.examine_torch(), packages)
    assert ("the explanation" in problems) == (state == "look-alike")


@pytest.mark.parametrize("npu", [True, False])
@pytest.mark.parametrize(
    "error", [ImportError("libhccl.so"), RuntimeError("backend"), OSError("x")]
)
def test_torch_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, error: Exception, npu: bool
) -> None:
    """As the NPU package does it where its driver stack is missing."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "torch":
            raise error
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "torch")
    installed = hardware_packages.is_installed
    monkeypatch.setattr(
        doctor,
        "is_installed",
        lambda name: npu if name == "torch_npu" else installed(name),
    )
    found = doctor.examine()
    assert found["machine"] is None
    assert found["kernels"] == {}
    (problem,) = found["problems"]
    assert str(error) in problem
    assert ("CANN" in problem) == npu
    text = doctor.to_text(found)
    assert "cannot be imported" in text
    assert f"problem: {problem}" in text


@pytest.mark.parametrize("driver", doctor.DRIVERS)
def test_a_driver_without_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    monkeypatch.setattr(doctor, "inspect_nunchaku", lambda: (None, ""))
    loaded = tmp_path / "version"
    loaded.touch()
    drivers = {
        name: (str(tmp_path / "nothing"), advice) for name, (_, advice) in doctor.DRIVERS.items()
    }
    advice = doctor.DRIVERS[driver][1]
    monkeypatch.setattr(doctor, "DRIVERS", {**drivers, driver: (str(loaded), advice)})
    packages = {name: doctor.examine_package(name) for name in hardware_packages.OPTIONAL_PACKAGES}
    here = {**doctor.examine_torch(), "devices": {"cpu": 1, "cuda": 0, "npu": 0, "mps": 0}}
    assert doctor.find_problems(here, packages) == [advice]
    seen = {**here, "devices": {"cpu": 1, "cuda": 1, "npu": 1, "mps": 0}}
    assert doctor.find_problems(seen, packages) == []
