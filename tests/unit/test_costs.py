"""What adding something costs: toys are added to a copy, run there, and their files are counted.

CONTRIBUTING has the table; a toy may touch exactly the files that its line names.
"""

from __future__ import annotations

import csv
import gc
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

import diffusers
import pytest
import torch

import quantmatrix

ROOT = Path(quantmatrix.__file__).parents[2]
IMPORTED = (diffusers.FluxPipeline, diffusers.FluxTransformer2DModel)
"""Diffusers imports a class when it is named."""
LIMITS = ("reports/limits.csv", "reports/spread.csv")
COPIED = ("src", "matrix", "pyproject.toml", *LIMITS)


@dataclass
class Copy:
    """A copy of the project, and the files of it that were added or changed."""

    root: Path
    touched: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)

    def add(self, path: str, text: str) -> None:
        file = self.root / path
        assert not file.exists()
        file.write_text(text)
        self.touched.add(path)

    def replace(self, path: str, old: str, new: str) -> None:
        file = self.root / path
        text = file.read_text()
        assert text.count(old) == 1, f"{path}: {old!r} stands there {text.count(old)} times"
        file.write_text(text.replace(old, new))
        self.touched.add(path)

    def add_row(self, table: str, **values: str) -> None:
        file = self.root / "matrix" / f"{table}.csv"
        with file.open(newline="") as stream:
            header = next(csv.reader(stream))
        assert values.keys() <= set(header)
        with file.open("a", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([values.get(name, "") for name in header])
        self.rows.add(table)

    def call(self, *words: str, ok: bool = True) -> str:
        """Standard output of a command of the copy's own package.

        It runs in a fork of this process, which has imported what takes longest: torch and diffusers.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                be_program(self.root, words, out, err)
            _, status = os.waitpid(child, 0)
            said, complained = (file.seek(0) or file.read() for file in (out, err))
        assert (status == 0) == ok, said[-3000:] + complained[-3000:]
        return said

    def run_suites(self, *words: str) -> dict[str, int]:
        """Passed and failed checks of the copy's suites."""
        plain = ("-p", "no:cacheprovider", "-p", "no:xdist", "-q")
        said = self.call("pytest", "src/quantmatrix/suites", *plain, *words)
        found = re.findall(r"(\d+) (passed|failed|skipped)", said)
        return {kind: int(count) for count, kind in found}


def be_program(root: Path, words: Sequence[str], out: TextIO, err: TextIO) -> NoReturn:
    """What a fork does: `python -m` of some words in a copy, with none of this checkout's modules."""
    code: object = 1
    gc.freeze()  # the collector would touch, and so copy, all memory of the parent
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        os.chdir(root)
        torch.set_num_threads(1)  # threads of the parent are not there
        for name in [name for name in sys.modules if name.partition(".")[0] == "quantmatrix"]:
            del sys.modules[name]
        sys.path.insert(0, str(root / "src"))
        os.environ["PYTHONPATH"] = sys.path[0]
        os.environ.pop("PYTEST_ADDOPTS", None)
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        out.flush()
        err.flush()
        os._exit(code if isinstance(code, int) else bool(code))


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    for (
        name
    ) in COPIED:  # with its __pycache__: compiling the package takes longer than most commands
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target)
        else:
            shutil.copy(ROOT / name, target)
    yield Copy(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


def read_costs() -> Mapping[str, tuple[set[str], set[str]]]:
    """(files, tables) that an addition touches, by its name in CONTRIBUTING's table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## What adding something costs\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {
        name.strip(): (set(re.findall("`([^`]+)`", files)), set(re.findall("`([^`]+)`", rows)))
        for name, files, rows in lines[2:]
    }


def check_cost(name: str, copy: Copy, **own: str) -> None:
    files, rows = read_costs()[name]
    named = {re.sub(r"<(\w+)>", lambda found: own[found[1]], file) for file in files}
    touched = {path.removeprefix("src/quantmatrix/") for path in copy.touched}
    assert touched == named
    assert copy.rows <= {row.removesuffix(".csv") for row in rows}


FAMILY = '''"""Toy: e4m3 codes [out, in] and one float32 `scale` [1], declared as `quant_method: toy`."""

import torch

from quantmatrix.families.protocol import Declaration
from quantmatrix.kernels import linear_fp8
from quantmatrix.scheme import Scheme, TensorSpec

ID = "toy"
SCHEMES = {"tensor": Scheme("linear.fp8", "toy", "e4m3", "tensor", "tensor-dynamic")}


def detect(checkpoint):
    declared = (checkpoint.quantization or {}).get("quant_method")
    return "quant_method is toy" if declared == ID else None


def schemes(checkpoint):
    ends = [name.removesuffix(".scale") for name in checkpoint.tensors if name.endswith(".scale")]
    return dict.fromkeys(ends, SCHEMES["tensor"])


def tensors(scheme, out_features, in_features):
    codes = TensorSpec(("F8_E4M3",), ((out_features, in_features),))
    return {"weight": codes, "scale": TensorSpec(("F32",), ((1,),))}


def quantize(weight, scheme, *, bias=None, calibration=None, parts=1):
    scale = weight.abs().amax().float().reshape(1) / 448
    made = {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "scale": scale}
    return made if bias is None else {**made, "bias": bias}


def cut_rows(stored, scheme, start, stop):
    return {n: t if n == "scale" else t[start:stop] for n, t in stored.items()}


def canonical(stored, scheme):
    named = {("weight_scale" if n == "scale" else n): t for n, t in stored.items()}
    return named


def dequantize(stored, scheme):
    return linear_fp8.decode(canonical(stored, scheme), scheme)


def reference(x, stored, scheme):
    return linear_fp8.reference(x, canonical(stored, scheme), scheme)


def declare(schemes, kept, tensors=()):
    return Declaration(config={"quant_method": ID})
'''
CHECKPOINT = {"form": "component-folder", "selector": "--transformer-path"}
CLAIM = {"hardware": "cpu", "checks": "load generate", "claim": "expected"}


def test_a_family_on_a_known_op(copy: Copy) -> None:
    copy.add("src/quantmatrix/families/toy.py", FAMILY)
    ids = 'IDS = (\n    "fp8",'
    copy.replace("src/quantmatrix/families/__init__.py", ids, ids.replace("(", '(\n    "toy",', 1))
    copy.add_row(
        "families", id="toy", checkpoint_form="a folder", canonical_cli="`--transformer-path`",
        supported_models="FLUX.1", extra_dependency="None", notes="a toy", models="flux-1",
    )  # fmt: skip
    copy.add_row(
        "checkpoints", id="toy-flux-1", family="toy", model="flux-1", scheme="tensor",
        reference="quantmatrix/flux-1-toy", base="black-forest-labs/FLUX.1-dev",
        components="transformer", **CHECKPOINT,
    )  # fmt: skip
    copy.add_row(
        "cases", id="toy-flux-1", family="toy", model="flux-1", checkpoint="toy-flux-1",
        backend="reference decode", **CLAIM,
    )  # fmt: skip
    assert copy.call("quantmatrix", "matrix", "check")
    assert copy.run_suites("--family", "toy") == {"passed": 4}
    check_cost("a quant family on a known op", copy, id="toy")


MODEL = '''"""Toy: AuraFlow, which diffusers has."""

from quantmatrix.models import Defaults
from quantmatrix.models.dialect import DIFFUSERS
from quantmatrix.models.forward import Step
from quantmatrix.models.stand_in import IMAGE_VAE, Part, StandIn

ID = "toy"
NAME = "AuraFlow"
REPO = "fal/AuraFlow"
PIPELINE = "AuraFlowPipeline"
TRANSFORMER = "AuraFlowTransformer2DModel"
COMPONENTS = ("transformer",)
BLOCKS = ("joint_transformer_blocks", "single_transformer_blocks")
DEFAULTS = Defaults(height=1024, width=1024, steps=50, guidance=3.5)
TINY_DEFAULTS = Defaults(height=64, width=64, steps=2, guidance=3.5)
DIALECTS = (DIFFUSERS,)
FALLBACKS = {}
TINY = {
    "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 128, "caption_projection_dim": 128,
    "pos_embed_max_size": 64,
}
FULL = {}
ONE_BLOCK = {"num_mmdit_layers": 1, "num_single_dit_layers": 1}
STEP = Step()
STAND_IN = StandIn(
    transformer=TINY,
    vae=Part("AutoencoderKL", {**IMAGE_VAE, "latent_channels": 4}),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 1.73}),
    text_encoders={"text_encoder": "umt5"},
)


def call_arguments(request):
    defaults = TINY_DEFAULTS if request.tiny else DEFAULTS
    return {
        "height": request.height or defaults.height,
        "width": request.width or defaults.width,
        "num_inference_steps": request.num_inference_steps or defaults.steps,
        "guidance_scale": defaults.guidance,
    }


def forward_inputs(config, draw, *, tiny):
    side = 2 * draw.side(tiny=tiny)
    return {
        "hidden_states": draw.normal(1, config.in_channels, side, side),
        "encoder_hidden_states": draw.normal(1, draw.text(tiny=tiny), config.joint_attention_dim),
        "timestep": draw.number(0.5),
        "return_dict": False,
    }
'''


def test_a_base_model_of_diffusers(copy: Copy) -> None:
    copy.add("src/quantmatrix/models/toy.py", MODEL)
    copy.replace(
        "src/quantmatrix/models/__init__.py", 'IDS = ("flux-1",', 'IDS = ("toy", "flux-1",'
    )
    copy.add_row(
        "models", id="toy", name="AuraFlow", repo="fal/AuraFlow", transformers="transformer"
    )
    copy.add_row(
        "checkpoints", id="fp8-toy", family="fp8", model="toy", scheme="tensor-dynamic",
        reference="quantmatrix/toy-fp8", base="fal/AuraFlow", components="transformer",
        **CHECKPOINT,
    )  # fmt: skip
    copy.add_row(
        "cases", id="fp8-toy", family="fp8", model="toy", checkpoint="fp8-toy",
        backend="decode", **CLAIM,
    )  # fmt: skip
    families = copy.root / "matrix" / "families.csv"
    text = families.read_text()
    families.write_text(
        text.replace(
            "flux-1 flux-2 wan-2-2 qwen-image z-image",
            "flux-1 flux-2 wan-2-2 qwen-image z-image toy",
        )
    )
    copy.rows.add("families")
    assert copy.call("quantmatrix", "matrix", "check")
    assert copy.run_suites("--model", "toy") == {"passed": 2}
    check_cost("a base model of diffusers", copy, id="toy")


KERNEL = """KERNELS = (
    Kernel(
        "linear.fp8", "toy", "W8A16", Needs("fp8-toy"), prepare_decode, run_decoded, count_decoded
    ),
"""


def test_a_kernel_backend(copy: Copy) -> None:
    copy.replace("src/quantmatrix/kernels/linear_fp8.py", "KERNELS = (\n", KERNEL)
    words = ("--model-path", "black-forest-labs/FLUX.1-dev", "--tiny", "--prompt", "a fox")
    path = ("--transformer-path", "quantmatrix/flux-1-fp8-tensor-dynamic", "--backend", "toy")
    said = json.loads(copy.call("quantmatrix", "plan", *words, *path, "--device", "cpu", "--json"))
    assert "toy" in json.dumps(said["components"]["transformer"])
    check_cost("a kernel backend", copy, op="fp8")


SUITE = '''"""Toy: a check of its own."""

import pytest


@pytest.mark.check("toy")
def test_toy(cell, proof) -> None:
    proof.metrics["length"] = len(cell.id)
'''


def test_a_check(copy: Copy) -> None:
    copy.add("src/quantmatrix/suites/test_toy.py", SUITE)
    copy.replace("src/quantmatrix/tables/rows.py", 'CHECKS = ("load",', 'CHECKS = ("toy", "load",')
    copy.add_row(
        "cases", id="toy", family="fp8", model="flux-1", checkpoint="fp8-flux-1-tensor-dynamic",
        hardware="cpu", backend="", flags="--seed 7", checks="toy", claim="expected",
    )  # fmt: skip
    assert copy.call("quantmatrix", "matrix", "check")
    folder = copy.root / "evidence"
    assert copy.run_suites("--check", "toy", f"--evidence-dir={folder}") == {"passed": 1}
    [record] = folder.rglob("*.json")
    assert json.loads(record.read_text())["checks"]["toy"]["verdict"] == "pass"
    check_cost("a check", copy, id="toy")


def test_a_hardware_of_a_known_architecture(copy: Copy) -> None:
    copy.add_row(
        "hardware", id="toy-4080", name="NVIDIA Toy 4080", vendor="nvidia", arch="sm89",
        memory_gib="16", group="cuda", job="gpu-toy", label="toy",
    )  # fmt: skip
    assert copy.call("quantmatrix", "matrix", "check")
    words = ("--model-path", "black-forest-labs/FLUX.1-dev", "--tiny", "--prompt", "a fox")
    path = ("--transformer-path", "quantmatrix/flux-1-fp8-tensor-dynamic")
    said = copy.call("quantmatrix", "plan", *words, *path, "--hardware", "toy-4080", "--json")
    assert json.loads(said)["machine"]["arch"] == "sm89"
    check_cost("a hardware of a known architecture", copy)


RUNTIME = '''"""Toy: draws a picture, and another one for a quantized file."""

from quantmatrix.peers.protocol import DONE, Answer, Found

ID = "toy"


def probe():
    return Found(version="1.0")


def ways(task):
    return ("draw",)


def command(task):
    return "toy draw"


def run(task, folder):
    from PIL import Image

    picture = Image.linear_gradient("L")
    if not task.baseline:
        picture = picture.point(lambda value: max(0, value - 1))
    picture.save(folder / "toy.png")
    return Answer(DONE, loaded=True, media="toy.png", weights={"uint8": 4})


def explain(answer):
    return answer.error
'''


def test_a_runtime(copy: Copy) -> None:
    copy.add("src/quantmatrix/peers/toy.py", RUNTIME)
    copy.add_row(
        "runtimes", id="toy", name="Toy", kind="library", found="nothing", hardware="cpu",
        home="here",
    )  # fmt: skip
    assert copy.call("quantmatrix", "matrix", "check")
    argv = ("--runtime", "toy", "--hardware", "cpu", "--tiny", "--output-path", "packet", "--json")
    name = "fp8-flux-1-tensor-dynamic"
    said = json.loads(copy.call("quantmatrix", "run-column", *argv, "--checkpoint", name))
    assert said["cells"][f"{name}@cpu~toy"]["verdict"] == "works"
    check_cost("a runtime", copy, id="toy")
