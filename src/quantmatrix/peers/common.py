"""Common: what adapters share: finding a program, calling it without a shell, keeping latents."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.peers.protocol import LATENTS, LOADED, Answer, Found, RuntimeFailure

if TYPE_CHECKING:
    import torch

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".mp4")
EXCEPTION_ENDINGS = ("Error", "Exception", "Interrupt")
"""How the class of a Python exception ends, where a traceback names it."""


def find_package(package: str) -> Found:
    """The version of an installed distribution, which is not imported."""
    try:
        return Found(version=metadata.version(package))
    except metadata.PackageNotFoundError:
        return Found(why=f"the package {package} is not installed")


def find_command(command: str, package: str) -> Found:
    """The version of a package whose command is on the path."""
    if shutil.which(command) is None:
        return Found(why=f"there is no command {command} on the path")
    try:
        return Found(version=metadata.version(package))
    except metadata.PackageNotFoundError:
        return ask_version(command)


def ask_version(command: str) -> Found:
    """The version that a command of another environment prints."""
    try:
        done = subprocess.run(
            [command, "--version"], capture_output=True, text=True, check=False, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(why=f"{command} --version: {error}")
    said = (done.stdout or done.stderr).strip().split("\n")[-1].split()
    if done.returncode or not said:
        return Found(why=f"{command} --version ended with {done.returncode} and no version")
    return Found(version=said[-1])


def call(
    argv: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder; what it prints goes to the log of the task and is returned.

    RuntimeFailure with its output for an exit code that is not 0. Time and memory are watched from
    outside (`quantmatrix.peers.session`), whose child this and all that it starts belong to.
    """
    settings = [f"{name}={value}" for name, value in (environment or {}).items()]
    done = subprocess.run(
        ["env", *settings, *argv], cwd=folder, check=False, text=True, errors="backslashreplace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode < 0:
        raise RuntimeFailure(done.stdout, kind=f"signal {-done.returncode}", loaded=True)
    if done.returncode:
        raise RuntimeFailure(done.stdout, kind=f"exit code {done.returncode}")
    return done


def find_media(folder: Path) -> str:
    """Name of the first picture or clip below a folder; empty where there is none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    return found[0].relative_to(folder).as_posix() if found else ""


def mark_loaded(folder: Path) -> None:
    """From here on a failure is a crash, not a refusal."""
    (folder / LOADED).touch()


def save_latents(steps: Sequence[torch.Tensor], folder: Path) -> bool:
    """Keep the latents of every step, tensors of any shape and dtype; whether there are any."""
    from safetensors.torch import save_file

    if not steps:
        return False
    tensors = {f"step.{n:03}": t.detach().to("cpu").contiguous() for n, t in enumerate(steps)}
    save_file(tensors, folder / LATENTS)
    return True


def read_latents(folder: Path) -> list[torch.Tensor]:
    """The latents of every step, in order, tensors of any shape and dtype."""
    from safetensors.torch import load_file

    return [tensor for _, tensor in sorted(load_file(folder / LATENTS).items())]


def count_bytes(modules: Sequence[Any]) -> dict[str, int]:
    """Bytes of the parameters and buffers of modules in memory, by dtype as stored.

    A tensor that is made of others (torchao's, quanto's) counts as those.
    """
    found: dict[str, int] = {}
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            for part in open_tensor(tensor):
                name = str(part.dtype).removeprefix("torch.")
                found[name] = found.get(name, 0) + part.numel() * part.element_size()
    return dict(sorted(found.items()))


def open_tensor(tensor: Any) -> list[Any]:
    """The plain tensors that a tensor is made of, itself where it is one."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor]
    names = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in open_tensor(getattr(tensor, name))]


def read_peak(device: str = "") -> int:
    """Peak memory in bytes: of a CUDA device, else resident, of this process or the largest it started."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024


def release() -> None:
    """Let go of what a task left behind, on a device too, before the next one.

    After the first task they are libraries, a million objects that no later collection need look at. What
    later tasks leave is looked at: an exception may hold a pipeline for a while.
    """
    import gc
    import sys

    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def pick_message(answer: Answer) -> str:
    """What a program said last of why it failed: the last line that names an exception, else the last."""
    lines = [line.strip() for line in answer.error.splitlines() if line.strip()]
    if answer.kind.startswith(("exit", "signal")):
        named = [ln for ln in lines if ln.split(":")[0].split(".")[-1].endswith(EXCEPTION_ENDINGS)]
        chosen = (named or lines or [""])[-1]
        return f"{answer.kind}: {chosen}".rstrip(": ")
    return f"{answer.kind}: {lines[0] if lines else ''}".rstrip(": ")
