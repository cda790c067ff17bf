"""Adapters of a request: which file each `--lora-path` means, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantmatrix.checkpoints.adapters import find_factor, is_adapter
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from quantmatrix.request import Hub, Request

WEIGHTS = ".safetensors"
Value = TypeVar("Value")


@dataclass(frozen=True)
class AdapterFile:
    """The file of an adapter, on this machine."""

    reference: str
    """As the request names it."""
    name: str
    path: Path


def find_adapter(reference: str, weight_name: str | None, hub: Hub) -> AdapterFile:
    """The file of an adapter: a file, or one in a folder or repository.

    Raises CheckpointError where there is none, or more than one and no name, and for a file that
    holds no factors.
    """
    folder, file = open_folder(reference, hub)
    listed = [name for name in folder.names if name.endswith(WEIGHTS)]
    chosen = [file] if file else [weight_name] if weight_name else listed
    if len(chosen) != 1 or not folder.has(chosen[0]) or not chosen[0].endswith(WEIGHTS):
        raise CheckpointError(
            f"{reference}: expected one {WEIGHTS} file of a LoRA, found "
            f"{', '.join(listed[:8]) or 'none'}"
            f"{f', and no {weight_name}' if weight_name else '; name it with --lora-weight-name'}"
        )
    name = chosen[0]
    path = folder.path(name)
    tensors, _ = folder.header(name)
    if not is_adapter(tensors) and find_factor(tensors) is None:
        raise CheckpointError(
            f"{path}: no low-rank factors in it (lora_A, lora_down ...), the first tensor is "
            f"{next(iter(tensors), 'none')}: expected a LoRA"
        )
    return AdapterFile(reference, name, path)


def list_adapters(request: Request) -> list[tuple[AdapterFile, float]]:
    """(file, scale) of every adapter of a request, in its order."""
    count = len(request.lora_path)
    names = spread(request.lora_weight_name, count, "--lora-weight-name", None)
    scales = spread(request.lora_scale, count, "--lora-scale", 1.0)
    files = [
        find_adapter(reference, name, request.hub)
        for reference, name in zip(request.lora_path, names, strict=True)
    ]
    return list(zip(files, scales, strict=True))


def spread(values: Sequence[Value], count: int, flag: str, default: Value) -> list[Value]:
    """A value for each adapter: one stands for all. UsageError for another number of them."""
    if not values:
        return [default] * count
    if len(values) not in (1, count) or not count:
        raise UsageError(
            f"{flag} is given {len(values)} times, --lora-path {count}: expected as many, or one"
        )
    return list(values) * (count if len(values) == 1 else 1)
