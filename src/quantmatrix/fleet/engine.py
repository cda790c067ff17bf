"""Engine: every call of Ray. Ray places tasks, retries them, and watches nodes and their memory.

A task takes bytes and gives bytes, both of JSON; Ray itself sends functions by their names, since nodes
have this package. A task that died with its node or worker is run again by Ray, on another node of the
same hardware; what comes of it in the end is an answer or a `Failure`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from quantmatrix.errors import MissingPackageError, UnusableError
from quantmatrix.fleet import on_node
from quantmatrix.fleet.cluster import Demand, Node

RETRIES = 3
"""How often Ray runs a task again whose worker or node died."""
PROBE_SECONDS = 300.0
"""A node that has not told what it is by then is not used."""
STARTS = 3
"""How often Ray is started on this machine before that is given up."""
SLOW = "timed out during startup"
"""What Ray says of a machine that was too slow."""
KEPT = 10_000
"""Notes that wait to be fetched; older ones are dropped."""

Work = Callable[[bytes, bytes, Callable[[bytes], None]], bytes]
"""What a task runs: bundle, order and a function that takes notes, to an answer."""


@dataclass(frozen=True)
class Failure:
    """A task without an answer."""

    why: str


class Engine(Protocol):
    """What the driver needs of a cluster."""

    def list_nodes(self) -> list[Node]:
        """The nodes that are alive."""

    def submit(self, name: str, order: bytes, demand: Demand) -> None:
        """Hand a task over; its name is unique among those that are not done."""

    def wait(self, seconds: float) -> list[tuple[str, bytes | Failure]]:
        """The tasks that are done by now, at the latest after some seconds."""

    def read_notes(self) -> list[bytes]:
        """What running tasks have said since the last time."""

    def cancel(self, name: str) -> None:
        """Give a task up; it is not among those that `wait` gives any more."""


class Board:
    """An actor that keeps notes of running tasks until the driver fetches them."""

    def __init__(self) -> None:
        self.notes: list[bytes] = []

    def tell(self, note: bytes) -> None:
        """Take a note."""
        self.notes = [*self.notes[-KEPT:], note]

    def take(self) -> list[bytes]:
        """Give the notes away."""
        notes, self.notes = self.notes, []
        return notes


def work(data: bytes, order: bytes, board: Any) -> bytes:
    """A task of a group, on its node."""
    return on_node.run_group(data, order, lambda note: board.tell.remote(note) and None)


def probe(data: bytes, named: bool) -> bytes:
    """A task that looks at its node."""
    return on_node.probe(data, named=named)


def import_ray() -> Any:
    """The package; MissingPackageError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "quantmatrix fleet needs Ray: pip install 'quantmatrix[ray]'"
        ) from error
    return ray


def connect(ray: Any, address: str | None) -> Any:
    """Ray's context of a cluster; UnusableError where none answers or starts.

    A machine that is busy may not start Ray within the 15 seconds that Ray gives itself: it gets more goes.
    """
    left = STARTS
    while True:
        left -= 1
        try:
            return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray has no class of its own for it, and raises five others
            if left and SLOW in str(error):
                ray.shutdown()
                continue
            where = f"--address {address}" if address else "Ray"
            raise UnusableError(f"{where}: {' '.join(str(error).split()):.500}") from error


def explain(error: BaseException) -> str:
    """Why a task has no answer, as one line."""
    name = type(error).__name__
    text = " ".join(str(error).split())
    if name == "OutOfMemoryError":
        return f"out of memory: Ray stopped its worker to save the node: {text:.400}"
    if name in ("NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError"):
        return f"its node or worker died, {RETRIES + 1} times: {text:.300}"
    if name.startswith("RayTaskError"):
        return f"an error on the node: {str(error).strip().rpartition(chr(10))[2]:.400}"
    return f"{name}: {text:.400}"


class RayEngine:
    """A connection to a cluster; a context manager, which leaves it at the end."""

    def __init__(self, address: str | None, data: bytes, task: Callable[..., bytes] = work) -> None:
        """Connect; without an address to `RAY_ADDRESS`, the cluster of this machine, or to a new one here.

        `data` is the bundle. Raises MissingPackageError, and UnusableError where no cluster answers or starts.
        """
        self.ray = import_ray()
        self.context = connect(self.ray, address)
        self.data = self.ray.put(data)
        self.task = self.ray.remote(task)
        self.board = self.ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self.names: dict[Any, str] = {}
        self.notes: Any = None

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.shutdown()

    @property
    def address(self) -> str:
        """Where the cluster is."""
        return str(self.context.address_info.get("gcs_address") or socket.gethostname())

    @property
    def dashboard(self) -> str:
        """Address of Ray's dashboard; empty where it does not run."""
        return str(self.context.dashboard_url or "")

    def list_nodes(self) -> list[Node]:
        """The nodes that are alive."""
        return [
            Node(one["NodeID"], f"{one['NodeManagerAddress']}", dict(one["Resources"]))
            for one in self.ray.nodes()
            if one["Alive"]
        ]

    def probe(self, nodes: Iterable[Node]) -> dict[str, bytes | Failure]:
        """What each node says of itself, by its id; a device is borrowed for a moment to be looked at."""
        remote = self.ray.remote(probe)
        asked = {}
        for node in (node for node in nodes if node.runs_tasks):
            named = bool(node.named)
            found = {name: 0.01 for name in ("GPU", "NPU") if node.resources.get(name)}
            options = demand_to_options(
                Demand({"CPU": 0.01, **({} if named else found)}, (node.id,))
            )
            asked[remote.options(max_retries=1, **options).remote(self.data, named)] = node.id
        ready, late = (
            self.ray.wait(list(asked), num_returns=max(len(asked), 1), timeout=PROBE_SECONDS)
            if asked
            else ([], [])
        )
        for ref in late:
            self.ray.cancel(ref, force=True)
        silent = (
            f"it did not identify itself within {PROBE_SECONDS:.0f} seconds: are its devices busy?"
        )
        return {asked[ref]: self.fetch(ref) for ref in ready} | {
            asked[ref]: Failure(silent) for ref in late
        }

    def fetch(self, ref: Any) -> bytes | Failure:
        """What a finished task gave."""
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            return Failure(explain(error))
        return answer if isinstance(answer, bytes) else Failure("its answer is not bytes")

    def submit(self, name: str, order: bytes, demand: Demand) -> None:
        """Hand a task over; see `Engine`."""
        options = demand_to_options(demand)
        task = self.task.options(max_retries=RETRIES, name=name, **options)
        self.names[task.remote(self.data, order, self.board)] = name

    def wait(self, seconds: float) -> list[tuple[str, bytes | Failure]]:
        """The tasks that are done, at the latest after some seconds; see `Engine`."""
        refs = list(self.names)
        if not refs:
            return []
        ready, _ = self.ray.wait(refs, timeout=seconds)
        if ready:  # and all others that are
            ready, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)
        return [(self.names.pop(ref), self.fetch(ref)) for ref in ready]

    def read_notes(self) -> list[bytes]:
        """What tasks have said; an answer that is not there yet is fetched the next time."""
        if self.notes is None:
            self.notes = self.board.take.remote()
        ready, _ = self.ray.wait([self.notes], timeout=0)
        if not ready:
            return []
        ref, self.notes = self.notes, None
        with suppress(self.ray.exceptions.RayError):  # the board is started again, empty
            return [note for note in self.ray.get(ref) if isinstance(note, bytes)]
        return []

    def cancel(self, name: str) -> None:
        """Give a task up; see `Engine`."""
        for ref in [ref for ref, known in self.names.items() if known == name]:
            del self.names[ref]
            self.ray.cancel(ref, force=True)


def demand_to_options(demand: Demand) -> dict[str, Any]:
    """A demand as options of a Ray task."""
    asked: Mapping[str, float] = demand.resources
    others = {name: count for name, count in asked.items() if name not in ("CPU", "GPU")}
    options = {
        "num_cpus": asked.get("CPU", 0),
        "num_gpus": asked.get("GPU", 0),
        "resources": others,
    }
    if demand.nodes:
        options["label_selector"] = {"ray.io/node-id": f"in({','.join(demand.nodes)})"}
    return options
