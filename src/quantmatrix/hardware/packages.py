"""Packages: optional ones, found without importing them; the unrelated `nunchaku`."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

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

DISTRIBUTIONS = {
    "flashinfer": "flashinfer-python",
    "humming": "humming-kernels",
    "torch_npu": "torch-npu",
    "comfy_kitchen": "comfy-kitchen",
}
"""Names under which optional packages are installed, where they differ from the import name."""


def installed_packages() -> frozenset[str]:
    """Optional packages that are there, found without importing any of them."""
    found = {name for name in OPTIONAL_PACKAGES if name != "nunchaku" and is_installed(name)}
    if inspect_nunchaku()[0] == "engine":
        found.add("nunchaku")
    return frozenset(found)


def is_installed(name: str) -> bool:
    """Whether a top-level package can be located; a mere folder of that name is none."""
    return find_package(name) is not None


def find_package(name: str) -> Path | None:
    """Folder of a top-level package, found without importing it, or None."""
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def inspect_nunchaku() -> tuple[str | None, str]:
    """(`engine`, `look-alike` or None, explanation) of an installed package named nunchaku."""
    folder = find_package("nunchaku")
    if folder is None:
        return None, "no package named nunchaku is installed"
    version = read_versions(("nunchaku",)).get("nunchaku", "of unknown version")
    compiled = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    missing = [
        name for name in ("ops/gemm.py", "models/linear.py") if not (folder / name).is_file()
    ]
    if compiled and not missing:
        return "engine", f"the SVDQuant engine {version}"
    advice = (
        "uninstall it, and install the engine's wheel for your Python, torch and CUDA from its "
        "project's releases"
    )
    if (folder / "nunchaku.py").is_file() or (folder / "gibbs_sampler.py").is_file():
        return (
            "look-alike",
            f"nunchaku {version} is an unrelated statistics package (piece-wise linear fitting), "
            f"not the SVDQuant engine: {advice}",
        )
    lacking = ", ".join([*([] if compiled else ["its compiled extension _C"]), *missing])
    return "look-alike", f"nunchaku {version} lacks {lacking}: not a working engine; {advice}"


def read_versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of installed packages; those that are not there are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(DISTRIBUTIONS.get(name, name))
        except metadata.PackageNotFoundError:
            continue
    return versions
