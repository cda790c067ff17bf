"""Tests of a mutant in a fork of a process that has imported the libraries already.

`python forked_tests.py` in a copy of the checkout reads one mutant per line, as JSON, and answers with
one line each. It never imports the package itself: that is what a fork does, with the mutant on disk.
Importing torch, diffusers and transformers for each mutant would take longer than most tests.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

LIBRARIES = (
    "numpy", "torch", "safetensors.torch", "huggingface_hub", "jinja2", "msgspec", "PIL.Image",
    "tqdm", "gguf", "transformers.modeling_utils", "diffusers.models.modeling_utils",
    "diffusers.pipelines.pipeline_utils", "_pytest.assertion.rewrite", "pytest_timeout",
)  # fmt: skip
CLASSES = {
    "diffusers": (
        "FluxPipeline", "Flux2Pipeline", "QwenImagePipeline", "WanPipeline", "ZImagePipeline",
    ),
    "transformers": (
        "CLIPTextModel", "T5EncoderModel", "UMT5EncoderModel", "Qwen3ForCausalLM",
        "Qwen2_5_VLForConditionalGeneration", "Mistral3ForConditionalGeneration",
    ),
}  # fmt: skip
FAILED = re.compile(
    r"^(?:FAILED|ERROR) (\S+\.py(?:::[^\[\n]+?(?:\[.*?\])?)?)(?: - .*)?$", re.MULTILINE
)
"""What pytest's summary names, a file or a test."""
TIMEOUT = "timeout"
COMPILER = "the compiler"
PYTEST = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")


def preload() -> None:
    """Import what tests take long to import; what is not installed is left out."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for library, names in CLASSES.items():
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
            for name in names:
                getattr(module, name, None)
    if found := [name for name in sys.modules if name.partition(".")[0] == "quantmatrix"]:
        raise SystemExit(f"forked_tests: {found[0]} was imported before any mutant")


def run_tests(tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """(exit code of pytest over some tests in a fork, what it printed); None after `seconds`."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = os.fork()
        if child == 0:
            run_here(tests, output)
        code = wait(child, seconds)
        output.seek(0)
        return code, output.read()


def run_here(tests: Sequence[str], output: TextIO) -> None:
    """What the fork does; it never returns."""
    code = 70
    try:
        os.setsid()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        import pytest

        code = int(pytest.main([*PYTEST, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """A fork's exit code; None when it had to be ended, with all that it started."""
    end = time.monotonic() + seconds
    pause = 0.01
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def name_killer(output: str) -> str:
    """The test that failed first, or an empty text where pytest does not say."""
    found = FAILED.search(output)
    return found[1] if found else ""


def is_program(path: Path) -> bool:
    """Whether a file of Python, as it is now, can be compiled: `**` of a dictionary cannot become `&`."""
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the tests of one line: with its mutants in place, or on the source as it is."""
    from cosmic_ray import mutating
    from cosmic_ray.work_item import MutationSpec, TestOutcome

    said: dict[str, Any] = {"killer": ""}

    def tell(_: str, seconds: float) -> tuple[TestOutcome, str]:
        if not all(is_program(Path(one["module_path"])) for one in asked["mutations"]):
            said["killer"] = COMPILER
            return TestOutcome.KILLED, ""
        if not asked["tests"]:  # pytest would take all of them
            return TestOutcome.SURVIVED, ""
        code, output = run_tests(asked["tests"], seconds)
        said["killer"] = TIMEOUT if code is None else name_killer(output) if code else ""
        return TestOutcome.KILLED if code != 0 else TestOutcome.SURVIVED, output[-4000:]

    mutating.run_tests = tell
    mutations = [MutationSpec(**one) for one in asked["mutations"]]
    result = mutating.mutate_and_test(mutations, "tests", asked["seconds"])
    return {
        "outcome": result.worker_outcome.value,
        "test": result.test_outcome.value if result.test_outcome else None,
        "output": result.output,
        "diff": result.diff,
        **said,
    }


def serve() -> None:
    """Answer line by line until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    preload()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
