"""Machines from rows and probes, optional packages that are never imported, fingerprints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.hardware import packages, probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.hardware.packages import (
    DISTRIBUTIONS,
    OPTIONAL_PACKAGES,
    find_package,
    inspect_nunchaku,
    installed_packages,
    is_installed,
    read_versions,
)
from quantmatrix.tables import identify

BOMB = "raise RuntimeError('imported')\n"


def install(site: Path, name: str, files: tuple[str, ...], version: str = "") -> None:
    """A package whose modules fail when they are imported; with a version, its metadata, too."""
    for file in ("__init__.py", *files):
        path = site / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BOMB)
    if version:
        distribution = DISTRIBUTIONS.get(name, name).replace("-", "_")
        info = site / f"{distribution}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the import path; the optional packages of this place are hidden."""
    monkeypatch.syspath_prepend(str(tmp_path))
    find_spec = packages.util.find_spec

    def find_here(name: str) -> Any:
        spec = find_spec(name)
        places = (
            [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
        )
        return spec if any(place.startswith(str(tmp_path)) for place in places) else None

    monkeypatch.setattr(packages.util, "find_spec", find_here)
    for name in OPTIONAL_PACKAGES:  # another test may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


ROWS = {
    "cpu": ("cpu", "cpu", 24.0, (), "cpu"),
    "h100": ("nvidia", "sm90", 80.0, ("flashinfer",), "cuda"),
    "mi300x": ("amd", "gfx942", 192.0, (), "cuda"),
    "ascend-910b": ("ascend", "910b", 64.0, ("torch_npu",), "npu"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_machine(name: str) -> None:
    vendor, arch, gib, packages, device = ROWS[name]
    row: Any = SimpleNamespace(
        name=name, vendor=vendor, arch=arch, memory_gib=gib, packages=packages, devices=4
    )
    brought = {"triton"} if device == "cuda" else set()
    assert identify.from_row(row) == Machine(
        name, vendor, arch, int(gib * 2**30), frozenset({*packages, *brought}), device, 4
    )


def test_every_row_of_the_tables_is_a_machine() -> None:
    from quantmatrix.tables import read

    machines = {name: identify.from_row(row) for name, row in read.read().hardware.items()}
    assert machines["cpu"].device == "cpu"
    assert machines["rtx-5090"].arch == "sm120"
    assert all(hash(machine) for machine in machines.values())


class TestProbe:
    """torch is the real one, its devices are not."""

    def test_cpu(self) -> None:
        machine = probe.probe("cpu")
        assert (machine.vendor, machine.arch, machine.device) == ("cpu", "cpu", "cpu")
        assert machine.memory_bytes > 2**30
        assert machine.packages == installed_packages()

    @pytest.fixture
    def give(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Two CUDA (or ROCm) devices, or two NPUs."""
        import torch

        def give(kind: str = "cuda", hip: str | None = None, **properties: Any) -> None:
            found = SimpleNamespace(total_memory=2**34, **properties)
            functions = {
                "is_available": lambda: True,
                "device_count": lambda: 2,
                "get_device_properties": lambda index: found,
                "get_device_name": lambda index: found.name,
            }
            if kind == "npu":
                monkeypatch.setattr(torch, "npu", SimpleNamespace(**functions), raising=False)
                return
            for name, function in functions.items():
                monkeypatch.setattr(torch.cuda, name, function)
            monkeypatch.setattr(torch.version, "hip", hip)

        return give

    @pytest.mark.parametrize(
        ("capability", "arch"), [((8, 6), "sm86"), ((9, 0), "sm90"), ((12, 0), "sm120")]
    )
    @pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
    def test_nvidia(
        self,
        give: Callable[..., None],
        capability: tuple[int, int],
        arch: str,
        device: str | None,
    ) -> None:
        give(name="NVIDIA X", major=capability[0], minor=capability[1], gcnArchName="ignored")
        expected = Machine(
            "NVIDIA X", "nvidia", arch, 2**34, installed_packages(), device or "cuda", 2
        )
        assert probe.probe(device) == expected

    def test_amd(self, give: Callable[..., None]) -> None:
        name = "gfx942:sramecc+:xnack-"
        give(hip="6.4", name="AMD Instinct MI300X", major=9, minor=4, gcnArchName=name)
        machine = probe.probe()
        assert (machine.vendor, machine.arch, machine.device) == ("amd", "gfx942", "cuda")

    @pytest.mark.parametrize(
        ("name", "arch"), [("Ascend910B2", "910b"), ("Ascend310P3", "310p"), ("Ascend", "unknown")]
    )
    def test_ascend(self, give: Callable[..., None], name: str, arch: str) -> None:
        give("npu", name=name)
        machine = probe.probe()
        assert (machine.vendor, machine.arch, machine.device) == ("ascend", arch, "npu")
        assert (machine.memory_bytes, machine.count) == (2**34, 2)

    @pytest.mark.parametrize("device", ["cuda:2", "cuda:x", "cuda:-1", "cpu:1", "tpu", "", "npu"])
    def test_devices_that_are_not_here(self, give: Callable[..., None], device: str) -> None:
        give(name="NVIDIA X", major=9, minor=0)
        with pytest.raises(UsageError, match=r"no such device here; found: cpu \(1\), cuda \(2\)"):
            probe.probe(device)

    def test_names_of_devices_are_in_the_fingerprint(self, give: Callable[..., None]) -> None:
        give(name="NVIDIA X", major=9, minor=0)
        assert probe.fingerprint()["devices"] == ["NVIDIA X", "NVIDIA X"]


class TestPackages:
    """Found on disk, never imported."""

    @pytest.mark.parametrize("name", sorted(set(OPTIONAL_PACKAGES) - {"nunchaku"}))
    def test_installed_without_import(self, site: Path, name: str) -> None:
        assert not is_installed(name)
        install(site, name, (), version="1.2.3")
        assert is_installed(name)
        assert find_package(name) == site / name
        assert installed_packages() == {name}
        assert read_versions((name,)) == {name: "1.2.3"}
        assert name not in sys.modules

    def test_a_folder_of_that_name_is_no_package(self, site: Path) -> None:
        (site / "triton").mkdir()
        assert not is_installed("triton")

    def test_names_that_cannot_be_looked_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = SimpleNamespace(__spec__=None)
        monkeypatch.setitem(sys.modules, "humming", broken)  # type: ignore[arg-type]
        assert not is_installed("humming")

    ENGINE = ("ops/gemm.py", "models/linear.py", "_C.cpython-311-x86_64-linux-gnu.so")
    LOOK_ALIKE = ("nunchaku.py", "gibbs_sampler.py")

    def test_no_nunchaku(self, site: Path) -> None:
        kind, text = inspect_nunchaku()
        assert kind is None
        assert "no package named nunchaku" in text

    @pytest.mark.parametrize("extension", [ENGINE[2], "_C.cp311-win_amd64.pyd"])
    def test_the_engine(self, site: Path, extension: str) -> None:
        install(site, "nunchaku", (*self.ENGINE[:2], extension), version="1.2.0+cu12.8torch2.9")
        assert inspect_nunchaku() == ("engine", "the SVDQuant engine 1.2.0+cu12.8torch2.9")
        assert installed_packages() == {"nunchaku"}
        assert "nunchaku" not in sys.modules

    def test_the_look_alike(self, site: Path) -> None:
        install(site, "nunchaku", self.LOOK_ALIKE, version="0.16.1")
        kind, text = inspect_nunchaku()
        assert kind == "look-alike"
        for word in ("0.16.1", "statistics", "uninstall", "wheel"):
            assert word in text
        assert installed_packages() == frozenset()
        assert "nunchaku" not in sys.modules

    @pytest.mark.parametrize("missing", range(3))
    def test_half_an_engine(self, site: Path, missing: int) -> None:
        files = tuple(file for i, file in enumerate(self.ENGINE) if i != missing)
        install(site, "nunchaku", files)
        kind, text = inspect_nunchaku()
        assert kind == "look-alike"
        assert ("_C", "ops/gemm.py", "models/linear.py")[(missing + 1) % 3] in text
        assert "nunchaku" not in installed_packages()


def test_versions_of_what_is_not_there_are_left_out() -> None:
    assert set(read_versions(("pytest", "no-such-package-at-all"))) == {"pytest"}


class TestFingerprint:
    """What is written beside results."""

    def test_fields(self) -> None:
        import torch

        found = probe.fingerprint()
        assert found["processors"] == os.cpu_count()
        assert found["threads"] == torch.get_num_threads()
        assert found["versions"]["torch"] == torch.__version__
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert found == probe.fingerprint()

    def test_torch_is_not_imported_for_it(self) -> None:
        code = (
            "import sys; from quantmatrix.hardware import packages, probe; f = probe.fingerprint()\n"
            "packages.installed_packages(); assert 'threads' not in f\n"
            "assert not {'torch', 'huggingface_hub', *packages.OPTIONAL_PACKAGES} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_instruction_sets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def say(text: str) -> None:
            monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)

        say("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nflags\t\t: fpu avx512f avx2 avx\n")
        assert probe.read_processor() == "Some CPU: 3 GHz"
        assert probe.read_instruction_sets() == ["avx2", "avx512f"]
        say("processor\t: 0\nFeatures\t: fp asimd i8mm\n")
        assert probe.read_instruction_sets() == ["asimd", "i8mm"]
        assert probe.read_processor()

    def test_systems_that_do_not_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise OSError("not here")

        monkeypatch.setattr(Path, "read_text", fail)
        monkeypatch.setattr(os, "sysconf", fail)
        assert probe.read_instruction_sets() == []
        assert probe.read_processor()
        assert probe.read_memory() == 0
