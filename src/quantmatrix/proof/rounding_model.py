"""Rounding model: what a number format alone costs a layer, in relative L2, before any run.

Take every rounding error as independent, of mean zero, and uniform within the gap `d` between codes
that the value lies in: variance `d^2 / 12`. For y = W x with products that do not cancel more than
chance makes them,

    E|dy|^2 / |y|^2  =  r_W^2 + r_x^2        r^2 = sum of d^2 / 12 over sum of w^2, of a group

so weights and inputs add in quadrature; inputs that stay in 16 bits add nothing. `r` of the worst
group that shares a scale, with its largest magnitude at the largest code `t`:

| format | r      | because |
| ------ | ------ | ------- |
| `e4m3` | 0.0361 | d / w is at most 1/8, at the lower end of a binade, whatever the magnitudes are and |
|        |        | however many share the scale: 1 / (8 sqrt(12)). Subnormals are below 2^-14 of t |
| `e5m2` | 0.0722 | the same with one bit less: 1 / (4 sqrt(12)) |
| `e2m1` | 0.1352 | groups of 16; worst where 15 values lie at 4, just below the widest gap (d = 2), and |
|        |        | the block scale, itself e4m3, moves the largest one: r(e4m3) of 6 |
| `int8` | 0.0059 | d is one step everywhere, so r = crest / (t sqrt(12)) with crest = largest over rms. |
| `int4` | 0.1071 | No magnitudes, no bound: one outlier rounds all others to zero. Taken is the crest of |
|        |        | normal values in the smallest group that a family has, 64: 2.596. Wider ones cost more |
| `int8-tensor` | 0.0101 | the same, of a whole layer: the crest of 256 x 256 normal values, 4.44 |
| `mx-e4m3` | 0.0556 | groups of 32 whose scale is a power of two: the largest magnitude is anywhere between |
|        |        | 256 and 512 steps (taken as uniform in log2), and 448 is the largest code: what lies above is |
|        |        | cut off, by 1/8 of it at most. No other value need be there to hide that |
| `mx-e2m1` | 0.1978 | the same between 4 and 8, with 6 as the largest code: at most 1/4 is cut off |

`uint4` (AWQ) searches for a range and cuts what is outside: no bound. Nor is there one for latents.
What is provable there multiplies a layer's error by the Lipschitz constants of all blocks and steps
behind it, which says nothing: limits of latents rest on the other sources (see `limits`). The bound
holds for the model above, not for every input: a layer whose products cancel exceeds it, and so does
one whose static input scale cuts off what a prompt brings, which is what the measured source is for.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

from quantmatrix.scheme import MX, WHOLE

MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
LARGEST_CODE = {"e4m3": 448.0, "e2m1": 6.0, "int8": 127.0, "int4": 7.0}
TOP_GAP = {"e4m3": 32.0, "e2m1": 2.0, "int8": 1.0, "int4": 1.0}
"""Distance of the two largest codes."""
GROUP = {"e2m1": 16, "int4": 64, "int8": 64, "int8" + WHOLE: 256 * 256, MX: 32}
"""Values that share a scale, where their number counts: the fewest of any family."""
E2M1_GAPS = ((0.0, 0.5), (2.0, 1.0), (4.0, 2.0))
"""(smallest value, gap from there on) of e2m1."""


def bound_class(kind: str) -> float:
    """The largest `bound_layer` in a class of arithmetic (`e2m1 W4A4 + uint4 W4A16`); 0 if none.

    A run of that class is not asked for less: its worst layer may have this error by rounding alone,
    whether one component is quantized or (`e4m3 W8A8 both`) two are.
    """
    parts = [part.split(" ") for part in kind.split(" + ")]
    return max((bound_layer(part[0], part[1]) or 0.0 for part in parts if part[1:]), default=0.0)


def bound_layer(weight: str, numerics: str) -> float | None:
    """Relative L2 error of a layer by rounding, `e4m3`, `W8A8` -> 0.051; None without a bound."""
    own = bound_format(weight)
    if own is None:
        return None
    return own if numerics.endswith("A16") else math.hypot(own, own)


def bound_format(name: str) -> float | None:
    """`r` of a number format; see the module's table. None for a format without one."""
    if name in MANTISSA_BITS:
        return bound_float(MANTISSA_BITS[name])
    if name == "e2m1":
        return bound_e2m1()
    if name.startswith(MX):
        return bound_power(name.removeprefix(MX))
    if name in GROUP:
        steps = LARGEST_CODE[name.removesuffix(WHOLE)]
        return find_crest(GROUP[name]) / (steps * math.sqrt(12.0))
    return None


def bound_float(mantissa_bits: int = MANTISSA_BITS["e4m3"]) -> float:
    """Rms over magnitude at the lower end of a binade, whose gap is 2^-bits of it."""
    return 2.0**-mantissa_bits / math.sqrt(12.0)


def bound_e2m1() -> float:
    """The worst of a value in every gap, for all but the largest of a group."""
    others, top = GROUP["e2m1"] - 1, LARGEST_CODE["e2m1"]
    moved = (top * bound_float()) ** 2
    return max(
        math.sqrt((others * gap**2 / 12.0 + moved) / (top**2 + others * value**2))
        for value, gap in E2M1_GAPS
    )


def bound_power(name: str) -> float | None:
    """The worst of a value in every gap, for all but the largest of a group that is cut off."""
    if name not in ("e4m3", "e2m1"):
        return None
    others, top = GROUP[MX] - 1, LARGEST_CODE[name]
    lower = 2.0 ** math.floor(math.log2(top))
    size = 1.5 * lower**2 / math.log(2.0)  # of a square, uniform in log2 over the binade
    cut = integrate_cut(top, 2.0 * lower)
    if name == "e4m3":
        return math.sqrt(cut / size + bound_float() ** 2)
    largest = cut + TOP_GAP[name] ** 2 / 12.0 * math.log2(top / lower)  # rounded where not cut off
    return max(
        math.sqrt((others * gap**2 / 12.0 + largest) / (size + others * value**2))
        for value, gap in E2M1_GAPS
    )


def integrate_cut(top: float, end: float) -> float:
    """Mean square of what exceeds `top`, of a magnitude uniform in log2 between end / 2 and end."""
    inner = (end**2 - top**2) / 2.0 - 2.0 * top * (end - top) + top**2 * math.log(end / top)
    return inner / math.log(2.0)


@cache
def find_crest(count: int, step: float = 1e-3) -> float:
    """Expected largest magnitude of `count` normal values, over their rms."""
    within = (2.0 * NormalDist().cdf((n + 0.5) * step) - 1.0 for n in range(round(8 / step)))
    return sum((1.0 - share**count) * step for share in within)
