"""The builder of flashinfer's matmuls: each file ends built or with the reason why not."""

from __future__ import annotations

import importlib.util
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "producers" / "compile_flashinfer.py"
SAID = """
ptxas info    : Compiling entry function 'one' for 'sm_120a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : Compiling entry function 'two' for 'sm_120a'
    64 bytes stack frame, 96 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_flashinfer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, folder: Path, command: str, minutes: float = 1) -> str:
    limits = Namespace(gib=0.1, minutes=minutes)
    return str(script.build("sm120a", folder / "deep" / "x.cuda.o", command, {}, limits))


def test_a_file_that_is_built(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "said").write_text(SAID)
    said = run(script, tmp_path, f"cat {tmp_path}/said; head -c 4096 /dev/zero > deep/x.cuda.o")
    assert "not built" in said  # the object lies elsewhere than it should
    target = tmp_path / "deep" / "x.cuda.o"
    said = run(script, tmp_path, f"cat {tmp_path}/said; head -c 4096 /dev/zero > {target}")
    expected = "2 kernels of 168/255 registers, at most 96 bytes spilled, 4 KiB"
    assert said.startswith(f"sm120a x.cuda.o: built: {expected} (0 s, ")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo 'a.h:1:9: fatal error: cuda.h: No such file or directory'; exit 1", "header cuda.h"),
        ("echo 'terminate: std::bad_alloc'; exit 134", "memory: more than --gib 0.1"),
        ("head -c 1G /dev/zero | tail", "memory: more than --gib 0.1"),
        ("echo fine; echo 'x.cu(7): error: no operator'; exit 2", r"x.cu\(7\): error: no operator"),
        ("kill -9 $$", "ended by SIGKILL: memory?"),
        ("exit 3", "exit code 3: no word"),
    ],
)
def test_why_a_file_is_not_built(
    script: ModuleType, tmp_path: Path, command: str, reason: str
) -> None:
    said = run(script, tmp_path, f"export PATH=/usr/bin:/bin; set -o pipefail; {command}")
    assert re.match(f"sm120a x.cuda.o: not built: .*{reason}", said)


def test_the_time_of_a_file_ends_what_it_started(script: ModuleType, tmp_path: Path) -> None:
    said = run(script, tmp_path, f"(sleep 3; touch {tmp_path}/late) & wait", minutes=0.005)
    assert "not built: 0.005 minutes are over: see --minutes" in said
    assert not (tmp_path / "late").exists()


def test_one_tile_stands_for_all_unless_all_are_asked_for(script: ModuleType) -> None:
    names = ("gemm.cuda.o", "gemm___nv_bfloat16_128_32_128.cuda.o", "b_bfloat16_256.cuda.o")
    commands = dict.fromkeys(names, "nvcc")
    assert list(script.choose(commands, whole=False)) == [names[1]]
    assert script.choose(commands, whole=True) == commands
