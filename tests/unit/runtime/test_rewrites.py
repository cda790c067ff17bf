"""Traced graphs after their rewrites: which kernels stand in them, and that their numbers are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from quantmatrix.hardware import probe
from quantmatrix.kernels import kernels_of
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime import rewrites
from quantmatrix.runtime.quantized_linear import QuantizedLinear, share_inputs
from quantmatrix.runtime.rewrites.codes import merge_equal

OURS = ("rms_norm_rope", "norm_codes", "gelu_codes")
EXPECTED = {
    # model: parts of each call in a graph, for each kind of block, in the order in which they are traced
    "flux-1": [
        {"rms_norm_rope": [2, 2], "norm_codes": [1, 1, 1, 1], "gelu_codes": [1, 1]},
        {"rms_norm_rope": [1, 1], "norm_codes": [2], "gelu_codes": [2]},
    ],
    "flux-2": [
        {"rms_norm_rope": [2, 2], "norm_codes": [1, 1, 1, 1], "gelu_codes": []},
        {"rms_norm_rope": [1, 1], "norm_codes": [1], "gelu_codes": []},
    ],
    "qwen-image": [
        {"rms_norm_rope": [2, 2], "norm_codes": [1, 1, 1, 1], "gelu_codes": [1, 1]},
    ],
    "z-image": [
        {"rms_norm_rope": [1, 1], "norm_codes": [1, 1], "gelu_codes": []},
    ],
    "wan-2-2": [
        {"rms_norm_rope": [1, 1], "norm_codes": [1, 1, 1], "gelu_codes": [1]},
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(model: str) -> tuple[Any, dict[str, Any]]:
    """A tiny transformer whose layers multiply e4m3 codes, as they do on a GPU, and inputs of one forward."""
    machine = probe.probe("cpu")
    options: dict[str, Any] = {"backend": "decode", "size": "tiny", "dtype": torch.float32}
    made: Any = synthesize(model, machine, family="modelopt-fp8", scheme="FP8", **options)
    kernel = next(one for one in kernels_of("linear.fp8") if one.backend == "torch")
    generator = torch.Generator().manual_seed(0)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, QuantizedLinear):
            size = (layer.out_features, layer.in_features)
            tensors = {
                "weight": (torch.randn(size, generator=generator) * 64).to(torch.float8_e4m3fn),
                "weight_scale": torch.tensor(1 / (64 * layer.in_features**0.5)),
                "input_scale": torch.tensor(0.02),
            }
            if layer.bias is not None:
                tensors["bias"] = layer.bias.data
            parent, _, child = name.rpartition(".")
            dtype = torch.float32
            other = QuantizedLinear(*size[::-1], kernel, layer.scheme, tensors, dtype)
            setattr(made.get_submodule(parent), child, other)
    share_inputs(made)
    return made, make_inputs(model, made, "cpu", torch.float32, size="tiny")


def run(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = transformer(**inputs)[0]
    return found[0] if isinstance(found, list) else found  # Z-Image gives a list


def list_calls(graph: fx.GraphModule) -> dict[str, list[int]]:
    """Parts of each call of a kernel of ours, by its name."""
    found: dict[str, list[int]] = {name: [] for name in OURS}
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if name in found:
            found[name].append(len(node.args[0]))
    return found


def count(graph: fx.GraphModule, *names: str) -> int:
    """Calls of functions or methods of these names whose result is read."""
    calls = [node for node in graph.graph.nodes if node.op.startswith("call") and node.users]
    return sum((getattr(node.target, "__name__", node.target)) in names for node in calls)


@pytest.mark.parametrize("model", EXPECTED)
def test_blocks_get_our_kernels_and_give_the_same_numbers(model: str) -> None:
    made, inputs = build(model)
    eager = run(made, inputs)
    graphs: list[fx.GraphModule] = []

    def keep(traced: fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(rewrites.rewrite(traced, everywhere=True))
        return traced.forward

    made.compile_repeated_blocks(backend=keep, fullgraph=True, dynamic=False)
    found = run(made, inputs)
    kinds = [list_calls(graph) for graph in graphs]
    assert all(kind in EXPECTED[model] for kind in kinds)
    assert all(kind in kinds for kind in EXPECTED[model])
    assert torch.allclose(found, eager, rtol=1e-3, atol=1e-3)
    for graph in graphs:
        products = [node for node in graph.graph.nodes if count_name(node) == "_scaled_mm"]
        assert products
        assert all(node.kwargs["use_fast_accum"] is True for node in products)


def count_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def test_without_a_gpu_kernels_of_ours_stay_out() -> None:
    made, inputs = build("flux-1")
    graphs: list[fx.GraphModule] = []

    def keep(traced: fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(rewrites.rewrite(traced))
        return traced.forward

    made.compile_repeated_blocks(backend=keep, fullgraph=True, dynamic=False)
    run(made, inputs)
    assert graphs
    for graph in graphs:
        assert list_calls(graph) == {name: [] for name in OURS}
        assert count(graph, "truediv")
        assert not count(graph, "reciprocal")


def trace(
    function: Callable[..., Any], *inputs: torch.Tensor, everywhere: bool = True
) -> fx.GraphModule:
    """The rewritten graph of a function, which has to give the same numbers."""
    graphs: list[fx.GraphModule] = []

    def keep(traced: fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(rewrites.rewrite(traced, everywhere=everywhere))
        return traced.forward

    found = torch.compile(function, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    expected = function(*inputs)
    for one, other in (
        zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    ):
        close = torch.allclose(one.float(), other.float(), rtol=0.13, atol=1e-3)  # a step of e4m3
        assert close
    return graphs[0]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Codes as a layer makes them."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat.float() / step).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


STEP = torch.tensor(0.02)
X, SCALE, SHIFT = draw(2, 6, 32), draw(2, 32, seed=1) / 4, draw(2, 32, seed=2)


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (32,), None, None, 1e-6) * (1 + scale[:, None]) + shift[:, None]


def test_a_norm_is_replaced_where_only_codes_are_made_of_it() -> None:
    alone = trace(lambda x, a, b, s: encode(modulate(x, a, b), s), X, SCALE, SHIFT, STEP)
    assert list_calls(alone)["norm_codes"] == [1]

    def both(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> Any:
        numbers = modulate(x, a, b)
        return encode(numbers, s), numbers

    assert list_calls(trace(both, X, SCALE, SHIFT, STEP))["norm_codes"] == []


@pytest.mark.parametrize(
    ("name", "function", "inputs"),
    [
        (
            "a scale for each token",
            lambda x, a, s: encode(functional.layer_norm(x, (32,), None, None, 1e-6) * (1 + a), s),
            (X, draw(2, 6, 32, seed=4), STEP),
        ),
        (
            "a step for each row",
            lambda x, a, b, s: encode(modulate(x, a, b), s),
            (X, SCALE, SHIFT, torch.full((12, 1), 0.02)),
        ),
        (
            "a norm over two sides",
            lambda x, s: encode(functional.layer_norm(x, (6, 32), None, None, 1e-6), s),
            (X, STEP),
        ),
        (
            "a scale for each token of as many tokens as samples",
            lambda x, a, s: encode(functional.layer_norm(x, (32,), None, None, 1e-6) * (1 + a), s),
            (draw(2, 2, 32), SCALE, STEP),
        ),
        (
            "a bias of its own before a scale",
            lambda x, w, b, a, s: encode(
                functional.layer_norm(x, (32,), w, b, 1e-6) * (1 + a[:, None]), s
            ),
            (X, draw(32, seed=6), draw(32, seed=7), SCALE, STEP),
        ),
        (
            "an RMS norm over two sides",
            lambda x, w, s: encode(functional.rms_norm(x, (6, 32), w, 1e-6), s),
            (X, draw(6, 32), STEP),
        ),
        (
            "an epsilon of the dtype",
            lambda x, w, s: encode(functional.rms_norm(x, (32,), w, None), s),
            (X, draw(32), STEP),
        ),
        (
            "two minus a scale",
            lambda x, a, s: encode(
                functional.layer_norm(x, (32,), None, None, 1e-6) * (2 + a[:, None]), s
            ),
            (X, SCALE, STEP),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_norms_stay(name: str, function: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    assert list_calls(trace(function, *inputs))["norm_codes"] == []


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def turns(*shape: int) -> torch.Tensor:
    return torch.polar(torch.ones(shape), draw(*shape, seed=5))


WEIGHT = 1 + draw(16, seed=3) / 4
QUERY = draw(2, 6, 3, 16)


@pytest.mark.parametrize("shape", [(1, 6, 1, 8), (2, 6, 1, 8), (6, 1, 8)], ids=str)
def test_a_rotation_of_normalized_numbers_is_replaced(shape: tuple[int, ...]) -> None:
    def turn(x: torch.Tensor, weight: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return rotate(functional.rms_norm(x, (16,), weight, 1e-6), angles)

    found = trace(turn, QUERY, WEIGHT, turns(*shape))
    assert list_calls(found)["rms_norm_rope"] == [1]


@pytest.mark.parametrize(
    ("name", "function", "angles"),
    [
        ("an angle for each head", lambda x, w: functional.rms_norm(x, (16,), w, 1e-6), turns(1, 6, 3, 8)),
        ("no norm", lambda x, w: x * w, turns(1, 6, 1, 8)),
        ("one row of angles", lambda x, w: functional.rms_norm(x, (16,), w, 1e-6), turns(1, 1, 1, 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_rotations_stay(name: str, function: Any, angles: torch.Tensor) -> None:
    found = trace(lambda x, w, a: rotate(function(x, w), a), QUERY, WEIGHT, angles)
    assert list_calls(found)["rms_norm_rope"] == []


def test_heads_of_no_power_of_two_are_not_rotated_by_the_kernel() -> None:
    x, weight = draw(1, 4, 2, 12), 1 + draw(12) / 4
    found = trace(
        lambda x, w, a: rotate(functional.rms_norm(x, (12,), w, 1e-6), a), x, weight, turns(4, 1, 6)
    )
    assert list_calls(found)["rms_norm_rope"] == []


def test_equal_operations_are_done_once() -> None:
    def twice(x: torch.Tensor, s: torch.Tensor) -> Any:
        return encode(x, s), encode(x, s), encode(x, s * 1)

    names = Counter(
        count_name(node) for node in trace(twice, X, STEP, everywhere=False).graph.nodes
    )
    assert (names["truediv"], names["clamp"], names["reshape"]) == (2, 2, 1)


@pytest.mark.parametrize("way", ["method", "operator", "item", "view", "out", "inplace"])
def test_what_is_written_between_is_read_again(way: str) -> None:
    def write(x: torch.Tensor) -> Any:
        own = x + 1
        before = own.float().abs()
        if way == "method":
            own.mul_(3)
        elif way == "operator":
            own *= 3
        elif way == "item":
            own[0] = 3
        elif way == "inplace":
            functional.relu(own, inplace=True)
        elif way == "view":
            own.view(-1)[:5].fill_(3)
        else:
            torch.mul(x, 3, out=own)
        return before, own.float().abs()

    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        merge_equal(module.graph)
        module.recompile()
        graphs.append(module)
        return module.forward

    x = draw(4, 5)
    found = torch.compile(write, backend=keep, fullgraph=True)(x)
    assert graphs
    for one, other in zip(found, write(x), strict=True):
        assert torch.equal(one, other)


def test_sums_of_grouped_scales_stay_as_they_are() -> None:
    graph = fx.Graph()
    codes, other, scale = (graph.placeholder(name) for name in ("codes", "other", "scale"))
    codes.meta["example_value"] = torch.empty(6, 256, dtype=torch.float8_e4m3fn)
    for shape, fast in (((), True), ((6, 1), True), ((6, 2), False)):
        scale.meta["example_value"] = torch.empty(shape)
        node = graph.call_function(
            torch._scaled_mm, (codes, other), {"scale_a": scale, "scale_b": scale}
        )
        rewrites.multiply_fast(graph)
        assert node.kwargs.get("use_fast_accum", False) is fast
        graph.erase_node(node)


def test_gelu_is_replaced_alone_and_after_other_columns() -> None:
    def beside(a: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return encode(torch.cat([a, functional.gelu(x, approximate="tanh")], dim=2), s)

    assert list_calls(trace(beside, X, draw(2, 6, 10), STEP))["gelu_codes"] == [2]
    single = trace(lambda x, s: encode(functional.gelu(x, approximate="tanh"), s), X, STEP)
    assert list_calls(single)["gelu_codes"] == [1]
    exact = trace(lambda x, s: encode(functional.gelu(x), s), X, STEP)
    assert list_calls(exact)["gelu_codes"] == []
    rows = trace(
        lambda a, x, s: encode(torch.cat([a, functional.gelu(x, approximate="tanh")], dim=1), s),
        X, draw(2, 3, 32), STEP,
    )  # fmt: skip
    assert list_calls(rows)["gelu_codes"] == []


def test_a_module_without_quantized_layers_is_left_alone() -> None:
    layer = nn.Linear(32, 8)
    found = trace(layer, X)
    assert list_calls(found) == {name: [] for name in OURS}
