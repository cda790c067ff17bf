"""Flashinfer's FP4 matmuls that our plans name, built for their hardware without a GPU.

    python tests/producers/compile_flashinfer.py [--arch sm120a] [--minutes 60] [--gib 12] [--jobs 1]

Flashinfer generates one source file per tile and output type and compiles them on the device at first
use. Here its own generator and its own compiler flags are used; what our plans call (bfloat16 outputs
and the function that chooses among them) is compiled to objects, and not linked. Of its backends only
`cutlass` has sources: `trtllm` is machine code that NVIDIA's server hands out, `cudnn` is a library
that compiles on the device. So nothing is said of those two.

Ends with 1 where a file does not compile, with 124 where the time is over.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

ARCHES = {
    "sm100a": ("10.0a", "gen_gemm_sm100_module_cutlass_fp4"),
    "sm120a": ("12.0a", "gen_gemm_sm120_module_cutlass_fp4"),
}
"""Flashinfer's word for each architecture, and the function that generates its matmuls."""
OTHER_OUTPUT = "_half_"
"""In the names of files for outputs that our plans do not ask for."""


def main() -> int:
    """Build for each architecture in a process of its own: flashinfer reads it when imported."""
    parser = argparse.ArgumentParser(description="build flashinfer's FP4 matmuls without a GPU")
    parser.add_argument("--arch", choices=ARCHES, action="append", help="default: all")
    parser.add_argument("--minutes", type=float, default=60, help="per architecture")
    parser.add_argument("--gib", type=float, default=12, help="memory of a compiler's process")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    parser.add_argument("--folder", type=Path, help="keeps the objects; default: a temporary one")
    arguments = parser.parse_args()
    if os.environ.get("FLASHINFER_CUDA_ARCH_LIST"):
        return build(arguments)
    toolkit = find_toolkit()
    with tempfile.TemporaryDirectory() as temporary:
        for arch in arguments.arch or ARCHES:
            environment = {
                **os.environ,
                "CUDA_HOME": str(toolkit),
                "FLASHINFER_CUDA_ARCH_LIST": ARCHES[arch][0],
                "FLASHINFER_WORKSPACE_BASE": str(arguments.folder or temporary),
            }
            words = [sys.executable, __file__, *sys.argv[1:], "--arch", arch]
            if code := subprocess.run(words, env=environment, check=False).returncode:
                return code
    return 0


def find_toolkit() -> Path:
    """The folder of NVIDIA's compiler, which comes as wheels."""
    spec = util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        found = sorted(Path(place).glob("cu*/bin/nvcc"))
        if found:
            return found[-1].parents[1]
    sys.exit(
        "no nvcc in the package nvidia: python -m pip install -r "
        "tests/producers/requirements-flashinfer.txt"
    )


def build(arguments: argparse.Namespace) -> int:
    """Compile the files of the last architecture that was named."""
    from flashinfer.jit.gemm import core

    arch = arguments.arch[-1]
    spec: Any = getattr(core, ARCHES[arch][1])()
    spec.write_ninja()
    plan = Path(spec.ninja_path)
    objects = list_objects(plan)
    version = metadata.version("flashinfer-python")
    print(f"flashinfer {version}, {spec.name} for {arch}: {len(objects)} files", flush=True)
    limit = int(arguments.gib * 2**30)
    words = [find_ninja(), "-k", "0", "-j", str(arguments.jobs), "-f", str(plan), *objects]
    running = subprocess.Popen(
        words,
        start_new_session=True,
        cwd=plan.parent,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    code = 124
    try:
        code = running.wait(60 * arguments.minutes)
    except subprocess.TimeoutExpired:
        print(f"{arch}: {arguments.minutes:g} minutes are over: see --minutes and --jobs")
    finally:
        if running.poll() is None:  # the compilers that it started go with it
            os.killpg(running.pid, signal.SIGTERM)
            running.wait()
    built = sum(Path(name).is_file() for name in objects)
    print(f"{arch}: {built} of {len(objects)} files compiled")
    return code


def list_objects(plan: Path) -> list[str]:
    """Objects that ninja's file describes and that our plans need."""
    lines = (line.split() for line in plan.read_text().splitlines())
    outputs = [words[1].rstrip(":") for words in lines if words[:1] == ["build"]]
    return [name for name in outputs if name.endswith(".cuda.o") and OTHER_OUTPUT not in name]


def find_ninja() -> str:
    """The ninja beside this Python."""
    return str(Path(sys.executable).with_name("ninja"))


if __name__ == "__main__":
    sys.exit(main())
