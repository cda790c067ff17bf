"""A plan that says yes can be loaded: headers are changed by chance, tensors are made to fit them.

Every checkpoint of the tables is planned from headers in which tensors were dropped, renamed,
reshaped, cast, doubled, moved or prefixed. What the plan takes must load, and decode, from tensors
of exactly those dtypes and shapes whose numbers are harmless, so that a failure can only have a
reason that a header shows. What it refuses, it refuses as text.

Tensors of a GGUF file are changed as they are planned, after its header was read: bytes of that
container are damaged in `tests/unit/checkpoints/test_gguf.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.checkpoints.dtypes import ITEM_BITS
from quantmatrix.checkpoints.gguf import TYPES as GGUF_TYPES
from quantmatrix.checkpoints.header import Header, TensorHeader
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.checkpoints.name_prefixes import PREFIXES
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.request import Request
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.plan import other_parts
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.scheme import BLOCKS
from quantmatrix.tables import read as tables_read
from quantmatrix.tables import rows
from quantmatrix.tables.rows import Cell
from quantmatrix.tiny.hub import use_tiny
from quantmatrix.tools.dequantize import list_tensors

CHANGES_PER_CHECKPOINT = 16
"""About two thousand headers in all; most of the time is theirs."""
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
LEAVES = (
    *("weight", "bias", "scale", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("input_scale", "pre_quant_scale", "comfy_quant", "svdquant_lora_a", "qweight", "wscales"),
    *("wzeros", "wcscales", "wtscale", "smooth_factor", "smooth", "proj_down", "lora_up"),
    *("deq_scale", "quant_bias", "input_offset", "weight_offset", "mul_scale", "linear.bias"),
    *("linear.weight", "div.mul_scale", "weight_quantizer._amax", "lora_A.weight", "modulation"),
)
Tensors = dict[str, TensorHeader]


@cache
def list_cells() -> dict[str, tuple[Cell, rows.Matrix]]:
    """The first cell of each checkpoint that a CPU takes."""
    tables = tables_read.read()
    found: dict[str, tuple[Cell, rows.Matrix]] = {}
    for cell in tables.cells:
        if cell.hardware == "cpu" and cell.claim not in ("refused", "planned"):
            found.setdefault(cell.checkpoint, (cell, tables))
    return found


def read_request(checkpoint: str) -> Request:
    """The request of a checkpoint without the witness, who reads numbers; a layout is chosen."""
    cell, tables = list_cells()[checkpoint]
    words = [*cell.command(tables)[2:], "--tiny"]
    request = replace(use_tiny(Request.from_words(words, device="cpu")), witness="off")
    if decide(request) is None:
        return replace(request, nvfp4_layout="tiles", nibble_order="high")
    return request


# Changes: each takes the tensors of a checkpoint by name and changes some of them.


def list_dtypes(tensors: Tensors) -> list[str]:
    """Dtypes that a container can have: those of GGUF where tensors are blocks, or of safetensors."""
    blocks = any(header.dtype in BLOCKS for header in tensors.values())
    return sorted(GGUF_TYPES.values() if blocks else ITEM_BITS)


def pick(chance: random.Random, tensors: Tensors) -> str:
    return chance.choice(sorted(tensors))


def drop(chance: random.Random, tensors: Tensors) -> None:
    for _ in range(chance.choice((1, 1, 2, 5))):
        if tensors:
            del tensors[pick(chance, tensors)]


def drop_alike(chance: random.Random, tensors: Tensors) -> None:
    """All tensors of one leaf, of one block, or everything outside the blocks."""
    name = pick(chance, tensors)
    leaf, top = name.rpartition(".")[2], name.partition(".")[0]
    kinds: list[Callable[[str], bool]] = [
        lambda n: n.endswith(f".{leaf}"),
        lambda n: n.startswith(f"{top}."),
        lambda n: not n.startswith(f"{top}."),
        lambda n: n.rpartition(".")[0] == name.rpartition(".")[0],
    ]
    gone = chance.choice(kinds)
    for other in [n for n in tensors if gone(n)]:
        del tensors[other]


def rename_one(chance: random.Random, name: str, tensors: Tensors) -> str:
    layer, _, leaf = name.rpartition(".")
    levels = name.split(".")
    return chance.choice(
        (
            f"{layer}.{chance.choice(LEAVES)}",
            f"{pick(chance, tensors).rpartition('.')[0]}.{leaf}",
            ".".join("7" if level.isdigit() else level for level in levels),
            f"{layer}.{chance.choice(('linear', 'div', 'extra', '0'))}.{leaf}",
            ".".join(levels[1:]) or "stray",
            f"stray.{name}",
            chance.choice(LEAVES),
            "",
        )
    )


def rename(chance: random.Random, tensors: Tensors) -> None:
    for _ in range(chance.choice((1, 1, 2))):
        name = pick(chance, tensors)
        header = tensors.pop(name)
        tensors[rename_one(chance, name, {**tensors, name: header})] = header


def swap(chance: random.Random, tensors: Tensors) -> None:
    one, two = pick(chance, tensors), pick(chance, tensors)
    tensors[one], tensors[two] = tensors[two], tensors[one]


def double(chance: random.Random, tensors: Tensors) -> None:
    name = pick(chance, tensors)
    tensors.setdefault(rename_one(chance, name, tensors), tensors[name])


def translate(chance: random.Random, tensors: Tensors) -> None:
    """A name of another layout beside, or instead of, the one that is there."""
    rules = [
        rule
        for model in models.IDS
        for dialect in models.load(model).DIALECTS
        for rule in (*dialect.layers, *dialect.tensors)
    ]
    rule = chance.choice(rules)
    module = chance.choice(rule.targets).module.replace("{i}", "0")
    hits = [n for n in tensors if n == module or n.startswith(f"{module}.")]
    keep = chance.random() < 0.5
    for name in hits:
        other = rule.source.replace("{i}", "0") + name.removeprefix(module)
        tensors[other] = tensors[name] if keep else tensors.pop(name)


def reshape(chance: random.Random, tensors: Tensors) -> None:
    name = pick(chance, tensors)
    shape = list(tensors[name].shape)
    spot = chance.randrange(len(shape)) if shape else 0
    forms: list[Callable[[list[int]], list[int]]] = [
        lambda s: s[::-1],
        lambda s: [*s, 1],
        lambda s: [1, *s],
        lambda s: s[1:],
        lambda s: s[:-1],
        lambda s: [],
        lambda s: [n * 2 if i == spot else n for i, n in enumerate(s)],
        lambda s: [n // 2 if i == spot else n for i, n in enumerate(s)],
        lambda s: [n + 1 if i == spot else n for i, n in enumerate(s)],
        lambda s: [0 if i == spot else n for i, n in enumerate(s)],
        lambda s: [1 if i == spot else n for i, n in enumerate(s)],
    ]
    tensors[name] = replace(tensors[name], shape=tuple(chance.choice(forms)(shape)))


def resize(chance: random.Random, tensors: Tensors) -> None:
    """Everything of one number is of another: a model of another size."""
    numbers = sorted({n for header in tensors.values() for n in header.shape if n > 1}) or [2]
    old = chance.choice(numbers)
    new = chance.choice((old * 2, old + 64, old // 2, old + 1))
    for name, header in tensors.items():
        shape = tuple(new if n == old else n for n in header.shape)
        tensors[name] = replace(header, shape=shape)


def cast(chance: random.Random, tensors: Tensors) -> None:
    name = pick(chance, tensors)
    leaf, dtype = name.rpartition(".")[2], chance.choice(list_dtypes(tensors))
    alike = chance.random() < 0.3
    for other in [n for n in tensors if n.endswith(f".{leaf}")] if alike else [name]:
        tensors[other] = replace(tensors[other], dtype=dtype)


def prefix(chance: random.Random, tensors: Tensors) -> None:
    """A prefix before all names, or before all but a few."""
    words = chance.choices((*PREFIXES, "foreign.", "net.model."), k=chance.choice((1, 1, 2)))
    left = set(chance.sample(sorted(tensors), min(len(tensors), chance.choice((0, 0, 0, 1, 3)))))
    for name in list(tensors):
        if name not in left:
            tensors["".join(words) + name] = tensors.pop(name)


def add(chance: random.Random, tensors: Tensors) -> None:
    """A tensor that a writer may put beside a layer, or another part of a whole checkpoint."""
    layer = pick(chance, tensors).rpartition(".")[0]
    name = chance.choice(
        (f"{layer}.{chance.choice(LEAVES)}", "vae.decoder.conv_in.weight", "scaled_fp8")
    )
    shape = chance.choice(((), (1,), (256,), (256, 256), (256, 1), (4, 256)))
    file = tensors[pick(chance, tensors)].file
    header = TensorHeader(name, chance.choice(list_dtypes(tensors)), shape, file)
    tensors.setdefault(name, header)


def move(chance: random.Random, tensors: Tensors) -> None:
    """A tensor lies in another shard than its index says."""
    name = pick(chance, tensors)
    files = sorted({header.file for header in tensors.values()})
    tensors[name] = replace(tensors[name], file=chance.choice(files))


CHANGES = (
    *(drop, drop_alike, rename, rename, swap, double, double, translate, reshape, reshape),
    *(resize, cast, cast, prefix, add, add, move),
)


# The files and numbers of a changed checkpoint.


def fill(header: TensorHeader, name: str) -> torch.Tensor:
    """Harmless numbers of a header's dtype and shape: ones, and zeros where one is an offset.

    Blocks are zeros, in the bytes and the shape that a reader gives them.
    """
    if header.dtype in BLOCKS:
        columns, size = BLOCKS[header.dtype]
        if header.shape[-1] % columns:
            return torch.zeros(header.nbytes, dtype=torch.uint8)
        row = header.shape[-1] // columns * size
        return torch.zeros(*header.shape[:-1], row, dtype=torch.uint8)
    if header.dtype not in DTYPES:
        raise CheckpointError(f"{name}: torch has no {header.dtype}")
    dtype = DTYPES[header.dtype]
    zero = name.endswith(("bias", "offset")) or not dtype.is_floating_point
    if name.endswith("deq_scale") and dtype == torch.int64:
        return torch.ones(header.shape).view(torch.int32).long()
    if name.endswith("weight_scale") and dtype == torch.uint8:
        return torch.full(header.shape, 127, dtype=dtype)
    return torch.full(header.shape, 0 if zero else 1, dtype=torch.float32).to(dtype)


def check_blocks(tensors: Tensors) -> None:
    """What reading a GGUF header guarantees of every tensor: as many numbers as whole blocks have."""
    for name, header in tensors.items():
        columns = BLOCKS.get(header.dtype, (1, 0))[0]
        if math.prod(header.shape) % columns:
            raise CheckpointError(f"{name}: {list(header.shape)} is no whole blocks of {columns}")


class Files:
    """Stands for the weight files of the components that have overrides, or of all.

    What is on disk stays as it is, so each header and each other part is read once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.headers: dict[str, Header] = {}
        self.real_contents, read_real, look_at_others = (
            LocalFolder.contents, LocalFolder.header, other_parts.explain_part
        )  # fmt: skip
        files = self

        @cache
        def real_header(folder: LocalFolder, name: str) -> Header:
            return read_real(folder, name)

        @cache
        def explain_part(*about: Any, **options: Any) -> str | None:
            return look_at_others(*about, **options)

        self.real_header = real_header

        def header(folder: LocalFolder, name: str) -> Header:
            changed = files.headers.get(str(folder.root / name))
            check_blocks(changed[0] if changed else {})
            return changed or files.real_header(folder, name)

        def contents(folder: LocalFolder, name: str, tensors: list[str]) -> dict[str, bytes]:
            real = files.real_header(folder, name)[0]
            known = [n for n in tensors if n in real]
            found = dict.fromkeys(tensors, b"")
            return found | (files.real_contents(folder, name, known) if known else {})

        def read(reader: TensorReader, name: str) -> torch.Tensor:
            return fill(reader._checkpoint.tensors[name], name)

        monkeypatch.setattr(other_parts, "explain_part", explain_part)
        monkeypatch.setattr(LocalFolder, "header", header)
        monkeypatch.setattr(LocalFolder, "contents", contents)
        monkeypatch.setattr(TensorReader, "read", read)

    def change(self, planned: Plan, seed: str) -> list[str]:
        """Change the headers of the plan's first component; the names of what was done."""
        chance = random.Random(seed)
        checkpoint = next(iter(planned.components.values())).checkpoint
        originals = {
            file: self.real_header(LocalFolder(Path(file).parent), Path(file).name)
            for file in checkpoint.files
        }
        tensors = {name: h for found, _ in originals.values() for name, h in found.items()}
        done = chance.choices(CHANGES, k=chance.choice((1, 1, 1, 2, 3)))
        for change in done:
            if tensors:
                change(chance, tensors)
        for file, (_, strings) in originals.items():
            own = {n: replace(h, name=n) for n, h in tensors.items() if h.file == file}
            self.headers[file] = (own, strings)
        return [change.__name__ for change in done]


def decide(request: Request) -> Plan | None:
    """The plan, or None where it refuses as text."""
    try:
        planned = plan(request)
    except (CheckpointError, UsageError, RefusedError):
        return None
    return planned if isinstance(planned, Plan) else None


@pytest.mark.parametrize("checkpoint", list_cells())
def test_what_a_plan_takes_can_be_loaded(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = read_request(checkpoint)
    whole = plan(request)
    assert isinstance(whole, Plan)
    files = Files(monkeypatch)
    taken = refused = 0
    for number in range(CHANGES_PER_CHECKPOINT):
        seed = f"{checkpoint} {number}"
        done = files.change(whole, seed)
        try:
            planned = decide(request)
        except Exception as error:
            raise AssertionError(f"{seed}: {done}: no words from the plan") from error
        if planned is None:
            refused += 1
            continue
        taken += 1
        part = next(iter(planned.components.values()))
        try:
            load_component(part, request)
            with TensorReader(part.checkpoint, "cpu") as reader:
                shapes = {n: (make(reader).shape, shape) for n, make, shape in list_tensors(part)}
        except Exception as error:
            raise AssertionError(f"{seed}: {done}: planned, and not loaded") from error
        assert [n for n, (got, expected) in shapes.items() if got != expected] == []
    assert refused > 0


def test_changes_are_many_and_some_are_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property is about two thousand headers, and not empty: plans take some of them."""
    assert len(list_cells()) * CHANGES_PER_CHECKPOINT >= 2000
    request = read_request("fp8-flux-1-tensor-dynamic")
    files = Files(monkeypatch)
    whole = plan(request)
    assert isinstance(whole, Plan)
    verdicts = [(files.change(whole, str(n)), decide(request)) for n in range(60)]
    assert any(made for _, made in verdicts)
