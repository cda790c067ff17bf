"""Declarations: where files describe their quantization, joined or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix import strict_json
from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote, quote_json
from quantmatrix.strict_json import JsonError, NotJsonError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from quantmatrix.checkpoints.header import Header, TensorHeader


QUANTIZATION_KEYS = ("quantization_config", "text_config.quantization_config", "compression_config")
"""Where one config.json may describe the quantization, best first."""

HEADER_KEYS = ("_quantization_metadata", "quantization_config")
"""Where a header may describe the quantization, best first; both hold JSON."""

JSON_KEYS = (*HEADER_KEYS, "config")
"""Keys of a header whose values are read, and are JSON objects; `config` is the model's own."""

METHOD_KEYS = ("quant_method", "quant_algo", "method")
"""Keys of which a complete description of a quantization has at least one."""


def merge_headers(headers: Mapping[str, Header]) -> Header:
    """Tensors and metadata of several files, by file name.

    Descriptions of the quantization are joined (`merge_blocks`); of other metadata the first file
    that has a key counts. Raises CheckpointError for a tensor in two files, for descriptions that
    disagree and for a value that is not valid JSON where JSON belongs (`JSON_KEYS`).
    """
    tensors: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    origin: dict[str, str] = {}
    for file, (found, strings) in headers.items():
        for name, header in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].file} and in {header.file}: these are "
                    "two checkpoints, not shards of one; name one file"
                )
            tensors[name] = header
        for key, value in strings.items():
            check_json(key, value, file)
            if key in HEADER_KEYS and key in metadata and metadata[key] != value:
                here = (parse_block(metadata[key]), f"{origin[key]}: {key}")
                there = (parse_block(value), f"{file}: {key}")
                metadata[key] = json.dumps(merge_blocks(*here, *there))
            metadata.setdefault(key, value)
            origin.setdefault(key, file)
    return tensors, metadata


def check_json(key: str, text: str, file: str) -> None:
    """Raises CheckpointError for a header's value that is not a JSON object where one belongs.

    Empty values and `null` say nothing and pass.
    """
    if key not in JSON_KEYS or text.strip() in ("", "null"):
        return
    try:
        found: Any = strict_json.parse(text)
        what = f"a JSON {type(found).__name__}"
    except JsonError as error:
        found, what = None, f"no JSON ({error})"
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file}: {key} in the header is {quote(text, 120)!r}, {what}: expected a JSON object. What "
            "it should declare is unknown: correct it, or write the file again without it"
        )


def parse_block(text: str) -> dict[str, Any]:
    """A JSON object written as a metadata string; empty when it is none.

    Raises CheckpointError for JSON that `strict_json` refuses.
    """
    try:
        block = strict_json.parse(text)
    except NotJsonError:
        return {}
    except JsonError as error:
        raise CheckpointError(
            f"a JSON text in the header cannot be used: {error}; the file is damaged"
        ) from error
    return block if isinstance(block, dict) else {}


def merge_blocks(
    first: Mapping[str, Any], source: str, second: Mapping[str, Any], other: str, path: str = ""
) -> dict[str, Any]:
    """Two descriptions of one quantization as one.

    Objects are joined key by key; lists of the same entries agree in any order. Raises
    CheckpointError for a key that they disagree about.
    """
    joined = dict(first)
    for key, value in second.items():
        mine = first.get(key, value)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            joined[key] = merge_blocks(mine, source, value, other, f"{path}{key}.")
        elif _sort_list(mine) == _sort_list(value):
            joined[key] = mine
        else:
            raise CheckpointError(
                f"{source} and {other} disagree about {path}{key} of the quantization: "
                f"{quote_json(mine, 120)} and {quote_json(value, 120)}; one of the two is stale, "
                "correct or remove it"
            )
    return joined


def _sort_list(value: Any) -> Any:
    return sorted(map(json.dumps, value)) if isinstance(value, list) else value


def find_block(
    config: Mapping[str, Any] | None,
    config_file: str | None,
    metadata: Mapping[str, str],
    files: Sequence[str],
    nested: tuple[Mapping[str, Any], str] | None = None,
) -> tuple[dict[str, Any] | None, str | None]:
    """(quantization block, where it was found), config.json and headers agreeing.

    `nested` is the content and name of an hf_quant_config.json, the last source.
    """
    block, source = find_config_block(config or {}, config_file or "config.json")
    header, where = find_header_block(metadata, files[0] if files else "header")
    if block and header:
        return merge_blocks(block, source, header, where), source
    if block or header:
        return (block, source) if block else (header, where)
    if nested is not None:
        content, where = nested
        inner = content.get("quantization", content)
        if isinstance(inner, Mapping) and inner.get("quant_algo"):
            block = {"quant_method": "modelopt", **inner}
            if "exclude_modules" in block:
                block["ignore"] = block.pop("exclude_modules")
            return block, where
    return None, None


def find_config_block(config: Mapping[str, Any], file: str) -> tuple[dict[str, Any], str]:
    """(block, source) that a config.json describes its quantization with; empty when it does not.

    Raises CheckpointError where the description is there and is not a JSON object.
    """
    for key in QUANTIZATION_KEYS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and value:
            return dict(value), f"{file}: {key}"
        if value:
            raise CheckpointError(
                f"{file}: {key} is {quote_json(value, 120)}: expected a JSON object"
            )
    return {}, ""


def find_header_block(metadata: Mapping[str, str], file: str) -> tuple[dict[str, Any], str]:
    """(block, source) that the headers describe the quantization with; empty when they do not.

    `_quantization_metadata` counts. One that only lists layers is completed by
    `quantization_config`, which otherwise counts where the first is absent.
    """
    for key in HEADER_KEYS:
        check_json(key, metadata.get(key, ""), file)
    block, other = (parse_block(metadata.get(key, "")) for key in HEADER_KEYS)
    first, second = (f"{file}: {key}" for key in HEADER_KEYS)
    if any(key in block for key in METHOD_KEYS):
        return block, first
    if block and other:
        return merge_blocks(block, first, other, second), first
    return (block, first) if block else (other, second if other else "")


def read_json(path: Path, *, endless: bool = False) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError naming the file.

    `endless` takes `Infinity` and `-Infinity` for numbers, which are no JSON.
    Where the path leads is looked at by the folder that gives it.
    """
    try:
        read = strict_json.read_bytes(path, Path(path.absolute().anchor))
        content = strict_json.parse(read, endless=endless)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
