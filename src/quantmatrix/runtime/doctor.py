"""Doctor: what this machine has, what each optional package is for, and what would run here.

The report is plain data (`examine`), and the same as text (`to_text`). Optional packages are never
imported. torch is, and may fail to: the NPU package hooks itself into `import torch` and takes it
down where its driver stack is missing. That is a finding, not a crash.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from quantmatrix.hardware import probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.hardware.packages import (
    LIBRARIES,
    OPTIONAL_PACKAGES,
    inspect_nunchaku,
    is_installed,
    read_versions,
)

DRIVERS = {
    "cuda": (
        "/proc/driver/nvidia/version",
        "an NVIDIA driver is loaded, but torch sees no GPU: install a CUDA build of torch that "
        "fits the driver (https://pytorch.org/get-started)",
    ),
    "hip": (
        "/dev/kfd",
        "an AMD GPU driver is loaded, but torch sees no GPU: install a ROCm build of torch",
    ),
    "npu": (
        "/dev/davinci_manager",
        "an Ascend driver is loaded, but torch sees no NPU: install torch-npu and CANN, and source "
        "CANN's set_env.sh",
    ),
}
"""File by which a loaded driver is seen, and what to do when torch does not see its device."""

FEATURES = 1024
"""Rows and columns of the layer that kernels are asked about."""


def examine() -> dict[str, Any]:
    """Everything the doctor finds, as plain data; `problems` lists what should be mended."""
    torch_found = examine_torch()
    packages = {name: examine_package(name) for name in OPTIONAL_PACKAGES}
    machine = None
    runs: dict[str, dict[str, Any]] = {}
    if torch_found["error"] is None:
        found = probe.probe()
        machine = {
            "name": found.name,
            "vendor": found.vendor,
            "arch": found.arch,
            "device": found.device,
            "count": found.count,
            "memory_bytes": found.memory_bytes,
            "flaws": [f"{flaw.op}: {flaw.backend}: {flaw.why}" for flaw in found.flaws],
        }
        runs = list_kernels(found)
    return {
        "machine": machine,
        "processor": probe.read_processor(),
        "instruction_sets": probe.read_instruction_sets(),
        "memory_bytes": probe.read_memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": read_versions(("quantmatrix", *LIBRARIES)),
        "torch": torch_found,
        "packages": packages,
        "hub": examine_hub(),
        "kernels": runs,
        "problems": find_problems(torch_found, packages),
    }


def examine_torch() -> dict[str, Any]:
    """Version and devices of torch, or the error that its import ends in."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return {"version": None, "error": f"{type(error).__name__}: {error}", "devices": {}}
    return {
        "version": torch.__version__,
        "error": None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "devices": {kind: probe.count_devices(kind) for kind in probe.DEVICES},
    }


def examine_package(name: str) -> dict[str, Any]:
    """State of an optional package: `installed`, `missing` or `look-alike`, and what it is for."""
    purpose = OPTIONAL_PACKAGES[name]
    version = read_versions((name,)).get(name)
    if name == "nunchaku":
        kind, note = inspect_nunchaku()
        state = {"engine": "installed", None: "missing"}.get(kind, "look-alike")
        return {"state": state, "version": version, "purpose": purpose, "note": note}
    state = "installed" if is_installed(name) else "missing"
    return {"state": state, "version": version, "purpose": purpose, "note": ""}


def examine_hub() -> dict[str, Any]:
    """Where models are cached, and whether the hub may be asked."""
    from huggingface_hub import constants

    return {"cache": str(constants.HF_HUB_CACHE), "offline": bool(constants.HF_HUB_OFFLINE)}


def list_kernels(machine: Machine) -> dict[str, dict[str, Any]]:
    """For each family and scheme: the backend that this machine would run, or why none does."""
    from quantmatrix import families, kernels
    from quantmatrix.kernels.choosing import choose

    found: dict[str, dict[str, Any]] = {}
    for family in families.IDS:
        found[family] = {}
        for name, scheme in families.load(family).SCHEMES.items():
            try:
                kernel = choose(scheme.op, machine, scheme, (FEATURES, FEATURES))
            except kernels.NoKernel as refusal:
                found[family][name] = {"backend": None, "why": refusal.message}
            else:
                found[family][name] = {"backend": kernel.backend, "why": ""}
    return found


def find_problems(torch_found: dict[str, Any], packages: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong here, each with the way to mend it."""
    problems = []
    if torch_found["error"] is not None:
        advice = "install torch again"
        if packages["torch_npu"]["state"] == "installed":
            advice = (
                "torch_npu hooks itself into torch and needs CANN: source CANN's set_env.sh, or "
                "uninstall torch-npu"
            )
        problems.append(f"`import torch` fails ({torch_found['error']}): {advice}")
    if packages["nunchaku"]["state"] == "look-alike":
        problems.append(packages["nunchaku"]["note"])
    seen = torch_found["devices"]
    for kind, (driver, advice) in DRIVERS.items():
        device = "npu" if kind == "npu" else "cuda"
        if torch_found["error"] is None and Path(driver).exists() and not seen[device]:
            problems.append(advice)
    return problems


def to_text(found: dict[str, Any]) -> str:
    """The report as text."""
    machine, torch_found = found["machine"], found["torch"]
    gib = found["memory_bytes"] / 2**30
    lines = [
        f"processor     {found['processor']} ({' '.join(found['instruction_sets']) or '-'})",
        f"memory        {gib:.1f} GiB",
        f"system        {found['system']}, Python {found['python']}",
        f"torch         {_describe_torch(torch_found)}",
    ]
    if machine is not None:
        lines += [f"flaw          {flaw}" for flaw in machine["flaws"]]
    if machine is not None and machine["vendor"] != "cpu":
        memory = f"{machine['memory_bytes'] / 2**30:.1f} GiB"
        lines.append(
            f"device        {machine['count']} x {machine['name']} ({machine['arch']}), {memory}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    offline = " (offline)" if found["hub"]["offline"] else ""
    lines += [f"versions      {versions}", f"hub cache     {found['hub']['cache']}{offline}", ""]
    lines.append("optional packages")
    for name, package in found["packages"].items():
        state = f"{package['state']} {package['version'] or ''}".strip()
        lines.append(f"  {name:<14}{state:<18}{package['purpose']}")
    if found["kernels"]:
        lines += ["", "what runs here"]
        lines += _describe_kernels(found["kernels"])
    lines += ["", *[f"problem: {text}" for text in found["problems"]]]
    if not found["problems"]:
        lines.append("no problems found")
    return "\n".join(lines)


def _describe_torch(found: dict[str, Any]) -> str:
    if found["error"] is not None:
        return f"cannot be imported: {found['error']}"
    build = f"CUDA {found['cuda']}" if found["cuda"] else None
    build = build or (f"ROCm {found['hip']}" if found["hip"] else "without GPU support")
    return f"{found['version']} ({build}), {found['threads']} threads"


def _describe_kernels(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for family, schemes in found.items():
        for name, kernel in schemes.items():
            verdict = kernel["backend"] or f"nothing: {kernel['why']}"
            lines.append(f"  {family:<16}{name:<20}{verdict}")
    return lines
