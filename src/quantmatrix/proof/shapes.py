"""Shapes: what records, benchmark files and packets hold, declared once.

`list_problems` holds plain data against a shape, and `schema` gives the shapes as one JSON Schema (2020-12),
which `quantmatrix evidence schema` prints.

A part that a run may leave out has `UNSET` for its default. Keys that a shape does not name are let through,
so that a newer writer may say more, but for those with `forbid_unknown_fields`. Whether the parts agree with
one another is no matter of shape: `form` and `bench_results` look at that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import msgspec.json
import msgspec.structs
from msgspec import UNSET, Meta, Struct, UnsetType, field

Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
"""A number beyond this is no measurement."""
Whole = Annotated[int, Meta(ge=0, le=2**53)]
"""A count; every reader of JSON keeps it exactly."""
Filled = Annotated[int, Meta(ge=1, le=2**53)]
"""Bytes of something that is there."""
One = Literal[1]
"""The only `schema` that there is."""


class Cell(Struct):
    """The row that a record is of, as it was then, and digests of what it computes with."""

    id: str
    row: str
    family: str
    model: str
    checkpoint: str
    hardware: str
    backend: str
    flags: list[str]
    checks: list[str]
    claim: str
    rule: str
    row_digest: str
    place_digest: str | UnsetType = UNSET
    device_digest: str | UnsetType = UNSET
    shared_digest: str | UnsetType = UNSET


class Machine(Struct):
    """What was probed."""

    devices: list[str] | UnsetType = UNSET
    processor: str | UnsetType = UNSET
    versions: dict[str, Any] | UnsetType = UNSET


class Weights(Struct):
    """The weight files of a run."""

    digest: str | UnsetType = UNSET
    files: list[str] | UnsetType = UNSET
    bytes: Whole | UnsetType = UNSET
    repository: str | UnsetType = UNSET
    revision: str | UnsetType = UNSET


class Component(Struct):
    """A transformer of a plan: quantized layers per kernel."""

    backends: dict[str, Any]
    quantized_layers: Whole
    total_layers: Whole


class Plan(Struct):
    """A plan as `quantmatrix plan --json` prints it, or its refusal."""

    components: dict[str, Component] | UnsetType = UNSET
    warnings: list[Any] | UnsetType = UNSET
    machine: dict[str, Any] | UnsetType = UNSET
    ok: bool | UnsetType = UNSET
    refusal: dict[str, Any] | None = None


class Check(Struct, forbid_unknown_fields=True):
    """What one check found; `metrics` of `latents` and `compile` have shapes of their own."""

    verdict: Literal["pass", "fail", "unjudged"]
    metrics: dict[str, Any]
    limits: dict[str, Any]
    message: str


class Kind(Struct):
    """What a witness found of a kind of layers."""

    kind: str
    limit: str
    reading: str
    verdict: str
    cosine: Number
    coded_cosine: Number
    relative_l2: Number
    gain: Number
    scale_error: Number


class Witnessed(Struct):
    """What decoded layers of a component showed beside the base model's."""

    kinds: list[Kind]
    verdict: str | UnsetType = UNSET
    layers: Whole | UnsetType = UNSET
    bytes: Whole | UnsetType = UNSET


class Record(Struct, forbid_unknown_fields=True):
    """The record of one cell: `reports/evidence/<hardware>/<row>[+<backend>][.<scope>].json`."""

    schema: One
    cell: Cell
    command: str
    machine: Machine
    versions: dict[str, str]
    commit: str
    checkpoint: Weights
    plan: Plan
    checks: Annotated[dict[str, Check], Meta(min_length=1)]
    timings: dict[str, Number]
    latents_digest: str
    made: str
    witness: dict[str, Witnessed] | UnsetType = UNSET


class Worst(Struct):
    """The worst step of a run; null is infinite."""

    psnr_db: Number | None = None
    cosine: Number | None = None
    relative_l2: Number | None = None


class WorstLayer(Struct):
    """The layer of a component with the largest error."""

    worst: Number


class Latents(Struct):
    """`metrics` of the check `latents`."""

    worst: Worst | UnsetType = UNSET
    layers: dict[str, WorstLayer] | UnsetType = UNSET
    steps: list[dict[str, Any]] | UnsetType = UNSET
    kind: str | UnsetType = field(default=UNSET, name="class")


class Program(Struct):
    """A kernel that was built for an architecture."""

    kernel: str
    arch: str
    specialised: str
    digest: str
    registers: Whole
    spilled: Whole
    shared: Whole
    shared_limit: Whole
    warps: Whole
    faults: list[Any]


class Compile(Struct):
    """`metrics` of the check `compile`, unless it failed before it could tell any."""

    arch: str
    triton: str
    kernels: str
    programs: list[Program]
    problems: list[Any]


class Sides(Struct):
    """Medians of a comparison, in milliseconds."""

    bf16: Number
    quantized: Number


class Samples(Struct):
    """Every round of a comparison, in milliseconds."""

    bf16: Annotated[list[Number], Meta(min_length=1)]
    quantized: Annotated[list[Number], Meta(min_length=1)]


class Timing(Struct):
    """A comparison: quantized over BF16, its interval, and what could have been seen."""

    ratio: Number
    low: Number
    high: Number
    detectable: Number
    verdict: str
    median: Sides
    milliseconds: Samples


class Layer(Timing):
    """The comparison of a kind of layer: rows of the input, inner and outer width."""

    rows: Whole
    inner: Whole = field(name="in")
    outer: Whole = field(name="out")
    scheme: str
    backend: str


class Bytes(Struct):
    """Memory of one side; a model without any is none."""

    weights: Filled
    working: Whole
    peak: Filled


class Memory(Struct):
    """Memory of both sides, and who counted it."""

    bf16: Bytes
    quantized: Bytes
    counted_by: str


class Part(Struct):
    """What was measured of a component; random weights have no `load`, for they lie in no file."""

    layers: Annotated[list[Layer], Meta(min_length=1)]
    step: Timing
    memory: Memory
    load: Timing | UnsetType = UNSET


class Settings(Struct):
    """How a comparison was made."""

    clock: str


class Result(Struct):
    """One benchmark: a cell's, or that of a request as text."""

    schema: One
    what: str
    size: str
    device: str
    command: str
    components: Annotated[dict[str, Part], Meta(min_length=1)]
    backends: dict[str, Any]
    settings: Settings
    machine: dict[str, Any]
    commit: str
    made: str
    cell: dict[str, Any] | UnsetType = UNSET


class Benchmark(Struct):
    """A file of `quantmatrix bench`: what was to be measured, and what was."""

    schema: One
    planned: Annotated[list[str], Meta(min_length=1)]
    results: Annotated[list[Result], Meta(min_length=1)]


class File(Struct, forbid_unknown_fields=True):
    """A file of a packet."""

    bytes: Whole
    sha256: str


class Packet(Struct, forbid_unknown_fields=True):
    """`packet.json`: what a packet is of, and what lies in it."""

    schema: One
    cell: str
    command: str
    metrics: dict[str, Any]
    files: dict[str, File]


class RuntimeCell(Struct):
    """A checkpoint in another runtime, and digests of its rows and of the adapter's code."""

    id: str
    checkpoint: str
    hardware: str
    runtime: str
    checkpoint_digest: str
    runtime_digest: str
    adapter_digest: str


class RuntimeRecord(Struct):
    """What another program made of a checkpoint; see `columns`."""

    schema: One
    cell: RuntimeCell
    verdict: Literal[
        "works", "wrong numbers", "not quantized", "refuses", "crashes", "not installed"
    ]
    reason: str
    command: str
    again: str
    version: str
    scope: str
    versions: dict[str, str]
    machine: Machine
    checkpoint: Weights
    metrics: dict[str, Any]
    limits: dict[str, Any]
    weights: dict[str, Whole]
    tried: list[str]
    log: str
    seconds: Number
    peak_bytes: Whole
    commit: str
    made: str


CHECKS: Mapping[str, type[Struct]] = {"latents": Latents, "compile": Compile}
"""Shapes of the metrics of a check."""
KINDS = (Record, Benchmark, Packet, RuntimeRecord)
"""Shapes of whole files."""


@cache
def list_fields(kind: type[Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """The parts of a shape."""
    return msgspec.structs.fields(kind)


def list_problems(value: Any, kind: Any, where: str = "") -> list[str]:
    """What is wrong with plain data that should be of a shape, a line for each place; empty: nothing."""
    try:
        msgspec.convert(value, kind)
    except (
        msgspec.ValidationError,
        UnicodeEncodeError,
    ) as error:  # half a surrogate pair is no text
        return list(explain(value, kind, where)) or [f"{where}: {error}".removeprefix(": ")]
    return []


def explain(value: Any, kind: Any, where: str) -> Iterator[str]:
    """The lines of `list_problems`, which asks first whether there is any."""
    kind = choose(kind, value)
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    origin = get_origin(inner)
    if origin in (dict, list) and inner is not kind and isinstance(value, origin) and not value:
        yield f"{where}: empty; at least one is expected"
    elif is_shape(inner) and isinstance(value, dict):
        yield from explain_object(value, inner, where)
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from list_problems(item, get_args(inner)[1], join(where, key))
    elif origin is list and isinstance(value, list):
        for number, item in enumerate(value):
            yield from list_problems(item, get_args(inner)[0], f"{where}[{number}]")
    else:
        yield f"{where}: expected {name_kind(kind)}, found {value!r:.80}".removeprefix(": ")


def is_shape(kind: Any) -> bool:
    """Whether a kind is one of the classes above."""
    return isinstance(kind, type) and issubclass(kind, Struct)


def explain_object(value: dict[str, Any], kind: type[Struct], where: str) -> Iterator[str]:
    """A line for each part that is missing, is not of its kind, or that nobody expects."""
    fields = list_fields(kind)
    names = {one.encode_name for one in fields}
    if kind.__struct_config__.forbid_unknown_fields:
        yield from (f"{join(where, key)}: not a known key" for key in value if key not in names)
    for one in fields:
        if one.encode_name in value:
            yield from list_problems(value[one.encode_name], one.type, join(where, one.encode_name))
        elif one.required:
            yield f"{join(where, one.encode_name)}: missing"


def choose(kind: Any, value: Any) -> Any:
    """What a value should be, of the alternatives that there are: nothing, and null, go without saying."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    options = [one for one in get_args(kind) if one is not UnsetType]
    inner = [one for one in options if one is not type(None)]
    return inner[0] if options == inner or isinstance(value, (dict, list)) else kind


def join(where: str, key: str) -> str:
    """`plan.components` and `transformer` as one place."""
    return f"{where}.{key}".lstrip(".")


NAMES: Mapping[Any, str] = {
    Number: "a number", Whole: "a count", Filled: "a count above 0", dict: "an object", list: "a list", str: "a text",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def name_kind(kind: Any) -> str:
    """A kind as text."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(name_kind(one) for one in get_args(kind) if one is not UnsetType)
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated and kind not in NAMES:
        kind = get_args(kind)[0]
    kind = dict if is_shape(kind) else kind
    return NAMES.get(kind) or NAMES[get_origin(kind)]


def schema() -> dict[str, Any]:
    """A JSON Schema of a record, a file of benchmarks or the card of a packet; each in `$defs`, too."""
    roots = (*KINDS, *CHECKS.values())
    _, found = msgspec.json.schema_components(roots, ref_template="#/$defs/{name}")
    found["Cell"]["additionalProperties"] = {"type": "string"}  # columns of other times
    checks = found["Record"]["properties"]["checks"]
    checks["properties"] = {
        name: {"allOf": [{"$ref": "#/$defs/Check"}, {"properties": {"metrics": allow(kind)}}]}
        for name, kind in CHECKS.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "quantmatrix: records, benchmarks and packets",
        "anyOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in KINDS],
        "$defs": found,
    }


def allow(kind: type[Struct]) -> dict[str, Any]:
    """Metrics of a shape, or none: a check that failed early may tell nothing."""
    return {"anyOf": [{"$ref": f"#/$defs/{kind.__name__}"}, {"type": "object", "maxProperties": 0}]}
