"""Pictures: what a run is given to look at, read and checked before anything is loaded.

`--image-path` names one or more files on this machine, `--mask-path` the white part of one that is to be
painted. Nothing is fetched. A file may be pinned, `cat.png#sha256:0f3a...` with 8 hexadecimal digits or
more: another content is an error, so a command says which picture it was run with. How a picture is
scaled, cut and coded is left to the pipeline's own processor.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.folders import find_local
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.models import generic
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from quantmatrix.models import Model
    from quantmatrix.request import Request

PINNED = re.compile(r"(.+)#sha256:([0-9a-f]{8,64})")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""What Pillow is asked to read: it knows formats that run programs, too."""
BYTES, PIXELS = 2**28, 2**26
"""Largest file, and most pixels of a picture."""
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error)
"""What Pillow raises for bytes that it cannot follow; the last is of EXIF entries."""
FLAGS = {"image": "--image-path", "mask_image": "--mask-path"}
"""The flag of each argument of a pipeline's call."""


@dataclass(frozen=True)
class Picture:
    """One file that a run is given."""

    argument: str
    """`image` or `mask_image`, as pipelines call it."""
    reference: str
    """As the user named it, the pin left out."""
    file: Path
    sha256: str
    """Of the file's bytes, hexadecimal."""
    height: int
    width: int
    tokens: int = 0
    """Rows that it adds to the latents' in every step; 0 where it adds channels, or none."""

    def to_json(self) -> dict[str, Any]:
        """The picture as plans and records keep it."""
        return {
            "argument": self.argument,
            "path": self.reference,
            "sha256": self.sha256,
            "height": self.height,
            "width": self.width,
            "tokens": self.tokens,
        }


def list_pictures(request: Request, pipeline: str) -> tuple[Picture, ...]:
    """The pictures of a request, every file read once, for a pipeline class of diffusers.

    Raises UsageError for a pipeline that takes none, or fewer, and for a file that is missing, no picture,
    too large or another than the pinned one.
    """
    named = [*(("image", one) for one in request.image_path)]
    named += [("mask_image", request.mask_path)] if request.mask_path else []
    if not named:
        return ()
    check_taken(request, pipeline)
    tokens = generic.count_picture_rows(pipeline)
    return tuple(
        read_picture(argument, reference, request, tokens if argument == "image" else 0)
        for argument, reference in named
    )


def check_taken(request: Request, pipeline: str) -> None:
    """Raise UsageError for pictures that a pipeline's call does not take."""
    parameters = generic.read_call(pipeline)
    given = {"image": request.image_path, "mask_image": request.mask_path}
    for argument in (name for name, value in given.items() if value):
        if argument not in parameters:
            raise UsageError(f"{FLAGS[argument]}: {pipeline} takes none; leave the flag out")
    most = generic.MOST_PICTURES.get(pipeline, 1)
    if len(request.image_path) > most:
        raise UsageError(
            f"--image-path: {len(request.image_path)} pictures, {pipeline} takes {most or 'none'}"
        )
    if request.mask_path and not request.image_path:
        raise UsageError("--mask-path: it masks a picture, and --image-path names none")


def read_picture(argument: str, named: str, request: Request, tokens: int) -> Picture:
    """One picture, its digest and its size; UsageError for a file that cannot be used."""
    match = PINNED.fullmatch(named)
    reference, pin = (match[1], match[2]) if match else (named, "")
    file = find_file(FLAGS[argument], reference, request)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(pin):
        raise UsageError(
            f"{FLAGS[argument]} {reference}: expected the file of sha256 {pin}, found {digest}: it is "
            "another picture, or was changed"
        )
    image = open_image(file, f"{FLAGS[argument]} {reference}")
    return Picture(argument, reference, file, digest, image.height, image.width, tokens)


def find_file(flag: str, reference: str, request: Request) -> Path:
    """The file on this machine that a picture's reference leads to; UsageError where there is none."""
    if re.match(r"[a-z][a-z0-9+.-]*:", reference, re.IGNORECASE) and not Path(reference).exists():
        raise UsageError(
            f"{flag} {quote(reference)}: an address is not opened, a picture is a file on this "
            "machine: download it and name the file"
        )
    try:
        found = find_local(reference, request.hub)
    except CheckpointError as error:
        raise UsageError(f"{flag} {error}") from error
    if found is None or not found.is_file():
        raise UsageError(f"{flag} {reference}: no such file; expected a picture on this machine")
    if found.stat().st_size > BYTES:
        raise UsageError(
            f"{flag} {reference}: {found.stat().st_size} bytes, a picture may have {BYTES}"
        )
    return found


def open_image(file: Path, what: str) -> Any:
    """A file as a PIL image, upright and whole; UsageError for one that is no picture, or damaged."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise UsageError(
                    f"{image.width} x {image.height} pixels, at most {PIXELS}: scale it down"
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{what}: no picture that is read here; expected {', '.join(FORMATS)}"
        ) from error
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise UsageError(f"{what}: not taken as a picture: {quote(str(error))}") from error


def call_arguments(model: Model, request: Request) -> dict[str, Any]:
    """Keyword arguments of a model's call, the pictures of the request among them.

    Raises what `Model.call_arguments` and `list_pictures` raise.
    """
    return {**model.call_arguments(request), **dict(load_pictures(model.PIPELINE, request))}


def load_pictures(pipeline: str, request: Request) -> Iterator[tuple[str, Any]]:
    """(argument, RGB picture, list of them or mask) of the call of a pipeline class."""
    found = list_pictures(request, pipeline)
    opened: Mapping[str, list[Any]] = {
        argument: [
            open_image(one.file, one.reference).convert(mode)
            for one in found
            if one.argument == argument
        ]
        for argument, mode in (("image", "RGB"), ("mask_image", "L"))
    }
    for argument, images in opened.items():
        if images:
            yield argument, images[0] if len(images) == 1 else images
