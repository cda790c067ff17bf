"""Runtime: sizes, texts, names and numbers that plain functions give, compared whole."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refusal
from torch import nn

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import BrokenRunError, CheckpointError, MissingPackageError, UsageError
from quantmatrix.kernels import kernels_of
from quantmatrix.models.dialect import Target
from quantmatrix.request import Hub, Request
from quantmatrix.runtime import (
    acceleration,
    doctor,
    generate,
    load,
    lora,
    media,
    offloading,
    parallel,
    pictures,
    pieces,
    pipeline,
    quantized_linear,
    sharded_weights,
    steps,
    stored_values,
    token_shares,
    true_bytes,
)
from quantmatrix.runtime.plan.placement import PlainTensor
from quantmatrix.runtime.plan.types import Piece
from quantmatrix.runtime.run import Run
from quantmatrix.runtime.true_bytes import Size
from quantmatrix.scheme import Scheme

GIB = 2**30
FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")


# --- doctor ----------------------------------------------------------------------------------

FOUND: dict[str, Any] = {
    "machine": {
        "name": "H100", "vendor": "nvidia", "arch": "sm90", "count": 3,
        "memory_bytes": int(79.25 * GIB), "flaws": ["linear.fp8: torch: wrong", "b: c: d"],
    },
    "processor": "Some CPU",
    "instruction_sets": ["avx2", "amx"],
    "memory_bytes": int(5.75 * GIB),
    "system": "Linux 6 x86",
    "python": "3.12.1",
    "versions": {"quantmatrix": "1.0", "torch": "2.9"},
    "torch": {"version": "2.9", "error": None, "cuda": "12.8", "hip": None, "threads": 5},
    "packages": {
        "triton": {"state": "installed", "version": "3.5", "purpose": "kernels"},
        "gguf": {"state": "missing", "version": None, "purpose": "files"},
    },
    "hub": {"cache": "/c", "offline": True},
    "kernels": {"fp8": {"tensor": {"backend": "torch", "why": ""}},
                "gguf": {"Q8_0": {"backend": None, "why": "none fits"}}},
    "problems": ["one thing", "another"],
}  # fmt: skip
WHOLE = """\
processor     Some CPU (avx2 amx)
memory        5.8 GiB
system        Linux 6 x86, Python 3.12.1
torch         2.9 (CUDA 12.8), 5 threads
flaw          linear.fp8: torch: wrong
flaw          b: c: d
device        3 x H100 (sm90), 79.2 GiB
versions      quantmatrix 1.0, torch 2.9
hub cache     /c (offline)

optional packages
  triton        installed 3.5     kernels
  gguf          missing           files

what runs here
  fp8             tensor              torch
  gguf            Q8_0                nothing: none fits

problem: one thing
problem: another"""
BARE = """\
processor     Some CPU (-)
memory        5.8 GiB
system        Linux 6 x86, Python 3.12.1
torch         cannot be imported: OSError: x
versions      quantmatrix 1.0, torch 2.9
hub cache     /c

optional packages

no problems found"""


def test_the_report_of_a_machine() -> None:
    assert doctor.to_text(FOUND) == WHOLE
    cpu = {**FOUND, "machine": {**FOUND["machine"], "vendor": "cpu"}}
    assert doctor.to_text(cpu) == WHOLE.replace("device        3 x H100 (sm90), 79.2 GiB\n", "")
    bare = {
        "machine": None, "instruction_sets": [], "torch": {"error": "OSError: x"}, "packages": {},
        "hub": {"cache": "/c", "offline": False}, "kernels": {}, "problems": [],
    }  # fmt: skip
    assert doctor.to_text({**FOUND, **bare}) == BARE


@pytest.mark.parametrize(
    ("cuda", "hip", "build"),
    [("12.8", None, "CUDA 12.8"), (None, "7.0", "ROCm 7.0"), (None, None, "without GPU support"),
     ("12.8", "7.0", "CUDA 12.8")],
)  # fmt: skip
def test_builds_of_torch(cuda: str | None, hip: str | None, build: str) -> None:
    found = {"version": "2.9", "error": None, "cuda": cuda, "hip": hip, "threads": 7}
    assert doctor._describe_torch(found) == f"2.9 ({build}), 7 threads"


@pytest.mark.parametrize(
    ("error", "npu", "engine", "problems"),
    [
        (None, "installed", "installed", []),
        ("OSError: x", "missing", "missing", ["`import torch` fails (OSError: x): install torch again"]),
        ("OSError: x", "installed", "look-alike",
         ["`import torch` fails (OSError: x): torch_npu hooks itself into torch and needs CANN: source "
          "CANN's set_env.sh, or uninstall torch-npu", "not the engine"]),
    ],
)  # fmt: skip
def test_problems_of_packages(
    error: str | None, npu: str, engine: str, problems: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DRIVERS", {})
    packages = {
        "torch_npu": {"state": npu},
        "nunchaku": {"state": engine, "note": "not the engine"},
    }
    found = {"error": error, "devices": {"cuda": 0, "npu": 0}}
    assert doctor.find_problems(found, packages) == problems


@pytest.mark.parametrize(
    ("kind", "devices", "error", "told"),
    [
        ("cuda", {"cuda": 0, "npu": 3}, None, True), ("cuda", {"cuda": 2, "npu": 0}, None, False),
        ("hip", {"cuda": 0, "npu": 3}, None, True), ("hip", {"cuda": 1, "npu": 0}, None, False),
        ("npu", {"cuda": 3, "npu": 0}, None, True), ("npu", {"cuda": 0, "npu": 1}, None, False),
        ("cuda", {}, "x", False),
    ],
)  # fmt: skip
def test_drivers_without_a_device(
    kind: str, devices: Any, error: Any, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver").touch()
    drivers = {kind: (str(tmp_path / "driver"), "do so"), "other": (str(tmp_path / "none"), "no")}
    monkeypatch.setattr(doctor, "DRIVERS", drivers)
    quiet = {"torch_npu": {"state": "missing"}, "nunchaku": {"state": "missing"}}
    found = doctor.find_problems({"error": error, "devices": devices}, quiet)
    assert ("do so" in found) is told
    assert "no" not in found


# --- true bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "whole", "layerwise"),
    [((), 7, 7), ((5,), 12, 12), ((5, 3), 15, 15), ((5, 3, 4), 19, 16), ((1, 9, 2, 8), 27, 24)],
)
def test_sizes_of_weights(blocks: tuple[int, ...], whole: int, layerwise: int) -> None:
    size = Size(7, blocks)
    assert (size.whole, size.layerwise) == (whole, layerwise)


def planned(
    memory: float, *families: str | None, layerwise: bool = False, cpu: bool = False
) -> Any:
    parts = {
        f"t{n}": SimpleNamespace(family=family) for n, family in enumerate(families or ("fp8",))
    }
    machine = SimpleNamespace(name="box", memory_bytes=int(memory * GIB))
    return SimpleNamespace(
        model="flux-1",
        machine=machine,
        components=parts,
        layerwise_offload=layerwise,
        cpu_offload=cpu,
    )


ONE = {"t0": Size(GIB, (2 * GIB, 3 * GIB, 4 * GIB))}
TWO = {**ONE, "t1": Size(0, (GIB, GIB, GIB))}
SMALLER = (
    "no offload makes it fit, for two blocks alone need 8.0 GiB: take a kernel that keeps fewer bits (see "
    "--backend), or another hardware"
)
LAYERS = "--dit-layerwise-offload makes it fit, with 8.0 GiB at one time"
WHOLES = "--dit-cpu-offload makes it fit, with 10.0 GiB at one time"


@pytest.mark.parametrize(
    ("sizes", "plan", "need", "advice"),
    [
        (ONE, planned(10), 0, ""), (ONE, planned(0), 0, ""), (ONE, planned(9.9), 10, LAYERS),
        (ONE, planned(8), 10, LAYERS), (ONE, planned(7.9), 10, SMALLER),
        (ONE, planned(8, layerwise=True), 0, ""), (ONE, planned(7.9, layerwise=True), 8, SMALLER),
        (TWO, planned(13), 0, ""), (TWO, planned(12.9), 13, WHOLES), (TWO, planned(10), 13, WHOLES),
        (TWO, planned(9.9), 13, LAYERS), (TWO, planned(10, cpu=True), 0, ""),
        (TWO, planned(9.9, cpu=True), 10, LAYERS), (TWO, planned(10, "modelopt-fp8"), 13, LAYERS),
        (TWO, planned(10, "fp8", None), 13, WHOLES), (TWO, planned(10, "fp8", "modelopt-fp8"), 13, LAYERS),
        (TWO, planned(8, layerwise=True), 0, ""), (TWO, planned(10, layerwise=True, cpu=True), 0, ""),
    ],
    ids=range(18),
)  # fmt: skip
def test_what_fits_a_device(sizes: Any, plan: Any, need: int, advice: str) -> None:
    room = plan.machine.memory_bytes / GIB
    text = (
        f"the transformer weights of flux-1 need {need}.0 GiB at true size, box has {room:.1f} GiB: "
        f"{advice}"
    )
    assert true_bytes.explain_fit(sizes, plan) == (text if need else None)


@pytest.mark.parametrize(
    ("name", "found"),
    [("blocks.12.attn.to_q", "blocks.#.attn.to_q"), ("a_b.0.c.1.d", "a_b.#.c.1.d"), ("blocks.3", "blocks.3"),
     ("x.blocks.0.y", "x.blocks.0.y"), ("Blocks.0.y", "Blocks.0.y")],
)  # fmt: skip
def test_numbers_of_blocks_are_left_open(name: str, found: str) -> None:
    assert true_bytes.generalize(name) == found


def test_a_component_is_measured_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of quantized layers by their kernels, biases with them, the rest in the dtype."""
    shapes = (
        ("embed.weight", (3, 5)), ("blocks.0.q.weight", (4, 6)), ("blocks.0.q.bias", (4,)),
        ("blocks.0.norm.weight", (7,)), ("blocks.1.q.weight", (4, 6)), ("blocks.1.k.weight", (2, 3)),
        ("blocks.1.out.0.weight", (11,)),
    )  # fmt: skip
    monkeypatch.setattr(true_bytes, "list_parameters", lambda model: shapes)
    seen = []

    def measure_piece(piece: Any, count: int, shape: Any, item: int) -> int:
        seen.append((piece, count, shape, item))
        return 100

    monkeypatch.setattr(true_bytes, "measure_piece", measure_piece)
    part: Any = SimpleNamespace(layers={"blocks.0.q": ("one", "two")})
    assert true_bytes.measure("m", part, 2) == Size(30, (214, 200 + 12 + 22))
    assert seen == [(p, 2, (4, 6), 2) for _ in range(2) for p in ("one", "two")]


def test_columns_are_shared_by_pieces() -> None:
    kernel = next(k for k in kernels_of("linear.fp8") if k.backend == "decode")
    piece = Piece("a", Target("m"), FP8, 4, 6, "decode", "W8A16", 0)
    for count in (1, 2, 3):
        expected = kernel.footprint(FP8, 4, 6 // count, 2)
        assert true_bytes.measure_piece(piece, count, (4, 6), 2) == expected


# --- media -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (torch.empty(0), "there is nothing in it"),
        (torch.tensor([0.1, math.nan, math.inf, 0.9]), "2 elements are NaN or infinite"),
        (torch.tensor([10, 12], dtype=torch.uint8), "it is constant: every element is within 2/255 of 10"),
        (torch.tensor([10, 13], dtype=torch.uint8), None),
        (torch.tensor([0.5, 0.5 + 1.99 / 255]), "it is constant: every element is within 2/255 of 0.5"),
        (torch.tensor([0.5, 0.5 + 2.01 / 255]), None),
        (torch.tensor([0] * 5 + [255] * 5 + [9], dtype=torch.uint8),
         "it is saturated: 91% of its elements are at an end of the range"),
        (torch.tensor([0] * 4 + [255] * 5 + [9], dtype=torch.uint8), None),
        (torch.tensor([-0.5] * 5 + [1.5] * 6 + [0.5]),
         "it is saturated: 92% of its elements are at an end of the range"),
        (torch.tensor([1, 254] * 10, dtype=torch.uint8), None),
    ],
    ids=range(10),
)  # fmt: skip
def test_pictures_that_show_nothing(frames: torch.Tensor, why: str | None) -> None:
    assert media.find_degeneration(frames) == why


def test_frames_are_bytes() -> None:
    found = media.stack_frames([np.array([[0.0, 0.5, 1.0, -1.0, 2.0, 0.998]])])
    assert found.dtype == torch.uint8
    assert found.tolist() == [[[0, 128, 255, 0, 255, 254]]]
    images = [Image.new("RGB", (2, 1), (3, 4, 5)), Image.new("RGB", (2, 1), (6, 7, 8))]
    assert media.stack_frames(images).tolist() == [[[[3, 4, 5]] * 2], [[[6, 7, 8]] * 2]]


@pytest.mark.parametrize(
    ("text", "name"),
    [("A cat, 2 dogs!", "a-cat-2-dogs"), ("--x--", "x"), ("", "output"), ("ü", "output"),
     ("a" * 59 + " bc", "a" * 59 + "-"), ("b" * 70, "b" * 60)],
)  # fmt: skip
def test_names_of_prompts(text: str, name: str) -> None:
    assert media.slugify(text) == name


def make_run(**changes: Any) -> Run:
    given: dict[str, Any] = {
        "plan": SimpleNamespace(
            components={"t": SimpleNamespace(bytes=13)}, to_json=lambda: {"p": 1}
        ),
        "prompt": "A cat", "seed": 7, "latents": [], "media": [Image.new("RGB", (4, 3), (9, 9, 9))],
        "is_video": False, "fps": 16, "seconds": {"load": 1.5}, "step_seconds": [0.25],
        "peak_bytes": 99, "census": {"t": {"a": 2, "b": 3}},
    }  # fmt: skip
    return Run(**{**given, **changes})


@pytest.mark.parametrize(
    ("path", "video", "several", "name"),
    [
        ("out", False, False, "out/a-cat-7.png"), ("out", True, True, "out/a-cat-7.mp4"),
        ("x.png", False, False, "x.png"), ("x.JPG", False, True, "x-a-cat-7.JPG"),
        ("x.mp4", True, False, "x.mp4"), ("x.webp", False, False, "x.webp"), ("x.y", False, False, "x.y/a-cat-7.png"),
    ],
)  # fmt: skip
def test_names_of_outputs(path: str, video: bool, several: bool, name: str) -> None:
    assert media.name_output(make_run(is_video=video), Path(path), several) == Path(name)


@pytest.mark.parametrize(
    ("name", "video", "text"),
    [
        ("x.mp4", False,
         "--output-path x.mp4: this run makes a picture; expected a folder or a file ending in .png or "
         ".jpg or .jpeg or .webp"),
        ("x.png", True,
         "--output-path x.png: this run makes a video; expected a folder or a file ending in .mp4"),
        ("x.gif", True,
         "--output-path x.gif: this run makes a video; expected a folder or a file ending in .mp4"),
    ],
)  # fmt: skip
def test_endings_of_the_other_kind(name: str, video: bool, text: str) -> None:
    assert refusal(UsageError, media.is_media_file, Path(name), video) == text


def test_names_that_are_taken(tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    taken = [target, tmp_path / "x-2.png"]
    for given, name in (((), "x.png"), (taken[:1], "x-2.png"), (taken, "x-3.png")):
        run = make_run()
        found = media.save_media(run, str(target), taken=given)
        assert found == run.output == tmp_path / name
        assert Image.open(found).size == (4, 3)


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, why in ((OSError(28, "No space left on device"), "No space left on device"),
                       (OSError("odd"), "odd")):  # fmt: skip
        failing = SimpleNamespace(save=lambda path, error=error: (_ for _ in ()).throw(error))
        run = make_run(media=[failing])
        assert refusal(UsageError, media.save_media, run, str(tmp_path / "x.png")) == (
            f"cannot write {tmp_path}/x.png: {why}; nothing was left behind. Free some space or choose "
            "another --output-path"
        )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "missing", [("imageio",), ("imageio_ffmpeg",), ("imageio", "imageio_ffmpeg")]
)
def test_packages_that_write_videos(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "find_spec", lambda name: None if name in missing else 1)
    names = " ".join(missing).replace("_", "-")
    assert refusal(MissingPackageError, media.check_video_writer) == (
        f"{names}: not installed, and a video cannot be written without: expected an encoder of mp4 "
        f"files. `python -m pip install {names}`, or keep the latents alone with --save-latents FILE "
        "--no-save-output"
    )


# --- runs ------------------------------------------------------------------------------------


def test_a_run_as_data() -> None:
    found = make_run(output=Path("x.png"), calls={"t": 4}, degenerate="grey").to_json()
    assert found == {
        "prompt": "A cat", "seed": 7, "output": "x.png", "seconds": {"load": 1.5},
        "step_seconds": [0.25], "peak_memory_bytes": 99, "quantized_layers": {"t": 5},
        "backends": {"t": {"a": 2, "b": 3}}, "transformer_calls": {"t": 4}, "witness": {},
        "degenerate": "grey", "transformer_bytes": {"t": 13}, "plan": {"p": 1},
    }  # fmt: skip
    more = make_run(encoders={"e": {"a": 1}}).to_json()
    assert (more["text_encoders"], more["output"], more["degenerate"]) == (
        {"e": {"a": 1}},
        None,
        None,
    )


def test_latents_that_are_not_numbers() -> None:
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, math.nan, 2.0], [math.inf, -math.inf, 3.0]])
    make_run(latents=[good, good]).require_numbers()
    assert refusal(BrokenRunError, make_run(latents=[good, bad, good]).require_numbers) == (
        "step 2 of 3 gave 3 of 6 latents that are NaN or infinite (prompt 'A cat', seed 7): expected "
        "numbers. Nothing was saved. Try --backend decode or --dtype float32, or the base model alone: if "
        "that works, the checkpoint is damaged"
    )


@pytest.mark.parametrize(
    ("model", "latents", "error", "told"),
    [
        ("o/r", [], TypeError("no"), True), ("o/r", [], ValueError("no"), True),
        ("o/r", [], AttributeError("no"), True), ("o/r", [1], TypeError("no"), False),
        ("flux-1", [], TypeError("no"), False), ("o/r", [], KeyError("no"), False),
    ],
)  # fmt: skip
def test_arguments_that_a_pipeline_refuses(
    model: str, latents: list[int], error: Exception, told: bool
) -> None:
    plan: Any = SimpleNamespace(model=model, pipeline_class="P")

    def call() -> None:
        with generate.readable_call(plan, latents):
            raise error

    text = (
        f"P did not take its arguments ({type(error).__name__}: no): flags give it a prompt, pictures, "
        "sizes, steps and guidance; it may want a picture (--image-path), or what no flag gives"
    )
    assert refusal(UsageError if told else type(error), call) == (text if told else str(error))


def test_seconds_of_stages_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vae:
        def decode(self, x: int) -> int:
            return x + 1

    class Pipe:
        vqvae = Vae()

        def encode_prompt(self, x: int, more: int = 0) -> int:
            return x * 10 + more

    times = iter([0.0, 2.0, 10.0, 10.5, 100.0, 103.0])
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    seconds: dict[str, float] = {}
    pipe = Pipe()
    with generate.timed_stages(pipe, seconds):
        assert pipe.encode_prompt(4, more=3) == 43
        assert pipe.encode_prompt(5) == 50
        assert pipe.vqvae.decode(6) == 7
    assert seconds == {"encode": 2.5, "decode": 3.0}
    assert "encode_prompt" not in vars(pipe)
    assert generate.find_vae(SimpleNamespace(vae=1, vqvae=2)) == 1
    assert generate.find_vae(SimpleNamespace()) is None


def test_peak_memory_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=123)
    monkeypatch.setattr(generate.resource, "getrusage", lambda who: usage)
    assert generate.read_peak("cpu") == 123 * 1024
    generate.reset_peak("cpu")


@pytest.mark.parametrize("keywords", [False, True])
def test_steps_by_a_callback(keywords: bool) -> None:
    class Named:
        def __call__(self, callback_on_step_end: Any = None) -> None: ...

    class Open:
        def __call__(self, **kwargs: Any) -> None: ...

    latents = torch.ones(2)
    with steps.watched_steps(Open() if keywords else Named()) as seen:
        tensors = {"latents": latents}
        assert seen.arguments["callback_on_step_end_tensor_inputs"] == ["latents"]
        assert seen.arguments["callback_on_step_end"](None, 0, 1, tensors) is tensors
        latents += 1
    assert [kept.tolist() for kept in seen.latents] == [[1.0, 1.0]]
    assert len(seen.marks) == 1


def test_steps_by_the_scheduler() -> None:
    class Scheduler:
        def step(self, x: torch.Tensor, more: int) -> tuple[torch.Tensor, str]:
            return x + more, "rest"

    class Pipe:
        scheduler = Scheduler()

        def __call__(self, prompt: str) -> None: ...

    pipe = Pipe()
    with steps.watched_steps(pipe) as seen:
        assert seen.arguments == {}
        assert pipe.scheduler.step(torch.zeros(1), more=3)[1] == "rest"
    assert [kept.tolist() for kept in seen.latents] == [[3.0]]
    assert "step" not in vars(pipe.scheduler)


# --- tokens and shards -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "processes", "found"),
    [(7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (2, 3, [1, 1, 0]), (9, 1, [9])],
)
def test_shares_of_tokens(tokens: int, processes: int, found: list[int]) -> None:
    assert token_shares.share_out(tokens, processes) == found


def test_shares_of_three_sequences() -> None:
    """Of each sequence, and of any that are joined."""
    found = token_shares.name_shares([3, 10, 40], 2, 1)
    assert found == {
        1: [2, 1], 5: [5, 5], 20: [20, 20], 6: [7, 6], 21: [22, 21], 25: [25, 25], 26: [27, 26],
    }  # fmt: skip
    assert token_shares.name_shares([3, 4], 2, 0) == {}


def test_patches_of_a_video() -> None:
    config = SimpleNamespace(config=SimpleNamespace(patch_size=(2, 3, 5)))
    assert token_shares.count_patches(config, torch.empty(1, 7, 6, 10, 15)) == 3 * 3 * 3


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True), (torch.empty(3, 4).T, True), (torch.empty(3, 4)[:, :2], False),
        (torch.empty(3, 4)[1:], True), (torch.empty(6)[::2], False), (torch.empty(1, 4), True),
        (torch.empty(4, 1)[::2], False), (torch.empty(()), True), (torch.empty(2, 3, 4).permute(2, 0, 1), True),
        (torch.empty(3, 1).expand(3, 5), False), (torch.empty(8, 4)[::8], True),
    ],
    ids=range(11),
)  # fmt: skip
def test_tensors_that_fill_their_memory(tensor: torch.Tensor, dense: bool) -> None:
    assert sharded_weights.is_dense(tensor) is dense


def test_tensors_of_a_block_lie_end_to_end() -> None:
    block = nn.Module()
    shared = nn.Parameter(torch.arange(100.0))
    block.a, block.b = nn.Module(), nn.Module()
    block.a.register_parameter("w", shared)
    block.b.register_parameter("v", shared)
    block.b.register_buffer("c", torch.arange(257, dtype=torch.uint8))
    block.b.register_buffer("cut", torch.arange(12.0).reshape(3, 4)[:, :2])
    block.b.register_buffer("none", torch.empty(0))
    block.b.register_buffer("t", torch.arange(6.0).reshape(2, 3).T)
    slots = sharded_weights.lay_out(block)
    assert [(slot.start, slot.size, len(slot.homes)) for slot in slots] == [
        (0, 400, 2), (512, 257, 1), (1024, 24, 1), (1280, 24, 1),
    ]  # fmt: skip
    buffer = torch.zeros(1536, dtype=torch.uint8)
    for slot in slots:
        slot.view(buffer).copy_(slot.tensor)
        sharded_weights.take_home(slot, buffer)
    assert block.a.w.tolist() == block.b.v.tolist() == [float(n) for n in range(100)]
    assert block.b.cut.tolist() == [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]
    assert block.b.t.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert block.b.t.stride() == (1, 3)
    assert buffer[512:769].tolist() == [n % 256 for n in range(257)]


def test_a_model_without_blocks_has_no_shards() -> None:
    assert refusal(UsageError, sharded_weights.shard, nn.Linear(2, 2), ()) == (
        "--shard-weights: no blocks are known of Linear: leave it out"
    )


@pytest.mark.parametrize(
    ("uneven_heads", "ring", "length", "anything"),
    [(4, 1, 8, False), (4, 1, 9, True), (5, 1, 8, True), (0, 1, 8, False), (5, 2, 8, False), (5, 2, 9, True)],
)  # fmt: skip
def test_the_way_of_sharing_is_chosen_for_each_forward(
    uneven_heads: int, ring: int, length: int, anything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(nn.Module):
        _cp_plan: ClassVar = {"": {"hidden_states": 1}}
        config = SimpleNamespace(num_attention_heads=uneven_heads)

        def forward(self, hidden_states: torch.Tensor, scale: int = 1) -> torch.Tensor:
            return hidden_states

    monkeypatch.setattr(token_shares.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(token_shares, "answer_by_rule", lambda: None)
    monkeypatch.setattr(token_shares, "replace_attention", lambda find: None)
    model, config = Model(), SimpleNamespace(ulysses_anything=None, ring_degree=ring)
    token_shares.follow_tokens(model, config, 2)
    for given in ((torch.empty(1, length, 3),), ()):
        named = {} if given else {"hidden_states": torch.empty(1, length, 3)}
        model(*given, **named)
        assert config.ulysses_anything is anything
        assert token_shares.find_shares(length // 2) == [-(-length // 2), length // 2]
    assert token_shares.find_shares(99) is None
    for few in (0, 1):
        assert refusal(UsageError, model, torch.empty(1, few, 3)) == (
            f"--nproc-per-node 2: {few} tokens cannot be shared by 2 processes: give a larger --height and "
            "--width (a longer prompt, where they are its), or fewer processes"
        )
    model(torch.empty(1, 2, 3))
    assert token_shares.find_shares(1) == [1, 1]
    token_shares._known.clear()


def test_the_command_that_starts_processes() -> None:
    command = parallel.name_launcher(3)
    assert command[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    with parallel.count_processor():
        assert torch.accelerator.device_count() == 1


# --- LoRA ------------------------------------------------------------------------------------


def test_names_are_shortened() -> None:
    names = list("abcdef")
    assert [lora.shorten(names[:n]) for n in (0, 1, 4, 5, 6)] == [
        "", "a", "a, b, c, d", "a, b, c, d and 1 more", "a, b, c, d and 2 more",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["first", "second"], ["first", "first"]), (["transformer", "transformer_2"], ["transformer", "transformer_2"]),
        (["transformer"], ["transformer", "transformer"]),
    ],
)  # fmt: skip
def test_the_expert_that_an_adapter_goes_to(
    names: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that names no noise goes to the first, one that names an expert which is not there as well."""
    seen: list[tuple[Any, ...]] = []
    files = [
        SimpleNamespace(reference=f"o/{n}", name=n, path=Path(n)) for n in ("style", "low_noise")
    ]
    monkeypatch.setattr(lora, "list_adapters", lambda request: zip(files, (1.0, 0.5), strict=True))
    for name in ("read_tensors", "read_alphas"):
        monkeypatch.setattr(lora, name, lambda file: file.name)
    monkeypatch.setattr(lora, "convert", lambda *given: given)
    monkeypatch.setattr(lora, "add_adapter", lambda *given: seen.append(given))
    transformers: Any = {name: f"the {name}" for name in names}
    lora.load_requested(transformers, "P", Request(model_path="m"))
    assert seen == [
        (f"the {name}", (file.name, file.name, "P", file.name), f"lora_{n}", scale, name, file.name)
        for n, (name, file, scale) in enumerate(zip(found, files, (1.0, 0.5), strict=True))
    ]


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (6.0, 2.0), (1.5, 0.5), (0.0, 0.0)])
def test_alpha_is_taken_into_the_factor(alpha: float | None, factor: float) -> None:
    own = {"lora_A.weight": torch.ones(3, 5), "lora_B.weight": torch.full((2, 3), 4.0),
           "lora_B.bias": torch.tensor([1.0, -3.0])}  # fmt: skip
    if alpha is not None:
        own["alpha"] = torch.tensor(alpha)
    found = lora.join(own)
    assert found.bias is not None
    assert found.up.unique().tolist() == [4.0 * factor]
    assert found.bias.tolist() == [factor, -3.0 * factor]
    assert found.down is own["lora_A.weight"]
    del own["lora_B.bias"]
    assert lora.join(own).bias is None


@pytest.mark.parametrize(
    ("down", "up", "fits"),
    [
        ((3, 5), (2, 3), True), ((3, 4), (2, 3), False), ((3, 6), (2, 3), False), ((3, 5), (1, 3), False),
        ((3, 5), (3, 3), False), ((3, 5), (2, 4), False), ((3, 5), (2, 2), False), ((3, 5, 1), (2, 3), False),
        ((3, 5), (2, 3, 1), False), ((5,), (2,), False),
    ],
)  # fmt: skip
def test_shapes_of_factors(down: tuple[int, ...], up: tuple[int, ...], fits: bool) -> None:
    factors = lora.Factors(torch.ones(down), torch.ones(up))
    if fits:
        lora.check_shapes(nn.Linear(5, 2), "m", factors, "f.st")
        return
    assert refusal(CheckpointError, lora.check_shapes, nn.Linear(5, 2), "m", factors, "f.st") == (
        f"f.st: the factors of m are {list(down)} and {list(up)}: expected [rank, 5] and [2, rank]; is it "
        "of another model, or size?"
    )


def test_factors_are_finite() -> None:
    good, bad = torch.ones(3, 5), torch.full((3, 5), math.inf)
    for factors in (
        lora.Factors(bad, torch.ones(2, 3)),
        lora.Factors(good, torch.full((2, 3), math.nan)),
    ):
        assert refusal(
            CheckpointError, lora.check_shapes, nn.Linear(5, 2), "m", factors, "f.st"
        ) == ("f.st: the factors of m hold numbers that are not finite")


def test_tensors_that_are_no_factors() -> None:
    down, up = torch.ones(3, 5), torch.ones(2, 3)
    pair = {"transformer.a.lora_A.weight": down, "transformer.a.lora_B.weight": up}
    assert list(lora.sort_factors(pair, "transformer", "f.st")) == ["a"]
    second = {name.replace("transformer", "transformer_2"): t for name, t in pair.items()}
    assert list(lora.sort_factors(second, "transformer_2", "f.st")) == ["a"]
    start = "f.st: 1 of its tensors are "
    end = "; expected lora_A and lora_B of linear layers of transformer"
    for name in ("text_encoder.b.lora_A.weight", "text_encoder_2.b.lora_A.weight", "a.diff"):
        more = {**pair, name: down}
        assert refusal(CheckpointError, lora.sort_factors, more, "transformer", "f.st") == (
            f"{start}no low-rank factors of a transformer: {name}{end}"
        )
    half = {**pair, "transformer.b.lora_A.weight": down}
    assert refusal(CheckpointError, lora.sort_factors, half, "transformer", "f.st") == (
        f"{start}half of a pair of factors: b{end}"
    )


def test_alphas_of_a_header() -> None:
    tensors = {
        f"transformer.{name}": torch.ones(1)
        for name in (
            "a.lora_A.weight",
            "a.lora_B.weight",
            "b.lora_A.weight",
            "c.lora_A.weight",
            "c.alpha",
        )
    }
    metadata = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"b": 3}}
    found = lora.read_header_alphas(tensors, metadata)
    assert {name: t.item() for name, t in found.items()} == {
        "transformer.a.alpha": 8.0,
        "transformer.b.alpha": 3.0,
    }
    assert lora.read_header_alphas(tensors, {"transformer_2.lora_alpha": 8}) == {}


def make_adapted(*scales: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    for number, scale in enumerate(scales):
        down, up = torch.full((1, 3), 1.0), torch.full((2, 1), float(number + 2))
        lora.attach(model[0], f"n{number}", lora.Factors(down, up), scale)
    return model


def test_scales_of_adapters() -> None:
    model = make_adapted(1.0, 0.5)
    x = torch.tensor([[1.0, 2.0, 4.0]])
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model[0](x) - plain, torch.full((1, 2), 7 * (2 * 1.0 + 3 * 0.5)))
    lora.set_scales([model], {"n1": 2.0})
    torch.testing.assert_close(model[0](x) - plain, torch.full((1, 2), 7 * 3 * 2.0))
    lora.set_scales([model], {})
    assert model[0].low_rank(x) is None
    assert lora.list_names(model) == ["n0", "n1"]
    assert refusal(UsageError, lora.set_scales, [model], {"z": 1.0, "y": 1.0}) == (
        "no such adapter: y; loaded are n0, n1"
    )
    assert refusal(UsageError, lora.set_scales, [nn.Linear(1, 1)], {"y": 1.0}) == (
        "no such adapter: y; loaded are none"
    )
    lora.remove([model])
    assert lora.list_branches(model) == []
    torch.testing.assert_close(model[0](x), plain)


def test_adapters_of_a_pipeline() -> None:
    pipe = SimpleNamespace(transformer=make_adapted(1.0, 0.5), transformer_2=make_adapted(0.0))
    found = lora.PipelineAdapters(pipe, ["transformer", "transformer_2"], Hub())
    assert found.get_active_adapters() == ["n0", "n1"]
    found.set_adapters("n1")
    assert found.get_active_adapters() == ["n1"]
    assert pipe.transformer[0].low_rank.scales == {"n0": 0.0, "n1": 1.0}
    found.set_adapters(["n1", "n0"], [0.25, 3])
    assert pipe.transformer[0].low_rank.scales == {"n0": 3.0, "n1": 0.25}
    found.set_adapters(["n1", "n0"], 2)
    assert pipe.transformer[0].low_rank.scales == {"n0": 2.0, "n1": 2.0}
    assert refusal(UsageError, found.set_adapters, ["n1", "n0"], [1.0]) == (
        "2 adapters and 1 weights: expected as many"
    )
    alone = lora.PipelineAdapters(pipe, ["transformer"], Hub())
    assert refusal(UsageError, alone.load_lora_weights, {}, load_into_transformer_2=True) == (
        "the pipeline has no transformer_2; it has transformer"
    )
    for name, text in (
        ("a.b", "adapter_name a.b: expected a name without dots"),
        ("", "adapter_name : expected a name without dots"),
        ("n0", "adapter n0 is loaded already: choose another adapter_name"),
    ):
        assert (
            refusal(UsageError, lora.add_adapter, pipe.transformer, {}, name, 1.0, "t", "f") == text
        )


def test_targets_that_a_model_lacks() -> None:
    model = make_adapted()
    tensors = {
        f"{module}.lora_{half}.weight": torch.ones(1, 1)
        for module in ("0", "1", "x", "y")
        for half in "AB"
    }
    assert refusal(CheckpointError, lora.add_adapter, model, tensors, "n", 1.0, "t", "f.st") == (
        "f.st: 3 of its 4 targets are not linear layers of Sequential: 1, x, y; is it of another model?"
    )


# --- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "dtype", "found"),
    [
        ({}, torch.bfloat16, ()),
        ({"_keep_in_fp32_modules": ["norm"]}, torch.bfloat16, ("norm",)),
        ({"_keep_in_fp32_modules": ["wo"], "_keep_in_fp32_modules_strict": None}, torch.bfloat16, ()),
        ({"_keep_in_fp32_modules": ["wo"], "_keep_in_fp32_modules_strict": None}, torch.float16, (".wo.",)),
        ({"_keep_in_fp32_modules": ["wo"], "_keep_in_fp32_modules_strict": ["n"]}, torch.bfloat16, (".n.",)),
        ({"_keep_in_fp32_modules": ["wo"], "_keep_in_fp32_modules_strict": ["n"]}, torch.float16,
         (".n.", ".wo.")),
    ],
    ids=range(6),
)  # fmt: skip
def test_parts_that_stay_in_full_precision(named: Any, dtype: torch.dtype, found: Any) -> None:
    assert tuple(sorted(load.list_full_precision(SimpleNamespace(**named), dtype))) == found  # type: ignore[arg-type]


def test_tensors_are_put_in_their_places() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    load.assign(model, "0.bias", torch.tensor([1.0, 2.0, 3.0]))
    load.assign(model, "1.running_mean", torch.tensor([4.0, 5.0, 6.0]))
    assert isinstance(model[0].bias, nn.Parameter)
    assert not model[0].bias.requires_grad
    assert model[0].bias.tolist() == [1.0, 2.0, 3.0]
    assert model[1].running_mean.tolist() == [4.0, 5.0, 6.0]
    bare = nn.Linear(2, 3)
    load.assign(bare, "bias", torch.zeros(3))
    assert bare.bias.tolist() == [0.0] * 3
    load.place_module(model, "1", nn.ReLU())
    outer = nn.Sequential(model)
    load.place_module(outer, "0.0", nn.Tanh())
    assert (type(model[0]), type(model[1])) == (nn.Tanh, nn.ReLU)


def test_tensors_that_nothing_filled() -> None:
    part: Any = SimpleNamespace(checkpoint=SimpleNamespace(reference="here"), class_name="A",
                                layers={"x": 1, "y": 1})  # fmt: skip
    model = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.Linear(2, 3))
    assert refusal(CheckpointError, load.check_complete, part, model) == (
        "here: 2 tensors of A were planned and not filled: 0.weight, 0.bias"
    )
    load.check_complete(part, nn.Linear(1, 1))
    assert refusal(CheckpointError, load.check_census, part, nn.Linear(1, 1)) == (
        "here: planned 2 quantized layers, found 0 in the model; they differ at x, y"
    )


@pytest.mark.parametrize(
    ("rows", "checked"),
    [((0, 1, 3), True), ((1, 2, 3), False), ((2, 3, 3), False), ((0, 1, 1), True)],
)
def test_numbers_are_looked_at_once(
    rows: tuple[int, int, int], checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(load, "check_plain", lambda c, name, parameter, t: seen.append(parameter))
    header = TensorHeader("a", "F32", (6, 2), "f.st")
    part: Any = SimpleNamespace(checkpoint=Checkpoint("x", ("f.st",), {"a": header}), numbers=())
    reader: Any = SimpleNamespace(read=lambda name: torch.arange(12.0).reshape(6, 2))
    got = load.read_plain(part, PlainTensor("a", "p", Target("p", rows=rows), (6, 2)), reader)
    start, stop, of = rows
    assert got.equal(torch.arange(12.0).reshape(6, 2)[6 // of * start : 6 // of * stop])
    assert seen == (["p"] if checked else [])
    flat = PlainTensor("a", "p", Target("p", reshaped=True), (3, 4))
    assert load.read_plain(part, flat, reader).shape == (3, 4)


def test_codes_that_are_numbers_are_widened() -> None:
    header = TensorHeader("a", "F8_E4M3", (2,), "f.st")
    codes = torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)
    for numbers, dtype in (
        (("F8_E4M3", "F8_E5M2"), torch.float32),
        (("F8_E5M2",), codes.dtype),
        ((), codes.dtype),
    ):
        part: Any = SimpleNamespace(
            checkpoint=Checkpoint("x", ("f.st",), {"a": header}), numbers=numbers
        )
        found = pieces.widen(part, "a", codes)
        assert found.dtype == dtype
        assert found.float().tolist() == [1.5, -2.0]


def test_tensors_of_a_layer_are_read_by_suffix() -> None:
    names = ["a.weight", "a.b.c", "ab.weight", "a", "b.a.weight"]
    tensors = {n: TensorHeader(n, "F32", (1,), "f") for n in names}
    reader: Any = SimpleNamespace(read=lambda name: name.upper())
    found = pieces.read_layer(Checkpoint("x", ("f",), tensors), "a", reader)
    assert found == {"weight": "A.WEIGHT", "b.c": "A.B.C"}


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        ({"weight_scale": torch.zeros(1)}, True), ({"weight_scale": torch.zeros(())}, True),
        ({"weight_scale": torch.zeros(2)}, False), ({"weight_scale": torch.ones(1)}, False), ({}, False),
        ({"weight_scale_2": torch.zeros(1), "weight_scale": torch.ones(4)}, True),
        ({"weight_scale_2": torch.ones(1), "weight_scale": torch.zeros(1)}, False),
        ({"weight_scale": torch.zeros(0)}, False),
    ],
    ids=range(8),
)  # fmt: skip
def test_layers_of_zeros_by_modelopt(scale: Any, told: bool) -> None:
    assert stored_values.explain_zeros(scale) == (
        ". ModelOpt writes this of a layer whose weights are all zero: switch its quantizers off and export "
        "again"
        if told
        else ""
    )


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ValueError("a /view/x\n\n  b  "), "ValueError: a /own/x b"),
        (ValueError("set trust_remote_code=True"),
         "ValueError: it asks for code that comes with the model, which is never run"),
        (KeyError("x" * 999), f"KeyError: {repr('x' * 999)[: pipeline.LONGEST_REASON]}"),
    ],
)  # fmt: skip
def test_errors_of_libraries_in_words(error: Exception, why: str) -> None:
    def act() -> None:
        with pipeline.readable_errors("a part", "/view", "/own"):
            raise error

    assert refusal(CheckpointError, act) == (
        f"a part cannot be loaded ({why}). Compare it with the model's own repository, or download it again"
    )
    for kept in (MemoryError("x"), UsageError("x"), CheckpointError("x")):

        def fail(kept: BaseException = kept) -> None:
            with pipeline.readable_errors("a part", "/view", "/own"):
                raise kept

        assert refusal(type(kept), fail) == "x"


def test_parts_that_a_pipeline_did_not_take() -> None:
    own = object()
    pipeline.check_parts(SimpleNamespace(a=own), {"a": own})
    assert refusal(CheckpointError, pipeline.check_parts, SimpleNamespace(a=1), {"a": own}) == (
        "SimpleNamespace did not take the a that was built for it: it would have run with the base model's "
        "own weights"
    )


@pytest.mark.parametrize(
    ("device", "number"),
    [("cpu", None), ("cpu:1", None), ("cuda", None), ("cuda:3", 3), ("npu:0", 0)],
)
def test_the_current_device(
    device: str, number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    module = lambda kind: SimpleNamespace(set_device=lambda n: seen.append((kind, n)))  # noqa: E731
    monkeypatch.setattr(torch, "get_device_module", module)
    pipeline.make_current(device)
    assert seen == ([] if number is None else [(device.partition(":")[0], number)])


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu", "npu"])
@pytest.mark.parametrize(
    ("compiled", "graph"), [(True, False), (False, True), (False, False), (True, True)]
)
def test_what_accelerates_a_pipeline(
    device: str, compiled: bool, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(acceleration, "compile_blocks", lambda part: seen.append(("compile", part)))
    monkeypatch.setattr(acceleration, "graph_forward", lambda part: seen.append(("graph", part)))
    plan: Any = SimpleNamespace(
        request=SimpleNamespace(compile=compiled, cuda_graph=graph),
        machine=SimpleNamespace(device=device), components=["x", "y"],
    )  # fmt: skip
    pipe = SimpleNamespace(x=1, y=2)
    if graph and not device.startswith("cuda"):
        assert refusal(UsageError, pipeline.accelerate, pipe, plan) == (
            f"--cuda-graph needs an NVIDIA GPU, the device is {device}: leave it out"
        )
        return
    pipeline.accelerate(pipe, plan)
    words = [word for word, on in (("compile", compiled), ("graph", graph)) if on]
    assert seen == [(word, part) for part in (1, 2) for word in words]


def test_blocks_are_compiled_for_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    model: Any = nn.Linear(1, 1)
    assert refusal(UsageError, acceleration.compile_blocks, model) == (
        "--compile: Linear declares no repeated blocks; leave it out"
    )
    model._repeated_blocks = ["Block"]
    model.compile_repeated_blocks = lambda backend, **options: seen.append(
        {"backend": (backend.func, *backend.args), **options}
    )
    for before, after in ((8, 64), (64, 64), (99, 99)):
        monkeypatch.setattr(torch._dynamo.config, "recompile_limit", before)
        acceleration.compile_blocks(model, mode="x")
        assert torch._dynamo.config.recompile_limit == after
    acceleration.compile_blocks(model, dynamic=True, backend="eager")
    compiler = acceleration.compile_rewritten
    fixed = {"fullgraph": False, "dynamic": False}
    assert seen[0] == {"backend": (compiler, "inductor"), **fixed, "mode": "x"}
    assert seen[-1] == {"backend": (compiler, "eager"), "fullgraph": False, "dynamic": True}


@pytest.mark.parametrize(
    ("device", "streams"), [("cuda", True), ("cuda:1", True), ("cpu", False), ("xpu", False)]
)
def test_blocks_are_streamed(device: str, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    model = SimpleNamespace(to=seen.append, enable_group_offload=lambda **words: seen.append(words))
    monkeypatch.setattr(offloading, "return_buffers", lambda part: seen.append("buffers"))
    offloading.stream_blocks(model, device)
    assert seen == [
        "cpu",
        {
            "onload_device": torch.device(device), "offload_device": torch.device("cpu"),
            "offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": streams,
        },
        *(["buffers"] if streams else []),
    ]  # fmt: skip


# --- quantized layers ------------------------------------------------------------------------


def make_layer(rows: int = 2, columns: int = 3, scale: float = 0.5, bias: bool = True) -> Any:
    kernel = next(k for k in kernels_of("linear.fp8") if k.backend == "decode")
    codes = torch.arange(1.0, rows * columns + 1).reshape(rows, columns).to(torch.float8_e4m3fn)
    tensors = {
        "weight": codes,
        "weight_scale": torch.tensor(scale),
        "input_scale": torch.tensor(1.0),
    }
    if bias:
        tensors["bias"] = torch.full((rows,), 10.0)
    return quantized_linear.QuantizedLinear(columns, rows, kernel, FP8, tensors, torch.float32)


def test_a_layer_of_two_parts() -> None:
    split = quantized_linear.SplitInputLinear([make_layer(2, 3), make_layer(2, 2, bias=False)])
    assert (split.in_features, split.out_features, split.widths) == (5, 2, [3, 2])
    assert (split.weight.shape, split.weight.dtype, split.bias) == ((2, 5), torch.float32, None)
    x = torch.tensor([[1.0, 0.0, 2.0, 3.0, 1.0]], dtype=torch.float64)
    expected = [[0.5 * (1 + 6) + 10 + 0.5 * (3 + 2), 0.5 * (4 + 12) + 10 + 0.5 * (9 + 4)]]
    got = split(x.float())
    assert got.tolist() == expected
    model = nn.ModuleDict({"a": split, "b": make_layer(), "c": nn.Linear(1, 1)})
    assert load.count_quantized(model) == {"a": "decode", "b": "decode"}


def test_a_layer_by_its_figures() -> None:
    layer = make_layer(2, 3)
    assert layer.extra_repr() == "in_features=3, out_features=2, scheme=FP8, backend=decode"
    assert (layer.weight.shape, layer.weight.device.type) == ((2, 3), "meta")
    kept = sum(t.numel() * t.element_size() for t in layer.buffers())
    assert layer.nbytes == kept + 8
    assert not layer.bias.requires_grad
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert {n: b.dtype for n, b in moved.named_buffers()} == {
        n: b.dtype for n, b in layer.named_buffers()
    }


def test_inputs_are_kept_while_they_live() -> None:
    shared = quantized_linear.SharedInput()
    x, codes = torch.ones(2), (torch.zeros(1),)
    assert shared.find(x) is None
    shared.keep(x, codes)
    assert shared.find(x) is codes
    assert shared.find(torch.ones(2)) is None
    x += 1
    assert shared.find(x) is None
    shared.keep(x, codes)
    assert shared.find(x) is codes
    del x
    assert shared._encoded is None


@pytest.mark.parametrize(
    ("names", "widths", "scales", "shared"),
    [
        (["b.0.q", "b.0.k", "b.0.v"], [3, 3, 3], [1, 1, 1], 3), (["b.0.q", "b.1.k"], [3, 3], [1, 1], 0),
        (["b.0.q", "b.0.k"], [3, 4], [1, 1], 0), (["b.0.q", "b.0.k"], [3, 3], [1, 2], 0),
        (["b.0.q", "b.0.k", "b.1.q", "b.1.k"], [3] * 4, [1] * 4, 4), (["q", "k"], [3, 3], [1, 1], 2),
        (["b.0.q"], [3], [1], 0),
    ],
)  # fmt: skip
def test_layers_that_share_an_input(
    names: list[str], widths: list[int], scales: list[int], shared: int
) -> None:
    class Layer(quantized_linear.QuantizedLinear):
        def __init__(self, width: int, scale: float) -> None:
            nn.Module.__init__(self)
            self.in_features, self.scheme, self.shared = width, FP8, None
            self.kernel = SimpleNamespace(encode=1, backend="x")  # type: ignore[assignment]
            self.register_buffer("q_input_scale", torch.tensor(float(scale)))

    model = nn.Module()
    layers = []
    for name, width, scale in zip(names, widths, scales, strict=True):
        at = model
        *above, last = name.split(".")
        for part in above:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        layers.append(Layer(width, scale))
        at.add_module(last, layers[-1])
    assert quantized_linear.share_inputs(model) == shared
    assert sum(layer.shared is not None for layer in layers) == shared
    if shared:
        assert layers[0].shared is layers[1].shared
        assert layers[0].q_input_scale is layers[1].q_input_scale


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "reference", "good"),
    [
        ("#sha256:", "x.png", True),
        ("", "x.png", True),
        ("#sha256:0000000", "x.png#sha256:0000000", False),
    ],
)
def test_pins_have_eight_digits(tmp_path: Path, named: str, reference: str, good: bool) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (5, 3)).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pin = f"{named}{digest[:8]}" if named.endswith(":") else named
    request = Request(model_path="m")
    if good:
        found = pictures.read_picture("image", f"{path}{pin}", request, 17)
        assert (found.height, found.width, found.tokens, found.sha256) == (3, 5, 17, digest)
        assert found.reference == str(path)
    else:
        with pytest.raises(UsageError):
            pictures.read_picture("image", f"{path}{pin}", request, 17)


@pytest.mark.parametrize(("limit", "fits"), [(15, True), (14, False)])
def test_pixels_of_a_picture(
    tmp_path: Path, limit: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (5, 3)).save(path)
    monkeypatch.setattr(pictures, "PIXELS", limit)
    if fits:
        assert pictures.open_image(path, "it").size == (5, 3)
    else:
        text = refusal(UsageError, pictures.open_image, path, "it")
        assert text == "it: not taken as a picture: 5 x 3 pixels, at most 14: scale it down"


@pytest.mark.parametrize("fits", [True, False])
def test_bytes_of_a_picture(tmp_path: Path, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"x" * 21)
    monkeypatch.setattr(pictures, "BYTES", 21 if fits else 20)
    request = Request(model_path="m")
    if fits:
        assert pictures.find_file("--image-path", str(path), request) == path
    else:
        assert refusal(UsageError, pictures.find_file, "--image-path", str(path), request) == (
            f"--image-path {path}: 21 bytes, a picture may have 20"
        )
    assert pictures.Picture("a", "b", path, "c", 1, 2).tokens == 0


def test_limits_of_pictures_are_those_of_the_guide() -> None:
    assert (pictures.BYTES, pictures.PIXELS) == (268435456, 67108864)
