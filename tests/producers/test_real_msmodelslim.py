"""Checkpoints that the real msmodelslim wrote, against the engine's own arithmetic.

The engine's quantizers and savers run on a CPU (see wan_original.py). Its fake-quantized model is
the oracle, with two corrections that the format itself implies: static layers take the bias as the
file stores it (`quant_bias` is rounded to units of deq_scale), and W8A8_DYNAMIC takes scales per
token, where the engine's class reduces over the wrong axis.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("msmodelslim")

from msmodelslim import ir
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Config
from msmodelslim.core.quant_service.modelslim_v1.save.mindie_format import MindIEFormatConfig
from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
from msmodelslim.ir.api import calculate_qparam, dequantize, quantize
from msmodelslim.ir.non_fusion_smooth_quant_ir import NonFusionSmoothQuantHookIR
from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope, QStorage
from msmodelslim.processor import LinearProcessorConfig
from safetensors.torch import load_file
from wan_original import CONFIG, OriginalWan, make_inputs, make_model, run_engine

from quantmatrix.api import load_transformer
from quantmatrix.checkpoints.opening import open_component
from quantmatrix.families import msmodelslim
from quantmatrix.kernels import int8_arithmetic, linear_int8
from quantmatrix.request import Hub
from quantmatrix.tools import wan_repack

SAVERS = {"mindie": MindIEFormatConfig, "ascendv1": AscendV1Config}
ACTIVATIONS = {
    "W8A8": {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"},
    "W8A8_DYNAMIC": {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"},
    "W8A8_MXFP8": {"scope": "per_block", "dtype": "mxfp8", "symmetric": True, "method": "minmax"},
}
WEIGHT = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
WEIGHTS = {"W8A8_MXFP8": ACTIVATIONS["W8A8_MXFP8"]}
WRITTEN = [
    ("W8A8", "mindie"),
    ("W8A8", "ascendv1"),
    ("W8A8_DYNAMIC", "mindie"),
    ("W8A8_DYNAMIC", "ascendv1"),
    ("W4A4_DYNAMIC", "ascendv1"),
]
EACH = pytest.mark.parametrize("written", WRITTEN, ids="-".join, indirect=True)
KINDS = (ir.W8A8StaticFakeQuantLinear, ir.W8A8DynamicPerChannelFakeQuantLinear)
KINDS += (ir.W4A4DynamicPerChannelFakeQuantLinear,)


class PerToken(ir.W8A8DynamicPerChannelFakeQuantLinear):
    """The engine's class with its own functions applied along the right axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize(
            QStorage(QDType.INT8, self.weight.data).T, scheme(self.weight_scale.data, QDType.INT8)
        ).T
        codes, scale = quantize_tokens(x, QDType.INT8)
        return torch.nn.functional.linear(codes * scale, weight.value, self.bias)


def scheme(scale: torch.Tensor, dtype: QDType, scope: QScope = QScope.PER_CHANNEL) -> QParam:
    return QParam(QScheme(scope=scope, dtype=dtype, symmetric=True), ext={"scale": scale})


def quantize_tokens(x: torch.Tensor, dtype: QDType) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale per token) by the engine's own functions."""
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    found = calculate_qparam(low, high, dtype, QScope.PER_TOKEN, True)
    return quantize(QStorage(QDType.FLOAT, x), found).value.float(), found.ext["scale"]


def quantize_int4(model: OriginalWan) -> None:
    """Replace linear layers by the engine's int4 ones: linear_quant has no int4 activations."""
    config = QConfig(dtype="int4", scope="per_channel", symmetric=True, method="minmax")
    activation = QScheme(scope=QScope.PER_TOKEN, dtype=QDType.INT4, symmetric=True)
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("ffn.2"):
            quantizer = AutoWeightQuantizer.from_config(config)
            quantizer.init_weight(QStorage(QDType.FLOAT, module.weight.detach()), module.bias)
            quantizer(None)
            made = ir.AutoFakeQuantLinear.create(
                QParam(activation), quantizer.get_q_param(), quantizer.get_q_storage(), module.bias
            )
            model.blocks.set_submodule(name, made)


def write(word: str, saver: str, folder: Path, smoothed: bool = False, **model: Any) -> OriginalWan:
    """Quantize a model with the engine, ffn.2 kept, and save it; returns the fake-quantized one."""
    made = make_model(0, **model)
    dtype = model.get("dtype", torch.float32)
    save = SAVERS[saver](part_file_size=0 if saver == "mindie" else 4)
    save.set_save_directory(folder)
    folder.mkdir(parents=True)
    processors = [save]
    if word == "W4A4_DYNAMIC":
        quantize_int4(made)
    else:
        qconfig = {"act": ACTIVATIONS[word], "weight": WEIGHTS.get(word, WEIGHT)}
        processors = [LinearProcessorConfig(qconfig=qconfig, exclude=["*ffn.2*"]), save]
    if smoothed:
        smooth(made.blocks[1].self_attn.q)
    empty = folder.parent / "source"
    empty.mkdir(exist_ok=True)
    run_engine(made, empty, processors, [make_inputs(1, dtype), make_inputs(2, dtype)])
    return made


def smooth(layer: torch.nn.Linear) -> None:
    """What iter_smooth does to one layer: the weight is scaled, a hook will unscale the input."""
    factors = torch.rand(layer.in_features, generator=torch.Generator().manual_seed(5)) + 0.5
    layer.weight.mul_(factors)
    hook = NonFusionSmoothQuantHookIR(factors)
    hook.set_hook_handle(layer.register_forward_pre_hook(hook))


def read_stored(folder: Path) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("quant_model_weight*.safetensors")):
        stored |= load_file(path)
    return stored


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, KINDS)}


def stored_layer(stored: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    prefix = f"{layer}."
    return {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}


def correct(model: OriginalWan, stored: dict[str, torch.Tensor]) -> None:
    """The two corrections of the oracle that the module's docstring names."""
    for name, layer in layers_of(model).items():
        if isinstance(layer, ir.W8A8StaticFakeQuantLinear):
            tensors = stored_layer(stored, name)
            del tensors["bias"]
            layer.bias.data = msmodelslim.canonical(tensors, msmodelslim.SCHEMES["W8A8"])["bias"]
        if isinstance(layer, ir.W8A8DynamicPerChannelFakeQuantLinear):
            layer.__class__ = PerToken


def catch_inputs(model: OriginalWan) -> dict[str, torch.Tensor]:
    """The input of every quantized layer in one forward."""
    caught: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, n=name: caught.__setitem__(n, args[0]))
        for name, layer in layers_of(model).items()
    ]
    model(**make_inputs(3))
    for handle in handles:
        handle.remove()
    return caught


class Written:
    """One checkpoint of the engine's: the folder, its tensors, and the corrected oracle."""

    def __init__(self, word: str, saver: str, root: Path) -> None:
        self.word, self.folder = word, root / "quantized"
        self.model = write(word, saver, self.folder)
        self.stored = read_stored(self.folder)
        correct(self.model, self.stored)
        self.scheme = msmodelslim.SCHEMES[word]
        self.repacked = root / "repacked"
        wan_repack.repack(self.folder, self.repacked)
        config = {"_class_name": "WanTransformer3DModel", **CONFIG}
        (self.repacked / "transformer" / "config.json").write_text(json.dumps(config))


MADE: dict[tuple[str, str], Written] = {}


def find_written(word: str, saver: str, factory: pytest.TempPathFactory) -> Written:
    if (word, saver) not in MADE:
        MADE[word, saver] = Written(word, saver, factory.mktemp("written"))
    return MADE[word, saver]


@pytest.fixture
def written(request, tmp_path_factory):
    return find_written(*request.param, tmp_path_factory)


@EACH
def test_schemes_are_read_as_they_were_written(written):
    checkpoint = open_component(str(written.folder), Hub())
    assert written.word in (msmodelslim.detect(checkpoint) or "")
    found = msmodelslim.schemes(checkpoint)
    assert found == dict.fromkeys(layers_of(written.model), written.scheme)
    assert len(found) == 2 * 9


@EACH
def test_tensors_have_the_declared_dtypes_and_shapes(written):
    checkpoint = open_component(str(written.folder), Hub())
    for name in layers_of(written.model):
        out, into = checkpoint.tensors[f"{name}.weight"].shape
        specs = msmodelslim.tensors(written.scheme, out, into)
        found = set(stored_layer(written.stored, name)) - {"bias"}
        assert {s for s, spec in specs.items() if not spec.optional} <= found <= set(specs)
        for suffix in found:
            header = checkpoint.tensors[f"{name}.{suffix}"]
            assert header.dtype in specs[suffix].dtypes
            assert header.shape in specs[suffix].shapes


@EACH
def test_our_quantizer_writes_the_same_codes(written):
    plain = make_model(0)
    for name in layers_of(written.model):
        linear = plain.get_submodule(name)
        stored = stored_layer(written.stored, name)
        if written.word == "W8A8":
            codes = msmodelslim.quantize(linear.weight, msmodelslim.SCHEMES["W8A8_DYNAMIC"])
        else:
            codes = msmodelslim.quantize(linear.weight, written.scheme, bias=linear.bias)
            assert set(codes) == set(stored)
            assert torch.equal(codes["weight_scale"], stored["weight_scale"])
        assert torch.equal(codes["weight"], stored["weight"])


@EACH
def test_accumulators_are_bit_exact(written):
    for name, x in catch_inputs(written.model).items():
        tensors = msmodelslim.canonical(stored_layer(written.stored, name), written.scheme)
        layer = written.model.get_submodule(name)
        if written.word == "W8A8":
            ours = int8_arithmetic.quantize_static(
                x, tensors["input_scale"], tensors["input_offset"]
            )
            asymmetric = QScheme(scope=QScope.PER_TENSOR, dtype=QDType.INT8, symmetric=False)
            ext = {"scale": layer.input_scale.data, "offset": layer.input_offset.data}
            theirs = quantize(QStorage(QDType.FLOAT, x), QParam(asymmetric, ext=ext)).value
        else:
            ours, scale = int8_arithmetic.quantize_tokens(
                x, int8_arithmetic.LARGEST[written.scheme.weight]
            )
            kind = QDType.INT4 if written.scheme.weight == "int4" else QDType.INT8
            theirs, expected = quantize_tokens(x, kind)
            assert torch.equal(scale, expected)
        exact = theirs.long() @ layer.weight.data.long().t()
        assert torch.equal(int8_arithmetic.accumulate(ours, tensors["weight"]).long(), exact)
        flat = ours.reshape(-1, ours.shape[-1])
        assert torch.equal(torch._int_mm(flat, tensors["weight"].t()).long().view_as(exact), exact)


@EACH
def test_layers_equal_the_oracle(written):
    for name, x in catch_inputs(written.model).items():
        expected = written.model.get_submodule(name)(x)
        y = msmodelslim.reference(x, stored_layer(written.stored, name), written.scheme)
        assert (y - expected).norm() / expected.norm() < 1e-6


@EACH
@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_the_whole_transformer_equals_the_oracle(written, backend):
    """Layer for layer both are equal to 1e-6; whole, they add float32 numbers in another order.

    Where that moves an input over the edge of its code, one step of a code shows in the output: 2.5e-5
    on one processor, nothing on another. A layer in the wrong place gives more than 1e-2.
    """
    loaded = load_transformer(
        str(written.repacked / "transformer"),
        model_id="Wan2.2-T2V-A14B",
        dtype=torch.float32,
        backend=backend,
    )
    for seed in (3, 4):
        expected = written.model(**make_inputs(seed))
        y = loaded(**make_inputs(seed), return_dict=False)[0]
        assert (y - expected).norm() / expected.norm() < 5e-4


@EACH
def test_repacked_names_are_those_of_diffusers(written):
    inner = written.model._inner[0]
    repacked = written.repacked / "transformer"
    found = load_file(repacked / "diffusion_pytorch_model.safetensors")
    described = json.loads((repacked / "quant_model_description.json").read_text())
    assert set(wan_repack.list_tensors(inner.config)) <= set(found)
    assert set(found) <= set(described)
    original = json.loads(next(written.folder.glob("quant_model_description*.json")).read_text())
    assert sorted(map(str, described.values())) == sorted(map(str, original.values()))
    assert len(found) == len(written.stored)


@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_both_encodings_of_deq_scale_give_one_output(backend, tmp_path_factory):
    """The MindIE writer stores float32, AscendV1 the bits as int64."""
    static, layer = msmodelslim.SCHEMES["W8A8"], "blocks.0.self_attn.q"
    kernel = next(k for k in linear_int8.KERNELS if k.backend == backend)
    dtypes, outputs = [], []
    for saver in ("mindie", "ascendv1"):
        stored = stored_layer(find_written("W8A8", saver, tmp_path_factory).stored, layer)
        dtypes.append(stored["deq_scale"].dtype)
        buffers = kernel.prepare(msmodelslim.canonical(stored, static), static, torch.float32)
        outputs.append(kernel.run(torch.linspace(-2, 2, 64)[None], buffers, None, static))
    assert dtypes == [torch.float32, torch.int64]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("saver", SAVERS)
def test_smoothed_layers(saver, tmp_path):
    model = write("W8A8_DYNAMIC", saver, tmp_path / "high_noise_model", smoothed=True)
    stored = read_stored(tmp_path / "high_noise_model")
    assert "blocks.1.self_attn.q.div.mul_scale" in stored
    checkpoint = open_component(str(tmp_path / "high_noise_model"), Hub())
    schemes = msmodelslim.schemes(checkpoint)
    assert [name for name, found in schemes.items() if found.smoothed] == ["blocks.1.self_attn.q"]
    wrapper = model.blocks[1].self_attn.q
    assert isinstance(wrapper, ir.NonFusionSmoothQuantWrapper)
    wrapper.wrapped_module.__class__ = PerToken
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    tensors = stored_layer(stored, "blocks.1.self_attn.q")
    y = msmodelslim.reference(x, tensors, schemes["blocks.1.self_attn.q"])
    assert (y - wrapper(x)).norm() / y.norm() < 1e-6
    plain = make_model(0).blocks[1].self_attn.q(x)
    assert (y - plain).norm() / plain.norm() < 0.03
    wan_repack.repack(tmp_path / "high_noise_model", tmp_path / "repacked")
    again = open_component(str(tmp_path / "repacked" / "transformer"), Hub())
    assert msmodelslim.schemes(again)["blocks.1.attn1.to_q"].smoothed


@pytest.mark.parametrize("saver", SAVERS)
def test_mxfp8_weights_are_read_exactly(saver, tmp_path):
    """The engine's dequantized weight is ours, and our quantizer writes the engine's bytes.

    Activations are no oracle: the engine rounds ties away from zero, an NPU to even.
    """
    model = write("W8A8_MXFP8", saver, tmp_path / "q")
    stored, word = read_stored(tmp_path / "q"), msmodelslim.SCHEMES["W8A8_MXFP8"]
    schemes = msmodelslim.schemes(open_component(str(tmp_path / "q"), Hub()))
    assert len(schemes) == 2 * 9
    assert set(schemes.values()) == {word}
    plain, x = make_model(0), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for name in schemes:
        tensors, layer = stored_layer(stored, name), model.get_submodule(name)
        scales = torch.exp2(layer.weight_scale.data.float()).reshape(layer.weight.shape[0], -1)
        exact = layer.weight.data.float() * scales.repeat_interleave(32, dim=1)
        assert torch.equal(msmodelslim.dequantize(tensors, word), exact)
        ours = msmodelslim.quantize(plain.get_submodule(name).weight, word)
        for suffix, tensor in ours.items():
            assert torch.equal(tensor.view(torch.uint8), tensors[suffix].view(torch.uint8))
    y = msmodelslim.reference(x, stored_layer(stored, "blocks.0.self_attn.q"), word)
    expected = model.blocks[0].self_attn.q(x)
    assert (y - expected).norm() / expected.norm() < 0.01


def test_bfloat16_models_have_bfloat16_scales(tmp_path):
    """Everything is computed in the model's dtype; the static layer must still be close."""
    write("W8A8", "ascendv1", tmp_path / "q", dtype=torch.bfloat16)
    stored = stored_layer(read_stored(tmp_path / "q"), "blocks.0.cross_attn.o")
    assert torch.equal(stored["input_scale"], stored["input_scale"].bfloat16().float())
    weight = make_model(0, dtype=torch.bfloat16).blocks[0].cross_attn.o.weight.float()
    error = msmodelslim.dequantize(stored, msmodelslim.SCHEMES["W8A8"]) - weight
    assert error.norm() / weight.norm() < 0.015


def test_the_mindie_writer_refuses_int4(tmp_path):
    with pytest.raises(Exception, match="AscendV1Saver"):
        write("W4A4_DYNAMIC", "mindie", tmp_path / "q")


def find_wheel(folder: Path) -> Path:
    """The wheel of torch_npu 2.13.0, downloaded and never installed."""
    if not list(folder.glob("torch_npu-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
        subprocess.run([*command, "torch_npu==2.13.0"], check=True)
    return next(folder.glob("torch_npu-2.13.0-*.whl"))


def test_npu_calls_bind_to_the_wheel(pytestconfig, monkeypatch):
    """The schemas with which the unit tests bind the npu backend's calls are those of the wheel."""
    simulator = Path(__file__).parents[1] / "unit" / "npu_simulator.py"
    spec = importlib.util.spec_from_file_location("npu_simulator", simulator)
    npu_simulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(npu_simulator)
    wheel = find_wheel(Path(pytestconfig.cache.mkdir("wheels")))
    text = zipfile.ZipFile(wheel).read("torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")
    lines = (line.strip().removeprefix("- ") for line in text.decode().splitlines())
    schemas = {line.removeprefix("func: ") for line in lines if line.startswith("func: ")}
    assert set(npu_simulator.SCHEMAS) <= schemas
