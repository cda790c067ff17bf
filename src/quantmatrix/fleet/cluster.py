"""Cluster: which nodes have which hardware, and what a task of a hardware asks Ray for.

A custom resource names the hardware of a node, with the number of tasks that may run there at once:

    ray start --address HEAD --resources '{"quantmatrix/h200": 8}'

Of any other node a probe finds it, as `--hardware auto` does. Where every node of a hardware names it,
tasks ask for that resource, so that nodes which join later are used, too; otherwise for one of the
nodes that were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantmatrix.fleet.answers import Probe
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from quantmatrix.tables.rows import HardwareRow, Matrix

PREFIX = "quantmatrix/"
"""What the custom resource of a hardware begins with."""
DEVICES = {"nvidia": "GPU", "amd": "GPU", "ascend": "NPU"}
"""Ray's name of a vendor's devices."""


@dataclass(frozen=True)
class Node:
    """A node as Ray describes it."""

    id: str
    name: str
    """Address; to be shown."""
    resources: Mapping[str, float]

    @property
    def named(self) -> tuple[str, ...]:
        """Hardware that custom resources name."""
        found = (name for name, count in self.resources.items() if count >= 1)
        return tuple(name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX))

    @property
    def runs_tasks(self) -> bool:
        """Whether a task could run there; a head that only coordinates has no CPU."""
        return self.resources.get("CPU", 0) >= 1


@dataclass(frozen=True)
class Demand:
    """What a task asks Ray for."""

    resources: Mapping[str, float]
    """`CPU`, `GPU`, others by their names."""
    nodes: tuple[str, ...] = ()
    """Ids, one of which it must be; empty: any that has the resources."""


@dataclass
class Site:
    """The nodes of a hardware."""

    row: HardwareRow
    nodes: list[Node] = field(default_factory=list)

    @property
    def by_name(self) -> bool:
        """Whether every node names the hardware by a resource."""
        return all(self.row.id in node.named for node in self.nodes)

    def demand(self, *, needs_device: bool) -> Demand:
        """What a task of this hardware asks for: as many devices as its row has."""
        count = float(self.row.devices or 1)
        asked = {"CPU": 1.0}
        device = DEVICES.get(self.row.vendor)
        if device and needs_device:
            asked[device] = count
        if self.by_name:
            return Demand({**asked, f"{PREFIX}{self.row.id}": count})
        return Demand(asked, tuple(node.id for node in self.nodes))

    def explain_lack(self, demand: Demand) -> str | None:
        """Why no node here could ever run such a task, or None."""
        for name, count in demand.resources.items():
            if not any(node.resources.get(name, 0) >= count for node in self.nodes):
                shown = ", ".join(node.name for node in self.nodes)
                return f"no node of {self.row.id} has {count:g} {name} for Ray ({shown})"
        return None


def find_sites(
    nodes: Iterable[Node], probes: Mapping[str, Probe | str], tables: Matrix, source: str
) -> tuple[dict[str, Site], dict[str, str]]:
    """(the nodes of each hardware, by its id; why other nodes are not used, by their names).

    `probes` are answers by a node's id, or why there is none; `source` is the digest of the driver's
    package.
    """
    sites: dict[str, Site] = {}
    unused: dict[str, str] = {}
    for node in nodes:
        why, rows = judge(node, probes.get(node.id, "it was not asked"), tables, source)
        if why:
            unused[f"{node.name} ({node.id[:8]})"] = why
        for row in rows:
            sites.setdefault(row.id, Site(row)).nodes.append(node)
    return sites, unused


def judge(
    node: Node, found: Probe | str, tables: Matrix, source: str
) -> tuple[str, list[HardwareRow]]:
    """(why a node is not used, or nothing; the rows of hardware.csv that it is)."""
    if not node.runs_tasks:
        return "it offers tasks no CPU", []
    if isinstance(found, str):
        return found, []
    if found.problem:
        return quote(found.problem, 500), []
    if found.source != source:
        return "its quantmatrix differs from the driver's: install the same commit there", []
    names = node.named or (found.hardware,)
    if unknown := [name for name in names if name not in tables.hardware]:
        return f"{quote(unknown[0])} is not a row of hardware.csv", []
    rows = [tables.hardware[name] for name in names]
    return "", rows if node.named else [*rows, *find_several(node, rows[0], tables)]


def find_several(node: Node, row: HardwareRow, tables: Matrix) -> list[HardwareRow]:
    """Rows of several devices of the kind of a row, as many as a node has for Ray."""
    count = node.resources.get(DEVICES.get(row.vendor, ""), 0)
    kind: Any = (row.vendor, row.arch, row.memory_gib)
    return [
        other
        for other in tables.hardware.values()
        if 1 < (other.devices or 1) <= count
        and (other.vendor, other.arch, other.memory_gib) == kind
    ]
