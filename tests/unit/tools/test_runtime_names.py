"""SGLang's names of layers: in `ignore`, for patterns, and nowhere else."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantmatrix.families import modelopt_fp8, modelopt_nvfp4
from quantmatrix.families.protocol import Calibration
from quantmatrix.tools import build_modelopt_fp8_transformer as fp8
from quantmatrix.tools import build_modelopt_nvfp4_transformer as nvfp4
from quantmatrix.tools import runtime_names

QWEN, FLUX = "QwenImageTransformer2DModel", "FluxTransformer2DModel"
HUNYUAN = "HunyuanVideoTransformer3DModel"
BLOCK = "transformer_blocks.0"
NAMES = {
    QWEN: {
        f"{BLOCK}.img_mod.1": f"{BLOCK}.img_mod",
        f"{BLOCK}.txt_mod.1": f"{BLOCK}.txt_mod",
        f"{BLOCK}.img_mlp.net.2": f"{BLOCK}.img_mlp.net.2",
        f"{BLOCK}.attn.to_q": f"{BLOCK}.attn.to_q",
    },
    FLUX: {
        f"{BLOCK}.ff.net.0.proj": f"{BLOCK}.ff.net.0.proj",
        f"{BLOCK}.norm1.linear": f"{BLOCK}.norm1.linear",
        "single_transformer_blocks.1.proj_out": "single_transformer_blocks.1.proj_out",
    },
    HUNYUAN: {
        f"{BLOCK}.norm1.linear": "double_blocks.0.img_mod.linear",
        f"{BLOCK}.norm1_context.linear": "double_blocks.0.txt_mod.linear",
        f"{BLOCK}.attn.to_q": "double_blocks.0.img_attn_qkv",
        f"{BLOCK}.attn.add_v_proj": "double_blocks.0.txt_attn_qkv",
        f"{BLOCK}.ff_context.net.0.proj": "double_blocks.0.txt_mlp.fc_in",
        f"{BLOCK}.ff.net.2": "double_blocks.0.img_mlp.fc_out",
        "single_transformer_blocks.11.norm.linear": "single_blocks.11.modulation.linear",
        "single_transformer_blocks.11.proj_mlp": "single_blocks.11.linear1",
        "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.fc_out",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.fc_in",
        "norm_out.linear": "final_layer.adaLN_modulation.linear",
    },
    "HunyuanVideo15Transformer3DModel": {f"{BLOCK}.norm1.linear": f"{BLOCK}.norm1.linear"},
}
"""Layer of SGLang 0.5.23 by the file's name, per class."""
N, K = 32, 48
CALIBRATION = Calibration(torch.full((K,), -3.0), torch.full((K,), 2.0))


@pytest.mark.parametrize(
    ("class_name", "module", "layer"),
    [(name, *pair) for name, pairs in NAMES.items() for pair in pairs.items()],
)
@pytest.mark.parametrize("prefix", ["", *runtime_names.PREFIXES])
def test_the_layer_of_a_module(class_name: str, module: str, layer: str, prefix: str) -> None:
    assert runtime_names.name_layer(prefix + module, class_name) == layer
    names = runtime_names.list_names(prefix + module, class_name)
    assert names[0] == prefix + module
    assert {module, layer} <= set(names)


class Export:
    """A ModelOpt export of some layers, its base and its calibrated model."""

    def __init__(self, root: Path, class_name: str, modules: Sequence[str], kind: str) -> None:
        self.root, self.kind = root, kind
        plain, coded, state = {}, {}, {}
        generator = torch.Generator().manual_seed(1)
        for module in (*modules, "x_embedder"):
            weight = torch.randn(N, K, generator=generator).bfloat16()
            plain[f"{module}.weight"] = coded[f"{module}.weight"] = weight
            if module == "x_embedder":
                continue
            family = modelopt_fp8 if kind == "FP8" else modelopt_nvfp4
            scheme = modelopt_fp8.SCHEMES["FP8"] if kind == "FP8" else modelopt_nvfp4.NVFP4
            stored = family.quantize(weight, scheme, calibration=CALIBRATION)
            coded |= {f"{module}.{suffix}": value for suffix, value in stored.items()}
            state[f"{module}.weight_quantizer._amax"] = weight.abs().amax()
            state[f"{module}.input_quantizer._amax"] = torch.tensor(3.0)
        torch.save({"model_state_dict": state}, root / "backbone.pt")
        block = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["x_embedder*"]}
        for folder, tensors, more in (
            ("base", plain, {}),
            ("export", coded, {"quantization_config": block}),
        ):
            (root / folder).mkdir()
            config = {"_class_name": class_name, **more}
            (root / folder / "config.json").write_text(json.dumps(config))
            save_file(tensors, root / folder / "model.safetensors")

    def build(self, *patterns: str) -> tuple[int, list[str], dict[str, Any]]:
        """(exit code, `ignore` of the output, dtypes of its weights)."""
        words = ["--base-transformer-dir", self.root / "base", "--output-dir", self.root / "out"]
        words += ["--modelopt-hf-dir", self.root / "export"]
        main = nvfp4.main
        if self.kind == "FP8":
            words += ["--modelopt-backbone-ckpt", self.root, "--model-type", "none"]
            main = fp8.main
        code = main([*map(str, words), *(w for p in patterns for w in ("--keep-bf16-pattern", p))])
        if code:
            return code, [], {}
        config = json.loads((self.root / "out/config.json").read_text())
        with safe_open(self.root / "out/model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
            dtypes = {n.removesuffix(".weight"): file.get_tensor(n).dtype for n in names}
        return code, config["quantization_config"]["ignore"], dtypes


@pytest.mark.parametrize("kind", ["FP8", "NVFP4"])
@pytest.mark.parametrize("class_name", [QWEN, FLUX, HUNYUAN])
def test_ignore_covers_every_plain_layer_by_the_name_of_the_runtime(
    tmp_path: Path, class_name: str, kind: str
) -> None:
    """As the runtime reads it: each entry is a glob over the whole name of a layer."""
    first, *rest = NAMES[class_name].items()
    export = Export(tmp_path, class_name, list(NAMES[class_name]), kind)
    pattern = f"^{first[0]}$".replace(".", r"\.") if kind == "FP8" else first[0]
    code, ignore, dtypes = export.build(pattern)
    assert code == 0
    assert dtypes.pop("x_embedder") == torch.bfloat16
    assert [m for m, dtype in dtypes.items() if dtype == torch.bfloat16] == [first[0]]
    assert any(fnmatch.fnmatch(first[1], entry) for entry in ignore)
    for _, layer in rest:
        assert not any(fnmatch.fnmatch(layer, entry) for entry in ignore)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_fused_layer_is_named_only_when_no_part_of_it_is_quantized(count: int) -> None:
    modules = [f"{BLOCK}.attn.to_{x}" for x in "qkv"]
    found = runtime_names.list_ignored(set(modules[:count]), modules, HUNYUAN)
    assert found == (["double_blocks.0.img_attn_qkv"] if count == 3 else [])


@pytest.mark.parametrize(
    ("class_name", "pattern", "kept"),
    [
        (QWEN, "img_mod$", f"{BLOCK}.img_mod.1"),
        (QWEN, r"img_mod\.1$", f"{BLOCK}.img_mod.1"),
        (FLUX, r"ff\.proj_in$", f"{BLOCK}.ff.net.0.proj"),
        (HUNYUAN, r"^double_blocks\.\d+\.txt_mod", f"{BLOCK}.norm1_context.linear"),
        (HUNYUAN, r"fc_out$", f"{BLOCK}.ff.net.2"),
    ],
)
def test_patterns_are_tried_on_both_names(
    tmp_path: Path, class_name: str, pattern: str, kept: str
) -> None:
    modules = [name for name in NAMES[class_name] if "time_text" not in name]
    code, _, dtypes = Export(tmp_path, class_name, modules, "FP8").build(pattern)
    assert code == 0
    assert {m for m, dtype in dtypes.items() if dtype == torch.bfloat16} == {kept, "x_embedder"}


def test_a_pattern_of_no_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, *_ = Export(tmp_path, FLUX, list(NAMES[FLUX]), "FP8").build("img_mod$")
    assert code == 1
    assert "SGLang's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
