"""Mutations: one good file made into one that is damaged, or that somebody hostile wrote.

Every function takes a `random.Random` and changes a file in place (the file may be a hard link: it is
written anew). What is put in is made of values that broke a reader before: numbers that no memory
holds, names that lead elsewhere, text that a terminal or a CI obeys, JSON that is nested for ever.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OUTSIDE = "outside"
"""Folder beside that of a case, which nothing may open."""
SECRET = "the-secret-of-another-folder"
"""What its files hold, which nothing may show."""
MARK = "Q"
"""A run of this letter is a value out of a file: a message may show 200 of them."""


class Raw(str):
    """JSON text that stands in a value's place as it is."""


DEEP = Raw("[" * 3000 + "]" * 3000)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**20, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e200, -1e200),
    *(0.5, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 4200)),
    *("", " ", ".", "..", "/", "a\nb\n::error::c", "##[error]x", "\x1b[31mred\x07", "\u202eevil"),
    *(Raw('"\\ud800"'), "\0", "NaN", "x" * 4096, MARK * 5000, f"{MARK * 90} " * 60),
    *("[link](https://example.org)", "<script>alert(1)</script>", "|`*_~", "__proto__", "%s{}{0}"),
    *(f"../{OUTSIDE}/secret.safetensors", f"../../{OUTSIDE}/secret.json", f"../{OUTSIDE}"),
    *("/etc/passwd", "/dev/zero", "/proc/self/mem", "~root/x.safetensors", "weights.pt", "x.bin"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}}, [0] * 300, ["a", 1, None, {}]),
    *(DEEP, Raw("[" * 40 + "]" * 40), Raw('{"a":' * 2000 + "1" + "}" * 2000), ["WanModel"]),
    *("BF16", "F8_E4M3", "F4", "fp8", "modelopt", "NVFP4", "W8A8", "WanTransformer3DModel"),
    *("nunchaku", "svdq", "int4", "FLUX.1-dev", "torch.float8_e4m3fn", "diffusers", "os", "cpu"),
)
"""What is put in a value's place."""
NAMES = (
    *(
        "",
        "..",
        "/",
        f"../{OUTSIDE}/x",
        "__metadata__",
        "dtype",
        "a\n::error::b",
        "\x1b[2J",
        "\u202e",
    ),
    *(MARK * 5000, "x" * 300, "transformer_blocks.0.attn.to_q.weight", "weight", ".weight", "a."),
    *("_class_name", "quantization_config", "blocks.999999.attn1.to_q.weight", "transformer_9"),
)
"""What is put in a key's place."""


def dump(value: Any) -> str:
    """JSON text, with every `Raw` as it is."""
    raws: list[str] = []

    def mark(found: Any) -> Any:
        if isinstance(found, Raw):
            raws.append(found)
            return f"@raw{len(raws) - 1}@"
        if isinstance(found, dict):
            return {key: mark(inner) for key, inner in found.items()}
        return [mark(inner) for inner in found] if isinstance(found, list) else found

    text = json.dumps(mark(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value inside."""
    pending = [value]
    while pending:
        found = pending.pop()
        keys: Any = found.keys() if isinstance(found, dict) else range(len(found))
        for key in keys:
            yield found, key
            if isinstance(found[key], (dict, list)):
                pending.append(found[key])


def change_value(rng: random.Random, value: Any) -> Any:
    """Put something else in the place of one value, key or entry; the value that came of it."""
    places = list(walk(value)) if isinstance(value, (dict, list)) else []
    if not places or rng.random() < 0.03:
        return pick(rng)
    container, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        container[key] = nudge(rng, container[key]) if kind < 0.15 else pick(rng)
    elif kind < 0.75:
        del container[key]
    elif isinstance(container, dict):
        name = rng.choice((*NAMES, *map(str, container))) if kind < 0.95 else f"{key}x"
        container[name] = container.pop(key) if kind < 0.85 else pick(rng)
    else:
        container.insert(key, pick(rng))
    return value


def pick(rng: random.Random) -> Any:
    """One of the values, not shared with another case."""
    return copy.deepcopy(rng.choice(VALUES))


def nudge(rng: random.Random, value: Any) -> Any:
    """A value of the same kind, a little wrong."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + rng.choice((-value - 1, -1, 1, value, 2 ** rng.randrange(70)))
    if isinstance(value, float):
        return value * rng.choice((-1, 0, 1e300, 3))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), value * 40, value + "\n"))
    if isinstance(value, list):
        return value[:-1] if rng.random() < 0.5 else value * 2
    return dict(list(value.items())[: len(value) // 2])


def change_text(rng: random.Random, text: str) -> str:
    """JSON text with one thing wrong that no value shows: a key twice, a text cut, a comma more."""
    kind = rng.randrange(4)
    if kind == 0:
        return text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    place = rng.randrange(len(text) + 1)
    if kind == 1:
        return text[:place]
    return (
        text[:place] + rng.choice(('"', ",", "{", "]", "\0", "\ufeff", "e99", "\\u")) + text[place:]
    )


def change_json(rng: random.Random, path: Path) -> None:
    """A JSON file with one to three things wrong."""
    value = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = change_value(rng, value)
    text = dump(value)
    if rng.random() < 0.1:
        text = change_text(rng, text)
    replace(path, text.encode("utf-8", "surrogatepass"))


def is_json(text: str) -> bool:
    """Whether a text is an object in JSON, and no earlier change has made it something else."""
    try:
        return text[:1] == "{" and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def change_header(rng: random.Random, path: Path) -> None:
    """A weight file whose header, or a JSON text in its metadata, has something wrong."""
    header, size = read_header(path)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        strings = header.get("__metadata__", {}) if isinstance(header, dict) else {}
        strings = strings if isinstance(strings, dict) else {}
        texts = [key for key, text in strings.items() if type(text) is str and is_json(text)]
        if texts and rng.random() < 0.4:
            key = rng.choice(texts)
            strings[key] = dump(change_value(rng, json.loads(strings[key])))
            if rng.random() < 0.1:
                strings[key] = change_text(rng, strings[key])
            break  # what is in it may be no JSON any more
        if texts or rng.random() < 0.9:
            header = change_value(rng, header)
        else:
            header = {"__metadata__": {"config": dump(change_value(rng, {"a": 1}))}, **header}
        if not isinstance(header, dict):
            break
    text = dump(header)
    if rng.random() < 0.1:
        text = change_text(rng, text)
    write_header(path, text.encode("utf-8", "surrogatepass"), size)


def change_length(rng: random.Random, path: Path) -> None:
    """A weight file that claims another length of its header."""
    data = path.read_bytes()
    old = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    new = rng.choice((0, 1, old - 1, old + 1, old + 8, len(data), 2**31, 2**63, 2**64 - 1, 10**8))
    replace(path, struct.pack("<Q", new % 2**64) + data[8:])


def change_bytes(rng: random.Random, path: Path) -> None:
    """A file with bits turned, bytes put in or taken out, or its end missing."""
    data = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    reach = min(len(data), rng.choice((16, 4096, 10**9)))
    if kind == 0:
        del data[rng.randrange(len(data) + 1) :]
    elif kind == 1:
        data += rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == 2:
        place = rng.randrange(reach + 1)
        data[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
    else:
        for _ in range(rng.choice((1, 2, 8, 64)) if reach else 0):
            data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


def change_kind(rng: random.Random, path: Path) -> None:
    """Something else in the place of a file: a link out, a circle, a folder, a pipe, a huge hole."""
    outside = next(up / OUTSIDE for up in path.parents if (up / OUTSIDE).is_dir())
    secret = outside / ("secret.json" if path.suffix == ".json" else "secret.safetensors")
    kind = rng.randrange(9)
    path.unlink()
    if kind == 0:
        path.symlink_to(secret)
    elif kind == 1:
        path.symlink_to(os.path.relpath(secret, path.parent))
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to(rng.choice(("/dev/zero", "/proc/self/mem", "/nowhere", "/etc/passwd")))
    elif kind == 4:
        path.mkdir()
    elif kind == 5:
        os.mkfifo(path)
    elif kind == 6:
        path.write_bytes(b"")
    elif kind == 7:
        with path.open("wb") as file:
            file.truncate(3 * 2**30)
    else:
        path.write_bytes(
            rng.choice((b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x80\x02}", b"<html>")) * 9
        )


def change_table(rng: random.Random, path: Path) -> None:
    """A CSV file with a cell, a line or a mark wrong."""
    lines = path.read_text(encoding="utf-8").split("\n")
    number = rng.randrange(len(lines))
    cells = lines[number].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(
        (
            "",
            '"',
            "x" * 4096,
            MARK * 5000,
            "\0",
            "\x1b[31m",
            "::error::x",
            "NaN",
            "-1",
            "1e999",
            "é",
        )
    )
    lines[number] = ",".join(cells)
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    replace(path, "\n".join(lines).encode())


def read_header(path: Path) -> tuple[Any, int]:
    """(header, bytes of data) of a good safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), path.stat().st_size - 8 - length


def write_header(path: Path, text: bytes, size: int) -> None:
    """A file of a header and `size` zeros, which take no room on the disk."""
    replace(path, struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + size)


def replace(path: Path, data: bytes) -> None:
    """Other bytes in a new file of the same name."""
    path.unlink()
    path.write_bytes(data)


def change_gguf(rng: random.Random, path: Path) -> None:
    """A GGUF file with a number of its header wrong: a count, a length, a type, a dimension."""
    data = bytearray(path.read_bytes())
    width = rng.choice((4, 8))
    at = rng.choice((4, 8, 16, 24, rng.randrange(24, max(25, len(data) // 2))))
    value = rng.choice((0, 1, 2, 31, 99, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
    data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    replace(path, bytes(data))


Change = Callable[[random.Random, Path], None]


def choose(rng: random.Random, path: Path) -> Change:
    """What may happen to a file of this kind."""
    if rng.random() < 0.1:
        return change_kind
    if path.read_bytes().startswith(b"GGUF"):
        return rng.choice((change_gguf,) * 6 + (change_bytes, change_length))
    if path.suffix == ".safetensors":
        return rng.choice((change_header,) * 6 + (change_bytes, change_length))
    if path.suffix == ".json":
        return rng.choice((change_json,) * 8 + (change_bytes,))
    return change_table if path.suffix == ".csv" and rng.random() < 0.8 else change_bytes


def change(rng: random.Random, folder: Path, names: list[str]) -> list[str]:
    """Change one to three of the files of a folder; what was done to which."""
    done = []
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 1, 2, 3)))):
        path = folder / name
        act = choose(rng, path)
        act(rng, path)
        done.append(f"{act.__name__}({name})")
    return done
