"""Compiling: a kernel of ours built ahead of time for an architecture that need not be here.

Triton compiles for any target on any machine; its wheel brings NVIDIA's assembler and AMD's code
generator. What is built is a launch as `kernels.launching.watch` keeps it, with tensors of the device
`meta`: Triton itself specialises it, on a driver that only names the target, so that the program is
the one that the same launch would get on that hardware. Read from the machine code:

| | NVIDIA | AMD |
| - | ------ | --- |
| registers per thread | cuobjdump, `REG` | `.vgpr_count` |
| spilled bytes per thread | cuobjdump, `STACK` and `LOCAL` | `.private_segment_fixed_size` |
| digest | `.text` sections of the cubin | `.text` of the hsaco |

Line numbers and paths are not part of the digest. A build says nothing of the numbers that a kernel
gives; it says that the kernel exists there and fits.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.kernels.launching import Launch, has_triton

KIB = 1024
MOST_THREADS = 1024
"""Threads of a program, on every GPU."""
MOST_SPILLED = 64
"""Bytes per thread that may be spilled: 16 registers of 255."""
GRID = (2**31 - 1, 65535, 65535)
"""Most programs in each dimension of a grid."""
INSTALL = (
    "building kernels needs triton, which has wheels for Linux on x86-64: "
    "python -m pip install 'quantmatrix[compile]'"
)


@dataclass(frozen=True)
class Target:
    """What Triton compiles for, and what a program may take there."""

    backend: str
    """`cuda` or `hip`, as Triton names them."""
    arch: int | str
    warp: int
    """Threads that step together: a warp, or AMD's wave."""
    shared: int
    """Bytes of shared memory that one program may have."""


TARGETS: Mapping[str, Target] = {
    "sm80": Target("cuda", 80, 32, 163 * KIB),
    "sm86": Target("cuda", 86, 32, 99 * KIB),
    "sm89": Target("cuda", 89, 32, 99 * KIB),
    "sm90": Target("cuda", 90, 32, 227 * KIB),
    "sm100": Target("cuda", 100, 32, 227 * KIB),
    "sm103": Target("cuda", 103, 32, 227 * KIB),
    "sm120": Target("cuda", 120, 32, 99 * KIB),
    "sm121": Target("cuda", 121, 32, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
}
"""From the CUDA programming guide's table of compute capabilities and the CDNA3 ISA (LDS)."""


@dataclass(frozen=True)
class Program:
    """A kernel built for an architecture, or why it could not be."""

    kernel: str
    arch: str
    specialised: str
    """What the launch was specialised on, as text."""
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled: int = 0
    """Bytes per thread."""
    shared: int = 0
    """Bytes per program."""
    shared_limit: int = 0
    digest: str = ""
    """`sha256:...` of the machine code."""
    faults: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The program as plain data."""
        return {**asdict(self), "faults": list(self.faults)}


class _Driver:
    """Stands for a GPU of an architecture: Triton asks it for nothing else before a launch."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return repr(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def require_triton() -> str:
    """Triton's version; UsageError with what to install where it is not."""
    if not has_triton():
        raise UsageError(INSTALL)
    import triton

    return str(triton.__version__)


def find_target(arch: str) -> Target:
    """The target of an architecture; UsageError for one that Triton has none for."""
    if arch not in TARGETS:
        raise UsageError(
            f"{arch}: no target of Triton is known for it, so no kernel of ours runs there; "
            f"known: {', '.join(TARGETS)}"
        )
    return TARGETS[arch]


def describe_launch(launch: Launch, arch: str) -> dict[str, Any]:
    """What decides the program of a launch, plain data: two launches that agree get the same."""
    return {
        "kernel": launch.kernel.__name__,
        "definition": digest_definition(launch.kernel),
        "arch": arch,
        "tensors": [
            [str(t.dtype).removeprefix("torch."), t.untyped_storage().size() < 2**31]
            for t in launch.tensors
        ],
        "numbers": [[n == 1, n % 16 == 0, n < 2**31] for n in launch.numbers],
        "constants": list(launch.constants),
        "options": dict(launch.options),
        "triton": require_triton(),
    }


def digest_definition(kernel: Any) -> str:
    """`sha256:...` of the source of a `triton.jit` function and of those that it calls.

    Triton's own digest has the line in it at which the function stands, so that it changes with every
    line above.
    """
    digest = hashlib.sha256(ast.unparse(kernel.parse()).encode())
    found = inspect.getclosurevars(kernel.fn)
    for name, value in sorted({**found.globals, **found.nonlocals}.items()):
        if hasattr(value, "fn") and hasattr(value, "parse"):
            digest.update(f"{name} {digest_definition(value)}".encode())
    return f"sha256:{digest.hexdigest()}"


def name_specialisation(launch: Launch) -> str:
    """The same for people: `codes uint8, scales float8_e4m3fn, size 4718592, GROUP 8 ...`."""
    values = [*(str(t.dtype).removeprefix("torch.") for t in launch.tensors)]
    values += map(str, (*launch.numbers, *launch.constants))
    names = launch.kernel.arg_names
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def build(launch: Launch, arch: str) -> Program:
    """Build the program of a launch for an architecture; what is wrong with it is in `faults`."""
    target = find_target(arch)
    about = (launch.kernel.__name__, arch, name_specialisation(launch))
    with use_target(target):
        try:
            made = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        except Exception as error:
            return Program(*about, faults=(explain_error(error),))
    registers, spilled = read_resources(made, target)
    program = Program(
        *about,
        warps=made.metadata.num_warps,
        stages=made.metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        shared_limit=target.shared,
        digest=digest_code(made.kernel),
    )
    return Program(**{**vars(program), "faults": tuple(list_faults(program, launch, target))})


@contextmanager
def use_target(target: Target) -> Iterator[None]:
    """Let Triton compile for a target, without its cache on disk and its advice to users."""
    require_triton()
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    with warnings.catch_warnings(), knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", UserWarning)
        knobs.cache.dir = folder
        before = dict(vars(driver))  # asking for the active one would look for a GPU
        driver.set_active(_Driver(GPUTarget(target.backend, target.arch, target.warp)))
        try:
            yield
        finally:
            vars(driver).update(before)


def explain_error(error: BaseException) -> str:
    """The innermost reason of a compiler's error, on one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = " ".join(str(error).split())
    found = re.search(r"""(?:ValueError|AssertionError|TypeError)\(["'](.*)["']\)""", text)
    return f"does not compile: {(found[1] if found else text) or type(error).__name__}"[:500]


def list_faults(program: Program, launch: Launch, target: Target) -> Iterator[str]:
    """What keeps a program that was built from running, or from running well."""
    threads = program.warps * target.warp
    if threads > MOST_THREADS:
        yield (
            f"{program.warps} warps of {target.warp} threads are {threads} threads; "
            f"a program has at most {MOST_THREADS}"
        )
    if program.shared > target.shared:
        yield (
            f"needs {program.shared / KIB:g} KiB of shared memory; {program.arch} has "
            f"{target.shared / KIB:g} KiB for a program: a smaller tile, or fewer stages"
        )
    if program.spilled > MOST_SPILLED:
        yield (
            f"spills {program.spilled} bytes per thread ({program.registers} registers are used); "
            f"{MOST_SPILLED} are allowed: more warps, or a smaller tile"
        )
    for axis, (count, most) in enumerate(zip(launch.grid, GRID, strict=False)):
        if count > most:
            yield f"its grid has {count} programs in dimension {axis}; at most {most} are allowed"


def read_resources(made: Any, target: Target) -> tuple[int, int]:
    """(registers, spilled bytes) per thread of a built kernel."""
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        return _read_number(text, r"\.vgpr_count:"), _read_number(
            text, r"\.private_segment_fixed_size:"
        )
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(made.kernel)
        stream.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", stream.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = text[text.index("Function ") :]
    spilled = _read_number(usage, "STACK:") + _read_number(usage, "LOCAL:")
    return _read_number(usage, "REG:"), spilled


def _read_number(text: str, before: str) -> int:
    found = re.search(rf"{before}\s*(\d+)", text)
    if found is None:
        raise QuantmatrixError(
            f"the compiler's description of a kernel has no {before} in it: expected that of "
            f"Triton 3.6 or newer, found {text[:200]!r}"
        )
    return int(found[1])


def digest_code(binary: bytes) -> str:
    """`sha256:...` of the code sections of an ELF file, which tell nothing of paths and lines."""
    digest = hashlib.sha256()
    for name, content in read_sections(binary):
        if name.startswith(".text"):
            digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def read_sections(binary: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each section of a 64-bit little-endian ELF file."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", binary, 40)
    headers = [struct.unpack_from("<II8xQQQ", binary, start + i * size) for i in range(count)]
    strings = binary[headers[names][3] :]
    for name, kind, _, offset, length in headers:
        text = strings[name : strings.index(b"\0", name)].decode()
        yield text, b"" if kind == 8 else binary[offset : offset + length]
