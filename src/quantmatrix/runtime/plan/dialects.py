"""Dialects: in whose names, and in whose layout, a checkpoint is written.

`quantmatrix.models` has the dialects of each model; its original names are learned from diffusers
where no dialect reads them (`learned_names`). A family whose files have a layout of their own
names it; what a layer of such a file stands for is not known of one that is stored in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantmatrix import families, models
from quantmatrix.checkpoints.original_names import is_original
from quantmatrix.errors import CheckpointError
from quantmatrix.kernels.svdq_arithmetic import SHIFT
from quantmatrix.models.dialect import DIFFUSERS, Dialect, Target, find_sources
from quantmatrix.quoting import quote
from quantmatrix.runtime.empty_model import measure_model
from quantmatrix.runtime.plan.learned_names import LearningError, learn
from quantmatrix.scheme import Scheme, measure_features

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader
    from quantmatrix.runtime.plan.sources import Source


def find_code(checkpoint: Checkpoint, layer: str, family: str) -> TensorHeader:
    """The tensor that holds the codes of a layer on disk.

    Raises CheckpointError where there is none.
    """
    names = (f"{layer}.{leaf}" for leaf in families.load(family).CODE_LEAVES)
    code = next((checkpoint.tensors[n] for n in names if n in checkpoint.tensors), None)
    if code is None:
        raise CheckpointError(f"{checkpoint.reference}: layer {layer} has scales but no weight")
    return code


def find_dialect(source: Source, model: str, names: Mapping[str, tuple[int, ...]]) -> Dialect:
    """The dialect that names on disk are of: one of the model's, its original one, or diffusers'.

    `names` are those of `placement.list_names`, with their shapes. Raises CheckpointError for
    original names of this model that diffusers' converter does not convert.
    """
    checkpoint = source.checkpoint
    known = models.dialect_of(model, checkpoint.tensors)
    shapes = measure_model(source.class_name, source.config, source.config_from).tensors
    if known is not DIFFUSERS or all(name in shapes for name in names):
        return known
    try:
        learned = learn(source.class_name, source.config, names, shapes)
    except LearningError as error:
        if not is_original(checkpoint.tensors, source.class_name):
            return known
        raise CheckpointError(
            f"{checkpoint.reference}: these are original names of a {source.class_name}, which "
            f"diffusers' converter cannot take apart ({quote(str(error))}): the file is incomplete, "
            "or its names are of another release; name one in diffusers' names"
        ) from error
    return learned or known


def choose_dialect(
    source: Source,
    model: str,
    family: str | None,
    schemes: Mapping[str, Scheme],
    names: Mapping[str, tuple[int, ...]],
) -> Dialect:
    """The dialect of a checkpoint: that of its family's files, else the one its names are of.

    Names may not tell: every name of a Qwen-Image file whose attention is in full precision is
    diffusers' own, too, but in an SVDQuant file the rows of its modulation are interleaved. Raises
    CheckpointError for a model that the family has no files of, and for layers that are not as the
    dialect has them.
    """
    checkpoint = source.checkpoint
    own = families.load(family).DIALECT if family else None
    if family is None or own is None:
        return find_dialect(source, model, names)
    found = [d for d in models.load(model).DIALECTS if d.name == own]
    if not found:
        every = [models.load(name) for name in models.IDS]
        known = [m.NAME for m in every if any(d.name == own for d in m.DIALECTS)]
        raise CheckpointError(
            f"{checkpoint.reference}: {family} files are known of {', '.join(known)} only, not of "
            f"{models.load(model).NAME}: how its layers would be packed in one is not defined. Name a "
            "checkpoint of another family, or the base model that this one belongs to"
        )
    check_packing(checkpoint, schemes, found[0], family)
    check_plain_layers(checkpoint, schemes, found[0])
    for layer in schemes:
        for target in found[0].layer_targets(layer):
            if target.columns[2] > 1:
                check_split(checkpoint, schemes, found[0], family, layer, target.module)
    return found[0]


def check_packing(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], dialect: Dialect, family: str
) -> None:
    """Quantized layers must have the names and the kind of codes that the dialect has for them.

    What a name stands for (rows of several modules, inputs that follow a GELU, rows that are
    interleaved) is not known of a layer that is stored in another way. Raises CheckpointError for
    such a layer.
    """
    for layer, scheme in schemes.items():
        targets = dialect.layer_targets(layer)
        elsewhere = find_sources(dialect.layers, layer)
        what = ""
        if elsewhere and layer not in elsewhere:
            what = f"under diffusers' name; expected it in {' and '.join(elsewhere)}"
        elif any(target.interleave > 1 for target in targets) and scheme.op != "linear.w4a16":
            what = f"as {scheme.name}; expected AWQ codes (qweight I32, wscales, wzeros)"
        if what:
            raise CheckpointError(
                f"{find_code(checkpoint, layer, family).file}: layer {layer} is quantized {what}, "
                f"as the {dialect.name} layout has it: this is another format; name a file that "
                "was made for the engine"
            )


def check_plain_layers(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], dialect: Dialect
) -> None:
    """Layers that a file leaves in full precision must be what the model's own modules are.

    A converter copies such a layer under the name that its codes would have had, whatever was done
    to it before: half of a module's columns, or a bias without what shifted inputs add. Raises
    CheckpointError for a layer that may be such a one.
    """
    shifted = any(scheme.weight == "int4" for scheme in schemes.values())
    for layer, suffixes in checkpoint.layers().items():
        if "weight" not in suffixes or layer in schemes:
            continue
        for target in dialect.layer_targets(layer):
            what = explain_plain(layer, target, shifted)
            if what:
                raise CheckpointError(
                    f"{checkpoint.tensors[f'{layer}.weight'].file}: tensor {layer}.weight is stored "
                    f"plainly, {what}"
                )


def explain_plain(layer: str, target: Target, shifted: bool) -> str:
    """Why a layer in full precision cannot be taken for the module that it is named for, or ''.

    `shifted`: the file is int4, so that inputs that follow a GELU were shifted before it was made.
    """
    if target.interleave > 1:
        return (
            "and this layout has the layer as AWQ codes only: whether its rows are interleaved and "
            "1 is added to its scale cannot be known. Quantize it, too"
        )
    lost = ""
    if target.unsigned and shifted and layer != target.module:
        lost = (
            f"converters that shift inputs for int4 leave {SHIFT} times the sum of each row of this "
            "weight out of its bias. Add that if yours does"
        )
    if target.columns[2] > 1:
        return (
            f"and is a part of the columns of {target.module} only: expected codes in every part, "
            "or none. Quantize them all, or join them (biases are added) as "
            f"{target.module}.weight{lost and f'; {lost}'}"
        )
    if lost:
        return f"so that its bias may not be whole: {lost}, and write the layer as {target.module}"
    return ""


def check_split(
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    family: str,
    layer: str,
    module: str,
) -> None:
    """Layers that share a module's input columns: all are there, in proportion, each with its bias.

    The loader adds their biases up, so it could not tell that one of them is missing. Raises
    CheckpointError for what is missing or out of proportion.
    """
    file = find_code(checkpoint, layer, family).file
    units = {}
    for other in find_sources(dialect.layers, module):
        if other not in schemes:
            raise CheckpointError(
                f"{file}: layer {layer} holds a part of the input columns of {module}, and {other}, "
                "which holds the rest, is not quantized or not there: expected both; the file is "
                "incomplete"
            )
        if f"{other}.bias" not in checkpoint.tensors:
            raise CheckpointError(
                f"{file}: tensor {other}.bias is missing: expected one in each layer that holds a "
                f"part of {module} (zeros in all but one); the file is incomplete"
            )
        [target] = dialect.layer_targets(other)
        start, stop, _ = target.columns
        into = measure_features(schemes[other], find_code(checkpoint, other, family).shape)[1]
        units[other] = into / (stop - start)
    if len(set(units.values())) > 1:
        widths = " and ".join(f"{name} {width:g}" for name, width in units.items())
        raise CheckpointError(
            f"{file}: per share of the input columns of {module} there are, in {widths} columns: "
            "expected the same number; the layers are of two models, or exchanged"
        )
