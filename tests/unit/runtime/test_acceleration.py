"""Compiled blocks give what eager blocks give; a CUDA graph is refused where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from quantmatrix.api import load_pipeline
from quantmatrix.errors import UsageError
from quantmatrix.hardware import probe
from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.request import Request
from quantmatrix.runtime import acceleration
from quantmatrix.runtime.quantized_linear import QuantizedLinear

FORMS = [
    ("flux-1", "modelopt-fp8", "FP8", "reference"),
    ("qwen-image", "fp8", "channel-dynamic", "decode"),
    ("flux-2", "modelopt-nvfp4", "NVFP4", "decode"),
    ("flux-1", "nunchaku-svdq", "int4_r32", "merged"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_compiled_blocks_give_the_same_numbers(form: tuple[str, str, str, str]) -> None:
    """One graph per block, without a break: a quantized layer hides nothing from the compiler."""
    model, family, scheme, backend = form
    machine = probe.probe("cpu")
    made = synthesize(
        model, machine, family=family, scheme=scheme, backend=backend, size="tiny",
        dtype=torch.float32,
    )  # fmt: skip
    assert any(isinstance(module, QuantizedLinear) for module in made.modules())
    inputs = make_inputs(model, made, "cpu", torch.float32, size="tiny")
    with torch.no_grad():
        eager = made(**inputs)[0]
        acceleration.compile_blocks(made, backend="aot_eager", fullgraph=True)
        torch._dynamo.utils.counters.clear()
        compiled = made(**inputs)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear declares no repeated blocks"):
        acceleration.compile_blocks(torch.nn.Linear(2, 2))


def test_a_cuda_graph_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match="--cuda-graph needs an NVIDIA GPU, the device is cpu"):
        load_pipeline(
            model_path="black-forest-labs/FLUX.1-dev", tiny=True, device="cpu", cuda_graph=True
        )


def test_an_argument_in_host_memory_cannot_be_captured() -> None:
    graphed = acceleration.GraphedForward(lambda x: x)
    with pytest.raises(UsageError, match=r"lies in host memory \(shape \(2, 3\)\)"):
        graphed(torch.zeros(2, 3))


@pytest.mark.parametrize("flag", ["compile", "cuda_graph"])
@pytest.mark.parametrize("offload", ["dit_layerwise_offload", "dit_cpu_offload"])
def test_offloaded_transformers_are_not_accelerated(flag: str, offload: str) -> None:
    with pytest.raises(UsageError, match="leave out the offload"):
        Request(model_path="x", **{flag: True, offload: True})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_forward_gives_the_same_numbers() -> None:
    machine = probe.probe("cuda")
    made = synthesize("flux-1", machine, family="modelopt-fp8", scheme="FP8", size="tiny")
    inputs = make_inputs("flux-1", made, "cuda", torch.bfloat16, size="tiny")
    others = make_inputs("flux-1", made, "cuda", torch.bfloat16, size="tiny", seed=2)
    with torch.no_grad():
        expected = [made(**given)[0].clone() for given in (inputs, others, inputs)]
        acceleration.graph_forward(made)
        found = [made(**given)[0] for given in (inputs, others, inputs)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
