"""A dry run by its numbers: which cells it is about, what it says of each, bytes at true size."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix import api, families, models
from quantmatrix.errors import UsageError
from quantmatrix.harness import dry_run, shards
from quantmatrix.measure import workbench
from quantmatrix.runtime import true_bytes
from quantmatrix.runtime.plan import types


def make_cell(name: str, checkpoint: str, claim: str = "expected") -> Any:
    return SimpleNamespace(
        id=name,
        checkpoint=checkpoint,
        claim=claim,
        hardware="h9",
        shell=lambda tables: f"run {name}",
    )


def test_the_first_cell_of_every_checkpoint_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        make_cell("1", "b"), make_cell("2", "a", "refused"), make_cell("3", "a"), make_cell("4", "b"),
        make_cell("5", "plain"), make_cell("6", "c", "zz"), make_cell("7", "d", "aa"),
    ]  # fmt: skip
    monkeypatch.setattr(shards, "runnable", lambda tables, rows: cells if rows == ["h9"] else [])
    checkpoints = {
        name: SimpleNamespace(algo="" if name == "plain" else "x")
        for name in ("d", "plain", "a", "c", "b")
    }
    tables: Any = SimpleNamespace(hardware={"h9": 1, "h8": 2}, checkpoints=checkpoints)
    assert [cell.id for cell in dry_run.choose_cells(tables, "h9")] == ["7", "3", "6", "1"]
    words = "--hardware h7: not a row of hardware.csv; known: h9, h8"
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        dry_run.choose_cells(tables, "h7")


@dataclass
class Planned:
    """As much of a plan as a dry run reads."""

    ok: bool = True
    rule: str = "r1"
    message: str = "no"
    components: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ("w",)


def make_part(size: int, *kernels: tuple[str, str]) -> Any:
    pieces = [SimpleNamespace(scheme=SimpleNamespace(op=op), backend=b) for op, b in kernels]
    return SimpleNamespace(bytes=size, pieces=lambda: pieces)


@pytest.mark.parametrize("why", ["", "does not fit"])
def test_what_is_said_of_a_cell(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Planned(components={
        "t": make_part(5, ("fp8", "torch"), ("fp8", "decode"), ("fp8", "torch")), "u": make_part(7),
    })  # fmt: skip
    asked = []

    class Bench:
        def __init__(self, tables: Any, *, tiny: bool) -> None:
            asked.append(tiny)

        def planned_request(self, cell: Any) -> Any:
            return cell.id

    monkeypatch.setattr(workbench, "Workbench", Bench)
    monkeypatch.setattr(api, "plan", {"1": plan, "2": Planned(ok=False)}.__getitem__)
    monkeypatch.setattr(
        true_bytes, "measure_all", lambda _: {n: SimpleNamespace(whole=n) for n in (300, 21)}
    )
    monkeypatch.setattr(true_bytes, "explain_fit", lambda sizes, planned: why)
    monkeypatch.setattr(dry_run, "estimate_bytes", lambda tables, row: (row.reference, 99))
    tables: Any = SimpleNamespace(
        checkpoints={"a": SimpleNamespace(reference="o/r")},
        hardware={"h9": SimpleNamespace(devices=4)},
    )
    head = {"checkpoint": "o/r", "devices": 4}
    monkeypatch.setattr(types, "Plan", Planned)
    assert dry_run.describe(tables, make_cell("1", "a")) == {
        "cell": "1", "command": "run 1", "ok": True, **head,
        "kernels": {"t": {"fp8: torch": 2, "fp8: decode": 1}, "u": {}}, "tiny_bytes": 12,
        "true_bytes": ("o/r", 99), "memory_bytes": 321, "warnings": ["w", why] if why else ["w"],
    }  # fmt: skip
    monkeypatch.setattr(types, "Plan", int)
    assert dry_run.describe(tables, make_cell("2", "a")) == {
        "cell": "2", "command": "run 2", "ok": False, **head, "refusal": {"rule": "r1", "message": "no"}
    }  # fmt: skip
    assert asked == [True, True]


PARAMETERS = (
    ("blocks.0.a.weight", (3, 4), True), ("blocks.0.a.bias", (3,), True), ("blocks.1.k.weight", (3, 4), True),
    ("blocks.0.norm.weight", (7,), False), ("top.weight", (5, 4), True), ("blocks_2.a.weight", (3, 4), True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("components", "kept", "size"),
    [
        (("t",), "set", 1000 + 2 * (3 + 12 + 7 + 20 + 12)), (("t",), "", 2000 + 2 * (3 + 7 + 20 + 12)),
        ((), "", 2 * (12 + 3 + 12 + 7 + 20 + 12)), (("t",), "other", 2000 + 2 * (3 + 7 + 20 + 12)),
    ],
)  # fmt: skip
def test_bytes_at_true_size(
    components: tuple[str, ...], kept: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`u` is never quantized; what is kept, or lies outside the blocks, has two bytes for each number."""

    def spec(dtype: str, shape: tuple[int, ...], optional: bool = False) -> Any:
        return SimpleNamespace(dtypes=(dtype, "F64"), shapes=(shape, (9, 9)), optional=optional)

    specs = {
        "a": spec("U8", (20, 40)),
        "b": spec("F32", (50,)),
        "c": spec("F32", (7,), optional=True),
    }
    family = SimpleNamespace(
        SCHEMES={"s": "S"}, tensors=lambda scheme, *shape: specs if shape == (3, 4) else {}
    )
    model = SimpleNamespace(FALLBACKS={"set": (r"blocks\.\d\.k",)}, BLOCKS=("blocks",))
    monkeypatch.setattr(families, "load", lambda _: family)
    monkeypatch.setattr(models, "load", lambda _: model)
    monkeypatch.setattr(dry_run, "list_parameters", lambda _: PARAMETERS)
    tables: Any = SimpleNamespace(models={"m": SimpleNamespace(transformers=("t", "u"))})
    row: Any = SimpleNamespace(
        id="row", family="f", model="m", scheme="s", kept=kept, components=components
    )
    plain = 2 * (12 + 3 + 12 + 7 + 20 + 12)
    assert dry_run.estimate_bytes(tables, row) == size + plain
    row.scheme = "z"
    with pytest.raises(UsageError, match=r"^row: scheme z is not one of its family's$"):
        dry_run.estimate_bytes(tables, row)
