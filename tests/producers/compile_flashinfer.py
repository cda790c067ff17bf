"""Flashinfer's FP4 matmuls that our plans name, built for their hardware without a GPU.

    python tests/producers/compile_flashinfer.py [--arch sm120a] [--all] [--minutes 20] [--gib 12]

Flashinfer generates one source file per tile and output type and compiles them on the device at first
use. Here its own generator and its own compiler flags are used; what our plans call (bfloat16 outputs
and the function that chooses among them) is compiled to objects, and not linked: 9 files for sm120a,
5 for sm100a. Without `--all` it is the tile that comes first, one file for each architecture: a file
takes minutes of a core and gigabytes.

Of flashinfer's backends only `cutlass` has sources: `trtllm` is machine code that NVIDIA's server
hands out, `cudnn` is a library that compiles on the device. So nothing is said of those two.

Every file ends in a line: built, with the registers of its kernels, bytes spilled, size, seconds and
memory, or why not. Ends with 1 where one was not built.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

ARCHES = {
    "sm100a": ("10.0a", "gen_gemm_sm100_module_cutlass_fp4"),
    "sm120a": ("12.0a", "gen_gemm_sm120_module_cutlass_fp4"),
}
"""Flashinfer's name of each architecture, and the function that generates its matmuls."""
OTHER_OUTPUT = "_half_"
"""In the names of files for outputs that our plans do not ask for."""
TILE = "_bfloat16_"
"""In the names of files that hold the kernels of a tile."""
REASONS = (
    (r"fatal error: (\S+): No such file", "missing header {0}"),
    (r"cannot open source file \"(.+?)\"", "missing header {0}"),
    (r"(?i)bad_alloc|out of memory|cannot allocate memory|memory exhausted", "memory: {gib}"),
    (r"(?m)^(.*\berror\b.*)$", "{0}"),
)
"""What a compiler says, and what is told of it; the first that fits."""


@dataclass(frozen=True)
class Result:
    """What became of one file."""

    arch: str
    file: str
    built: bool
    seconds: float
    """Of the clock."""
    peak_gib: float
    """Most resident memory of one process of the compiler."""
    kernels: int = 0
    registers: tuple[int, ...] = ()
    """Per thread, the different ones of its kernels."""
    spilled: int = 0
    """Most bytes that a thread of one kernel stores."""
    object_kib: int = 0
    reason: str = ""

    def __str__(self) -> str:
        """A line."""
        took = f"{self.seconds:.0f} s, {self.peak_gib:.1f} GiB"
        if not self.built:
            return f"{self.arch} {self.file}: not built: {self.reason} ({took})"
        used = f"{self.kernels} kernels"
        if self.registers:
            registers = "/".join(map(str, self.registers))
            used += f" of {registers} registers, at most {self.spilled} bytes spilled"
        return f"{self.arch} {self.file}: built: {used}, {self.object_kib} KiB ({took})"


def main() -> int:
    """Build for each architecture what was asked for; 1 where a file was not built."""
    arguments = read_arguments()
    if arguments.list:
        print(json.dumps(list_commands(arguments.arch[-1])))
        return 0
    toolkit = find_toolkit()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        for arch in arguments.arch or ARCHES:
            environment = {
                **os.environ,
                "CUDA_HOME": str(toolkit),
                "FLASHINFER_CUDA_ARCH_LIST": ARCHES[arch][0],
                "FLASHINFER_WORKSPACE_BASE": str(arguments.folder or temporary),
                "FLASHINFER_EXTRA_CUDAFLAGS": "-Xptxas=-v",
            }
            commands = ask_for_commands(arch, environment)
            chosen = choose(commands, whole=arguments.all)
            version = metadata.version("flashinfer-python")
            said = f"flashinfer {version} for {arch}: {len(chosen)} of {len(commands)} files"
            print(said, file=sys.stderr, flush=True)
            for target, command in chosen.items():
                results.append(build(arch, Path(target), command, environment, arguments))
                print(results[-1], file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    built = sum(result.built for result in results)
    print(f"{built} of {len(results)} files built", file=sys.stderr)
    return int(built < len(results))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="build flashinfer's FP4 matmuls without a GPU")
    parser.add_argument("--arch", choices=ARCHES, action="append", help="default: all")
    parser.add_argument(
        "--all", action="store_true", help="every file: hours; default: the first tile of each arch"
    )
    parser.add_argument("--minutes", type=float, default=20, help="limit per file (default: 20)")
    parser.add_argument("--gib", type=float, default=12, help="memory per process (default: 12)")
    parser.add_argument("--folder", type=Path, help="keeps the objects; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, too")
    parser.add_argument("--list", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


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


def ask_for_commands(arch: str, environment: dict[str, str]) -> dict[str, str]:
    """The commands of an architecture, from a process of its own: flashinfer reads it on import."""
    words = [sys.executable, __file__, "--list", "--arch", arch]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arch}: flashinfer generates no sources: {done.stderr.strip()[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def list_commands(arch: str) -> dict[str, str]:
    """The compiler's command of each object that our plans need, by the object's path."""
    from flashinfer.jit.gemm import core

    spec = getattr(core, ARCHES[arch][1])()
    spec.write_ninja()
    plan = Path(spec.ninja_path)
    lines = (line.split() for line in plan.read_text().splitlines())
    outputs = [words[1].rstrip(":") for words in lines if words[:1] == ["build"]]
    ninja = [str(Path(sys.executable).with_name("ninja")), "-f", str(plan), "-t", "commands", "-s"]
    return {
        name: subprocess.check_output([*ninja, name], text=True, cwd=plan.parent).strip()
        for name in outputs
        if name.endswith(".cuda.o") and OTHER_OUTPUT not in name
    }


def choose(commands: dict[str, str], *, whole: bool) -> dict[str, str]:
    """All of them, or the first that holds kernels."""
    first = next(name for name in commands if TILE in name)
    return commands if whole else {first: commands[first]}


def build(
    arch: str,
    target: Path,
    command: str,
    environment: dict[str, str],
    arguments: argparse.Namespace,
) -> Result:
    """Compile one file within its limits, and read what the assembler says of its kernels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    limit = int(arguments.gib * 2**30)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        running = subprocess.Popen(
            ["bash", "-c", command],
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        code, peak, late = wait(running.pid, 60 * arguments.minutes)
        running.returncode = code  # it was waited for
        said.seek(0)
        text = said.read()
    seconds = time.monotonic() - began
    if code == 0 and target.is_file():
        size = target.stat().st_size // 1024
        return Result(arch, target.name, True, seconds, peak, *read_kernels(text), size)
    over = f"{arguments.minutes:g} minutes are over: see --minutes"
    reason = over if late else find_reason(text, code, f"more than --gib {arguments.gib:g}")
    return Result(arch, target.name, False, seconds, peak, reason=reason)


def wait(pid: int, seconds: float) -> tuple[int, float, bool]:
    """(exit code, most GiB of one process, whether the time was over) of a session's leader."""
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(pid, signal.SIGKILL)  # the compilers that it started go with it

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        _, status, used = os.wait4(pid, 0)
    except BaseException:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        timer.cancel()
    return os.waitstatus_to_exitcode(status), used.ru_maxrss / 2**20, late.is_set()


def read_kernels(text: str) -> tuple[int, tuple[int, ...], int]:
    """(kernels, their different registers per thread, most bytes spilled) that ptxas tells of."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", text)]
    return len(registers), tuple(sorted(set(registers))), max(spilled, default=0)


def find_reason(text: str, code: int, gib: str) -> str:
    """Why a file was not built: a header, memory, or the compiler's first error."""
    for pattern, said in REASONS:
        if hit := re.search(pattern, text):
            return said.format(*hit.groups(), gib=gib).strip()
    if code < 0 or code >= 128:
        name = signal.Signals(-code if code < 0 else code - 128).name
        return f"the compiler was ended by {name}: memory?"
    return f"exit code {code}: {text.strip()[-300:] or 'no word'}"


if __name__ == "__main__":
    sys.exit(main())
