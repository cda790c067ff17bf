"""Kernels: who computes an op, on which machine, and why not.

An *op* is what is computed (`linear.fp8`); a *backend* is whose code computes it (`reference`,
`decode`, `torch` ...); a `Kernel` is the pair. Each op has one file here, whose docstring names the
canonical tensors that its kernels take, and which lists its kernels in `KERNELS`. What a kernel
needs is data (`Needs`): the plan tests it, refusals quote it, the docs render it. `choose` takes
the first kernel of the op's order that fits, and otherwise says of every candidate why not.
Nothing falls through at call time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch

from quantmatrix.hardware.machine import Machine
from quantmatrix.hardware.packages import inspect_nunchaku
from quantmatrix.scheme import Scheme

Tensors = dict[str, torch.Tensor]

OPS: Mapping[str, str] = {
    "linear.fp8": "quantmatrix.kernels.linear_fp8",
    "linear.nvfp4": "quantmatrix.kernels.linear_nvfp4",
    "linear.svdq": "quantmatrix.kernels.linear_svdq",
    "linear.w4a16": "quantmatrix.kernels.linear_w4a16",
    "linear.int8": "quantmatrix.kernels.linear_int8",
    "linear.convrot": "quantmatrix.kernels.linear_convrot",
    "linear.mxfp4": "quantmatrix.kernels.linear_mxfp4",
    "linear.gguf": "quantmatrix.kernels.linear_gguf",
}


@dataclass(frozen=True)
class Needs:
    """What a kernel asks of the machine, the scheme and the shape. Empty means: anything."""

    rule: str
    """Id of the rule; a refusal that comes from it quotes this id."""
    vendors: tuple[str, ...] = ()
    arches: tuple[str, ...] = ()
    package: str = ""
    """Import name of an optional package that must be present."""
    weights: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    """Rows and columns of the weight that share a scale."""
    plain: bool = False
    """Takes no smoothed layers and none with a low-rank branch."""
    out_multiple: int = 1
    in_multiple: int = 1
    max_rows: int = 0
    """Most rows (tokens) of an input that the kernel takes; 0: any number."""
    remedy: str = ""
    """What to try instead, for the end of a refusal."""
    only_on: tuple[str, ...] = ()
    """Architectures on which this is asked at all; empty: everywhere."""
    further: tuple[Needs, ...] = ()
    """More needs, each with its own rule, looked at after this one."""

    def why_not(
        self, machine: Machine, scheme: Scheme, shape: tuple[int, int], rows: int = 0
    ) -> str | None:
        """The first unmet need as text, or None.

        `shape` is (out_features, in_features); `rows` the most rows that an input will have, 0
        when that is not known.
        """
        return self.find_unmet(machine, scheme, shape, rows)[1]

    def find_unmet(
        self, machine: Machine, scheme: Scheme, shape: tuple[int, int], rows: int = 0
    ) -> tuple[Needs, str | None]:
        """(the need that is not met, why) among this and its `further` ones; (self, None): none."""
        for need in (self, *self.further):
            asked = not need.only_on or machine.arch in need.only_on
            if asked and (why := need._test(machine, scheme, shape, rows)):
                return need, why
        return self, None

    def _test(
        self, machine: Machine, scheme: Scheme, shape: tuple[int, int], rows: int
    ) -> str | None:
        out_features, in_features = shape
        if self.vendors and machine.vendor not in self.vendors:
            return f"needs {' or '.join(self.vendors)} hardware, this is {machine.name}"
        if self.arches and machine.arch not in self.arches:
            return f"needs {', '.join(self.arches)}, this is {machine.name} ({machine.arch})"
        if self.package and self.package not in machine.packages:
            return f"needs the package {self.package}: {explain_missing(self.package)}"
        for what, allowed, found in (
            ("weights", self.weights, scheme.weight),
            ("weight scales per", self.scales, scheme.scale),
            ("activations", self.activations, scheme.activation),
        ):
            if allowed and found not in allowed:
                return f"takes {what} {' or '.join(allowed)}, the layer has {found}"
        if self.blocks and scheme.block not in self.blocks:
            sizes = " or ".join("x".join(map(str, block)) for block in self.blocks)
            return f"takes blocks of {sizes}, the layer has {'x'.join(map(str, scheme.block))}"
        if self.plain and (scheme.smoothed or scheme.rank):
            return "takes no layers with smoothing or a low-rank branch"
        if out_features % self.out_multiple or in_features % self.in_multiple:
            return (
                f"needs out_features a multiple of {self.out_multiple} and in_features of "
                f"{self.in_multiple}, the layer is {out_features} x {in_features}"
            )
        if self.max_rows and rows > self.max_rows:
            return f"takes inputs of at most {self.max_rows} rows, this run has {rows}"
        return None


def explain_missing(package: str) -> str:
    """What stands in for an optional package that cannot be used."""
    kind, note = inspect_nunchaku() if package == "nunchaku" else (None, "")
    return note if kind == "look-alike" else "it is not installed"


@dataclass(frozen=True)
class Kernel:
    """One backend of one op.

    `prepare(tensors, scheme, dtype)` runs once at load, on the device, and returns the buffers to
    keep; `run(x, buffers, bias, scheme)` takes x [..., in_features] and returns [..., out_features]
    in x's dtype. `numerics` names the class of arithmetic (`W8A8`, `W4A16` ...): latents of
    different machines can be compared within one class only.
    """

    op: str
    backend: str
    numerics: str
    needs: Needs
    prepare: Callable[[Tensors, Scheme, torch.dtype], Tensors]
    run: Callable[[torch.Tensor, Tensors, torch.Tensor | None, Scheme], torch.Tensor]
    footprint: Callable[[Scheme, int, int, int], int]
    """Bytes kept for a layer: (scheme, out_features, in_features, bytes of the compute dtype)."""
    encode: Callable[[torch.Tensor, Tensors, Scheme], tuple[torch.Tensor, ...] | None] | None = None
    """x [..., in] to codes and scales, where `run` is `multiply` after `encode`: layers that read
    one input may then share its codes. None from it: not here, call `run`."""
    multiply: (
        Callable[
            [tuple[torch.Tensor, ...], torch.Tensor, Tensors, torch.Tensor | None, Scheme],
            torch.Tensor,
        ]
        | None
    ) = None
    """(encoded, x, buffers, bias, scheme) to [..., out]; only shape and dtype of x are used."""
    matmul: tuple[str, ...] = ("aten::linear",)
    """What multiplies the weight, as a profiler names it: operations or kernels, of which at least
    one runs in a call. A kernel that names no plain matmul takes codes, never a decoded weight;
    empty: codes, too, by a matmul whose name nobody has seen yet."""


class NoKernel(LookupError):
    """No kernel of the op fits; `rule` is the rule of the first candidate that was tried."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule
        self.message = message


def kernels_of(op: str) -> tuple[Kernel, ...]:
    """All kernels of an op, in the order in which they are declared.

    Raises KeyError for an unknown op.
    """
    if op not in OPS:
        raise KeyError(f"no such op: {op}; known: {', '.join(OPS)}")
    found: tuple[Kernel, ...] = import_module(OPS[op]).KERNELS
    return found


def order_of(op: str, machine: Machine) -> tuple[str, ...]:
    """Backends to try on a machine, best first: `ORDER` of the op for its arch, vendor or `*`.

    Raises KeyError where the op declares an order for none of the three.
    """
    order: Mapping[str, tuple[str, ...]] = import_module(OPS[op]).ORDER
    for key in (machine.arch, machine.vendor, "*"):
        if key in order:
            return order[key]
    raise KeyError(f"{op} declares no order for {machine.arch}, {machine.vendor} or *")


def backends_of(op: str) -> tuple[str, ...]:
    """Names of the backends that an op has."""
    return tuple(kernel.backend for kernel in kernels_of(op))


def take_rows(scheme: Scheme, tensors: Tensors, rows: torch.Tensor | slice) -> Tensors:
    """Canonical tensors of some output rows of a layer, in the order given.

    `tensors` have the shapes and dtypes of the op's table (`OPS`); `rows` is a slice or int64
    [rows]. What belongs to the input side is shared, not cut. Raises ValueError where rows that
    share a scale would be parted.
    """
    height = (scheme.block[0],) if scheme.scale == "block" else ()
    found: Tensors = import_module(OPS[scheme.op]).take_rows(tensors, rows, *height)
    return found


def check_rows(scheme: Scheme, rows: torch.Tensor | slice | None, count: int) -> None:
    """Refuse to part rows that share a scale; `rows` is a slice or int64 [rows], None: all `count`.

    Raises ValueError where a block scale of the scheme covers rows on both sides of a cut.
    """
    if rows is not None and scheme.scale == "block":
        import_module(OPS[scheme.op]).find_blocks(rows, count, scheme.block[0])


def decode(scheme: Scheme, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [out, in], bias [out] or None) in plain float32 numbers, of canonical tensors.

    An op whose bias is stored folded (SVDQuant's shift, a zero point) offers `decode_bias`.
    """
    module = import_module(OPS[scheme.op])
    bias = tensors.get("bias")
    if hasattr(module, "decode_bias"):
        bias = module.decode_bias(tensors, scheme)
    weight: torch.Tensor = module.decode(tensors, scheme)
    return weight, None if bias is None else bias.float()


def choose(
    op: str,
    machine: Machine,
    scheme: Scheme,
    shape: tuple[int, int],
    backend: str | None = None,
    rows: int = 0,
) -> Kernel:
    """The kernel that will run a layer of `shape` (out, in) on `machine`, or NoKernel with reasons.

    With `backend` given nothing else is tried. `rows` is the most rows that an input will have; 0
    when that is not known.
    """
    kernels = {kernel.backend: kernel for kernel in kernels_of(op)}
    names = (backend,) if backend else order_of(op, machine)
    reasons: list[str] = []
    remedies: set[str] = set()
    rule = ""
    for name in names:
        if name not in kernels:
            reasons.append(f"{name}: no such backend (known: {', '.join(kernels)})")
            rule = rule or "unknown-backend"
            continue
        need, why = kernels[name].needs.find_unmet(machine, scheme, shape, rows)
        if why is None:
            return kernels[name]
        rule = rule or need.rule
        remedies.add(need.remedy)
        reasons.append(f"{name}: {why}")
    working = [
        k.backend for k in kernels.values() if k.needs.why_not(machine, scheme, shape, rows) is None
    ]
    remedy = f"; works here: --backend {' | '.join(working)}" if working else ""
    hint = "".join(f"; {text}" for text in sorted(remedies - {""}))
    raise NoKernel(rule, f"{op} on {machine.name}: {'; '.join(reasons)}{remedy}{hint}")
