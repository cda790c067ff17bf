"""The workbench: which device a cell runs on, and what its BF16 run is made of."""

from __future__ import annotations

import gc
import weakref
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tables import CASES, write_tables

from quantmatrix.errors import UsageError
from quantmatrix.hardware import probe
from quantmatrix.hardware.machine import Machine
from quantmatrix.harness.workers import find_group
from quantmatrix.measure import workbench
from quantmatrix.measure.workbench import Workbench
from quantmatrix.request import FP4_BACKEND_VARIABLE, Hub, Request, strip_quantization
from quantmatrix.runtime import generate as generating
from quantmatrix.tables import read

H100 = Machine("NVIDIA H100 80GB HBM3", "nvidia", "sm90", 80 * 2**30, device="cuda:0", count=2)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    cases = [{**CASES[0], "flags": f"{FP4_BACKEND_VARIABLE}=cudnn --seed 3 --height 32"}]
    return Workbench(read.read(write_tables(tmp_path / "matrix", cases)))


def test_a_cell_becomes_the_request_of_its_command(bench: Workbench) -> None:
    cell = bench.tables.cells[0]
    request = bench.request(cell)
    assert request.model_path == "some/flux-1"
    assert request.component_paths == {"transformer": "some/flux1-fp8"}
    assert (request.seed, request.height, request.backend) == ((3,), 32, "reference")
    assert (request.tiny, request.device, request.fp4_gemm_backend) == (True, "cpu", "cudnn")
    assert bench.command(cell).startswith(f"{FP4_BACKEND_VARIABLE}=cudnn quantmatrix generate")
    assert bench.command(cell).endswith("--tiny")


def test_planning_for_other_hardware_needs_none(bench: Workbench) -> None:
    cell = next(cell for cell in bench.tables.cells if cell.hardware == "h100")
    assert bench.planned_request(cell).hardware == "h100"


def test_each_worker_has_its_own_device(bench: Workbench, monkeypatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: H100)
    row = replace(bench.tables.hardware["h100"], memory_gib=80.0)
    assert bench.find_device(row) == "cuda:0"
    bench.worker = 1
    assert bench.find_device(row) == "cuda:1"
    assert bench.find_device(bench.tables.hardware["cpu"]) == "cpu"
    bench.worker = 2
    with pytest.raises(UsageError, match=r"worker 2 has no device .* use -n 2"):
        bench.find_device(row)


def test_a_worker_computes_with_one_thread(bench: Workbench) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Workbench(bench.tables)
        assert torch.get_num_threads() == 2
        Workbench(bench.tables, worker=3)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_several_devices_belong_to_one_worker(bench: Workbench, monkeypatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: H100)
    row = replace(bench.tables.hardware["h100"], memory_gib=80.0, devices=2)
    assert bench.find_device(row) == "cuda"
    bench.worker = 0
    assert bench.find_device(row) == "cuda"
    bench.worker = 1
    with pytest.raises(UsageError, match="cells of h100 take all devices: run without workers"):
        bench.find_device(row)
    with pytest.raises(UsageError, match=r"2 x NVIDIA H100.*, but 3 are needed"):
        bench.find_device(replace(row, devices=3))


def test_a_shared_run_is_made_in_processes_of_its_own(bench: Workbench, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        workbench.parallel,
        "generate_together",
        lambda request, made: calls.append((request, made)) or made,
    )
    request = replace(bench.request(bench.tables.cells[0]), nproc_per_node=2)
    hub = Hub(offline=True)
    made = SimpleNamespace(processes=2, request=replace(request, hub=hub))
    assert bench.run(request, made) is made
    assert calls == [(replace(request, hub=hub), made)], "the stand-ins' hub goes with the request"
    assert strip_quantization(request, "some/base").nproc_per_node == 1


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, None),
        ({"memory_gib": 141.0}, "has 80 GiB of memory"),
        ({"arch": "sm100"}, "architecture sm90"),
        ({"vendor": "amd"}, "vendor nvidia"),
        ({"memory_gib": 0.0}, None),
    ],
)
def test_another_machine_proves_nothing(bench: Workbench, row: dict, why: str | None) -> None:
    found = workbench.find_difference(
        H100, replace(bench.tables.hardware["h100"], **{"memory_gib": 80.0, **row})
    )
    assert found is None if why is None else why in str(found)


def test_the_bf16_run_has_nothing_of_the_checkpoint() -> None:
    words = "--model-path some/w8a8 --model-id FLUX.1-dev --transformer-weights-path x.safetensors"
    words += " --transformer-2-path y --vae-path z --enable-svdquant --quantization-precision int4"
    words += " --quantization-rank 32 --backend decode --seed 5 --height 64 --prompt fox"
    request = Request.from_words(words.split())
    plain = strip_quantization(request, "some/base")
    assert plain == Request(
        model_path="some/base",
        component_paths={"vae": "z"},
        seed=(5,),
        height=64,
        prompt=("fox",),
    )


def test_pipelines_and_bf16_runs_are_made_once(bench: Workbench, monkeypatch) -> None:
    built, ran = [], []
    monkeypatch.setattr(workbench, "build_pipeline", lambda made: built.append(made) or object())
    monkeypatch.setattr(
        workbench, "generate", lambda request, **_: ran.append(request) or SimpleNamespace()
    )
    monkeypatch.setattr(workbench.api, "require_plan", lambda request: SimpleNamespace())
    cell, made = bench.tables.cells[0], make_dataclass("Made", [("processes", int)])(1)
    request = bench.request(cell)
    assert bench.baseline(cell, request) is bench.baseline(cell, request)
    assert len(ran) == 1
    for changed in ({}, {"seed": (9,)}, {"prompt": ("x",)}):
        bench.run(replace(request, **changed), made)
    assert len(built) == 1
    for changed in ({"backend": "decode"}, {"dtype": "float32"}, {"dit_layerwise_offload": True}):
        bench.run(replace(request, **changed), made)
    assert len(built) == 4
    assert bench.baseline(cell, replace(request, backend="decode")) is not None
    assert len([r for r in ran if r.model_path == "some/flux-1" and not r.component_paths]) == 1


def test_plans_are_made_once_and_the_oldest_goes(bench: Workbench, monkeypatch) -> None:
    made: list[Request] = []
    monkeypatch.setattr(
        workbench.api, "require_plan", lambda request: made.append(request) or object()
    )
    first = bench.request(bench.tables.cells[0])
    kept = bench.plan(first)
    others = [replace(first, seed=(number,)) for number in range(100, 99 + workbench.PLANS)]
    for request in others:
        bench.plan(request)
    assert bench.plan(replace(first)) is kept
    bench.plan(replace(first, backend="decode"))
    assert len(made) == workbench.PLANS + 1
    assert bench.plan(first) is kept
    bench.plan(others[0])  # it was asked for longest ago, and is made again
    assert len(made) == workbench.PLANS + 2


def test_a_pipeline_is_lent_to_who_has_its_plan(bench: Workbench, monkeypatch) -> None:
    built: list[str] = []

    def build(plan: str, *, progress: bool = False) -> str:
        built.append(plan)
        return f"pipeline of {plan}"

    monkeypatch.setattr(workbench, "build_pipeline", build)
    usual, request = generating.build_pipeline, bench.request(bench.tables.cells[0])
    kept = bench.pipeline(request, "plan")
    with bench.lend(request, "plan") as lent:
        assert generating.build_pipeline("plan", progress=True) is kept
        assert generating.build_pipeline("another", progress=False) == "pipeline of another"
    assert lent == [True, False]
    assert built == ["plan", "another"]
    with pytest.raises(ZeroDivisionError), bench.lend(request, "plan"):
        raise ZeroDivisionError
    assert generating.build_pipeline is usual


def test_tests_of_a_cell_are_grouped_and_others_go_by_file() -> None:
    groups = {"a@cpu+decode": "flux-1 x"}
    assert find_group("tests/suites/test_load.py::test_load[a@cpu+decode]", groups) == "flux-1 x"
    assert find_group("tests/unit/test_a.py::test_b[1]", groups) == "tests/unit/test_a.py"


def test_a_pipeline_is_collected_and_libraries_are_left_alone(bench: Workbench) -> None:
    """A collection over all objects of torch and diffusers takes a second, and came for every cell."""
    pipeline = torch.nn.Linear(2, 2)
    pipeline.itself = [pipeline]  # only a collection frees it
    gone = weakref.ref(pipeline)
    bench._pipeline = ("key", pipeline)
    del pipeline
    gc.unfreeze()
    try:
        bench.release()
        assert gone() is None
        assert gc.get_freeze_count() > len(gc.get_objects())
    finally:
        gc.unfreeze()
