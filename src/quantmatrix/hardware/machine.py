"""Machine: what a plan needs to know of a device, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flaw:
    """A backend that a machine computes wrongly, without an error, though it meets all its needs."""

    op: str
    backend: str
    rule: str
    """Id of the rule; a refusal that comes from it quotes this id."""
    why: str


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
    """Devices of this kind."""
    flaws: tuple[Flaw, ...] = ()
