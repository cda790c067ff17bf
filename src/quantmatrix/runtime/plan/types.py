"""Plans and refusals as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantmatrix.errors import RefusedError
from quantmatrix.runtime.witness.base import Base

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.models.dialect import Dialect, Target
    from quantmatrix.request import Request
    from quantmatrix.runtime.pictures import Picture
    from quantmatrix.runtime.plan.placement import PlainTensor
    from quantmatrix.scheme import Scheme


@dataclass(frozen=True)
class Piece:
    """One layer on disk that serves a module, and the kernel that will compute it."""

    layer: str
    target: Target
    scheme: Scheme
    out_features: int
    in_features: int
    backend: str
    numerics: str
    bytes: int


@dataclass(frozen=True)
class ComponentPlan:
    """How one transformer component will be built."""

    name: str
    class_name: str
    config: Mapping[str, Any]
    config_from: str
    checkpoint: Checkpoint
    family: str | None
    why: str
    online: bool
    """Quantized while loading, from full-precision weights."""
    dialect: Dialect
    layers: Mapping[str, tuple[Piece, ...]]
    """Quantized modules, by diffusers name."""
    plain: tuple[PlainTensor, ...]
    """Tensors that are stored plainly, and where they go."""
    ignored: Mapping[str, str]
    """Tensors that are left aside, each with the family's reason."""
    total_layers: int
    bytes: int
    """Bytes of weights that stay in memory."""
    model: str = ""
    numbers: tuple[str, ...] = ()
    """Dtypes of codes that are the numbers themselves, where full precision is expected."""
    layout: str = ""
    """What the layout of the codes rests on, where it could be another."""
    base: Base = field(default_factory=Base)
    """Weights of the base model that decoded layers are compared with."""

    @property
    def backends(self) -> dict[str, int]:
        """Layers per backend."""
        return dict(Counter(piece.backend for piece in self.pieces()))

    @property
    def precision(self) -> str | None:
        """The checkpoint's own names of its schemes, most frequent first."""
        names = Counter(piece.scheme.name for piece in self.pieces())
        return " + ".join(name for name, _ in names.most_common()) or None

    @property
    def rank(self) -> int | None:
        """Largest low-rank branch, if there is one."""
        return max((piece.scheme.rank for piece in self.pieces()), default=0) or None

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every quantized module."""
        for pieces in self.layers.values():
            yield from pieces

    def to_json(self) -> dict[str, Any]:
        """The component as plain data."""
        return {
            "class": self.class_name,
            "family": self.family,
            "why": self.why,
            "online": self.online,
            "files": list(self.checkpoint.files),
            "reference": self.checkpoint.reference,
            "config_from": self.config_from,
            "dialect": self.dialect.name,
            "precision": self.precision,
            "rank": self.rank,
            "quantized_layers": len(self.layers),
            "total_layers": self.total_layers,
            "backends": self.backends,
            "numerics": dict(Counter(piece.numerics for piece in self.pieces())),
            "layout": self.layout or None,
            "base_weights": self.base.reference or None,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Plan:
    """A run that can be made."""

    request: Request
    model: str
    machine: Machine
    base: str
    """Where every component without an override comes from."""
    pipeline_class: str | None
    components: Mapping[str, ComponentPlan]
    layerwise_offload: bool
    cpu_offload: bool
    processes: int = 1
    """Processes that share each generation, on a device each."""
    warnings: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    """What the run is given to look at."""
    encoders: Mapping[str, ComponentPlan] = field(default_factory=dict)
    """Text encoders that are built as transformers are; transformers' own loader builds the others."""
    ok: bool = field(default=True, init=False)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, the form that `plan --json` prints and evidence keeps."""
        return {
            "ok": True,
            "refusal": None,
            "model": self.model,
            "base": self.base,
            "machine": {
                "name": self.machine.name,
                "vendor": self.machine.vendor,
                "arch": self.machine.arch,
            },
            "dtype": self.request.dtype,
            "offload": {"layerwise": self.layerwise_offload, "cpu": self.cpu_offload},
            "processes": self.processes,
            "bytes": sum(c.bytes for c in self.components.values()),
            "warnings": list(self.warnings),
            "components": {name: c.to_json() for name, c in self.components.items()},
            **(
                {"text_encoders": {n: c.to_json() for n, c in self.encoders.items()}}
                if self.encoders
                else {}
            ),
            **({"pictures": [one.to_json() for one in self.pictures]} if self.pictures else {}),
        }


@dataclass(frozen=True)
class Refusal:
    """A run that cannot be made here: the rule that forbids it, and what would work instead."""

    rule: str
    message: str
    ok: bool = field(default=False, init=False)

    def to_json(self) -> dict[str, Any]:
        """The refusal as plain data."""
        return {
            "ok": False,
            "refusal": {"rule": self.rule, "message": self.message},
            "components": {},
        }


def require(decided: Plan | Refusal) -> Plan:
    """The plan of what was decided; raises RefusedError, with rule and message, for a refusal."""
    if isinstance(decided, Refusal):
        raise RefusedError(decided.rule, decided.message)
    return decided
