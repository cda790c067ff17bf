"""Limit classes: what runs are compared with one another when limits are measured.

The class of a run names how the weights of its layers are rounded (`scheme.name_format`) and their
arithmetic: `e4m3 W8A8`, `mx-e2m1 W4A4`; several are joined by ` + `. A run whose experts are both
quantized errs more than one with an expert in BF16, so it is of a class of its own: `e4m3 W8A8 both`.
Text encoders do not count: a row's BF16 run has the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantmatrix.scheme import Scheme, name_format

if TYPE_CHECKING:
    from quantmatrix.proof.record import CheckResult

BOTH = " both"
"""How the class of a run ends of which more than one component is quantized."""


def name_run(parts: Iterable[Any]) -> str:
    """The class of a run with these components of a plan (`ComponentPlan`)."""
    return name_class(*([(p.scheme, p.numerics) for p in part.pieces()] for part in parts))


def name_class(*components: Iterable[tuple[Scheme, str]]) -> str:
    """The class of a run whose components have quantized layers of these (scheme, arithmetic).

    A component without any does not count; the class is empty where none has one.
    """
    quantized = [found for one in components if (found := list(one))]
    names = {f"{name_format(scheme)} {numerics}" for one in quantized for scheme, numerics in one}
    return " + ".join(sorted(names)) + (BOTH if len(quantized) > 1 else "")


def swap_count(kind: str) -> str:
    """The class of the same arithmetic in one component instead of both, or the other way round."""
    return kind.removesuffix(BOTH) if kind.endswith(BOTH) else kind + BOTH


def read_class(check: CheckResult) -> str:
    """The class of a latents check, by the components that it measured; empty where it has none.

    Records from before classes told the number of components lack the suffix.
    """
    kind = str(check.metrics.get("class") or "")
    both = len(check.metrics.get("layers", {})) > 1 and not kind.endswith(BOTH)
    return kind + BOTH if kind and both else kind
