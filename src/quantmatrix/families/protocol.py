"""What a family module must offer. A family is a module, not a class; this protocol checks it.

*On-disk tensors* carry the suffixes of the checkpoint (`weight`, `weight_scale`, `bias` ...).
*Canonical tensors* are what the kernels of the op take (see the docstring of the op's file in
`quantmatrix.kernels`): plain row-major layout, one fixed nibble order, rows first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.scheme import Scheme, TensorSpec


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


class Family(Protocol):
    """The functions and names that every module in `quantmatrix.families` has."""

    ID: str
    SCHEMES: Mapping[str, Scheme]
    """Every scheme that `quantize` can write, by the word used in checkpoints.csv."""

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
    ) -> dict[str, torch.Tensor]:
        """On-disk tensors of a layer with this weight [out, in], `bias` [out] included when given.

        Both have any float dtype; the family's docstring has the table of what it gives.
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

    def declare(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> Declaration:
        """What to write beside layers of these schemes, `kept` being the layers left alone."""
