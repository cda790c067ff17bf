"""Run: what one generation gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from quantmatrix.errors import BrokenRunError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from quantmatrix.runtime.plan.types import Plan


@dataclass
class Run:
    """What one prompt and one seed gave."""

    plan: Plan
    prompt: str
    seed: int
    latents: list[torch.Tensor]
    """Latents after each step, on the CPU, in the dtype of the pipeline."""
    media: list[Any]
    """PIL images; for a video its frames."""
    is_video: bool
    fps: int
    seconds: dict[str, float]
    """Per stage: `load` (first run of a pipeline only), `encode`, `denoise`, `decode`, and
    `generate`, which is the last three together."""
    step_seconds: list[float]
    peak_bytes: int
    """Peak memory: of the accelerator when there is one, else resident memory of the process."""
    census: dict[str, dict[str, int]]
    """Quantized layers found in each transformer component, per backend."""
    output: Path | None = None
    calls: dict[str, int] = field(default_factory=dict)
    """Forward calls of each transformer component."""
    witness: dict[str, Any] = field(default_factory=dict)
    """What the witness found of each quantized component; empty where it was not asked."""
    encoders: dict[str, dict[str, int]] = field(default_factory=dict)
    """Quantized layers found in each text encoder that was built as the transformers are, per backend."""
    degenerate: str | None = None
    """Why the run shows nothing: its latents are not finite, or its media are of one colour."""

    def require_numbers(self) -> None:
        """Raise BrokenRunError when latents are NaN or infinite: the picture would be black."""
        for step, latents in enumerate(self.latents, 1):
            if bad := int((~torch.isfinite(latents)).sum()):
                raise BrokenRunError(
                    f"step {step} of {len(self.latents)} gave {bad} of {latents.numel()} latents "
                    f"that are NaN or infinite (prompt {self.prompt!r}, seed {self.seed}): expected "
                    "numbers. Nothing was saved. Try --backend decode or --dtype float32, or the "
                    "base model alone: if that works, the checkpoint is damaged"
                )

    def to_json(self) -> dict[str, Any]:
        """The performance dump, plain data."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "output": str(self.output) if self.output else None,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "peak_memory_bytes": self.peak_bytes,
            "quantized_layers": {n: sum(c.values()) for n, c in self.census.items()},
            "backends": self.census,
            "transformer_calls": self.calls,
            **({"text_encoders": self.encoders} if self.encoders else {}),
            "witness": self.witness,
            "degenerate": self.degenerate,
            "transformer_bytes": {n: c.bytes for n, c in self.plan.components.items()},
            "plan": self.plan.to_json(),
        }
