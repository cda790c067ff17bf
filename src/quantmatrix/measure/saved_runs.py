"""Saved runs: the latents of every step and the frames of a run, in one file.

| format | content |
| ------ | ------- |
| `.safetensors` | `latents.000` ..., one tensor per step in the dtype of the run; `frames`, uint8 |
|                | [frames, height, width, 3]; header metadata `quantmatrix.runtime.generate`: JSON that says  |
|                | which prompt, seed, checkpoint and backends |
| `.pt`  | a dict with `latents` (a list of tensors, or one [steps, ...] tensor) and, if there are |
|        | any, `frames`; read without executing what is pickled in it |

`quantmatrix generate --save-latents FILE` writes the first form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix import strict_json
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.files import check_writable, whole
from quantmatrix.links import explain_link
from quantmatrix.quoting import quote_json

if TYPE_CHECKING:
    from quantmatrix.runtime.run import Run

KEY = "quantmatrix.runtime.generate"
ENDINGS = (".safetensors", ".pt")


@dataclass(frozen=True)
class SavedRun:
    """A trajectory that can be compared with another."""

    name: str
    latents: list[torch.Tensor]
    frames: torch.Tensor | None
    """uint8 [frames, height, width, 3]."""
    about: Mapping[str, Any] = field(default_factory=dict)


def from_run(run: Run, name: str) -> SavedRun:
    """What is kept of a run that was just made."""
    from quantmatrix.runtime.media import stack_frames

    about = {
        "prompt": run.prompt,
        "seed": run.seed,
        "model": run.plan.model,
        "backends": run.census,
        "seconds": run.seconds,
        "references": {n: p.checkpoint.reference for n, p in run.plan.components.items()},
    }
    return SavedRun(name, run.latents, stack_frames(run.media), about)


def check_target(path: str | None, *, several: bool) -> Path | None:
    """Where a run is to be written, asked before anything is computed.

    Raises UsageError for several runs, for another ending than .safetensors, and where nothing can
    be written.
    """
    if path is None:
        return None
    if several:
        raise UsageError("--save-latents: one file holds one run; give one prompt and one seed")
    if not path.endswith(".safetensors"):
        raise UsageError(f"--save-latents {path}: expected a file ending in .safetensors")
    check_writable(Path(path), "--save-latents")
    return Path(path)


def write(run: Run, path: Path) -> Path:
    """Write a run; the file appears whole or not at all.

    Raises UsageError where it cannot be written.
    """
    from quantmatrix.checkpoints.writer import save_tensors

    saved = from_run(run, path.name)
    tensors = {f"latents.{n:03}": x.contiguous() for n, x in enumerate(saved.latents)}
    if saved.frames is not None:
        tensors["frames"] = saved.frames.contiguous()
    try:
        with whole(path) as temporary:
            save_tensors(tensors, temporary, {KEY: json.dumps(saved.about, sort_keys=True)})
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; nothing was left behind. "
            "Free some space or choose another --save-latents"
        ) from error
    return path


def is_saved_run(path: Path) -> bool:
    """Whether a file holds a run, not a checkpoint; only a header is read.

    Raises CheckpointError for a damaged header, and for a link that leads out of its folder.
    """
    if not path.is_file() or path.suffix not in ENDINGS:
        return False
    if path.suffix == ".pt":
        return True
    from quantmatrix.checkpoints.header import read_header

    if why := explain_link(path, path.parent):
        raise CheckpointError(f"{path}: {why}")
    return "latents.000" in read_header(path)[0]


def read(path: Path) -> SavedRun:
    """Read a run; CheckpointError names what is missing or damaged."""
    tensors, about = _read_pt(path) if path.suffix == ".pt" else _read_safetensors(path)
    names = sorted(name for name in tensors if name.startswith("latents."))
    expected = [f"latents.{n:03}" for n in range(len(names))]
    if not names or names != expected:
        raise CheckpointError(
            f"{path}: found the tensors {', '.join(sorted(tensors)[:8]) or 'none'}, expected "
            "latents.000 and so on without gaps; write it with `generate --save-latents`"
        )
    odd = [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if odd or not isinstance(about, Mapping):
        what = f"{odd[0]} is not a tensor" if odd else f"{KEY} is {quote_json(about)}"
        raise CheckpointError(f"{path}: {what}: expected a run of `generate --save-latents`")
    return SavedRun(path.name, [tensors[name] for name in names], tensors.get("frames"), about)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = strict_json.parse((file.metadata() or {}).get(KEY, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, strict_json.JsonError) as error:
        raise CheckpointError(f"{path}: not a readable run: {error}") from error


def _read_pt(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a pickle that is not a pickle raises
        raise CheckpointError(f"{path}: not a readable run: {error}") from error
    latents = found.get("latents") if isinstance(found, dict) else None
    if latents is None:
        raise CheckpointError(f"{path}: expected a dict with the key `latents`")
    tensors = {f"latents.{n:03}": tensor for n, tensor in enumerate(latents)}
    if "frames" in found:
        tensors["frames"] = found["frames"]
    return tensors, found.get("about", {})
