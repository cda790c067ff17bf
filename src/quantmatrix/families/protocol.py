"""All that a family offers, and what holds where it offers nothing.

A family is a module, not a class. `Needed` is what every one of them defines; a name of `Family` may
be left out, and then what stands here is taken: `complete`, which `families.load` calls, binds it to
the module. The rest of the package asks a family by these names alone, and never whether it has one.

*On-disk tensors* carry the suffixes of the checkpoint (`weight`, `weight_scale`, `bias` ...).
*Canonical tensors* are what the kernels of the op take (see the docstring of the op's file in
`quantmatrix.kernels`): plain row-major layout, one fixed nibble order, rows first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.errors import UsageError
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.families.layouts import Layout
    from quantmatrix.request import Request


@dataclass(frozen=True)
class Calibration:
    """Range of a layer's input over calibration data, per channel."""

    low: torch.Tensor
    """float32 [in_features]"""
    high: torch.Tensor
    """float32 [in_features]"""

    @property
    def amax(self) -> torch.Tensor:
        """Largest magnitude per channel, float32 [in_features]."""
        return torch.maximum(self.low.abs(), self.high.abs())


@dataclass(frozen=True)
class Declaration:
    """How a checkpoint says what it is: each part is written where the family's readers look."""

    config: dict[str, Any] | None = None
    """`quantization_config` of config.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Entries of the safetensors header's `__metadata__`."""
    description: tuple[str, dict[str, Any]] | None = None
    """Name and content of a description file beside the weights."""
    blocks: Mapping[str, str] | None = None
    """Types of the tensors of a GGUF file that are blocks, by name; None: a safetensors file."""


class Needed(Protocol):
    """The names that the module of every family defines."""

    ID: str
    SCHEMES: Mapping[str, Scheme]
    """Every scheme that `quantize` can write, by the name used in checkpoints.csv."""

    def detect(self, checkpoint: Checkpoint) -> str | None:
        """The reason why the checkpoint is of this family, or None."""

    def schemes(self, checkpoint: Checkpoint) -> dict[str, Scheme]:
        """Scheme of each quantized layer, by the layer's name on disk; absent = full precision."""

    def tensors(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The tensors of a layer on disk, by suffix, `bias` left out."""

    def quantize(
        self,
        weight: torch.Tensor,
        scheme: Scheme,
        *,
        bias: torch.Tensor | None = None,
        calibration: Calibration | None = None,
        parts: int = 1,
    ) -> dict[str, torch.Tensor]:
        """On-disk tensors of a layer with this weight [out, in], `bias` [out] included when given.

        Both have any float dtype; the family's docstring has the table of what it gives. `parts` is
        how many layers of the model are stacked in it, each of out / parts rows.
        """

    def cut_rows(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
    ) -> dict[str, torch.Tensor]:
        """On-disk tensors of a layer with some of its rows only, in the order on disk; no copies.

        `start` is a multiple of 128 (and of the rows of a block), so is `stop`, or the last row's
        end: so much lies together in every format. A tensor [out, ...] becomes [stop - start, ...];
        dtypes stay.
        """

    def canonical(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> dict[str, torch.Tensor]:
        """On-disk tensors of one layer as canonical tensors of `scheme.op`, `bias` included.

        Shapes and dtypes are those of the family's table, and of the op's: [out, in] or packed.
        """

    def dequantize(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
        """The weight in plain numbers, float32 [out, in]."""

    def reference(
        self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> torch.Tensor:
        """The layer's exact arithmetic on on-disk tensors, activations quantized too.

        x [..., in] of any float dtype gives [..., out] in x's dtype.
        """

    def declare(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
    ) -> Declaration:
        """What to write beside layers of these schemes, `kept` being the layers left alone.

        `tensors` are the names of all tensors on disk, for declarations that describe each.
        """


class Family(Needed, Protocol):
    """What a family may define besides; what it leaves out is as it stands here."""

    # What its files say, and how

    ALGORITHMS: tuple[str, ...] = ()
    """Values of ModelOpt's `quant_algo` that mean this family."""
    DIALECT: str | None = None
    """The models' dialect that its files are written in; None: any, by the names in a file."""
    CODE_LEAVES: tuple[str, ...] = ("weight",)
    """Where the codes of a layer lie, below its name."""
    BIAS_LEAVES: tuple[str, ...] = ("bias",)
    """Where the bias of a layer lies, below its name; some formats store a second one."""
    WRAPPERS: tuple[str, ...] = ()
    """Levels between a layer's name and its tensors."""
    UNUSED: tuple[str, ...] = ()
    """Suffixes of a quantized layer that nothing computes with."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what the family's writers left out, by its cause; CheckpointError.

        Asked of any checkpoint that is opened, before it is known whose it is.
        """

    def doubts(self, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
        """Warnings about a checkpoint of the family that is taken: what its files leave open."""
        return []

    def ignored(self, name: str) -> str | None:
        """Why a tensor on disk is never loaded, or None when it is."""
        return None

    def layout(self, checkpoint: Checkpoint) -> Layout | None:
        """Where its codes and scales lie, the user's choice included; None: in one way only."""
        return None

    def plain_codes(self, schemes: Iterable[Scheme]) -> tuple[str, ...]:
        """Dtypes of codes that are the numbers themselves, where a tensor in no layer has them."""
        return ()

    def after_gelu(self, scheme: Scheme) -> Scheme:
        """The scheme of a layer whose inputs follow a GELU, which leaves few below zero."""
        return scheme

    def find_fault(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> tuple[str, str] | None:
        """(suffix, what it holds and what was expected) of stored numbers that cannot be meant.

        None where there are none. Tensors as in the table of the family: weight [out, in] and what
        stands beside it, dtypes as `tensors` has them.
        """
        return None

    # What a request asks of it

    ONLINE: str | None = None
    """The scheme, by its word in `SCHEMES`, that `--quantization` makes while loading; None: none."""
    ONLINE_NAMES: Mapping[str, str] = {}
    """Other names of `--quantization`, and the word in `SCHEMES` of what each makes while loading."""
    CPU_OFFLOAD: bool = True
    """Whether `--dit-cpu-offload` may move its components."""

    def check_flags(self, request: Request) -> None:
        """Refuse flags of the family that contradict each other, before a file is opened; UsageError.

        Asked of any request.
        """

    def check_fit(self, request: Request, checkpoint: Checkpoint) -> list[str]:
        """Warnings where flags of the family, or a file's name, do not fit what the file holds.

        Asked of any request, with the checkpoint of its primary component and the steps that the
        run will take. Contradictions raise UsageError or CheckpointError.
        """
        return []

    # How it is written

    MODELS: tuple[str, ...] = ()
    """Ids of the models that its files are defined for; empty: any."""
    WHOLE_PIPELINE: bool = False
    """Whether its readers want the whole pipeline, and no component alone."""
    ENDING: str = ".safetensors"
    """How the name of a single file of it ends."""
    WRITES_ON_CPU: bool = False
    """Whether `quantize` needs a CPU: for sums of integers that GPUs do not have."""

    def name_scheme(self, scheme: str | None, precision: str | None, rank: int | None) -> str:
        """The name in `SCHEMES` that `quantmatrix quantize` asks for; UsageError where none
        fits."""
        if precision is not None or rank is not None:
            raise UsageError(f"--precision and --rank are not for {self.ID}: give --scheme")
        name = next(iter(self.SCHEMES)) if scheme is None else scheme
        if name not in self.SCHEMES:
            raise UsageError(f"--scheme {name}: {self.ID} has {', '.join(self.SCHEMES)}")
        return name

    def scheme_of(
        self,
        layer: str,
        scheme: Scheme,
        *,
        raw: bool,
        gelu: bool,
        interleaved: bool,
        columns: int,
    ) -> Scheme | None:
        """The scheme of one layer where `scheme` is that of the whole; None: full precision.

        `raw`: written with the model's original names. `gelu`: its inputs follow a GELU.
        `interleaved`: its rows are, as the dialect has it. `columns`: its inputs.
        """
        return scheme

    def check_output(self, model: str, scheme: Scheme, path: Path) -> None:
        """Refuse a path whose name the family's readers would misread; UsageError."""


def list_names(protocol: type) -> list[str]:
    """The public names of `Needed`, or those that `Family` adds."""
    names = dict.fromkeys([*vars(protocol).get("__annotations__", {}), *vars(protocol)])
    return [name for name in names if not name.startswith("_")]


def complete(module: ModuleType) -> Family:
    """A family's module, with the defaults of what it leaves out; TypeError for what it must have."""
    missing = [name for name in list_names(Needed) if not hasattr(module, name)]
    if missing:
        raise TypeError(f"{module.__name__} has no {', '.join(missing)}: every family defines them")
    for name in list_names(Family):
        if not hasattr(module, name):
            default = vars(Family)[name]
            bound = MethodType(default, module) if isinstance(default, FunctionType) else default
            setattr(module, name, bound)
    return cast("Family", module)
