"""GGUF files that the `gguf` package quantizes and writes, read by our own reader and decoded as it decodes.

Its writer pads, orders and names as llama.cpp's does; nothing of ours is between the tensors and the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_files import MODELS, decode, draw, find_base

from quantmatrix import models
from quantmatrix.checkpoints.gguf import ARCHITECTURES
from quantmatrix.request import Request
from quantmatrix.tools.dequantize import plan_decode

gguf = pytest.importorskip("gguf")
TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16")
"""Types that the package can write without llama.cpp."""


def write(path: Path, model: str, name: str) -> dict[str, torch.Tensor]:
    """The model's stand-in, matrices in one type and the rest in F32; what its decoder gives of it."""
    kind = gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(path, ARCHITECTURES[models.load(model).TRANSFORMER])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    expected = {}
    for tensor, values in draw(model).items():
        numbers = values.float().numpy()
        own = (
            kind
            if numbers.ndim == 2 and not numbers.shape[1] % 32
            else gguf.GGMLQuantizationType.F32
        )
        stored = gguf.quants.quantize(numbers, own)
        writer.add_tensor(tensor, stored, raw_dtype=own)
        decoded = gguf.quants.dequantize(stored, own).reshape(numbers.shape)
        expected[tensor] = torch.from_numpy(np.ascontiguousarray(decoded))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(
    ("model", "name"),
    [*((model, "Q8_0") for model in MODELS), *(("flux-1", name) for name in TYPES[1:])],
)
def test_files_of_the_package(model: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{model}-{name}.gguf"
    expected = write(path, model, name)
    request = Request(
        str(find_base(model)), weights_paths={"transformer": str(path)}, dtype="float32"
    )
    planned = plan_decode(request, "transformer")
    quantized = {piece.scheme.weight for piece in planned.pieces()}
    assert quantized == (set() if name in ("BF16", "F16") else {name.lower()})
    found = decode(planned)
    assert found.keys() == expected.keys()
    assert [n for n, tensor in expected.items() if not torch.equal(found[n], tensor)] == []
