"""LoRA on a loaded transformer, whatever its layers are: codes stay as they are.

An adapter adds `scale * up(down(x))` to a linear layer, where down is [rank, in] and up [out, rank].
Nothing is merged: the product stands beside the layer, quantized or not, so that several adapters
work at once, and a scale can be changed or an adapter taken off between two steps.

| file | becomes |
| ---- | ------- |
| diffusers, PEFT: `transformer.X.lora_A.weight`, `lora_B.weight`, `.alpha`, `lora_B.bias` | itself |
| kohya, XLabs, ComfyUI, original names | these names, by diffusers' converter of the pipeline class |

`alpha / rank` is taken into `up`. What names no linear layer of the model, and what is no low-rank
factor (DoRA, LoKr, changes of norms), is an error: leaving it out would give another model.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.quoting import quote
from quantmatrix.runtime import acceleration
from quantmatrix.runtime.plan.adapters import AdapterFile, find_adapter, list_adapters
from quantmatrix.runtime.plan.experts import EXPERTS, read_noise
from quantmatrix.runtime.quantized_linear import QuantizedLinear, SplitInputLinear

if TYPE_CHECKING:
    from quantmatrix.request import Hub, Request

logger = logging.getLogger(__name__)

FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<leaf>lora_A\.weight|lora_B\.weight|lora_B\.bias|alpha)\Z"
)
DEFAULT = re.compile(r"\.(lora_[AB])\.default(?=\.|\Z)")
PREFIX = re.compile(r"^transformer(_2)?\.")
DORA = re.compile(r"dora_scale|lora_magnitude_vector")
METADATA = "lora_adapter_metadata"
"""Entry of a header in which diffusers keeps ranks and alphas."""
SHOWN = 4
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one layer."""

    down: torch.Tensor
    """[rank, in], any float dtype"""
    up: torch.Tensor
    """[out, rank], any float dtype; alpha / rank is in it"""
    bias: torch.Tensor | None = None
    """[out]"""


class LowRankBranch(nn.Module):
    """The adapters of one linear layer: [..., in] -> [..., out], the sum of what each adds."""

    def __init__(self) -> None:
        """No adapter yet."""
        super().__init__()
        self.factors = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.active: tuple[str, ...] = ()

    def add(self, name: str, factors: Factors, scale: float, dtype: torch.dtype) -> None:
        """Take an adapter's factors, in the compute dtype `dtype`."""
        down = nn.Linear(factors.down.shape[1], factors.down.shape[0], bias=False, device="meta")
        up = nn.Linear(
            factors.up.shape[1], factors.up.shape[0], bias=factors.bias is not None, device="meta"
        )
        down.weight = nn.Parameter(factors.down.to(dtype), requires_grad=False)
        up.weight = nn.Parameter(factors.up.to(dtype), requires_grad=False)
        if factors.bias is not None:
            up.bias = nn.Parameter(factors.bias.to(dtype), requires_grad=False)
        self.factors[name] = nn.Sequential(down, up)
        self.register_buffer(f"scale_{name}", torch.tensor(1.0), persistent=False)
        self.scale({**self.scales, name: scale})

    def scale(self, scales: Mapping[str, float]) -> None:
        """Give the adapters these scales.

        Code that was compiled and a graph that was captured read them from a tensor, so that neither is made
        again but where an adapter gets 0 or leaves it.
        """
        self.scales = dict(scales)
        self.active = tuple(name for name, scale in scales.items() if scale)
        for name, scale in scales.items():
            self.get_buffer(f"scale_{name}").fill_(scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Move everything where `fn` moves it; scales stay float32."""
        moved: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in self.scales.items():
            kept = torch.tensor(scale, device=self.get_buffer(f"scale_{name}").device)
            self.register_buffer(f"scale_{name}", kept, persistent=False)
        return moved

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the adapters add for x [..., in], in x's dtype; None where no scale is set."""
        total: torch.Tensor | None = None
        pairs: dict[str, Any] = dict(self.factors.items())
        for name in self.active:
            found = pairs[name](x.to(pairs[name][0].weight.dtype))
            added = (found.float() * self.get_buffer(f"scale_{name}")).to(found.dtype)
            total = added if total is None else total + added
        return total


def add_branch(layer: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
    """A forward hook of a layer with a branch: its output [..., out], and what the adapters add.

    The result has the output's dtype.
    """
    added = layer.low_rank(arguments[0])
    return output if added is None else output + added.to(output.dtype)


def load_requested(
    transformers: Mapping[str, nn.Module], pipeline_class: str | None, request: Request
) -> None:
    """Put the adapters of a request beside the layers of its transformers, by component.

    A file whose name says that it is of the low-noise expert goes there, any other to the first
    transformer. Raises CheckpointError for a file that does not fit, and UsageError for a model
    whose adapters nobody can name.
    """
    names = list(transformers)
    for number, (file, scale) in enumerate(list_adapters(request)):
        noise = read_noise(file.reference) or read_noise(file.name)
        wanted = next((name for name, kind in EXPERTS.items() if kind == noise), names[0])
        component = wanted if wanted in transformers else names[0]
        tensors = convert(read_tensors(file), read_alphas(file), pipeline_class, str(file.path))
        add_adapter(
            transformers[component], tensors, f"lora_{number}", scale, component, str(file.path)
        )


def read_tensors(file: AdapterFile) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter's file, of any shape and dtype, as it is stored."""
    with safe_open(file.path, "pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


def read_alphas(file: AdapterFile) -> dict[str, Any]:
    """What diffusers wrote into the header of a file: `transformer.lora_alpha`, `.r` ...

    Raises CheckpointError for an entry that is no JSON.
    """
    with safe_open(file.path, "pt") as reader:
        text = (reader.metadata() or {}).get(METADATA, "{}")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file.path}: its {METADATA} is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def convert(
    tensors: Tensors, metadata: Mapping[str, Any], pipeline_class: str | None, source: str
) -> dict[str, torch.Tensor]:
    """An adapter's tensors under diffusers' names, by the converter of the pipeline class.

    `tensors`, of any shape and dtype, have the names of any writer and stay as they are where these
    are diffusers'. Alphas that stand in the header are added. Raises CheckpointError for what is no
    low-rank factor, and UsageError for a pipeline without a converter.
    """
    import diffusers

    if doras := [name for name in tensors if DORA.search(name)]:
        raise CheckpointError(
            f"{source}: {quote(doras[0])} is of a DoRA, whose magnitudes a branch beside the layer "
            "cannot apply: expected a LoRA; merge it into the base weights first"
        )
    owner: Any = getattr(diffusers, pipeline_class or "", None)
    if not hasattr(owner, "lora_state_dict"):
        raise UsageError(
            f"{source}: diffusers has no LoRA names for {pipeline_class or 'a component alone'}: "
            "name a whole pipeline of a class that has `load_lora_weights`"
        )
    takes_alphas = "return_alphas" in inspect.signature(owner.lora_state_dict).parameters
    try:
        found = owner.lora_state_dict(
            dict(tensors), **({"return_alphas": True} if takes_alphas else {})
        )
    except Exception as error:  # whatever a converter does with names that it does not know
        raise CheckpointError(
            f"{source}: diffusers' converter for {pipeline_class} cannot read its names "
            f"({type(error).__name__}: {quote(str(error))}): is it of another model?"
        ) from error
    own, alphas = found if isinstance(found, tuple) else (found, None)
    named = {
        DEFAULT.sub(r".\1", name): tensor for name, tensor in {**own, **(alphas or {})}.items()
    }
    return named | read_header_alphas(named, metadata)


def read_header_alphas(tensors: Tensors, metadata: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Alphas that a header states for layers without one of their own, as float32 tensors []."""
    found = {}
    for name in tensors:
        match = FACTOR.fullmatch(name)
        if (
            match is None
            or match["leaf"] != "lora_A.weight"
            or f"{match['module']}.alpha" in tensors
        ):
            continue
        component, _, module = match["module"].partition(".")
        pattern = metadata.get(f"{component}.alpha_pattern") or {}
        alpha = pattern.get(module, metadata.get(f"{component}.lora_alpha"))
        if alpha is not None:
            found[f"{match['module']}.alpha"] = torch.tensor(float(alpha))
    return found


def add_adapter(
    transformer: nn.Module,
    tensors: Tensors,
    name: str,
    scale: float,
    component: str,
    source: str,
) -> None:
    """Put an adapter of diffusers' names beside the layers of a transformer.

    `tensors` are factors [rank, in] and [out, rank], of any float dtype. Nothing is added where one of them does not
    fit: CheckpointError names every target that the model lacks, UsageError a name that is taken.
    """
    if not name or "." in name:
        raise UsageError(f"adapter_name {quote(name)}: expected a name without dots")
    if name in list_names(transformer):
        raise UsageError(f"adapter {name} is loaded already: choose another adapter_name")
    found = sort_factors(tensors, component, source)
    layers = dict(transformer.named_modules())
    kinds = (nn.Linear, QuantizedLinear, SplitInputLinear)
    unknown = [module for module in found if not isinstance(layers.get(module), kinds)]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} of its {len(found)} targets are not linear layers of "
            f"{type(transformer).__name__}: {shorten(unknown)}; is it of another model?"
        )
    for module, factors in found.items():
        check_shapes(layers[module], module, factors, source)
    for module, factors in found.items():
        attach(layers[module], name, factors, scale)
    acceleration.forget(transformer)
    logger.debug("LoRA %s of %s: %d layers of %s", name, source, len(found), component)


def sort_factors(tensors: Tensors, component: str, source: str) -> dict[str, Factors]:
    """Factors by module; alpha / rank goes into `up`.

    Tensors are [rank, in], [out, rank] and alphas [], of any float dtype.
    Raises CheckpointError for tensors of other components, for what is no factor, and for half of a
    pair.
    """
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    others = []
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None or name.startswith(("text_encoder.", "text_encoder_2.")):
            others.append(name)
            continue
        parts[PREFIX.sub("", match["module"])][match["leaf"]] = tensor
    halves = [m for m, own in parts.items() if not {"lora_A.weight", "lora_B.weight"} <= own.keys()]
    if others or halves:
        what = "no low-rank factors of a transformer" if others else "half of a pair of factors"
        raise CheckpointError(
            f"{source}: {len(others or halves)} of its tensors are {what}: "
            f"{shorten(others or halves)}; expected lora_A and lora_B of linear layers of {component}"
        )
    return {module: join(own) for module, own in parts.items()}


def join(own: Tensors) -> Factors:
    """The factors of one layer, from `lora_A.weight` [rank, in], `lora_B.weight` [out, rank] ... of any float dtype."""
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    factor = float(own["alpha"]) / down.shape[0] if "alpha" in own else 1.0
    bias = own.get("lora_B.bias")
    return Factors(down, up.float() * factor, None if bias is None else bias.float() * factor)


def check_shapes(layer: Any, module: str, factors: Factors, source: str) -> None:
    """Factors must be matrices of one rank that fit their layer; else raises CheckpointError."""
    down, up = tuple(factors.down.shape), tuple(factors.up.shape)
    expected = (layer.in_features, layer.out_features)
    if len(down) != 2 or len(up) != 2 or (down[1], up[0]) != expected or down[0] != up[1]:
        raise CheckpointError(
            f"{source}: the factors of {module} are {list(down)} and {list(up)}: expected "
            f"[rank, {expected[0]}] and [{expected[1]}, rank]; is it of another model, or size?"
        )
    if not all(bool(torch.isfinite(x).all()) for x in (factors.down, factors.up)):
        raise CheckpointError(f"{source}: the factors of {module} hold numbers that are not finite")


def attach(layer: Any, name: str, factors: Factors, scale: float) -> None:
    """Add an adapter to a layer; the first one brings the branch."""
    if not hasattr(layer, "low_rank"):
        layer.low_rank = LowRankBranch()
        layer.low_rank_hook = layer.register_forward_hook(add_branch)
    kept = next((t for t in layer.buffers()), None)
    weight = layer.weight
    layer.low_rank.add(name, factors, scale, weight.dtype)
    layer.low_rank.to(weight.device if kept is None else kept.device)


def shorten(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(map(quote, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def list_branches(transformer: nn.Module) -> list[tuple[Any, LowRankBranch]]:
    """(layer, branch) of every layer with adapters."""
    found = [(layer, getattr(layer, "low_rank", None)) for layer in transformer.modules()]
    return [(layer, branch) for layer, branch in found if isinstance(branch, LowRankBranch)]


def list_names(transformer: nn.Module) -> list[str]:
    """Names of the adapters of a transformer."""
    names = [name for _, branch in list_branches(transformer) for name in branch.scales]
    return list(dict.fromkeys(names))


def set_scales(transformers: Iterable[nn.Module], scales: Mapping[str, float]) -> None:
    """Give adapters their scales; those that are not named get 0. UsageError for an unknown one."""
    listed = list(transformers)
    known = {name for transformer in listed for name in list_names(transformer)}
    if unknown := sorted(scales.keys() - known):
        raise UsageError(
            f"no such adapter: {unknown[0]}; loaded are {', '.join(sorted(known)) or 'none'}"
        )
    for transformer in listed:
        for _, branch in list_branches(transformer):
            branch.scale({name: float(scales.get(name, 0.0)) for name in branch.scales})


def remove(transformers: Iterable[nn.Module]) -> None:
    """Take every adapter off; the layers are as they were loaded."""
    for transformer in transformers:
        for layer, _ in list_branches(transformer):
            layer.low_rank_hook.remove()
            del layer.low_rank, layer.low_rank_hook
        acceleration.forget(transformer)


class PipelineAdapters:
    """The LoRA methods of a pipeline that was built here, by diffusers' names.

    diffusers' own need PEFT, which replaces layers and knows none that is quantized here.
    """

    def __init__(self, pipeline: Any, components: Sequence[str], hub: Hub) -> None:
        """Take the pipeline and the names of its transformers."""
        self.pipeline, self.hub = pipeline, hub
        self.components = tuple(components)

    @property
    def transformers(self) -> dict[str, nn.Module]:
        """The transformers that stand in the pipeline now, by component."""
        return {name: getattr(self.pipeline, name) for name in self.components}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Tensors,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        load_into_transformer_2: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Add an adapter: a file, folder or hub id, or its tensors, of any shape, dtype and names.

        Raises CheckpointError for what does not fit, and UsageError for a name that is taken.
        """
        given = pretrained_model_name_or_path_or_dict
        file = find_adapter(given, weight_name, self.hub) if isinstance(given, str) else None
        tensors = read_tensors(file) if file else dict(given)  # type: ignore[arg-type]
        metadata, source = (
            (read_alphas(file), str(file.path)) if file else ({}, "the tensors given")
        )
        component = "transformer_2" if load_into_transformer_2 else self.components[0]
        if component not in self.components:
            raise UsageError(
                f"the pipeline has no {component}; it has {', '.join(self.components)}"
            )
        target = self.transformers[component]
        name = adapter_name or f"default_{len(list_names(target))}"
        converted = convert(tensors, metadata, type(self.pipeline).__name__, source)
        add_adapter(target, converted, name, scale, component, source)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use these adapters with these scales, and no others; UsageError for an unknown one."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        numbers = isinstance(adapter_weights, (int, float))
        weights = [adapter_weights] * len(names) if numbers else list(adapter_weights)  # type: ignore[arg-type]
        if len(weights) != len(names):
            raise UsageError(f"{len(names)} adapters and {len(weights)} weights: expected as many")
        set_scales(self.transformers.values(), dict(zip(names, weights, strict=True)))  # type: ignore[arg-type]

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters whose scale is not 0."""
        branches = [b for t in self.transformers.values() for _, b in list_branches(t)]
        active = [name for branch in branches for name, scale in branch.scales.items() if scale]
        return list(dict.fromkeys(active))

    def unload_lora_weights(self) -> None:
        """Take every adapter off."""
        remove(self.transformers.values())


METHODS = ("load_lora_weights", "set_adapters", "get_active_adapters", "unload_lora_weights")


def give_methods(pipeline: Any, components: Sequence[str], hub: Hub) -> None:
    """Let a pipeline that was built here take adapters by diffusers' names of the methods."""
    adapters = PipelineAdapters(pipeline, components, hub)
    for name in METHODS:
        setattr(pipeline, name, getattr(adapters, name))
