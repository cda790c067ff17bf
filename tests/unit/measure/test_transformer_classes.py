"""Every transformer class of diffusers, small: quantized, loaded, counted, compared and run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import quantmatrix
from quantmatrix.errors import CheckpointError
from quantmatrix.measure.classes import prove
from quantmatrix.measure.classes.inputs import UNKNOWN
from quantmatrix.measure.classes.options import list_classes
from quantmatrix.proof.transformer_classes import FILE, LIMITS, ClassLine, read_lines, write_lines
from quantmatrix.report.transformer_classes import summarize, write_classes

REPORTS = Path(quantmatrix.__file__).parents[2] / "reports"
CLASSES = list(dict.fromkeys(line.class_name for line in read_lines(REPORTS / FILE)))
"""Classes that the table has, which are all that there are; to list those imports every one of them."""
RUN = [name for name in CLASSES if name not in UNKNOWN]
FORMS = [form for form in prove.FORMS if form[0] in ("fp8", "modelopt-nvfp4")]
"""What is run here; the table has the other two forms, too."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, ClassLine]]:
    """The lines of the table, by class and family."""
    found: dict[str, dict[str, ClassLine]] = defaultdict(dict)
    for line in read_lines(REPORTS / FILE):
        found[line.class_name][line.family] = line
    return found


@pytest.mark.parametrize("name", RUN)
def test_a_class_is_quantized_loaded_and_run(
    name: str, recorded: dict[str, dict[str, ClassLine]]
) -> None:
    for line in prove.prove_class(name, FORMS):
        assert line.quantized > 0
        assert 0 < line.error < LIMITS[line.family], line
        assert line.witness == "agrees"
        known = recorded[name][line.family]
        assert (line.linear, line.quantized) == (known.linear, known.quantized)
        assert line.error == pytest.approx(known.error, rel=0.3, abs=0.01)


def test_the_table_has_every_class_of_diffusers(
    recorded: dict[str, dict[str, ClassLine]],
) -> None:
    assert {line.diffusers for own in recorded.values() for line in own.values()} == {
        diffusers.__version__
    }
    assert list(recorded) == CLASSES == list_classes()
    shown = [name for name, own in recorded.items() if "" not in own]
    assert len(shown) >= 58
    assert {name for name in CLASSES if name not in shown} == set(UNKNOWN)
    for name in shown:
        assert list(recorded[name]) == list(LIMITS)


def test_the_page_names_every_class(recorded: dict[str, dict[str, ClassLine]]) -> None:
    lines = [line for own in recorded.values() for line in own.values()]
    page = write_classes(lines)
    for name in CLASSES:
        assert f"| `{name}` |" in page
    assert summarize(lines).startswith(f"{len(RUN)} of the {len(CLASSES)} transformer classes")
    assert summarize([]) == ""
    doubtful = replace(lines[0], witness="differs")
    assert "(witness differs)" in write_classes([doubtful])


def test_the_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    lines = (
        ClassLine("A", "1", "fp8", "tensor", 3, 2, 0.125, "agrees"),
        ClassLine("B", "1", reason="a, b"),
    )
    (tmp_path / FILE).write_text(write_lines(lines))
    assert read_lines(tmp_path / FILE) == lines
    assert read_lines(tmp_path / "none.csv") == ()
    (tmp_path / FILE).write_text("class,error\nA,1\n")
    with pytest.raises(CheckpointError, match=r"measure\.classes"):
        read_lines(tmp_path / FILE)


@pytest.fixture(scope="module")
def small() -> Iterator[prove.Small]:
    with prove.open_small("AuraFlowTransformer2DModel") as found:
        yield found


def test_a_small_model_is_ready_to_run(small: prove.Small) -> None:
    assert not small.model.training
    assert not any(parameter.requires_grad for parameter in small.model.parameters())
    assert {parameter.dtype for parameter in small.model.parameters()} == {torch.bfloat16}


def test_every_linear_layer_of_the_blocks_is_quantized(small: prove.Small) -> None:
    blocks = ("joint_transformer_blocks.", "single_transformer_blocks.")
    linear = [n for n, m in small.model.named_modules() if isinstance(m, nn.Linear)]
    line = prove.prove(small, "fp8", "tensor-dynamic")
    assert line.quantized == sum(name.startswith(blocks) for name in linear)
    assert line.linear == len(linear)


def test_a_broken_layer_exceeds_the_limit(
    small: prove.Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of one layer that are those of another: the witness refuses them, and so does the limit."""
    from quantmatrix.runtime import load

    genuine = load.load_component

    def exchanged(*args: object, **kwargs: object) -> nn.Module:
        model = genuine(*args, **kwargs)  # type: ignore[arg-type]
        for name, module in model.named_modules():
            if name.endswith("attn.to_v"):
                module.q_weight = module.q_weight.roll(1, dims=0)  # type: ignore[union-attr,operator]
        return model

    monkeypatch.setattr(prove, "load_component", exchanged)
    line = prove.prove(small, "fp8", "tensor-dynamic")
    assert line.error > LIMITS["fp8"]
