"""Hardware: the machine a plan is made for, as a table row describes it or as a probe finds it.

Optional packages are looked for without importing them: some break the interpreter where their
driver stack is missing, and one name belongs to two projects. The package `nunchaku` on the public
index is an unrelated statistics package; the engine of that name comes as wheels from elsewhere.
The two are told apart by their files: only the engine has a compiled `nunchaku/_C` extension and
the modules `nunchaku/ops/gemm` and `nunchaku/models/linear`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.matrix import HardwareRow

OPTIONAL_PACKAGES = {
    "flashinfer": "native NVFP4 kernels on Blackwell",
    "nunchaku": "the SVDQuant engine for SM8x and SM12x GPUs (not the package of the public index)",
    "torch_npu": "Ascend NPUs; breaks `import torch` where CANN is missing",
    "triton": "fused quantization kernels on GPUs",
    "humming": "packed 4-bit and 8-bit weights on SM75 and newer",
    "comfy_kitchen": "SVDQuant int4 kernels on SM80 and newer",
}
"""Import names of packages that a kernel may ask for, and what each is for."""

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "accelerate", "huggingface_hub")
"""Packages whose versions belong to a result."""


@dataclass(frozen=True)
class Machine:
    """A machine that a plan can be made for."""

    name: str
    vendor: str
    """`cpu`, `nvidia`, `amd`, `ascend` or `apple`."""
    arch: str
    """`cpu`, `sm90`, `gfx942`, `910b`, `mps` ..."""
    memory_bytes: int
    """Memory of one device; 0 when unknown."""
    packages: frozenset[str] = frozenset()
    """Optional packages that are there, by import name."""
    device: str = "cpu"
    """torch's name of the device."""
    count: int = 1


def from_row(row: HardwareRow) -> Machine:
    """A machine as a row of hardware.csv describes it."""
    device = {"nvidia": "cuda", "amd": "cuda", "ascend": "npu"}.get(row.vendor, "cpu")
    return Machine(
        name=row.name,
        vendor=row.vendor,
        arch=row.arch,
        memory_bytes=int(row.memory_gib * 2**30),
        packages=frozenset(row.packages),
        device=device,
    )


def probe(device: str | None = None) -> Machine:
    """The machine we stand on; `device` is torch's name (`cpu`, `cuda:1`), default the best."""
    import torch

    packages = installed_packages()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind == "cuda":
        return _probe_cuda(device, packages)
    if kind == "npu":
        name = "Ascend NPU"
        return Machine(name, "ascend", "910b", 0, packages, device)
    if kind == "mps":
        return Machine("Apple GPU", "apple", "mps", 0, packages, device)
    return Machine("cpu", "cpu", "cpu", read_memory(), packages, "cpu")


def _probe_cuda(device: str, packages: frozenset[str]) -> Machine:
    import torch

    index = int(device.partition(":")[2] or 0)
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        vendor, arch = "amd", str(properties.gcnArchName).split(":")[0]
    else:
        vendor, arch = "nvidia", f"sm{properties.major}{properties.minor}"
    count = torch.cuda.device_count()
    memory = int(properties.total_memory)
    return Machine(str(properties.name), vendor, arch, memory, packages, device, count)


def read_memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    return int(text.split("MemTotal:")[1].split()[0]) * 1024


def installed_packages() -> frozenset[str]:
    """Optional packages that are there, found without importing any of them."""
    found = {name for name in OPTIONAL_PACKAGES if name != "nunchaku" and is_installed(name)}
    if inspect_nunchaku()[0] == "engine":
        found.add("nunchaku")
    return frozenset(found)


def is_installed(name: str) -> bool:
    """Whether a top-level package can be located."""
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def inspect_nunchaku() -> tuple[str | None, str]:
    """(`engine`, `look-alike` or None, explanation) of an installed package named nunchaku."""
    try:
        distribution = metadata.distribution("nunchaku")
    except metadata.PackageNotFoundError:
        return None, "no package named nunchaku is installed"
    files = {str(file) for file in distribution.files or ()}
    compiled = any(
        file.startswith("nunchaku/_C") and file.endswith((".so", ".pyd")) for file in files
    )
    modules = {"nunchaku/ops/gemm.py", "nunchaku/models/linear.py"}
    version = distribution.version
    if compiled and modules <= files:
        return "engine", f"the SVDQuant engine {version}"
    if "nunchaku/nunchaku.py" in files or "nunchaku/gibbs_sampler.py" in files:
        return (
            "look-alike",
            f"nunchaku {version} is an unrelated statistics package (piece-wise linear fitting): "
            "uninstall it, and install the engine's wheel for your Python, torch and CUDA from "
            "its project's releases (nunchaku.tech)",
        )
    return "look-alike", f"nunchaku {version} has no compiled extension: it is not the engine"


def read_versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of installed packages; those that are not there are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def fingerprint() -> dict[str, Any]:
    """What a result should say about the software and processor it was made on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": read_processor(),
        "versions": read_versions(),
    }


def read_processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
