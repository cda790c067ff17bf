"""Synthetic: a transformer at its true size with random weights in a family's true format.

Speed and memory depend on shapes and formats, not on values, so nothing is downloaded: the model is
built without memory from diffusers' own defaults, plain tensors are drawn on the device, and each
linear layer of the blocks gets random on-disk tensors of the family's specification, then takes the
loader's way: canonical tensors, kernel, preparation. Only the numbers mean nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantmatrix import families, kernels, models
from quantmatrix.checkpoints.dtypes import to_torch
from quantmatrix.errors import RefusedError
from quantmatrix.kernels import linear_gguf
from quantmatrix.kernels.choosing import choose
from quantmatrix.kernels.gguf_arithmetic import HALVES
from quantmatrix.runtime.empty_model import build_plain
from quantmatrix.runtime.quantized_linear import QuantizedLinear, share_inputs
from quantmatrix.scheme import BLOCKS, Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine


def synthesize(
    model: str,
    machine: Machine,
    *,
    family: str | None = None,
    scheme: str = "",
    backend: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    size: str = "full",
    kept: tuple[str, ...] = (),
    seed: int = 0,
) -> nn.Module:
    """A transformer of a base model on the machine's device; `family` None: full precision.

    `size` is `full` or `tiny`; `kept` are regular expressions over names of layers left alone.
    Raises RefusedError where no kernel fits.
    """
    model_built = build_plain(model, size)
    generator = torch.Generator(machine.device).manual_seed(seed)
    if family is not None:
        chosen = families.load(family).SCHEMES[scheme]
        blocks = models.load(model).BLOCKS
        patterns = [re.compile(pattern) for pattern in kept]
        for name, module in list(model_built.named_modules()):
            inside = isinstance(module, nn.Linear) and name.split(".")[0] in blocks
            if inside and not any(pattern.fullmatch(name) for pattern in patterns):
                found = find_scheme(family, chosen, name, module.in_features)
                layer = make_layer(module, found, family, machine, backend, dtype, generator)
                parent, _, child = name.rpartition(".")
                setattr(model_built.get_submodule(parent), child, layer)
    fill_plain(model_built, machine.device, dtype, generator)
    share_inputs(model_built)
    return model_built.eval().requires_grad_(False)


def make_layer(
    linear: nn.Linear,
    scheme: Scheme,
    family: str,
    machine: Machine,
    backend: str | None,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> QuantizedLinear:
    """A quantized layer of a linear layer's shape, from random tensors as on disk.

    Raises RefusedError where no kernel (or not `backend`) fits the machine.
    """
    shape = (linear.out_features, linear.in_features)
    module = families.load(family)
    try:
        kernel = choose(scheme.op, machine, scheme, shape, backend)
    except kernels.NoKernel as error:
        raise RefusedError(error.rule, error.message) from error
    stored = {
        suffix: draw(suffix, spec, shape, generator)
        for suffix, spec in module.tensors(scheme, *shape).items()
        if not spec.optional
    }
    if scheme.op == linear_gguf.OP:
        set_block_scales(stored["weight"], scheme, shape[1])
    if linear.bias is not None:
        stored["bias"] = torch.zeros(shape[0], dtype=dtype, device=machine.device)
    canonical = module.canonical(stored, replace(scheme))
    return QuantizedLinear(shape[1], shape[0], kernel, scheme, canonical, dtype)


def draw(
    suffix: str, spec: TensorSpec, shape: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    """Random codes, or scales that give weights of gain 1; layers of one input have one zero point.

    The tensor has the first shape and dtype of `spec`, such as [out, in/2] and uint8; the layer's
    `shape` (out, in) sets the gain.
    """
    dtype, device = to_torch(spec.dtypes[0]), generator.device
    size = spec.shapes[0]
    if "offset" in suffix:
        return torch.zeros(size, dtype=dtype, device=device)
    if "scale" in suffix or "smooth" in suffix:
        value = 1.0 / (224 * math.sqrt(shape[1])) if dtype == torch.float32 else 1.0
        return torch.full(size, value, device=device).to(dtype)
    if dtype == torch.float8_e4m3fn:
        return torch.randn(size, generator=generator, device=device).mul_(64).to(dtype)
    if dtype.is_floating_point:
        spread = 1 / math.sqrt(shape[1])
        return (torch.randn(size, generator=generator, device=device) * spread).to(dtype)
    low, high = {torch.uint8: (0, 256), torch.int8: (-127, 128)}.get(dtype, (-(2**20), 2**20))
    return torch.randint(low, high, size, generator=generator, device=device, dtype=dtype)


def find_scheme(family: str, scheme: Scheme, layer: str, columns: int) -> Scheme:
    """The scheme of a layer: of GGUF another type where its rows are no whole blocks, as in files."""
    if scheme.op != linear_gguf.OP:
        return scheme
    asked = {"raw": False, "gelu": False, "interleaved": False}
    return families.load(family).scheme_of(layer, scheme, columns=columns, **asked) or scheme


def set_block_scales(blocks: torch.Tensor, scheme: Scheme, columns: int) -> None:
    """Give random blocks scales for weights of gain 1, in place; random bits may be NaN.

    `blocks` are uint8 [N, bytes of a row] of a type in `HALVES`, a row has so many columns.
    """
    numbers = blocks.view(torch.float16).unflatten(1, (-1, BLOCKS[scheme.name][1] // 2))
    offsets = [at // 2 for at in HALVES[scheme.name]]
    numbers[..., offsets] = 1.0
    spread = linear_gguf.decode({"weight": blocks[:1]}, scheme).square().mean().sqrt()
    numbers[..., offsets] = (1 / (math.sqrt(columns) * spread)).to(numbers.dtype)


def fill_plain(
    model: nn.Module, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Draw every parameter that has no memory yet, and move the rest to the device."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name) if owner_name else model
        numbers = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim >= 2:
            numbers /= math.sqrt(math.prod(parameter.shape[1:]))
        elif leaf == "weight":
            numbers = 1 + 0.1 * numbers
        else:
            numbers *= 0.02
        owner._parameters[leaf] = nn.Parameter(numbers.to(dtype), requires_grad=False)
    model.to(device)


def make_inputs(
    model: str,
    module: nn.Module,
    device: str,
    dtype: torch.dtype,
    *,
    size: str = "full",
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of one forward at the model's usual size: 1024 pixels, or 480p and 81 frames.

    On `meta` they are shapes alone, which is enough to follow a forward without memory.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    config: Any = module.config
    draw = TorchDraw(generator, device, dtype)
    return models.load(model).forward_inputs(config, draw, tiny=size == "tiny")


@dataclass(frozen=True)
class TorchDraw:
    """Numbers for the arguments of a forward (see `quantmatrix.models.forward.Draw`)."""

    generator: torch.Generator | None
    device: str
    dtype: torch.dtype

    def normal(self, *shape: int) -> torch.Tensor:
        """Normally distributed numbers [*shape] in the compute dtype, a float dtype."""
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    def number(self, value: float) -> torch.Tensor:
        """One number [1] in the compute dtype."""
        return torch.tensor([value], device=self.device, dtype=self.dtype)

    def whole_number(self, value: int) -> torch.Tensor:
        """One number [1] in int64."""
        return torch.tensor([value], device=self.device)

    def side(self, *, tiny: bool) -> int:
        """Patches of a picture's side: 64 are 1024 pixels."""
        return 4 if tiny else 64

    def text(self, *, tiny: bool) -> int:
        """Rows of the text encoder's output."""
        return 16 if tiny else 512

    def packed(self, config: Any, *, tiny: bool) -> dict[str, Any]:
        """Latents [1, side * side, channels], text [1, rows, width], timestep [1], any float dtype."""
        return {
            "hidden_states": self.normal(1, self.side(tiny=tiny) ** 2, config.in_channels),
            "encoder_hidden_states": self.normal(
                1, self.text(tiny=tiny), config.joint_attention_dim
            ),
            "timestep": self.number(0.5),
            "return_dict": False,
        }

    def positions(self, config: Any, *, tiny: bool) -> dict[str, Any]:
        """`img_ids` [side * side, axes] and `txt_ids` [rows, axes], float32."""
        axes, side = len(config.axes_dims_rope), self.side(tiny=tiny)
        ids = torch.zeros(side, side, axes, device=self.device)
        ids[..., 1] = torch.arange(side, device=self.device)[:, None]
        ids[..., 2] = torch.arange(side, device=self.device)[None, :]
        texts = torch.zeros(self.text(tiny=tiny), axes, device=self.device)
        return {"img_ids": ids.view(-1, axes), "txt_ids": texts}
