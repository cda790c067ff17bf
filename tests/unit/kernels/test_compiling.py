"""Kernels built ahead of time: what is read from the program, and which faults are seen."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix.errors import UsageError
from quantmatrix.kernels import (
    compiling,
    exchange_triton,
    fp8_triton,
    gelu_triton,
    int8_triton,
    launching,
    norm_triton,
    packed_triton,
    rope_triton,
)
from quantmatrix.kernels.compiling import TARGETS, Program
from quantmatrix.kernels.launching import Launch
from quantmatrix.tables import read

triton = pytest.importorskip("triton", reason="needs triton: the extra `compile`")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def watch(arch: str, call: Any, *arguments: Any) -> Launch:
    with launching.watch(arch) as seen:
        call(*arguments)
    return seen[-1]


def see_decode(arch: str, columns: int = 3072) -> Launch:
    codes = draw(128, columns // 2, dtype=torch.uint8)
    scales = draw(128, columns // 16, dtype=torch.float8_e4m3fn)
    return watch(arch, packed_triton.decode, codes, scales, draw(), torch.bfloat16)


def see_multiply(arch: str, rows: int) -> Launch:
    codes, weight = draw(rows, 5120, dtype=torch.int8), draw(256, 5120, dtype=torch.int8)
    bias = draw(256, dtype=torch.bfloat16)
    words = (codes, weight, draw(256), draw(rows, 1), bias, torch.bfloat16)
    return watch(arch, int8_triton.multiply, *words)


def test_every_architecture_of_the_tables_has_a_target_or_no_triton() -> None:
    rows = read.read().hardware.values()
    assert {row.arch for row in rows if row.vendor in launching.TRITON} <= set(TARGETS)
    with pytest.raises(UsageError, match="910b: no target of Triton is known"):
        compiling.find_target("910b")


@pytest.mark.parametrize("arch", ["sm86", "sm90", "gfx942"])
def test_a_program_tells_what_it_takes(arch: str) -> None:
    found = compiling.build(see_decode(arch), arch)
    assert found.faults == ()
    assert (found.kernel, found.arch, found.warps) == ("decode", arch, 8)
    assert 16 <= found.registers <= 128
    assert found.spilled == 0
    assert 0 < found.shared <= found.shared_limit == TARGETS[arch].shared
    assert found.digest.startswith("sha256:")
    scales = "float8_e4m3fn" if arch == "sm90" else "uint8"
    assert found.specialised.startswith(f"codes uint8, scales {scales}, whole float32")


def test_nothing_is_left_of_the_driver_that_stands_for_a_gpu() -> None:
    from triton.runtime.driver import driver

    before, folder = dict(vars(driver)), triton.knobs.cache.dir
    compiling.build(see_decode("sm90"), "sm90")
    assert (vars(driver), triton.knobs.cache.dir) == (before, folder)


def test_e4m3_where_the_target_has_no_such_type_is_a_fault() -> None:
    x = draw(16, 512, dtype=torch.bfloat16)
    launch = watch("sm80", fp8_triton.launch_static, x, draw())
    [fault] = compiling.build(launch, "sm80").faults
    assert fault.startswith("does not compile: type fp8e4nv not supported in this architecture")
    assert compiling.build(launch, "sm89").faults == ()


def test_a_tile_that_needs_120_kib_is_a_fault_on_sm86(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = (128, 128, 128, 8, 5)  # four buffers of 2 x 16 KiB
    monkeypatch.setattr(int8_triton, "TILES", {"*": (tile, tile)})
    [fault] = compiling.build(see_multiply("sm86", 4096), "sm86").faults
    size = re.match(r"needs (\d+) KiB of shared memory; sm86 has 99 KiB for a program", fault)
    assert size is not None
    assert int(size[1]) >= 120
    assert compiling.build(see_multiply("sm80", 4096), "sm80").faults == ()


def test_more_waves_than_amd_takes_are_a_fault() -> None:
    launch = see_decode("gfx942")
    wide = Launch(**{**vars(launch), "options": {"num_warps": 32}})
    [fault] = compiling.build(wide, "gfx942").faults
    assert fault == "32 warps of 64 threads are 2048 threads; a program has at most 1024"
    assert compiling.build(wide, "sm90").faults == ()


def test_registers_that_spill_are_a_fault() -> None:
    launch = see_multiply("sm86", 4096)
    tight = Launch(**{**vars(launch), "options": {**launch.options, "maxnreg": 128}})
    [fault] = compiling.build(tight, "sm86").faults
    assert re.match(r"spills \d{3} bytes per thread \(128 registers are used\)", fault)


def test_a_grid_that_is_too_large_is_a_fault() -> None:
    launch = see_decode("sm90")
    high = Launch(**{**vars(launch), "grid": (1, 65536)})
    [fault] = compiling.build(high, "sm90").faults
    assert fault == "its grid has 65536 programs in dimension 1; at most 65535 are allowed"


@pytest.mark.parametrize("rows", [64, 65])
@pytest.mark.parametrize("arch", sorted(TARGETS))
def test_tiles_of_the_int8_matmul_fit_everywhere(arch: str, rows: int) -> None:
    launch = see_multiply(arch, rows)
    program = compiling.build(launch, arch)
    assert program.faults == ()
    assert program.spilled == 0


def make_kernel(folder: Path, lines: int, constant: int = 3) -> Any:
    """A kernel in a file of its own, below a number of empty lines."""
    text = f"""
        import triton
        import triton.language as tl

        @triton.jit
        def helper(x):
            return x * {constant}.0

        @triton.jit
        def double(x, y, BLOCK: tl.constexpr):
            places = tl.arange(0, BLOCK)
            tl.store(y + places, helper(tl.load(x + places)))
    """
    path = folder / f"kernel_{lines}_{constant}.py"
    path.write_text("\n" * lines + textwrap.dedent(text))
    found: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.read_text(), path, "exec"), found)
    return found["double"]


def test_digests_tell_nothing_of_files_and_lines(tmp_path: Path) -> None:
    kernels = [make_kernel(tmp_path, 0), make_kernel(tmp_path, 7), make_kernel(tmp_path, 0, 5)]
    x = draw(128)
    launches = [Launch(kernel, (1,), (x, x), (), (128,)) for kernel in kernels]
    said = [compiling.describe_launch(launch, "sm90") for launch in launches]
    assert said[0] == said[1] != said[2]
    for arch in ("sm90", "gfx942"):
        digests = [compiling.build(launch, arch).digest for launch in launches]
        assert digests[0] == digests[1] != digests[2]


def test_what_a_launch_is_specialised_on_is_told() -> None:
    tall, other, wide = see_decode("sm90"), see_decode("sm90", 6144), see_decode("sm90", 3104)
    first = compiling.describe_launch(tall, "sm90")
    assert first == compiling.describe_launch(other, "sm90")  # the same but for a larger size
    assert first["numbers"] == [[False, True, True]]
    assert compiling.describe_launch(tall, "sm100") != first
    assert wide.numbers[0] % 16 == 0
    odd = Launch(**{**vars(tall), "numbers": (17,)})
    assert compiling.describe_launch(odd, "sm90")["numbers"] == [[False, False, True]]


def test_the_program_is_the_one_of_a_launch() -> None:
    """Addresses and sizes that are multiples of 16 are known to be so, and a 1 is a constant."""
    launch = see_multiply("sm90", 1)
    with compiling.use_target(TARGETS["sm90"]):
        made = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    assert made.src.signature["m"] == "constexpr"
    assert made.src.signature["n"] == "i32"
    places = [
        i for i, attributes in made.src.attrs.items() if ["tt.divisibility", 16] in attributes
    ]
    assert sorted(places) == [(0,), (1,), (2,), (3,), (4,), (5,), (7,)]


def test_what_to_install_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'quantmatrix\[compile\]'"):
        compiling.require_triton()


def test_a_compiler_that_tells_other_things_is_named() -> None:
    made: Any = SimpleNamespace(asm={"amdgcn": ".vgprs: 3"})
    with pytest.raises(compiling.QuantmatrixError, match=r"no \\.vgpr_count: in it"):
        compiling.read_resources(made, TARGETS["gfx942"])


def test_a_program_is_plain_data() -> None:
    program = Program("decode", "sm86", "size 1", faults=("spills",))
    assert program.to_json()["faults"] == ["spills"]


def bf16(*shape: int) -> torch.Tensor:
    return draw(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120", "gfx942"])
@pytest.mark.parametrize(
    ("lengths", "heads", "angles", "weight"),
    [((512, 4096), 24, 128, 128), ((4224,), 30, 64, 128), ((32760,), 40, 64, 5120)],
    ids=["flux-1", "z-image", "wan-2-2"],
)
def test_rotations_of_compiled_blocks_build(
    lengths: tuple[int, ...], heads: int, angles: int, weight: int, arch: str
) -> None:
    tables = [draw(1, length, angles) for length in lengths]
    parts, weights = [bf16(1, length, heads, 128) for length in lengths], [bf16(weight)] * 2
    given = (parts, weights[: len(lengths)], tables, tables, 1e-6)
    with launching.watch(arch) as seen:
        rope_triton.launch_rms_norm_rope(*given)
    assert [launch.grid[0] for launch in seen] == [*lengths]
    assert compiling.build(seen[-1], arch).faults == ()


@pytest.mark.parametrize("arch", ["sm89", "sm90", "sm120"])
@pytest.mark.parametrize(
    ("width", "tiles"), [(3072, (2048, 1024)), (3840, (2048, 2048)), (5120, (4096, 1024))]
)
def test_norms_of_compiled_blocks_build(width: int, tiles: tuple[int, int], arch: str) -> None:
    assert norm_triton.split_width(width) == tiles
    rows, vector = [bf16(1, 4096, width), bf16(1, 510, width)], bf16(1, width)
    with launching.watch(arch) as seen:
        norm_triton.launch_norm_codes(rows, None, vector, vector, draw(), 1e-6, True)
    assert [launch.grid for launch in seen] == [(1024,), (510,)]  # four rows a program, or one
    assert compiling.build(seen[0], arch).faults == ()


@pytest.mark.parametrize("arch", ["sm89", "sm90", "sm120"])
def test_gelu_of_compiled_blocks_builds(arch: str) -> None:
    with launching.watch(arch) as seen:
        gelu_triton.launch_gelu_codes([bf16(4608, 3072), bf16(4608, 12288)], [False, True], draw())
    assert [launch.grid for launch in seen] == [(4608, 2), (4608, 6)]
    assert [compiling.build(launch, arch).faults for launch in seen] == [(), ()]


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("shares", [[2304, 2304], [8, 8, 8]])
def test_exchanges_of_heads_and_tokens_build(shares: list[int], arch: str) -> None:
    """Three processes of 30 heads have 10 each, in a block of 16."""
    x, memory = bf16(1, shares[0], 30, 128), torch.empty(1, dtype=torch.uint8, device="meta")
    addresses = torch.empty(len(shares), dtype=torch.int64, device="meta")
    landing = exchange_triton.Landing((memory,) * len(shares), addresses)
    with launching.watch(arch) as seen:
        exchange_triton.launch_send_heads(x, x, x, bf16(1), landing, shares, 1)
        exchange_triton.launch_send_tokens(bf16(1, sum(shares), 15, 128), 30, landing, shares, 1)
    assert [launch.grid for launch in seen] == [(shares[0], len(shares))] * 2
    assert [launch.constants for launch in seen] == [(128, 16)] * 2
    assert [compiling.build(launch, arch).faults for launch in seen] == [(), ()]
