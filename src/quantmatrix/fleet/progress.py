"""Progress: how far a run is, hardware by hardware, in memory and as a file that `fleet status` reads.

The file lies beside the evidence folder, not in it: `DIR.fleet/status.json`, with the JUnit files in
`DIR.fleet/junit`. The time that is left is the estimate of the groups that are not done, corrected by how
long the finished ones took beside theirs, shared among as many as run at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix import strict_json
from quantmatrix.errors import UsageError
from quantmatrix.files import whole
from quantmatrix.proof.record import tell_time

if TYPE_CHECKING:
    from quantmatrix.fleet.answers import Note
    from quantmatrix.fleet.groups import Group

SCHEMA = 1
STATUS = "status.json"
EVERY = 1.0
"""Seconds between two writings of the file."""
DEAD = 30.0
"""Seconds without a writing after which nobody runs any more."""
SHOWN = 8
"""Running groups that are shown to people."""


def fleet_folder(evidence: Path) -> Path:
    """Where a run keeps what is no record: a folder beside that of the evidence."""
    return evidence.with_name(f"{evidence.name}.fleet")


@dataclass
class Running:
    """A group that a node works at."""

    node: str
    since: float
    cells: int
    done: int


@dataclass
class Lane:
    """The groups of one hardware."""

    nodes: int = 0
    planned: int = 0
    """Cells."""
    kept: int = 0
    """Cells whose records were there before."""
    done: int = 0
    failed: int = 0
    not_executed: int = 0
    waiting: dict[str, float] = field(default_factory=dict)
    """Estimated seconds of groups that are not done, by name."""
    running: dict[str, Running] = field(default_factory=dict)
    estimated: float = 0.0
    """Seconds of the groups that are done, as estimated."""
    spent: float = 0.0
    """The same, as it was."""

    @property
    def seconds_left(self) -> float:
        """Estimated."""
        speed = self.spent / self.estimated if self.estimated and self.spent else 1.0
        left = sum(self.waiting.values())
        for name, one in self.running.items():
            left -= self.waiting.get(name, 0.0) * one.done / max(one.cells, 1)
        return round(max(left, 0.0) * speed / max(len(self.running), 1), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        counts = ("nodes", "planned", "kept", "done", "failed", "not_executed", "seconds_left")
        now = time.time()
        running = [
            {
                "group": name,
                "node": one.node,
                "seconds": round(now - one.since, 1),
                "cells": one.cells,
                "done": one.done,
            }
            for name, one in sorted(self.running.items())
        ]
        waiting = len(self.waiting) - len(self.running)
        found = {name: getattr(self, name) for name in counts}
        return {**found, "running": running, "waiting_groups": waiting}


class Progress:
    """Counts what becomes of cells, and writes the file now and then."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """`folder` is that of `fleet_folder`; `about` is kept in the file as it is."""
        self.path, self.about = folder / STATUS, dict(about)
        self.lanes: dict[str, Lane] = {}
        self.groups: dict[str, Group] = {}
        self.started, self.finished = tell_time(), False
        self.written = 0.0

    def lane(self, hardware: str) -> Lane:
        """That of a hardware."""
        return self.lanes.setdefault(hardware, Lane())

    def expect(self, groups: Iterable[Group]) -> None:
        """Count groups among those to be run."""
        for group in groups:
            self.groups[group.name] = group
            self.lane(group.hardware).waiting[group.name] = group.seconds

    def take_note(self, note: Note) -> None:
        """A node has begun a group, or is further; notes of others than expected groups are dropped."""
        group = self.groups.get(note.group)
        lane = self.lane(group.hardware) if group else None
        if group is None or lane is None or group.name not in lane.waiting:
            return
        known = lane.running.get(group.name)
        if known is None or known.node != note.node:
            known = Running(note.node, time.time(), len(group.cells), 0)
            lane.running[group.name] = known
        known.done = min(max(note.done, 0), known.cells)

    def close(self, name: str, seconds: float, counts: Mapping[str, int]) -> None:
        """A group is done after some seconds; `counts` are its cells that are `done`, `failed` and `not_executed`."""
        group = self.groups.pop(name)
        lane = self.lane(group.hardware)
        lane.waiting.pop(name, None)
        lane.running.pop(name, None)
        if seconds:
            lane.spent += seconds
            lane.estimated += group.seconds
        for what, count in counts.items():
            setattr(lane, what, getattr(lane, what) + count)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the file has it."""
        lanes = {name: lane.to_json() for name, lane in self.lanes.items()}
        return {
            "schema": SCHEMA,
            **self.about,
            "started": self.started,
            "written": time.time(),
            "finished": self.finished,
            "hardware": lanes,
        }

    def write(self, *, at_once: bool = False) -> None:
        """Write the file, at most once a second unless it has to be."""
        now = time.monotonic()
        if not at_once and now - self.written < EVERY:
            return
        self.written = now
        text = json.dumps(self.to_json(), indent=1, sort_keys=True)
        with whole(self.path) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")


def read(evidence: Path) -> dict[str, Any]:
    """The status of the run that writes into an evidence folder; UsageError where there was none."""
    path = fleet_folder(evidence) / STATUS
    try:
        found = strict_json.read(path)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no run of a fleet writes into {evidence}; start one with `quantmatrix fleet run`"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(f"{path}: not the status of a run, or of another version")
    alive = not found["finished"] and time.time() - float(found["written"]) < DEAD
    return {
        **found,
        "state": "finished" if found["finished"] else "running" if alive else "stopped",
    }


def describe(status: Mapping[str, Any]) -> list[str]:
    """A status for people."""
    lines = [f"{status['state']}: {status.get('address', '')}, started {status['started']}"]
    if status.get("dashboard"):
        lines.append(f"Ray's dashboard: http://{status['dashboard']}")
    columns = ("planned", "kept", "done", "failed", "not_executed")
    lines.append(
        f"{'hardware':14} nodes {' '.join(f'{name:>12}' for name in columns)}    time left"
    )
    for hardware, lane in status["hardware"].items():
        counts = " ".join(f"{lane[name]:12}" for name in columns)
        left = show_seconds(lane["seconds_left"])
        lines.append(f"{hardware:14} {lane['nodes']:5} {counts} {left:>12}")
        for one in lane["running"][:SHOWN]:
            since = show_seconds(one["seconds"])
            lines.append(
                f"  {one['group']} on {one['node']}: {one['done']} of {one['cells']} cells, {since}"
            )
        more = len(lane["running"]) - SHOWN
        if more > 0 or lane["waiting_groups"]:
            lines.append(f"  {max(more, 0)} more running, {lane['waiting_groups']} groups waiting")
    if status["state"] == "stopped":
        lines.append("nobody runs it: start the same `quantmatrix fleet run` again to resume")
    return lines


def show_seconds(seconds: float) -> str:
    """Seconds as `2 h 05 min`, `3 min`, `12 s`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
