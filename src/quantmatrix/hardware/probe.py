"""Hardware: the machine a plan is made for, as a table row describes it or as a probe finds it.

Optional packages are looked for without importing them: some break the interpreter where their
driver stack is missing, and one name belongs to two projects. The package `nunchaku` on the public
index is an unrelated statistics package; the engine of that name comes as wheels from elsewhere.
The two are distinguished by their files: only the engine has a compiled `nunchaku/_C` extension and
the modules `nunchaku/ops/gemm` and `nunchaku/models/linear`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError
from quantmatrix.hardware.machine import Flaw, Machine
from quantmatrix.hardware.packages import installed_packages, read_versions

DEVICES = ("cpu", "cuda", "npu", "mps")
"""Kinds of device that can be probed, by torch's names."""

INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "sve",
)  # fmt: skip
"""Processor flags that decide which arithmetic a CPU backend runs."""


def probe(device: str | None = None) -> Machine:
    """The machine we stand on; `device` is torch's name (`cpu`, `cuda:1`), default the best.

    Raises UsageError when there is no such device here.
    """
    import torch

    packages = installed_packages()
    if device is None:
        device = next((kind for kind in ("cuda", "npu") if count_devices(kind)), "cpu")
    kind, _, number = device.partition(":")
    index = int(number) if number.isdecimal() else 0
    count = count_devices(kind)
    if number not in ("", str(index)) or index >= count:
        here = [f"{name} ({count_devices(name)})" for name in DEVICES if count_devices(name)]
        raise UsageError(f"--device {device}: no such device here; found: {', '.join(here)}")
    if kind == "cuda":
        return _probe_cuda(torch.cuda.get_device_properties(index), packages, device, count)
    if kind == "npu":
        return _probe_npu(_npu().get_device_properties(index), packages, device, count)
    if kind == "mps":
        return Machine("Apple GPU", "apple", "mps", read_memory(), packages, device)
    return Machine("cpu", "cpu", "cpu", read_memory(), packages, device, flaws=find_flaws())


def count_devices(kind: str) -> int:
    """How many devices of a kind torch sees; 0 for a kind it does not know."""
    import torch

    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "npu":
        return int(_npu().device_count()) if _npu() is not None and _npu().is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")


def _npu() -> Any:
    """`torch.npu`, which torch itself brings in where the NPU package is installed, or None."""
    import torch

    return getattr(torch, "npu", None)


def _probe_cuda(found: Any, packages: frozenset[str], device: str, count: int) -> Machine:
    import torch

    vendor, arch = "amd" if torch.version.hip else "nvidia", name_arch(found)
    return Machine(str(found.name), vendor, arch, int(found.total_memory), packages, device, count)


def name_arch(found: Any) -> str:
    """`sm90`, `gfx942` ...: the architecture in what torch knows of a GPU."""
    import torch

    if torch.version.hip:
        return str(found.gcnArchName).split(":")[0]
    return f"sm{found.major}{found.minor}"


def _probe_npu(found: Any, packages: frozenset[str], device: str, count: int) -> Machine:
    name = str(found.name)
    generation = re.search(r"(\d+[A-Za-z]?)", name)
    arch = generation[1].lower() if generation else "unknown"
    return Machine(name, "ascend", arch, int(found.total_memory), packages, device, count)


def read_memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def fingerprint() -> dict[str, Any]:
    """What a result should say about the machine and software it was made on.

    Threads and devices are torch's, and are there only when torch has been imported already.
    """
    found: dict[str, Any] = {
        "processor": read_processor(),
        "instruction_sets": read_instruction_sets(),
        "processors": os.cpu_count() or 0,
        "memory_bytes": read_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": read_versions(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["devices"] = [
            getattr(torch, kind).get_device_name(index)
            for kind in ("cuda", "npu")
            for index in range(count_devices(kind))
        ]
    return found


SATURATING = Flaw(
    "linear.int8",
    "int8",
    "int8-exact-cpu",
    "torch's integer product is not exact on this processor: without VNNI instructions sums of two "
    "products saturate at 16 bits",
)


ROTATED_SATURATING = replace(SATURATING, op="linear.convrot")
"""The same product, of rotated codes."""


def find_flaws() -> tuple[Flaw, ...]:
    """What this CPU is known to compute wrongly."""
    return () if multiplies_int8_exactly() else (SATURATING, ROTATED_SATURATING)


@cache
def multiplies_int8_exactly() -> bool:
    """Whether `torch._int_mm` is exact on this processor.

    oneDNN adds 128 to the codes of one side and, without VNNI instructions, sums pairs of products in
    16 bits, where large ones saturate: no error, other numbers. Asked of torch itself, because the
    instructions that it may use can be set (`ONEDNN_MAX_CPU_ISA`).
    """
    import torch

    codes = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == 64 * 127 * 127).all())


def read_processor() -> str:
    """Model name of the processor."""
    names = (value for key, value in _read_cpuinfo() if key == "model name")
    return next(names, platform.processor() or platform.machine() or "unknown")


def read_instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has; empty where the system does not say."""
    flags = next((value for key, value in _read_cpuinfo() if key in ("flags", "Features")), "")
    return [name for name in INSTRUCTION_SETS if name in flags.split()]


def _read_cpuinfo() -> list[tuple[str, str]]:
    """(key, value) of each line of Linux's description of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]
