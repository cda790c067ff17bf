"""Plans: numbers, limits and words that plain functions give, each edge from both sides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refusal
from weight_files import write_json, write_weights

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.families.layouts import Layout
from quantmatrix.hardware.machine import Machine
from quantmatrix.models.dialect import Target
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan import (
    adapters,
    config_limits,
    context_parallel,
    decide,
    experts,
    kernel_choice,
    layout_choice,
    layouts,
    other_parts,
    part_files,
    placement,
    schemes,
    taken_for,
)
from quantmatrix.runtime.plan.types import ComponentPlan, Piece, Plan, Refusal, require
from quantmatrix.runtime.witness.base import Base
from quantmatrix.scheme import Scheme

FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")
GIB = 2**30


def make(stored: Mapping[str, tuple[str, tuple[int, ...]]], **more: Any) -> Checkpoint:
    tensors = {n: TensorHeader(n, dtype, shape, "f.st") for n, (dtype, shape) in stored.items()}
    return Checkpoint("here", more.pop("files", ("f.st",)), tensors, **more)


# --- limits of a config ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "most", "why"),
    [
        ("num_layers", 64, "a layer has tensors of its own"),
        ("n_blocks", 64, "a layer has tensors of its own"),
        ("depth", 64, "a layer has tensors of its own"),
        ("attention_head_dim", 1024, "no model has wider heads"),
        ("axes_dims_rope", 1024, "no model has wider heads"),
        ("rope_max_len", 131072, "no model has more positions"),
        ("num_frames", 131072, "no model has more positions"),
        ("ffn_dim", 5000, "the weights have no wider tensor"),
        ("in_channels", 5000, "the weights have no wider tensor"),
        ("anything", 2**24, "no model has more"),
    ],
)
def test_numbers_of_a_config(key: str, most: int, why: str) -> None:
    checkpoint = make({"a": ("F32", (3, 5000)), "b": ("F32", ())})
    for value in (most, -most, float(most)):
        config_limits.check_config({key: value}, "c.json", checkpoint)
    for value in (most + 1, -most - 1):
        assert refusal(
            CheckpointError, config_limits.check_config, {key: value}, "c.json", checkpoint
        ) == (
            f"c.json: {key} is {value}, expected at most {most} ({why}): the file is damaged, or not of "
            "these weights; compare it with the base model's config.json"
        )


@pytest.mark.parametrize(
    ("tensors", "most"), [(0, 64), (63, 64), (65, 65), (1023, 1023), (1025, 1024), (3000, 1024)]
)
def test_layers_of_a_config(tensors: int, most: int) -> None:
    checkpoint = make({f"t{n}": ("F32", (2,)) for n in range(tensors)})
    config_limits.check_config({"num_layers": most}, "c.json", checkpoint)
    text = refusal(
        CheckpointError, config_limits.check_config, {"num_layers": most + 1}, "c.json", checkpoint
    )
    assert f"expected at most {most} (" in text


@pytest.mark.parametrize(("width", "most"), [(1, 4096), (4096, 4096), (4097, 4097), (9000, 9000)])
def test_widths_of_a_config(width: int, most: int) -> None:
    checkpoint = make({"a": ("F32", (2, width)), "b": ("F32", (1,))})
    config_limits.check_config({"dim": most}, "c.json", checkpoint)
    text = refusal(CheckpointError, config_limits.check_config, {"dim": most + 1}, "c", checkpoint)
    assert f"expected at most {most} (" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"max_len": 2**14, "head_dim": 1024}, ""),
        ({"max_len": 2**14 + 1, "head_dim": 1024}, "16385 positions for heads of 1024"),
        ({"lens": [5, 2**17, 3], "head_dim": [2, 128, 4]}, ""),
        ({"lens": [5, 2**17, 3], "head_dim": [2, 129, 4]}, "131072 positions for heads of 129"),
        ({"max_len": 2**17}, ""),
    ],
)
def test_tables_of_positions(config: Any, said: str) -> None:
    if not said:
        config_limits.check_config(config, "c.json", make({}))
        return
    assert refusal(CheckpointError, config_limits.check_config, config, "c.json", make({})) == (
        f"c.json: a table of {said} would have more than 16777216 numbers: the file is damaged; compare "
        "it with the base model's config.json"
    )


def test_numbers_are_found_at_any_depth() -> None:
    config = {
        "a": 3, "b": [4, {"x": 5.9, "y": True}], "c": "6", "d": None,
        "quantization_config": {"e": 7}, "compression_config": 8, "f": False, "g": -2.5,
    }  # fmt: skip
    assert sorted(config_limits.list_numbers(config)) == [("a", 3), ("b", 4), ("b", 5), ("g", -2)]


# --- several devices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "processes", "found"),
    [(24, 2, [12, 12]), (24, 5, [5, 5, 5, 5, 4]), (7, 3, [3, 3, 1]), (4, 3, [2, 2, 0]),
     (3, 5, [1, 1, 1, 1, -1]), (7, 1, [7]), (0, 2, [0, 0])],
)  # fmt: skip
def test_heads_of_each_process(heads: int, processes: int, found: list[int]) -> None:
    assert context_parallel.split_heads(heads, processes) == found


@pytest.mark.parametrize(
    ("heads", "processes", "ulysses", "ring", "text"),
    [
        (24, 2, 2, 1, "Ulysses"), (24, 5, 5, 1, "Ulysses"), (2, 2, 2, 1, "Ulysses"), (24, 7, 1, 7, "ring"),
        (24, 16, 8, 2, "Ulysses 8 x ring 2"), (2, 4, 2, 2, "Ulysses 2 x ring 2"), (9, 8, 2, 4, "Ulysses 2 x ring 4"),
        (40, 12, 6, 2, "Ulysses 6 x ring 2"), (3, 12, 3, 4, "Ulysses 3 x ring 4"), (1, 4, 1, 4, "ring"),
        (0, 2, 1, 2, "ring"), (7, 1, 1, 1, "Ulysses"), (0, 1, 1, 1, "Ulysses"),
    ],
)  # fmt: skip
def test_degrees_of_ulysses_and_ring(
    heads: int, processes: int, ulysses: int, ring: int, text: str
) -> None:
    assert context_parallel.choose_degrees(heads, processes) == (ulysses, ring)
    assert context_parallel.name_degrees(ulysses, ring) == text


def test_uneven_heads_in_words() -> None:
    assert list(context_parallel.say_uneven({"transformer": 7, "transformer_2": 9}, 3)) == [
        "transformer: its 7 attention heads are shared as 3, 3, 1: a step takes as long as the 3 of the "
        "first process"
    ]
    assert list(context_parallel.say_uneven({"a": 40, "b": 24, "c": 2}, 12)) == [
        "a: its 40 attention heads leave none for the last of 12 processes, so keys and values of all tokens "
        "are gathered (Ulysses 6 x ring 2), which sends more than --nproc-per-node 10, which exchanges heads "
        "alone",
        "a: its 40 attention heads are shared as 7, 7, 7, 7, 7, 5: a step takes as long as the 7 of the first "
        "process",
        "c: its 2 attention heads leave none for the last of 12 processes, so keys and values of all tokens "
        "are gathered (Ulysses 2 x ring 6), which sends more than --nproc-per-node 2, which exchanges heads "
        "alone",
    ]


@pytest.mark.parametrize(
    ("heads", "count", "fits"),
    [(4, 3, 2), (7, 6, 4), (1, 4, 0), (3, 2, 0), (30, 25, 15), (2, 3, 2)],
)
def test_fewer_processes_that_have_heads(heads: int, count: int, fits: int) -> None:
    text = f" than --nproc-per-node {fits}, which exchanges heads alone" if fits else ""
    assert context_parallel.advise_count(heads, count) == text


def machine(device: str = "cuda", count: int = 4, memory: float = 8) -> Machine:
    return Machine("box", "nvidia", "sm90", int(memory * GIB), frozenset(), device, count)


@pytest.mark.parametrize(
    ("device", "count", "text"),
    [
        ("cuda", 4, ""), ("cuda", 5, "FLAG: box has 4 cuda devices"), ("cuda", 0, "FLAG: expected 1 or more"),
        ("cuda", 1, ""), ("cuda:1", 2, "FLAG takes the first devices: give --device cuda without a number"),
        ("cpu", 9, ""), ("npu", 5, "FLAG: box has 4 npu devices"), ("a", 5, "FLAG: box has 4 a devices"),
    ],
)  # fmt: skip
def test_devices_for_processes(device: str, count: int, text: str) -> None:
    planned: Any = SimpleNamespace(machine=machine(device))
    if text:
        assert refusal(UsageError, context_parallel.check_devices, planned, count, "FLAG") == text
    else:
        context_parallel.check_devices(planned, count, "FLAG")


@pytest.mark.parametrize(("count", "compiled"), [(1, False), (2, True), (2, False), (3, False)])
def test_shards_of_weights(count: int, compiled: bool) -> None:
    planned: Any = SimpleNamespace(request=SimpleNamespace(compile=compiled))
    texts = {
        (1, False): "--shard-weights needs several devices: give --nproc-per-node 2 or more",
        (
            2,
            True,
        ): "--shard-weights gathers each block's weights before it runs, which compiled blocks "
        "cannot wait for: leave out --compile (--cuda-graph goes with it)",
    }
    if (count, compiled) in texts:
        found = refusal(UsageError, context_parallel.check_sharding, planned, count)
        assert found == texts[count, compiled]
    else:
        context_parallel.check_sharding(planned, count)


@pytest.mark.parametrize(
    ("config", "count", "said"),
    [
        ({"num_attention_heads": 4}, 3, ["its 4 attention heads leave none"]),
        ({"num_attention_heads": 9}, 8, ["its 9 attention heads leave none", "shared as 5, 4"]),
        ({}, 2, ["its 0 attention heads leave none"]),
        ({"num_attention_heads": 4}, 2, []),
        ({"num_attention_heads": 7}, 3, ["its 7 attention heads are shared as 3, 3, 1"]),
    ],
)
def test_heads_that_do_not_divide_are_said(
    config: dict[str, int], count: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = SimpleNamespace(config=config, class_name="FluxTransformer2DModel")
    given: Any = SimpleNamespace(
        request=SimpleNamespace(nproc_per_node=count, shard_weights=False, tiny=False),
        machine=machine("cpu"), layerwise_offload=False, cpu_offload=False, model="flux-1",
        components={"transformer": part}, warnings=("before",),
    )  # fmt: skip
    monkeypatch.setattr(context_parallel, "replace", lambda plan, **changes: changes)
    found: Any = context_parallel.share(given)
    assert (found["processes"], found["warnings"][0]) == (count, "before")
    assert len(found["warnings"]) == 1 + len(said)
    for text, warning in zip(said, found["warnings"][1:], strict=True):
        assert text in warning


# --- offloading and memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layerwise", "whole", "family", "found", "warned"),
    [
        (False, False, "fp8", (False, False), ""), (None, None, None, (False, False), ""),
        (True, False, "fp8", (True, False), ""), (False, True, "fp8", (False, True), ""),
        (False, True, None, (False, True), ""),
        (True, True, "fp8", (True, False), "--dit-layerwise-offload wins over --dit-cpu-offload"),
        (False, True, "modelopt-fp8", (False, False),
         "--dit-cpu-offload stays disabled for modelopt-fp8 checkpoints; --dit-layerwise-offload is "
         "supported"),
        (True, True, "modelopt-fp8", (True, False),
         "--dit-cpu-offload stays disabled for modelopt-fp8 checkpoints; --dit-layerwise-offload is "
         "supported"),
        (True, False, "modelopt-fp8", (True, False), ""),
    ],
)  # fmt: skip
def test_offloads(layerwise: Any, whole: Any, family: str | None, found: Any, warned: str) -> None:
    warnings: list[str] = []
    request: Any = SimpleNamespace(dit_layerwise_offload=layerwise, dit_cpu_offload=whole)
    assert decide.decide_offload(request, family, warnings) == found
    assert warnings == ([warned] if warned else [])


@pytest.mark.parametrize(
    ("memory", "count", "processes", "shard", "text"),
    [
        (0, 1, 1, False, ""),
        (12, 1, 1, False, ""),
        (11.99, 1, 1, False,
         "the transformer weights need 12.0 GiB, box has 12.0 GiB: try --dit-layerwise-offload"),
        (3.26, 1, 1, False,
         "the transformer weights need 12.0 GiB, box has 3.3 GiB: try --dit-layerwise-offload"),
        (3.26, 3, 1, False,
         "the transformer weights need 12.0 GiB, box has 3.3 GiB: try --dit-layerwise-offload, or "
         "--nproc-per-node 3 --shard-weights"),
        (3.26, 3, 3, True,
         "1/3 of the transformer weights needs 4.0 GiB, box has 3.3 GiB: try --dit-layerwise-offload"),
        (4, 3, 3, True, ""),
        (4, 3, 3, False,
         "the transformer weights need 12.0 GiB, box has 4.0 GiB: try --dit-layerwise-offload, or "
         "--nproc-per-node 3 --shard-weights"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(
    memory: float, count: int, processes: int, shard: bool, text: str
) -> None:
    parts: Any = {"a": SimpleNamespace(bytes=5 * GIB), "b": SimpleNamespace(bytes=7 * GIB)}
    request: Any = SimpleNamespace(nproc_per_node=processes, shard_weights=shard)
    warnings: list[str] = []
    decide.check_memory(parts, request, machine(count=count, memory=memory), warnings)
    assert warnings == ([text] if text else [])


# --- rows of an input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words", "rows"),
    [
        ("flux-1", {"height": 160, "width": 112}, 10 * 7 + 512),
        ("flux-1", {"height": 175, "width": 127}, 10 * 7 + 512),
        ("flux-1", {"height": 176, "width": 128}, 11 * 8 + 512),
        ("wan-2-2", {"height": 160, "width": 112, "num_frames": 1}, 70 + 512),
        ("wan-2-2", {"height": 160, "width": 112, "num_frames": 4}, 70 + 512),
        ("wan-2-2", {"height": 160, "width": 112, "num_frames": 5}, 2 * 70 + 512),
        ("wan-2-2", {"height": 160, "width": 112, "num_frames": 17}, 5 * 70 + 512),
    ],
)
def test_rows_of_the_largest_input(model: str, words: Any, rows: int) -> None:
    assert kernel_choice.count_rows(model, Request(model_path="m", **words)) == rows


@pytest.mark.parametrize(
    ("op", "weight", "numerics", "found"),
    [
        ("linear.int8", "int4", "W8A8", "W4A4"), ("linear.int8", "int4", "W8A16", "W4A16"),
        ("linear.int8", "int4", "exact", "exact"), ("linear.int8", "int8", "W8A8", "W8A8"),
        ("linear.int9", "int4", "W8A8", "W8A8"), ("linear.fp8", "int4", "W8A8", "W8A8"),
    ],
)  # fmt: skip
def test_classes_of_arithmetic(op: str, weight: str, numerics: str, found: str) -> None:
    kernel: Any = SimpleNamespace(numerics=numerics)
    scheme = replace(FP8, op=op, weight=weight)
    assert kernel_choice.name_numerics(kernel, scheme) == found


# --- adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "count", "found"),
    [
        ([], 3, [9, 9, 9]), ([], 0, []), ([5], 1, [5]), ([5], 3, [5, 5, 5]), ([5, 6], 2, [5, 6]),
        ([5, 6], 3, None), ([5, 6, 7], 2, None), ([5], 0, None), ([5, 6], 1, None),
    ],
)  # fmt: skip
def test_a_value_for_each_adapter(values: list[int], count: int, found: list[int] | None) -> None:
    if found is not None:
        assert adapters.spread(values, count, "--flag", 9) == found
        return
    assert refusal(UsageError, adapters.spread, values, count, "--flag", 9) == (
        f"--flag is given {len(values)} times, --lora-path {count}: expected as many, or one"
    )


def test_files_of_adapters(tmp_path: Path) -> None:
    lora = {"a.lora_A.weight": ("F32", (2, 3))}
    text = f"{tmp_path}: expected one .safetensors file of a LoRA, found "
    find = adapters.find_adapter
    assert refusal(CheckpointError, find, str(tmp_path), None, Hub()) == (
        f"{text}none; name it with --lora-weight-name"
    )
    write_weights(tmp_path / "n1.safetensors", lora)
    assert find(str(tmp_path), None, Hub()).name == "n1.safetensors"
    for number in range(2, 10):
        write_weights(tmp_path / f"n{number}.safetensors", lora)
    listed = ", ".join(f"n{number}.safetensors" for number in range(1, 9))
    assert refusal(CheckpointError, find, str(tmp_path), None, Hub()) == (
        f"{text}{listed}; name it with --lora-weight-name"
    )
    assert refusal(CheckpointError, find, str(tmp_path), "x.safetensors", Hub()) == (
        f"{text}{listed}, and no x.safetensors"
    )
    (tmp_path / "x.bin").write_bytes(b"")
    assert refusal(CheckpointError, find, str(tmp_path), "x.bin", Hub()) == (
        f"{text}{listed}, and no x.bin"
    )
    plain = write_weights(tmp_path / "p.safetensors", {"w": ("F32", (2,))})
    assert refusal(CheckpointError, find, str(plain), None, Hub()) == (
        f"{plain}: no low-rank factors in it (lora_A, lora_down ...), the first tensor is w: expected a "
        "LoRA"
    )
    assert find(str(tmp_path), "n3.safetensors", Hub()).path == tmp_path / "n3.safetensors"


# --- experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "noise"),
    [
        ("high_noise/x.st", "high"), ("LowNoise.st", "low"), ("x-HIGH.st", "high"), ("slow_noise.st", None),
        ("high_noise/low-noise.st", "low"), ("low_high_noise.st", "high"), ("low_noise_high_noise.st", None),
        ("high_noise/a/b.st", "high"), ("high_noise/a/b/c.st", None), ("transformer_2/x.st", "low"),
        ("transformer/x.st", None), ("a\\high_noise\\x.st", "high"), ("Highest.st", None),
    ],
)  # fmt: skip
def test_noise_in_names(path: str, noise: str | None) -> None:
    assert experts.read_noise(path) == noise


@pytest.mark.parametrize(
    ("component", "file", "components", "other"),
    [
        ("transformer", "low_noise.st", ("transformer", "transformer_2"), "transformer_2"),
        ("transformer_2", "high_noise.st", ("transformer", "transformer_2"), "transformer"),
        ("transformer", "high_noise.st", ("transformer", "transformer_2"), ""),
        ("transformer", "x.st", ("transformer", "transformer_2"), ""),
        ("transformer", "low_noise.st", ("transformer",), ""),
        ("vae", "low_noise.st", ("transformer", "transformer_2"), ""),
    ],
)
def test_the_other_expert(component: str, file: str, components: Any, other: str) -> None:
    noise, own = ("low", "high") if component == "transformer" else ("high", "low")
    text = (
        f"{file}: by its name this is the {noise}_noise expert, and it is given to {component}, which "
        f"takes the steps of {own} noise. Nothing else tells the two apart: is it meant for {other} "
        f"(--{other.replace('_', '-')}-weights-path)?"
    )
    found = experts.warn_of_expert(component, ["a.st", file], components)
    assert found == (text if other else None)


# --- layouts ---------------------------------------------------------------------------------

NVFP4 = Scheme("linear.nvfp4", "NVFP4", "e2m1", "group", "group-dynamic", group_size=16)


def test_layouts_are_counted() -> None:
    raw = replace(NVFP4, swap_nibbles=True, tiled_scales=True)
    found = {"a": raw, "b": NVFP4, "c": raw, "d": FP8}
    known = Layout("low", "rows", "said")
    counted = {
        "even column in the high nibble, block scales in 128 x 4 tiles": 2,
        "even column in the low nibble, block scales in rows": 1,
    }
    assert layouts.describe_layouts(found, None) == counted
    assert layouts.describe_layouts(found, known) == counted
    for unknown in (Layout(None, "rows", "nothing"), Layout("low", None, "nothing")):
        assert layouts.describe_layouts(found, unknown) == {
            "unknown: nothing; the base model's weights, or flags, decide": 3
        }
    for op in ("linear.fp8", "linear.svdq", "linear.a", "linear.z"):
        assert layouts.describe_layout(replace(NVFP4, op=op)) == ""


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"nibble_order": "low"}, ""), ({"nvfp4_layout": "rows"}, ""),
        ({"nibble_order": "low", "nvfp4_layout": "rows"}, ""), ({"nibble_order": "high"}, "x"),
        ({"nvfp4_layout": "tiles"}, "x"), ({"nibble_order": "low", "nvfp4_layout": "tiles"}, "x"),
    ],
)  # fmt: skip
def test_flags_against_a_declaration(chosen: dict[str, str], said: str) -> None:
    declared = Layout("low", "rows", "the header")
    text = (
        "here: FLAGS is used, although the file declares even column in the low nibble, block scales in "
        "rows (the header)"
    )
    found = layout_choice.list_contradictions(make({}), declared, chosen, "FLAGS")
    assert found == ([text] if said else [])
    open_ = Layout(None, None, "nothing")
    assert layout_choice.list_contradictions(make({}), open_, chosen, "FLAGS") == []
    half = Layout("low", None, "half")
    [*more] = layout_choice.list_contradictions(make({}), half, chosen, "FLAGS")
    assert bool(more) is (chosen.get("nibble_order") == "high")


# --- what a checkpoint is taken for ----------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (FP8, "e4m3 codes, one scale, inputs by a stored scale"),
        (replace(FP8, scale="channel", activation="token-dynamic"),
         "e4m3 codes, a scale per channel, inputs by a scale per token"),
        (replace(FP8, scale="block", block=(128, 64), activation="none"),
         "e4m3 codes, a scale per block of 128 x 64, inputs left alone"),
        (replace(NVFP4, rank=32),
         "e2m1 codes, a scale per 16 columns, a branch of rank 32, inputs by a scale per group"),
        (replace(FP8, scale="channel", group_size=64, activation="group-power"),
         "e4m3 codes, a scale per channel, 64 columns rotated together, inputs by a power of two per "
         "group"),
        (replace(NVFP4, activation="group-dual"),
         "e2m1 codes, a scale per 16 columns, inputs by a power of two per group and a coarse scale"),
    ],
)  # fmt: skip
def test_codes_in_words(scheme: Scheme, text: str) -> None:
    assert taken_for.describe_codes(scheme) == text


@pytest.mark.parametrize(
    ("files", "config", "prefix", "text"),
    [
        (("a.safetensors",), None, "", "a safetensors file in the names of x, y"),
        (("a.GGUF",), {"_class_name": "A"}, "", "a GGUF file of a A in the names of x, y"),
        (("a.st", "b.st"), {"_class_name": ""}, "m.",
         "2 safetensors files in the names of x, y after the prefix m."),
        (("a.st", "b.st", "c.st"), {"_class_name": 3}, "", "3 safetensors files in the names of x, y"),
    ],
)  # fmt: skip
def test_files_in_words(files: Any, config: Any, prefix: str, text: str) -> None:
    checkpoint = make({}, files=files, config=config, prefix=prefix)
    assert taken_for.describe_files(checkpoint, ["x", "y"]) == text
    summary = taken_for.summarize(checkpoint, [FP8, NVFP4, FP8], ["x", "y"])
    assert summary == (
        "2 layers FP8: e4m3 codes, one scale, inputs by a stored scale; 1 layer NVFP4: e2m1 codes, a "
        f"scale per 16 columns, inputs by a scale per group; {text}"
    )


def test_other_parts_of_a_file_in_words() -> None:
    for prefix, own in (("m.", " (m.*)"), ("", "")):
        checkpoint = make({}, prefix=prefix, aside={"vae.": 3, "text.": 1})
        assert schemes.list_doubts(checkpoint, None, {}) == [
            f"here is a whole checkpoint: of its tensors those of the transformer{own} are used, 3 of "
            "vae.*, 1 of text.* are left aside; the base model's own components replace them"
        ]
    assert schemes.list_doubts(make({}), None, {}) == []


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("b.0.attn.to_q", True), ("attn.to_q", True), ("b.0", True), ("b", True), ("to_q", True),
        ("to_qkv", True), ("attn.to_qkv", True), ("to_added_qkv", False), ("tn.to_q", False),
        ("b.0.", True), ("b.*.to_q", True), ("b.1", False), ("to_k", False), ("*_q", True), ("o_q", False),
    ],
)  # fmt: skip
def test_patterns_of_ignored_layers(pattern: str, part: bool) -> None:
    assert schemes.is_part_of_path(pattern, ["x.y", "b.0.attn.to_q"]) is part


def test_names_that_quantize_while_loading() -> None:
    for name, family, scheme in (
        ("fp8", "fp8", "fp8"), ("mxfp8", "msmodelslim", "W8A8_MXFP8"), ("mxfp4", "msmodelslim", "W4A4_MXFP4"),
    ):  # fmt: skip
        found = schemes.online_scheme(name)
        assert (found[0], found[1].name) == (family, scheme)
    assert refusal(UsageError, schemes.online_scheme, "int3") == (
        "--quantization int3: only fp8, mxfp8, mxfp4 can be made while loading"
    )


# --- placement -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "most", "text"),
    [(0, 8, ""), (1, 8, "n0"), (3, 3, "n0, n1, n2"), (4, 3, "n0, n1, n2 and 1 more"),
     (9, 8, "n0, n1, n2, n3, n4, n5, n6, n7 and 1 more"), (8, 8, "n0, n1, n2, n3, n4, n5, n6, n7")],
)  # fmt: skip
def test_lists_of_names(count: int, most: int, text: str) -> None:
    names = [f"n{number}" for number in range(count)]
    assert placement.shorten(names, most) == text
    if most == 8:
        assert placement.shorten(names) == text


@pytest.mark.parametrize(
    ("target", "rows", "found"),
    [
        (Target("m"), 12, None),
        (Target("m", rows=(1, 2, 3)), 12, slice(4, 8)),
        (Target("m", rows=(1, 3, 3)), 12, slice(4, 12)),
        (Target("m", swap_halves=True), 6, [3, 4, 5, 0, 1, 2]),
        (Target("m", rows=(1, 2, 2), swap_halves=True), 12, [9, 10, 11, 6, 7, 8]),
        (Target("m", interleave=3), 6, [0, 3, 1, 4, 2, 5]),
        (Target("m", rows=(1, 2, 2), interleave=2), 8, [4, 6, 5, 7]),
    ],
)
def test_rows_of_a_module(target: Target, rows: int, found: Any) -> None:
    got = placement.select_rows(target, rows)
    assert (got.tolist() if isinstance(got, torch.Tensor) else got) == found


@pytest.mark.parametrize(
    ("target", "rows", "count"),
    [
        (Target("m"), 7, 0), (Target("m", rows=(0, 1, 3)), 12, 0), (Target("m", rows=(0, 1, 3)), 13, 3),
        (Target("m", swap_halves=True), 7, 2), (Target("m", swap_halves=True), 8, 0),
        (Target("m", rows=(0, 1, 3), swap_halves=True), 9, 6), (Target("m", interleave=4), 6, 4),
        (Target("m", interleave=1), 7, 0), (Target("m", rows=(0, 1, 2), interleave=3), 9, 6),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_cut(target: Target, rows: int, count: int) -> None:
    text = f"its {rows} rows are no {count} equal parts" if count else ""
    assert placement.explain_rows(target, rows) == text


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("a.weight", True), ("a.div.weight", True), ("a.x.weight", False), ("b.weight", False),
        ("a", False), ("a.div.x.weight", False), ("div.weight", False),
    ],
)  # fmt: skip
def test_tensors_below_a_layer(name: str, below: bool) -> None:
    assert placement.is_below(name, {"a"}, ("div", "linear")) is below


# --- files of the other parts ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("vocab.json", b"", "is empty"), ("vocab.json", b" {} \n", ""), ("vocab.json", b"{", "cut"),
        ("vocab.json", b"}", "cut"), ("vocab.json", b"[]", "cut"),
        ("vocab.json", b"{" + b"x" * 300 + b"}" + b" " * 63, ""),
        ("vocab.json", b"{" + b"x" * 300 + b"}" + b" " * 64, "cut"),
        ("vocab.json", b" " * 63 + b"{" + b"x" * 300 + b"}", ""),
        ("vocab.json", b" " * 64 + b"{" + b"x" * 300 + b"}", "cut"),
        ("merges.txt", b"version https://git-lfs.github.com", "is a Git LFS pointer"),
        ("merges.txt", b"x", ""), ("spiece.model", b"\0", ""), ("a.jsonl", b"[", ""),
    ],
)  # fmt: skip
def test_vocabularies(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    expected = "is not a JSON object, or is cut off" if text == "cut" else text
    assert part_files.explain_vocabulary(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("class_name", "files", "text"),
    [
        ("CLIPTokenizer", ["vocab.json", "merges.txt"], ""), ("CLIPTokenizer", ["tokenizer.json"], ""),
        ("CLIPTokenizer", ["vocab.json"], "tokenizer.json, or vocab.json with merges.txt"),
        ("ByT5Tokenizer", ["tokenizer_config.json"], ""), ("ByT5Tokenizer", ["x"], "tokenizer_config.json"),
        ("T5Tokenizer", ["spiece.model"], ""),
        ("T5Tokenizer", ["vocab.json", "merges.txt"],
         "tokenizer.json, or spiece.model, or tokenizer.model, or sentencepiece.bpe.model"),
        ("OtherTokenizer", ["vocab.txt"], ""), ("OtherTokenizer", ["tekken.json"], ""),
        ("OtherTokenizer", ["x"],
         "tokenizer.json, or vocab.json with merges.txt, or spiece.model, or tokenizer.model, or "
         "sentencepiece.bpe.model, or tekken.json, or vocab.txt"),
    ],
)  # fmt: skip
def test_sets_of_vocabulary_files(
    tmp_path: Path, class_name: str, files: list[str], text: str
) -> None:
    for name in files:
        write_json(tmp_path / name, {})
    folder = LocalFolder(tmp_path)
    if not text:
        part_files.check_files(folder, "tokenizer_2", class_name)
        return
    assert refusal(CheckpointError, part_files.check_files, folder, "tokenizer_2", class_name) == (
        f"{tmp_path}: tokenizer_2 ({class_name}) has no vocabulary: expected {text}. Download the model "
        "again, or name another with --tokenizer-2-path"
    )


@pytest.mark.parametrize(
    ("name", "class_name", "file"),
    [
        ("scheduler", "X", "scheduler_config.json"), ("other", "FlowScheduler", "scheduler_config.json"),
        ("guider", "AdaptiveGuidance", "guider_config.json"),
        ("image_processor", "CLIPImageProcessor", "preprocessor_config.json or processor_config.json"),
        ("feature_extractor", "CLIPFeatureExtractor",
         "preprocessor_config.json or processor_config.json"),
        ("vae", "AutoencoderKL", "config.json"),
    ],
)  # fmt: skip
def test_files_of_parts(tmp_path: Path, name: str, class_name: str, file: str) -> None:
    text = f"{tmp_path}: {name} {{}}. Download the model again, or name another with --{name}-path"
    text = text.replace(f"--{name}", f"--{name.replace('_', '-')}")
    check = part_files.check_files
    assert refusal(CheckpointError, check, LocalFolder(tmp_path), name, class_name) == text.format(
        "is missing, or empty: expected the files of the part"
    )
    write_json(tmp_path / "sub" / "x.json", {})
    assert refusal(CheckpointError, check, LocalFolder(tmp_path), name, class_name) == text.format(
        f"has no {file}: expected one beside its sub-folders"
    )
    for letter in "edcba":
        write_json(tmp_path / f"{letter}.json", {})
    assert refusal(CheckpointError, check, LocalFolder(tmp_path), name, class_name) == text.format(
        f"has no {file}: expected one beside a.json, b.json, c.json, d.json"
    )
    (tmp_path / file.rpartition(" ")[2]).write_text('{"a": -Infinity}')
    if name in ("scheduler", "other", "guider"):
        check(LocalFolder(tmp_path), name, class_name)
    else:
        said = refusal(CheckpointError, check, LocalFolder(tmp_path), name, class_name)
        assert ": not valid JSON: -Infinity is not a finite number" in said


def test_exports_of_modelopt_in_words() -> None:
    block = {"quant_method": "modelopt", "quant_algo": "FP8"}
    text = (
        "c.json: quantization_config: text_encoder_2 was quantized by ModelOpt (quant_algo FP8), which is "
        "read of transformers only: here its codes would be taken for numbers, without an error. Name one "
        "in full precision: --text-encoder-2-path"
    )
    for change, said in (
        ({}, True), ({"quant_method": "ModelOpt_fp4"}, True), ({"quant_method": "x"}, False),
        ({"quant_method": None}, False),
    ):  # fmt: skip
        config = {"quantization_config": {**block, **change}}
        found = other_parts.explain_export(config, "c.json", "text_encoder_2")
        assert found == (text if said else None)
    bare = {"quantization_config": {"quant_method": "modelopt"}}
    assert other_parts.explain_export(bare, "c.json", "vae") is None


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a.bin"], "a.bin"), (["b.PT", "a.txt", "c.ckpt"], "b.PT"), (["a.bin", "x.safetensors"], ""),
        (["a.txt"], ""), ([], ""),
    ],
)  # fmt: skip
def test_parts_that_are_pickles(tmp_path: Path, files: list[str], found: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    text = (
        f"{tmp_path}/{found}: a pickle file can run code when it is opened, so it is refused: expected "
        "text_encoder as .safetensors. Convert it first, or name another: --text-encoder-path"
    )
    assert other_parts.explain_pickle(tmp_path, "text_encoder") == (text if found else None)


def test_parts_that_hold_codes(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    write_weights(
        tmp_path / "b.safetensors", {"w.weight": ("F32", (2,)), "w.qweights": ("F32", (2,))}
    )
    assert other_parts.explain_codes(tmp_path, "text_encoder_2") is None
    write_weights(tmp_path / "c.safetensors", {"w.x": ("F32", (2,)), "w.qweight": ("I32", (2,))})
    assert other_parts.explain_codes(tmp_path, "text_encoder_2") == (
        f"{tmp_path}/c.safetensors: tensor w.qweight holds codes, which {tmp_path}/config.json declares "
        "nowhere: text_encoder_2 would be loaded with random numbers in their place. Name one in full "
        "precision: --text-encoder-2-path"
    )


# --- plans as data ---------------------------------------------------------------------------


def component(*pieces: Piece, **changes: Any) -> ComponentPlan:
    given: dict[str, Any] = {
        "name": "transformer", "class_name": "A", "config": {}, "config_from": "c.json",
        "checkpoint": make({}), "family": "fp8", "why": "said", "online": False,
        "dialect": SimpleNamespace(name="diffusers"), "layers": {"m": pieces[:2], "n": pieces[2:]},
        "plain": (), "ignored": {}, "total_layers": 9, "bytes": 77,
    }  # fmt: skip
    return ComponentPlan(**{**given, **changes})


def piece(scheme: Scheme = FP8, backend: str = "decode", numerics: str = "W8A16") -> Piece:
    return Piece("a", Target("m"), scheme, 3, 5, backend, numerics, 11)


def test_a_component_as_data() -> None:
    wide = replace(NVFP4, rank=16)
    pieces = (
        piece(),
        piece(wide, "x"),
        piece(wide, "x"),
        piece(replace(NVFP4, rank=8), "x", "W4A4"),
    )
    assert component(*pieces, base=Base(reference="o/r"), layout="rows").to_json() == {
        "class": "A",
        "family": "fp8",
        "why": "said",
        "online": False,
        "files": ["f.st"],
        "reference": "here",
        "config_from": "c.json",
        "dialect": "diffusers",
        "precision": "NVFP4 + FP8",
        "rank": 16,
        "quantized_layers": 2,
        "total_layers": 9,
        "backends": {"decode": 1, "x": 3},
        "numerics": {"W8A16": 3, "W4A4": 1},
        "layout": "rows",
        "base_weights": "o/r",
        "bytes": 77,
    }
    bare = component(layers={}).to_json()
    for key in ("precision", "rank", "layout", "base_weights"):
        assert bare[key] is None
    assert (bare["quantized_layers"], bare["backends"]) == (0, {})


def test_a_plan_as_data() -> None:
    parts = {"one": component(piece()), "two": component(piece(), bytes=5)}
    request = Request(model_path="m", dtype="float16")
    planned = Plan(request, "flux-1", machine(), "o/r", "P", parts, True, False, 3, ("w",))
    found = planned.to_json()
    assert found.pop("components") == {name: part.to_json() for name, part in parts.items()}
    assert found == {
        "ok": True,
        "refusal": None,
        "model": "flux-1",
        "base": "o/r",
        "machine": {"name": "box", "vendor": "nvidia", "arch": "sm90"},
        "dtype": "float16",
        "offload": {"layerwise": True, "cpu": False},
        "processes": 3,
        "bytes": 82,
        "warnings": ["w"],
    }
    more = replace(
        planned,
        encoders={"text": parts["one"]},
        pictures=(SimpleNamespace(to_json=lambda: {"a": 1}),),  # type: ignore[arg-type]
    ).to_json()
    assert more["text_encoders"] == {"text": parts["one"].to_json()}
    assert more["pictures"] == [{"a": 1}]
    assert (planned.ok, planned.processes) == (True, 3)
    assert Plan(request, "m", machine(), "b", None, parts, False, False).processes == 1
    assert require(planned) is planned


def test_a_refusal_as_data() -> None:
    found = Refusal("a-rule", "words")
    assert found.to_json() == {
        "ok": False,
        "refusal": {"rule": "a-rule", "message": "words"},
        "components": {},
    }
    assert not found.ok
    with pytest.raises(RefusedError, match=re.escape("words")) as caught:
        require(found)
    assert caught.value.rule == "a-rule"


# --- kernels ---------------------------------------------------------------------------------


def test_wishes_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be met is told once, and the order decides."""
    flag = kernel_choice.FP4_BACKEND
    warnings: list[str] = []
    assert kernel_choice.wanted_backend(Request(model_path="m"), warnings) is None
    odd = Request(model_path="m", fp4_gemm_backend="odd")
    for _ in range(2):
        assert kernel_choice.wanted_backend(odd, warnings) is None
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{flag}=odd is not used: ")

    def refuse(*_: Any) -> Any:
        raise kernel_choice.kernels.NoKernel("a-rule", "not here")

    first: Any = SimpleNamespace(
        backend="fast", needs=SimpleNamespace(why_not=lambda *given: f"takes fewer than {given[3]}")
    )
    second: Any = SimpleNamespace(backend="slow")
    asked: list[Any] = []

    def choose(op: str, machine: Any, scheme: Any, shape: Any, backend: Any, *more: Any) -> Any:
        asked.append((op, shape, backend, more[:1]))
        return second if more else first

    monkeypatch.setattr(kernel_choice.kernels, "choose", refuse)
    monkeypatch.setattr(kernel_choice, "choose", choose)
    wish = Request(model_path="m", fp4_gemm_backend="cudnn")
    found: list[str] = []
    for _ in range(2):
        got = kernel_choice.choose_kernel(NVFP4, machine(), (3, 5), 17, wish, "cudnn", found)
        assert got is second
    assert found == [
        f"{flag}=cudnn is not used: not here",
        "linear.nvfp4: fast takes fewer than 17; slow is used",
    ]
    assert asked[:2] == [
        ("linear.nvfp4", (3, 5), None, (17,)),
        ("linear.nvfp4", (3, 5), None, ()),
    ]
    for scheme, request in ((FP8, wish), (NVFP4, replace(wish, backend="slow"))):
        more: list[str] = []
        kernel_choice.choose_kernel(scheme, machine(), (3, 5), 17, request, "cudnn", more)
        assert more == [f"{scheme.op}: fast takes fewer than 17; slow is used"]
    monkeypatch.setattr(kernel_choice, "choose", lambda *given: first)
    none: list[str] = []
    assert kernel_choice.choose_kernel(FP8, machine(), (3, 5), 17, wish, None, none) is first
    assert none == []


def test_pieces_are_in_the_order_of_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []

    def footprint(scheme: Any, out: int, into: int, item: int) -> int:
        sizes.append((out, into, item))
        return out * into * item

    kernel: Any = SimpleNamespace(backend="x", numerics="N", footprint=footprint)
    monkeypatch.setattr(kernel_choice, "choose_kernel", lambda *_: kernel)
    parts = [
        placement.Part("late", Target("m", columns=(1, 3, 3)), FP8, 3, 10),
        placement.Part("early", Target("m", columns=(0, 1, 3)), FP8, 3, 5),
    ]
    request = Request(model_path="m", dtype="float32", height=64, width=64)
    found = kernel_choice.choose_kernels({"m": parts}, "flux-1", request, machine(), [])
    assert [(p.layer, p.bytes, p.backend, p.numerics) for p in found["m"]] == [
        ("early", 60, "x", "N"), ("late", 120, "x", "N"),
    ]  # fmt: skip
    assert sizes == [(3, 5, 4), (3, 10, 4)]


def test_parts_that_lead_out_of_their_model(tmp_path: Path) -> None:
    """By a link, or by a shard that an index names; what stays inside is taken."""
    model, part = tmp_path / "model", tmp_path / "model" / "vae"
    write_json(part / "config.json", {})
    write_json(part / "d.safetensors.index.json", {"weight_map": {"a": "x.safetensors"}})
    write_json(part / "e.index.json", {"weight_map": ["../x"]})
    write_json(tmp_path / "secret.json", {})
    other_parts.check_inside(part, model)
    (model / "shared.json").symlink_to(part / "config.json")
    (part / "z.json").symlink_to(model / "shared.json")
    other_parts.check_inside(part, model)
    assert "which is not in" in refusal(CheckpointError, other_parts.check_inside, part, part / "x")
    (part / "z.json").unlink()
    (part / "z.json").symlink_to(tmp_path / "secret.json")
    assert refusal(CheckpointError, other_parts.check_inside, part, model).startswith(
        f"{part}/z.json: leads to {tmp_path}/secret.json, which is not in {model}: expected the file itself."
    )
    (part / "z.json").unlink()
    write_json(part / "d.safetensors.index.json", {"weight_map": {"a": "x", "b": "../y"}})
    assert refusal(CheckpointError, other_parts.check_inside, part, model).startswith(
        f"{part}/d.safetensors.index.json: the name ../y leads out of the folder"
    )
