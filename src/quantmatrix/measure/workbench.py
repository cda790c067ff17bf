"""Workbench: runs of cells on this machine, with nothing loaded or computed twice.

Pipelines are kept one at a time, keyed by everything that shapes them (checkpoint, backend, dtype,
offload ...): cells come sorted, and two large ones would not fit on a device. The command line of a
cell is lent the one at hand. BF16 runs are kept as latents and media, keyed by model, size, steps,
prompt and seed; plans are kept while cells near them may ask again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from quantmatrix import api
from quantmatrix.errors import MachineError
from quantmatrix.hardware import probe
from quantmatrix.measure.layers import LayerErrors, watch_layers
from quantmatrix.request import FP4_BACKEND_VARIABLE, Request, blank_generation, strip_quantization
from quantmatrix.runtime import generate as generating
from quantmatrix.runtime import parallel
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.run import Run
from quantmatrix.tables.identify import find_difference

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, HardwareRow, Matrix

PLANS = 64
"""Plans that are kept: those of a cell and of its base model are asked for by every check."""


class Workbench:
    """Requests, plans, pipelines and runs of cells."""

    def __init__(self, tables: Matrix, *, tiny: bool = True, worker: int | None = None) -> None:
        """`worker` is the number of the process among several, which is also that of its device."""
        self.tables = tables
        self.tiny = tiny
        self.worker = worker
        self._pipeline: tuple[str, Any] | None = None
        self._baselines: dict[str, Run] = {}
        self._plans: dict[str, Plan] = {}
        if worker is not None:
            torch.set_num_threads(1)

    def argv(self, cell: Cell) -> list[str]:
        """The command of a cell as it is run here."""
        command = cell.command(self.tables)
        return [*command, "--tiny"] if self.tiny else command

    def command(self, cell: Cell) -> str:
        """The same quoted for a shell, environment included."""
        return f"{cell.shell(self.tables)}{' --tiny' if self.tiny else ''}"

    def request(self, cell: Cell) -> Request:
        """The request of a cell on this machine's device; MachineError when it is another machine."""
        device = self.find_device(self.tables.hardware[cell.hardware])
        return self._read(cell, device=device)

    def planned_request(self, cell: Cell) -> Request:
        """The request of a cell, to be planned for the cell's hardware wherever we are."""
        return self._read(cell, hardware=cell.hardware)

    def _read(self, cell: Cell, **extra: str) -> Request:
        backend = cell.environment.get(FP4_BACKEND_VARIABLE)
        return Request.from_words(self.argv(cell)[2:], fp4_gemm_backend=backend, **extra)

    def find_device(self, row: HardwareRow) -> str:
        """The torch device of a hardware row on this machine; one worker, one device.

        Of a row of several devices it is their kind alone: one worker has them all. Raises
        MachineError where this machine is another one, or has too few devices.
        """
        if row.vendor == "cpu":
            return "cpu"
        machine = probe.probe()
        if why := find_difference(machine, row):
            raise MachineError(f"cells of {row.id} cannot be tested here: {why}")
        slot = self.worker or 0
        if row.devices > 1:
            if slot:
                raise MachineError(f"cells of {row.id} take all devices: run without workers")
            return machine.device.partition(":")[0]
        if slot >= machine.count:
            raise MachineError(
                f"worker {slot} has no device of its own: {machine.count} of them are here; "
                f"use -n {machine.count}"
            )
        return f"{machine.device.partition(':')[0]}:{slot}"

    def plan(self, request: Request) -> Plan:
        """The plan of a request, made once; RefusedError when it ends in a refusal."""
        key = repr(request)
        plan = self._plans.pop(key, None) or api.require_plan(request)
        self._plans[key] = plan
        if len(self._plans) > PLANS:
            del self._plans[next(iter(self._plans))]  # the one that was asked for longest ago
        return plan

    def pipeline(self, request: Request, plan: Plan) -> Any:
        """The pipeline of a request, the one at hand if it is the same."""
        key = repr(replace(request, **blank_generation()))
        if self._pipeline is None or self._pipeline[0] != key:
            self.release()
            self._pipeline = (key, build_pipeline(plan))
        return self._pipeline[1]

    @contextmanager
    def lend(self, request: Request, plan: Plan) -> Iterator[list[bool]]:
        """Give the pipeline of a request to who generates by the same plan meanwhile, in this process.

        Whoever has another plan builds a pipeline. The list tells, for each, whether it was lent one.
        """
        lent: list[bool] = []

        def give(wanted: Plan, *, progress: bool = False) -> Any:
            lent.append(wanted == plan)
            if lent[-1]:
                return self.pipeline(request, plan)
            return build_pipeline(wanted, progress=progress)

        with patch.object(generating, "build_pipeline", give):
            yield lent

    def run(self, request: Request, plan: Plan) -> Run:
        """Generate with the pipeline of a request, or in the processes that its plan has."""
        if plan.processes > 1:
            self.release()
            resolved = replace(request, hub=plan.request.hub)
            return parallel.generate_together(resolved, plan)
        return self.run_alone(request, plan)

    def run_alone(self, request: Request, plan: Plan) -> Run:
        """Generate in this process with the pipeline of a request."""
        alone = replace(plan, processes=1)
        return generate(request, plan=alone, pipeline=self.pipeline(request, plan))

    def run_watched(self, cell: Cell, request: Request, plan: Plan) -> tuple[Run, LayerErrors]:
        """Generate here, and measure every quantized layer against the base model's on the way."""
        base = self.plan(self.base_request(cell, request))
        with watch_layers(self.pipeline(request, plan), plan, base) as errors:
            return self.run_alone(request, plan), errors

    def base_request(self, cell: Cell, request: Request) -> Request:
        """The same request of the base model in full precision."""
        return strip_quantization(request, self.tables.models[cell.model].repo)

    def baseline(self, cell: Cell, request: Request) -> Run:
        """The BF16 run that a cell is compared with: base model, same prompt, size and seed."""
        plain = self.base_request(cell, request)
        key = repr(plain)
        if key not in self._baselines:
            self.release()
            self._baselines[key] = generate(plain, plan=self.plan(plain))
        return self._baselines[key]

    def release(self) -> None:
        """Let go of the pipeline that is kept.

        What is left are libraries: a million objects that no later collection need look at.
        """
        if self._pipeline is not None:
            self._pipeline = None
            gc.collect()
            gc.freeze()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def folders(self, request: Request) -> dict[str, str]:
        """Folders of this machine that must not stand in a record."""
        from quantmatrix.tiny import hub

        named = {
            str(hub.default_folder()): "$HUB",
            str(self.tables_root()): "$PROJECT",
            str(Path.home()): "$HOME",
        }
        if request.hub.cache_dir:
            named[str(request.hub.cache_dir)] = "$HUB"
        return {folder: name for folder, name in named.items() if len(folder) > 1}

    def tables_root(self) -> Path:
        """Folder of the checkout that the tables lie in."""
        from quantmatrix.tables import read

        return read.tables_folder().parent
