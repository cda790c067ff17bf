"""Choosing: the kernel of a layer on a machine, its flaws known.

What a kernel needs is declared with it (`kernels.Needs`). What a machine computes wrongly although
every need is met is a property of the machine (`hardware.Flaw`), found by a probe: such a backend is
passed over, with a warning, and refused where it was asked for.
"""

from __future__ import annotations

from quantmatrix import kernels
from quantmatrix.hardware.machine import Flaw, Machine
from quantmatrix.scheme import Scheme


def choose(
    op: str,
    machine: Machine,
    scheme: Scheme,
    shape: tuple[int, int],
    backend: str | None = None,
    rows: int = 0,
    warnings: list[str] | None = None,
) -> kernels.Kernel:
    """`kernels.choose`, without the backends that the machine computes wrongly.

    Raises NoKernel with the flaw where `backend` asks for one of these, or nothing else is left.
    """
    chosen = kernels.choose(op, machine, scheme, shape, backend, rows)
    flaw = find_flaw(machine, op, chosen.backend)
    if flaw is None:
        return chosen
    others = list_sound(op, machine, scheme, shape, rows)
    if backend is None and others:
        note = f"{op}: {chosen.backend} is not used: {flaw.why}; {others[0].backend} is"
        if warnings is not None and note not in warnings:
            warnings.append(note)
        return others[0]
    works = " | ".join(kernel.backend for kernel in others)
    remedy = f"; works here: --backend {works}" if works else ""
    message = f"{op} on {machine.name}: {chosen.backend}: {flaw.why}{remedy}"
    raise kernels.NoKernel(flaw.rule, message)


def find_flaw(machine: Machine, op: str, backend: str) -> Flaw | None:
    """What is wrong with a backend on a machine, or None."""
    found = (flaw for flaw in machine.flaws if (flaw.op, flaw.backend) == (op, backend))
    return next(found, None)


def list_sound(
    op: str, machine: Machine, scheme: Scheme, shape: tuple[int, int], rows: int
) -> list[kernels.Kernel]:
    """Kernels that fit a layer and compute it rightly, in the machine's order."""
    known = {kernel.backend: kernel for kernel in kernels.kernels_of(op)}
    return [
        known[name]
        for name in kernels.order_of(op, machine)
        if known[name].needs.why_not(machine, scheme, shape, rows) is None
        and find_flaw(machine, op, name) is None
    ]
