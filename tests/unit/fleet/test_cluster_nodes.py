"""Which nodes have which hardware, what tasks ask for, and how Ray's errors are told."""

from __future__ import annotations

import pytest

from quantmatrix.errors import UnusableError
from quantmatrix.fleet.answers import Probe
from quantmatrix.fleet.cluster import Demand, Node, Site, find_sites
from quantmatrix.fleet.engine import SLOW, STARTS, connect, demand_to_options, explain
from quantmatrix.tables import read

OURS = "the digest"


def node(number: int, **resources: float) -> Node:
    given = {name.replace("__", "/"): count for name, count in resources.items()}
    return Node(str(number) * 12, f"10.0.0.{number}", {"CPU": 8.0, **given})


def test_nodes_are_named_or_probed_and_others_are_not_used() -> None:
    tables = read.read()
    nodes = [
        node(1, quantmatrix__h200=8, GPU=8),
        node(2, GPU=4),
        node(3),
        node(4),
        node(5, quantmatrix__h201=1),
        node(6, CPU=0.0),
        node(7),
        node(8),
    ]
    probes: dict[str, Probe | str] = {
        nodes[0].id: Probe(OURS),
        nodes[1].id: Probe(OURS, "rtx-5090"),
        nodes[2].id: Probe(OURS, "cpu"),
        nodes[3].id: Probe("another", "cpu"),
        nodes[4].id: Probe(OURS),
        nodes[6].id: Probe(OURS, problem="M60 is not a row\x1b[2J"),
        nodes[7].id: "its devices are taken",
    }
    sites, unused = find_sites(nodes, probes, tables, OURS)
    assert {name: [n.name for n in site.nodes] for name, site in sites.items()} == {
        "h200": ["10.0.0.1"],
        "rtx-5090": ["10.0.0.2"],
        "rtx-5090-x4": ["10.0.0.2"],  # a node with four of them
        "cpu": ["10.0.0.3"],
    }
    assert unused == {
        "10.0.0.4 (44444444)": "its quantmatrix differs from the driver's: install the same commit there",
        "10.0.0.5 (55555555)": "h201 is not a row of hardware.csv",
        "10.0.0.6 (66666666)": "it offers tasks no CPU",
        "10.0.0.7 (77777777)": "M60 is not a row\\x1b[2J",
        "10.0.0.8 (88888888)": "its devices are taken",
    }


@pytest.mark.parametrize(
    ("hardware", "nodes", "needs_device", "expected"),
    [
        ("cpu", [node(1)], True, Demand({"CPU": 1.0}, ("1" * 12,))),
        (
            "h200",
            [node(1, quantmatrix__h200=8, GPU=8)],
            True,
            Demand({"CPU": 1.0, "GPU": 1.0, "quantmatrix/h200": 1.0}),
        ),
        (
            "h200",
            [node(1, quantmatrix__h200=8, GPU=8), node(2, GPU=8)],  # one of them was probed
            True,
            Demand({"CPU": 1.0, "GPU": 1.0}, ("1" * 12, "2" * 12)),
        ),
        ("h200", [node(1, GPU=8)], False, Demand({"CPU": 1.0}, ("1" * 12,))),
        ("rtx-5090-x4", [node(1, GPU=4)], True, Demand({"CPU": 1.0, "GPU": 4.0}, ("1" * 12,))),
        ("ascend-910b", [node(1, NPU=8)], True, Demand({"CPU": 1.0, "NPU": 1.0}, ("1" * 12,))),
    ],
)
def test_what_a_task_asks_for(
    hardware: str, nodes: list[Node], needs_device: bool, expected: Demand
) -> None:
    site = Site(read.read().hardware[hardware], nodes)
    found = site.demand(needs_device=needs_device)
    assert found == expected
    assert site.explain_lack(found) is None


def test_a_hardware_without_its_devices_is_told() -> None:
    site = Site(read.read().hardware["h200"], [node(1, quantmatrix__h200=8)])
    why = site.explain_lack(site.demand(needs_device=True))
    assert why == "no node of h200 has 1 GPU for Ray (10.0.0.1)"
    assert site.explain_lack(site.demand(needs_device=False)) is None


def test_a_demand_in_rays_words() -> None:
    asked = Demand({"CPU": 1.0, "GPU": 2.0, "NPU": 3.0}, ("a", "b"))
    assert demand_to_options(asked) == {
        "num_cpus": 1.0,
        "num_gpus": 2.0,
        "resources": {"NPU": 3.0},
        "label_selector": {"ray.io/node-id": "in(a,b)"},
    }
    assert "label_selector" not in demand_to_options(Demand({"CPU": 1.0}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("OutOfMemoryError", "out of memory: Ray stopped its worker to save the node: 2 workers"),
        ("NodeDiedError", "its node or worker died, 4 times"),
        ("WorkerCrashedError", "its node or worker died, 4 times"),
        ("RayTaskError(KeyError)", "an error on the node: KeyError: 'x'"),
        ("ObjectLostError", "ObjectLostError: 2 workers"),
    ],
)
def test_errors_of_ray_in_a_line(name: str, expected: str) -> None:
    error = type(name, (Exception,), {})("2 workers\n  were killed\nKeyError: 'x'")
    assert explain(error).startswith(expected)
    assert "\n" not in explain(error)


class SlowRay:
    """A Ray that starts the n-th time."""

    def __init__(self, good: int, message: str) -> None:
        self.good, self.message, self.starts = good, message, 0

    def init(self, **settings: object) -> str:
        self.starts += 1
        if self.starts < self.good:
            raise Exception(self.message)
        return "context"

    def shutdown(self) -> None:
        pass


def test_a_busy_machine_gets_more_goes_and_a_wrong_address_none() -> None:
    assert connect(SlowRay(STARTS, f"The current node {SLOW}."), None) == "context"
    slow = SlowRay(STARTS + 1, f"The current node {SLOW}.")
    with pytest.raises(UnusableError, match=SLOW):
        connect(slow, None)
    assert slow.starts == STARTS
    wrong = SlowRay(2, "no cluster\n  there")
    with pytest.raises(UnusableError, match="--address a:1: no cluster there"):
        connect(wrong, "a:1")
    assert wrong.starts == 1
