"""Validation page: what `validate` found, as a page, as JSON, and as a block for a model card.

| file              | content |
| ----------------- | ------- |
| `index.html`      | the page; pictures lie beside it |
| `validation.json` | everything that was measured |
| `model-card.md`   | a model card: YAML front matter, and what was measured |
| `images/`         | per run the BF16 picture, the quantized one and their difference (PNG) |
| `contact-sheet.png` | all runs on one picture, with maps of FLIP: see `contact_sheet` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.files import check_writable, whole
from quantmatrix.measure.contact_sheet import draw_sheet
from quantmatrix.measure.quality import read_metric
from quantmatrix.proof.scopes import WEIGHTS

if TYPE_CHECKING:
    from quantmatrix.measure.validate import Validation
    from quantmatrix.runtime.run import Run

SHEET = "contact-sheet.png"
KINDS = ("bf16", "quantized", "difference")
LONGEST = 300
"""Characters of a fact that a model card shows."""
METRICS = (
    ("psnr_db", "PSNR", " dB"), ("ssim", "SSIM", ""), ("ms_ssim", "MS-SSIM", ""), ("flip", "FLIP", ""),
    ("lpips", "LPIPS", ""), ("clip", "CLIP", ""), ("clip_bf16", "CLIP of BF16", ""),
)  # fmt: skip
"""(name, title, unit) of the metrics of pictures."""
OPTIONAL = ("lpips", "clip", "clip_bf16")
"""Those that have a column only where they were measured."""
GAIN = 4
"""The difference is shown this many times as strong, around a middle grey."""
MIB = 2**20
YAML_RESERVED = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
"""Values that a YAML reader does not take for text."""


def write_folder(found: Validation, folder: Path) -> Path:
    """Write what the module's table lists into a folder that appears whole or not at all.

    Raises UsageError for a folder that is not empty, before anything is written.
    """
    check_output(folder)
    with whole(folder) as temporary:
        temporary.mkdir()
        write_files(found, temporary)
    return folder


def check_output(folder: Path) -> None:
    """UsageError unless the folder can be made, or is empty: nothing is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output-path {folder} exists and is not an empty folder")
    check_writable(folder)


def write_files(found: Validation, folder: Path) -> None:
    """Write what the module's table lists into a folder that exists."""
    (folder / "images").mkdir()
    pictures = []
    for number, pair in enumerate(found.runs):
        names = [f"images/{number}-{kind}.png" for kind in KINDS]
        for name, picture in zip(names, draw_pictures(pair), strict=True):
            picture.save(folder / name)
        pictures.append(names)
    captions = [write_caption(run) for run in found.report["runs"]]
    sheet = draw_sheet(found.runs, captions, describe_scope(found.report["scope"]))
    sheet.save(folder / SHEET)
    text = json.dumps(found.report, indent=1, sort_keys=True, allow_nan=False)
    (folder / "validation.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "model-card.md").write_text(write_card(found.report), encoding="utf-8")
    (folder / "index.html").write_text(write_page(found.report, pictures), encoding="utf-8")


def write_caption(run: dict[str, Any]) -> str:
    """What a run is, and how near: `a fox, seed 7: PSNR 30.1 dB, SSIM 0.91, MS-SSIM 0.97, FLIP 0.05`."""
    shown = [
        f"{title} {value:.4g}{unit}"
        for name, title, unit in METRICS
        if (value := read_metric(run, name)) is not None
    ]
    return f"{run['prompt']}, seed {run['seed']}: {', '.join(shown)}"


def list_metrics(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The metrics that the table of quality has columns of."""
    return [one for one in METRICS if one[0] not in OPTIONAL or report["quality"].get(one[0])]


def list_quality(report: dict[str, Any]) -> list[list[str]]:
    """The table of quality: a line per prompt and seed, then the mean and the worst of each metric."""

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.4g}"

    names = [name for name, _, _ in list_metrics(report)]
    lines = [
        [f"{run['prompt']} (seed {run['seed']})", *(show(read_metric(run, n)) for n in names)]
        for run in report["runs"]
    ]
    for title in ("mean", "worst"):
        summary = [report["quality"][name] for name in names]
        lines.append([title, *(show(one[title] if one else None) for one in summary)])
    return lines


def draw_pictures(pair: tuple[Run, Run]) -> list[Any]:
    """BF16, quantized and difference as PIL images; of a video the middle frame."""
    import numpy as np
    from PIL import Image

    from quantmatrix.runtime.media import stack_frames

    base, run = (stack_frames(r.media).numpy() for r in pair)
    middle = len(base) // 2
    left, right = base[middle], run[middle]
    distance = right.astype(np.float64) - left.astype(np.float64)
    shown = (128 + GAIN * distance).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(array) for array in (left, right, shown)]


def write_page(report: dict[str, Any], pictures: Sequence[Sequence[str]]) -> str:
    """The page; all of its text is escaped."""
    from quantmatrix.report import template

    return template.draw(
        "validation.html",
        report=report,
        runs=list(zip(report["runs"], pictures, strict=True)),
        curves=[draw_curve(run["latents"]["steps"]) for run in report["runs"]],
        facts=list_facts(report),
        quality=list_quality(report),
        metrics=[
            f"{title}{f' ({unit.strip()})' if unit else ''}"
            for _, title, unit in list_metrics(report)
        ],
        sheet=SHEET,
        gain=GAIN,
        scope=describe_scope(report["scope"]),
    )


def draw_curve(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Points of the relative L2 error over the steps, for a box of 300 by 110."""
    values = [step["relative_l2"] for step in steps if step["relative_l2"] is not None]
    top = max(values, default=0.0) or 1.0
    width = 290 / max(len(values) - 1, 1)
    points = [
        (round(5 + n * width, 2), round(105 - 100 * v / top, 2)) for n, v in enumerate(values)
    ]
    label = ", ".join(f"step {n + 1}: {value}" for n, value in enumerate(values))
    return {"points": points, "line": " ".join(f"{x},{y}" for x, y in points), "told": label}


def list_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings in short lines: what a reader of a model card wants."""
    finals = [run["latents"]["final"] for run in report["runs"]]
    worst = [run["latents"]["worst"] for run in report["runs"]]
    media, ssim = ([run["media"][name] for run in report["runs"]] for name in ("psnr_db", "ssim"))
    memory = report["memory"]
    layers = [
        f"{name}: {part['quantized']} of {part['linear_layers']} linear layers, {part['precision']}"
        for name, part in report["census"].items()
    ]
    unseen = {name: len(part["not_called"]) for name, part in report["census"].items()}
    weights = [memory[kind]["weight_bytes"] / MIB for kind in ("bf16", "quantized")]
    facts = [
        ("verdict", "as declared" if report["ok"] else f"{len(report['problems'])} problems"),
        ("scope", describe_scope(report["scope"])),
        ("base model", report["base"]),
        ("checkpoint", ", ".join(map(str, report["references"].values()))),
        ("quantized", "; ".join(layers)),
        ("beside the base", "; ".join(describe_witness(report.get("witness", {})))),
        ("not called", ", ".join(f"{n} layers of {name}" for name, n in unseen.items() if n)),
        ("latents, PSNR", f"{show_worst(finals, 'psnr_db')} dB after the last step"),
        ("latents, cosine", f"{show_worst(worst, 'cosine')} at the worst step"),
        ("pictures, PSNR", f"{show_least(media)} dB"),
        ("pictures, SSIM", show_least(ssim)),
        *(
            (
                f"pictures, {title}",
                f"{found['mean']:.4g} in the mean, {found['worst']:.4g} at worst",
            )
            for name, title, _ in METRICS[2:]
            if (found := report["quality"].get(name))
        ),
        ("files", f"{report['checkpoint']['bytes'] / MIB:,.1f} MiB"),
        ("revision", report["checkpoint"].get("revision", "")),
        ("weights in memory", f"{weights[0]:,.1f} MiB in BF16, {weights[1]:,.1f} MiB quantized"),
        (
            "backends",
            ", ".join(sorted({b for p in report["census"].values() for b in p["backends"]})),
        ),
        ("processor", str(report["machine"].get("processor", ""))),
        ("devices", ", ".join(report["machine"].get("devices", []))),
        ("versions", ", ".join(f"{k} {v}" for k, v in sorted(report["versions"].items()))),
        ("measured", str(report["made"])),
    ]
    return [(name, value) for name, value in facts if value]


def describe_scope(scope: str) -> str:
    """A scope with what was run; a card never leaves open whether its weights are random."""
    return f"{scope}: {WEIGHTS.get(scope, 'weights that are in no repository yet')}"


def describe_witness(witness: dict[str, Any]) -> list[str]:
    """Per component the lowest cosine of a decoded layer with the base model's own."""
    label = []
    for name, part in witness.items():
        cosines = [kind["cosine"] for kind in part["kinds"]]
        lowest = f"cosine at least {min(cosines):.4f} in " if cosines else ""
        label.append(f"{name}: {part['verdict']} ({lowest}{part['layers']} decoded layers)")
    return label


def show_worst(steps: Sequence[dict[str, Any]], metric: str) -> str:
    """The smallest value of a metric over the runs."""
    return show_least([step[metric] for step in steps])


def show_least(values: Sequence[float | None]) -> str:
    """The smallest number, with `at least` where there are several runs; null means infinite."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "infinite"
    return f"{'at least ' if len(values) > 1 else ''}{min(numbers):.5g}"


def write_front_matter(report: dict[str, Any]) -> str:
    """The YAML that the hub reads at the top of a model card."""
    parts = report["census"].values()
    tags = {
        str(name)
        for part in parts
        for name in (part["family"], *split_precision(part["precision"]))
    }
    lines = [
        f"base_model: {quote(report['base_id'])}",
        "base_model_relation: quantized",
        "library_name: diffusers",
        f"pipeline_tag: {report['pipeline_tag']}",
        "tags:",
        *(f"- {quote(tag)}" for tag in ("quantized", *sorted(tags))),
    ]
    return "\n".join(["---", *lines, "---"])


def split_precision(precision: str | None) -> list[str]:
    """The names in `FP8 + INT8`."""
    return (precision or "").lower().split(" + ") if precision else []


def quote(text: str) -> str:
    """A YAML scalar, quoted unless it is a plain name."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in YAML_RESERVED
    return text if plain else json.dumps(text)


def write_card(report: dict[str, Any]) -> str:
    """A model card: the YAML that the hub reads, then what was measured."""
    from quantmatrix.quoting import escape, escape_markdown
    from quantmatrix.report.table import write_table

    title = "## Quantization, measured against the base model"
    note = (
        "Measured with `quantmatrix validate`. It times nothing: for speed beside BF16 there is "
        "`quantmatrix bench`."
    )
    facts = [(name, escape_markdown(value, LONGEST)) for name, value in list_facts(report)]
    parts = [write_front_matter(report), title, write_table(["", ""], facts), note]
    if report["problems"]:
        problems = [f"- {escape_markdown(text, LONGEST)}" for text in report["problems"]]
        parts.append("\n".join(["Problems:", "", *problems]))
    return "\n\n".join([*parts, f"```bash\n{escape(report['command'])}\n```"]) + "\n"
