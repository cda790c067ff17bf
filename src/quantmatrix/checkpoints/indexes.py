"""Indexes: which shards make up a checkpoint, as a `*.safetensors.index.json` lists them.

A *selection* is what an index, or a rule of `opening`, gives: file names, each with the tensors that
an index promises.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath

from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.header import refuse_pickle
from quantmatrix.checkpoints.hub import Folder, explain_partial
from quantmatrix.errors import CheckpointError
from quantmatrix.links import check_name
from quantmatrix.quoting import quote_json

logger = logging.getLogger(__name__)

WEIGHTS = ".safetensors"
INDEX = re.compile(r"\.safetensors(\.(fp16|bf16|fp32))?\.index(\.(fp16|bf16|fp32))?\.json$")

Selection = Mapping[str, frozenset[str]]


def find_index(folder: Folder, names: Iterable[str]) -> str | None:
    """The index among the names, or None.

    A converter copies what lies beside the weights, an index of what they were before, too: of
    several the one counts whose shards are there and hold the tensors that it names, all of them
    rather than some. Raises CheckpointError where none does, or several that differ.
    """
    indexes = [name for name in names if INDEX.search(name)]
    if len(indexes) < 2:
        return next(iter(indexes), None)
    fitting: dict[str, tuple[Selection, bool]] = {}
    whys = {}
    for name in indexes:
        try:
            selection = read_index(folder, name)
            fitting[name] = selection, holds_just(folder, name, selection)
        except CheckpointError as error:
            whys[name] = str(error)
    whole = [name for name, (_, just) in fitting.items() if just]
    chosen = whole or list(fitting)
    if chosen and all(fitting[name] == fitting[chosen[0]] for name in chosen):
        logger.debug("%s: of its %d indexes %s is read", folder, len(indexes), chosen[0])
        return chosen[0]
    raise ambiguous(folder, indexes, "indexes", next(iter(whys.values()), ""))


def holds_just(folder: Folder, index: str, selection: Selection) -> bool:
    """Whether shards hold the tensors that an index promises and no others.

    Raises CheckpointError where some that it promises are missing.
    """
    just = True
    for shard, promised in selection.items():
        held = folder.header(shard)[0].keys()
        if absent := sorted(promised - held):
            raise CheckpointError(f"{folder}/{index}: {shard} has no tensor {absent[0]}")
        just = just and promised == held
    return just


def read_index(folder: Folder, name: str) -> Selection:
    """Shards that an index lists, with their tensors.

    Raises CheckpointError for an index without a `weight_map`, for a shard that is no plain name of
    a file or is a pickle, and for one that is not there.
    """
    weight_map = read_json(folder.path(name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}/{name}: no weight_map in it: expected a safetensors index")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{folder}/{name}: the shard of {tensor} is {quote_json(shard)}, expected a name"
            )
        shards.setdefault(str(PurePosixPath(name).parent / shard), set()).add(tensor)
    for shard in shards:
        check_name(shard, f"{folder}/{name}")
        refuse_pickle(PurePosixPath(shard))
    missing = sorted(shard for shard in shards if not folder.has(shard))
    if missing:
        raise CheckpointError(
            f"{folder}/{name}: lists {len(shards)} shards, {len(missing)} are missing: "
            f"{', '.join(missing)}; {explain_missing(folder, name, shards.keys() - missing)}"
        )
    return {shard: frozenset(shards[shard]) for shard in sorted(shards)}


def explain_missing(folder: Folder, index: str, present: Collection[str]) -> str:
    """What to do about shards that an index lists and that are not there.

    Who exports a model in one file into a folder that held shards of it leaves their index behind.
    """
    above = PurePosixPath(index).parent
    others = [n for n in folder.names if n.endswith(WEIGHTS) and PurePosixPath(n).parent == above]
    if others and not present:
        return (
            f"there is {', '.join(others)} instead: if the index was left behind by an earlier "
            "export into this folder, remove it"
        )
    return f"download them again{explain_partial(folder)}"


def ambiguous(folder: Folder, names: list[str], what: str, why: str = "") -> CheckpointError:
    """The error for several candidates; `why` one of them is none."""
    listed = "".join(f"\n  {folder}/{name}" for name in names)
    more = f"\n{why}" if why else ""
    return CheckpointError(f"{folder}: {len(names)} {what}; name one of them:{listed}{more}")
