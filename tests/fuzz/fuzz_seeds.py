"""Seeds: the good files that a campaign damages, and the commands that read them.

Weight files are those of the tiny stand-ins, every family and every way of saying what it is. Most
commands read headers only, so of most files only the header is kept, and a hole for the data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz_mutations import OUTSIDE, SECRET, read_header, write_header

FLUX = "black-forest-labs/FLUX.1-dev"
FLUX_2 = "black-forest-labs/FLUX.2-dev"
WAN = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
QWEN = "Qwen/Qwen-Image"
Z_IMAGE = "Tongyi-MAI/Z-Image-Turbo"
OVERRIDES = {
    "flux-1-modelopt-fp8": (FLUX, "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"),
    "flux-1-svdq": (FLUX, "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"),
    "flux-1-fp8-sharded": (FLUX, "quantmatrix/flux-1-fp8-sharded"),
    "flux-2-comfyui": (FLUX_2, "quantmatrix/flux-2-fp8-comfyui"),
    "flux-2-mixed": (FLUX_2, "black-forest-labs/FLUX.2-dev-NVFP4/flux2-dev-nvfp4-mixed.safetensors"),
    "qwen-svdq": (
        QWEN, "nunchaku-tech/nunchaku-qwen-image/svdq-fp4_r32-qwen-image.safetensors"
    ),
    "qwen-nvfp4": (QWEN, "quantmatrix/qwen-image-modelopt-nvfp4"),
    "z-image-block": (Z_IMAGE, "quantmatrix/z-image-fp8-block-dynamic"),
    "wan-nvfp4": (WAN, "BBuf/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer"),
    "wan-single": (WAN, "quantmatrix/wan-2-2-fp8-single-file"),
}  # fmt: skip
"""Checkpoints that are read beside a base model, by the name of their seed."""
ENCODERS = {
    "t5-modelopt": (FLUX, "--text-encoder-2-path", "t5-modelopt-fp8"),
    "t5-file": (FLUX, "--text-encoder-2-path", "t5xxl_fp8_e4m3fn_scaled.safetensors"),
    "clip-modelopt": (FLUX, "--text-encoder-path", "clip-modelopt-fp8"),
    "qwen-vl-nvfp4": (QWEN, "--text-encoder-path", "qwen2.5-vl-modelopt-nvfp4"),
}
"""Quantized text encoders that are read beside a base model, by the name of their seed."""
WHOLE = {"wan-w8a8": "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "wan": WAN, "flux-1": FLUX}
"""Model folders that are read alone."""
FULL = ("wan-nvfp4", "wan-single", "wan-w8a8")
"""Seeds whose weights are kept: their tensors are read, too."""
RECORDS = 4
"""Records of a folder of evidence."""


@dataclass(frozen=True)
class Seed:
    """A folder of good files, and what may be asked of it: words in which `.` is the folder."""

    name: str
    folder: Path
    files: tuple[str, ...]
    """Those that are damaged."""
    commands: tuple[tuple[str, ...], ...]
    weight: int = 1
    """How often it is taken."""


def make_seeds(root: Path) -> list[Seed]:
    """Every seed, below a folder; the first call makes the stand-ins, which takes a while."""
    from quantmatrix.tiny import hub

    cache = hub.default_folder()
    references = [*(r for pair in OVERRIDES.values() for r in pair), *WHOLE.values()]
    references += [f"{hub.PLACEHOLDER}{name}" for _, _, name in ENCODERS.values()]
    for reference in references:
        hub.ensure(reference, cache)
    seeds = [make_override(root / name, cache, *OVERRIDES[name]) for name in OVERRIDES]
    seeds += [make_encoder(root / name, cache, *ENCODERS[name]) for name in ENCODERS]
    seeds += [make_whole(root / name, cache, WHOLE[name]) for name in WHOLE]
    makers = (make_packet, make_records, make_bench, make_tables, make_gguf, make_saved)
    return seeds + [make(root / make.__name__.removeprefix("make_")) for make in makers]


def make_outside(root: Path) -> None:
    """The folder beside a case that nothing may open: weights and JSON that could be read."""
    folder = root / OUTSIDE
    folder.mkdir()
    header = {
        SECRET: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "__metadata__": {"secret": SECRET},
    }
    (folder / "secret.safetensors").touch()
    write_header(folder / "secret.safetensors", json.dumps(header).encode(), 4)
    (folder / "secret.json").write_text(json.dumps({"_class_name": SECRET}))


def make_override(folder: Path, cache: Path, base: str, reference: str) -> Seed:
    """A base model beside a quantized checkpoint, both damaged."""
    from quantmatrix.tiny import hub

    full = folder.name in FULL
    copy(hub.find_snapshot(base, cache), folder / "base", full=full)
    snapshot = hub.find_snapshot(hub.repository_of(reference), cache)
    single = reference.endswith(".safetensors")
    source = snapshot / Path(reference).name if single else snapshot
    copy(source, folder / "weights" / (source.name if single else ""), full=full)
    weights = f"./weights/{source.name}" if single else "./weights"
    has_config = (folder / "weights/config.json").is_file()
    flag = "--transformer-path" if has_config else "--transformer-weights-path"
    request = ("--model-path", "./base", flag, weights)
    commands = list_commands(weights, request, full=full)
    return Seed(folder.name, folder, list_files(folder, "weights", "base"), commands, 4)


def make_encoder(folder: Path, cache: Path, base: str, flag: str, name: str) -> Seed:
    """A base model beside a quantized text encoder, a folder or a file, both damaged."""
    from quantmatrix.tiny import hub

    copy(hub.find_snapshot(base, cache), folder / "base", full=False)
    source = hub.path_of(f"{hub.PLACEHOLDER}{name}", cache)
    copy(source, folder / "encoder" / (name if source.is_file() else ""), full=False)
    weights = f"./encoder/{name}" if source.is_file() else "./encoder"
    request = ("--model-path", "./base", flag, weights)
    commands = (
        ("plan", *request, "--json"),
        ("plan", *request, "--hardware", "b200"),
        ("inspect", weights),
    )
    return Seed(
        folder.name, folder, list_files(folder, "encoder", "base/text_encoder"), commands, 3
    )


def make_whole(folder: Path, cache: Path, reference: str) -> Seed:
    """A model folder with quantized, or plain, transformers."""
    from quantmatrix.tiny import hub

    full = folder.name in FULL
    copy(hub.find_snapshot(reference, cache), folder / "model", full=full)
    request = ("--model-path", "./model")
    commands = list_commands("./model", request, full=full)
    return Seed(folder.name, folder, list_files(folder, "model"), commands, 4)


def list_commands(
    checkpoint: str, request: tuple[str, ...], *, full: bool
) -> tuple[tuple[str, ...], ...]:
    """What is asked of weights; LOAD and DEQUANTIZE read tensors."""
    light = (
        ("inspect", checkpoint),
        ("inspect", checkpoint, "--json"),
        ("inspect", checkpoint, "--layers"),
        ("plan", *request, "--json"),
        ("plan", *request, "--hardware", "b200"),
    )
    heavy = (
        ("dequantize", *request, "--output-path", "./out/plain"),
        ("LOAD", *request),
        ("PARTS", *request),
    )
    return light + heavy if full else (*light, ("LOAD", *request))


def list_files(folder: Path, *parts: str) -> tuple[str, ...]:
    """Weights and JSON files of transformers and of the whole; others only where they are read."""
    found = [path for part in parts for path in sorted((folder / part).rglob("*"))]
    listed = [path for path in found if path.suffix in (".json", ".safetensors")]
    names = [path.relative_to(folder).as_posix() for path in listed]
    return tuple(n for n in names if "token" not in n and "scheduler" not in n)


def copy(source: Path, target: Path, *, full: bool) -> None:
    """A file or a folder; of weights the header alone, unless they are wanted in full."""
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if not path.is_file():
            continue
        place = target / path.relative_to(source) if source.is_dir() else target
        place.parent.mkdir(parents=True, exist_ok=True)
        transformer = "text_encoder" not in place.parts and "vae" not in place.parts
        if path.suffix != ".safetensors" or (full and transformer):
            shutil.copyfile(path, place)
        else:
            header, size = read_header(path)
            place.touch()
            write_header(place, json.dumps(header).encode(), size)


def make_packet(folder: Path) -> Seed:
    """A packet that is sound but for its limits; after damage its digests are made to fit again."""
    import torch

    from quantmatrix.harness import packets
    from quantmatrix.proof import record as records
    from quantmatrix.tables import read

    tables = read.read()
    record, _ = next(pick_records())
    cell = next(cell for cell in tables.cells if cell.id == record.cell["id"])
    steps = [torch.linspace(-1, 1, 64).reshape(1, 4, 16) * (n + 1) for n in range(3)]
    noisy = [step + 1e-3 for step in steps]
    checks = {"latents": packets.CheckResult("fail", packets.recompute(steps, noisy), {}, "-")}
    known = {
        **vars(record),
        "cell": records.describe_cell(cell, tables),
        "checks": checks,
        "latents_digest": packets.digest(noisy),
    }
    packets.write(records.Evidence(**known), steps, noisy, folder / "packet")
    commands = (("packet", "check", "./packet"), ("packet", "check", "./packet", "--json"))
    return Seed("packet", folder, list_files(folder, "packet"), commands, 5)


def make_records(folder: Path) -> Seed:
    """Folders of evidence, and what reads them: merging, checking, the summary of a job."""
    from quantmatrix.proof import store

    for number, (record, _) in enumerate(pick_records()):
        store.write(record, folder / ("a" if number < RECORDS // 2 else "b"))
        if number == RECORDS - 1:
            break
    (folder / "rows.txt").write_text(f"{record.cell['id']}\n# one row\n")
    jobs = {"include": [{"rows": [record.cell["id"]]}]}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    case = f'<testcase name="test_load[{record.cell["id"]}]"><properties>'
    case += f'<property name="cell" value="{record.cell["id"]}"/>'
    case += '<property name="check" value="load"/></properties></testcase>'
    (folder / "junit.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    commands = (
        ("evidence", "check", "./a", "--planned", "./rows.txt"),
        ("evidence", "check", "./junit.xml", "./a", "--planned", "./jobs.json", "--json"),
        ("evidence", "merge", "./a", "./b", "--output-path", "./out/merged", "--json"),
        ("evidence", "merge", "./a", "./b", "--output-path", "./out/merged"),
        ("summary", "./a", "--since", "./b"),
        ("summary", "./a", "./b", "--since", "./b", "--json"),
    )
    names = (*list_files(folder, "a", "b"), "rows.txt", "jobs.json", "junit.xml")
    return Seed("records", folder, names, commands, 5)


def pick_records() -> Iterator[tuple[object, Path]]:
    """Committed records of cells that run on a CPU and compare latents."""
    from quantmatrix.proof import reports_folder, store

    for path in sorted((reports_folder.default_folder() / "evidence" / "cpu").glob("*.json")):
        record = store.read(path)
        if "latents" in record.checks:
            yield record, path


def make_bench(folder: Path) -> Seed:
    """Two saved results of a benchmark."""
    from quantmatrix.proof import reports_folder

    kept = sorted((reports_folder.default_folder() / "benchmarks" / "cpu").glob("*.json"))[0]
    folder.mkdir()
    for name in ("kept.json", "new.json"):
        shutil.copyfile(kept, folder / name)
    command = ("bench", "--compare", "./kept.json", "./new.json")
    return Seed("bench", folder, ("kept.json", "new.json"), (command, (*command, "--json")), 3)


def make_tables(folder: Path) -> Seed:
    """The tables of the matrix."""
    from quantmatrix.tables import read

    folder.mkdir()
    names = [path.name for path in sorted(read.tables_folder().glob("*.csv"))]
    for name in names:
        shutil.copyfile(read.tables_folder() / name, folder / name)
    return Seed("tables", folder, tuple(names), (("TABLES", "."),), 2)


def make_gguf(folder: Path) -> Seed:
    """A GGUF file of some layers, small and whole, and the same bytes under another name."""
    import torch

    from quantmatrix.checkpoints import gguf_writer

    folder.mkdir()
    numbers = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (4, 2 * 34), generator=numbers, dtype=torch.uint8)
    codes.view(4, 2, 34)[..., :2] = torch.tensor([0.01]).half().view(torch.uint8)
    tensors = {"blocks.0.ffn.0.weight": codes, "blocks.0.ffn.0.bias": torch.zeros(4)}
    metadata: dict[str, str | int] = {"general.architecture": "wan", "general.file_type": 7}
    blocks = {"blocks.0.ffn.0.weight": "Q8_0"}
    for name in ("flux.gguf", "flux.safetensors"):
        gguf_writer.write_file(folder / name, tensors, blocks, metadata)
    commands = tuple(("inspect", f"./{name}") for name in ("flux.gguf", "flux.safetensors", ""))
    return Seed("gguf", folder, ("flux.gguf", "flux.safetensors"), commands, 2)


def make_saved(folder: Path) -> Seed:
    """A run that `generate --save-latents` wrote."""
    import torch

    from quantmatrix.checkpoints.writer import save_tensors
    from quantmatrix.measure.saved_runs import KEY

    folder.mkdir()
    latents = {f"latents.{n:03}": torch.ones(1, 4, 8) * n for n in range(3)}
    for name in ("a.safetensors", "b.safetensors"):
        save_tensors(latents, folder / name, {KEY: json.dumps({"seed": 1})})
    command = ("compare", "./a.safetensors", "./b.safetensors")
    commands = (command, (*command, "--json"))
    return Seed("saved", folder, ("a.safetensors", "b.safetensors"), commands, 2)
