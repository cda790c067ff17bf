"""Pictures as input: what is read, what is refused in words, and what a pipeline's call gets."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.models import generic
from quantmatrix.request import Hub, Request, blank_generation, strip_quantization
from quantmatrix.runtime import pictures
from quantmatrix.runtime.pictures import Picture
from quantmatrix.tiny import hub
from quantmatrix.tiny.pictures import PICTURES, write_picture

KONTEXT, FILL = "FluxKontextPipeline", "FluxFillPipeline"
PLUS, TO_VIDEO = "QwenImageEditPlusPipeline", "WanImageToVideoPipeline"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_picture("picture.png", tmp_path)


def ask(*paths: object, **fields: Any) -> Request:
    return Request(model_path="x", image_path=tuple(map(str, paths)), **fields)


def test_a_picture_is_known_by_its_bytes_and_size(picture: Path) -> None:
    [found] = pictures.list_pictures(ask(picture), KONTEXT)
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    assert found.to_json() == {
        "argument": "image",
        "path": str(picture),
        "sha256": digest,
        "height": 64,
        "width": 64,
        "tokens": 4096,
    }
    [pinned] = pictures.list_pictures(ask(f"{picture}#sha256:{digest[:16]}"), TO_VIDEO)
    assert (pinned.reference, pinned.sha256, pinned.tokens) == (str(picture), digest, 0)
    assert pictures.list_pictures(ask(), KONTEXT) == ()


def test_another_picture_than_the_pinned_one_is_an_error(picture: Path) -> None:
    with pytest.raises(
        UsageError, match=r"expected the file of sha256 00000000, found [0-9a-f]{64}"
    ):
        pictures.list_pictures(ask(f"{picture}#sha256:00000000"), KONTEXT)


@pytest.mark.parametrize(
    "address",
    ["https://example.org/cat.png", "HTTP://x/y.png", "data:image/png;base64,AAAA", "file:///etc/passwd"],
)  # fmt: skip
def test_an_address_is_refused_in_words(address: str) -> None:
    with pytest.raises(
        UsageError, match=r"an address is not opened.*download it and name the file"
    ):
        pictures.list_pictures(ask(address), KONTEXT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture at all", "no picture that is read here; expected PNG, JPEG"),
        (b"", "no picture that is read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that is read here"),
        (None, "not taken as a picture"),
    ],
)
def test_what_is_no_picture_is_refused(
    content: bytes | None, message: str, picture: Path, tmp_path: Path
) -> None:
    file = tmp_path / "other.png"
    file.write_bytes(picture.read_bytes()[:6000] if content is None else content)
    with pytest.raises(UsageError, match=rf"--image-path .*other\.png: {message}"):
        pictures.list_pictures(ask(file), KONTEXT)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of entries that it leaves out
def test_damaged_entries_of_a_camera_are_told_in_words(tmp_path: Path) -> None:
    """Pillow raises an error of `struct` for some."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # it lies on its side
    file = tmp_path / "camera.jpg"
    Image.new("RGB", (16, 16)).save(file, exif=exif)
    whole = file.read_bytes()
    start = whole.index(b"Exif")
    told = set()
    for place in range(start, start + 60):
        for value in (0, 1, 2, 3, 7, 10, 255):
            file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                pictures.list_pictures(ask(file), KONTEXT)
            except UsageError as error:
                told.add(str(error).partition("not taken as a picture: ")[2])
    assert any("not an integer" in words for words in told)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.png", tmp_path, Path("owner/repo.png")):
        with pytest.raises(UsageError, match=f"--image-path {path}: no such file"):
            pictures.list_pictures(ask(path), KONTEXT)


def test_too_many_pixels_are_refused_before_they_are_read(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "PIXELS", 64 * 64 - 1)
    with pytest.raises(UsageError, match="64 x 64 pixels, at most 4095"):
        pictures.list_pictures(ask(picture), KONTEXT)
    monkeypatch.setattr(pictures, "BYTES", 100)
    with pytest.raises(UsageError, match="bytes, a picture may have 100"):
        pictures.list_pictures(ask(picture), KONTEXT)


def test_a_pipeline_takes_what_its_call_takes(picture: Path, tmp_path: Path) -> None:
    mask = str(write_picture("mask.png", tmp_path))
    with pytest.raises(UsageError, match="--image-path: FluxPipeline takes none"):
        pictures.list_pictures(ask(picture), "FluxPipeline")
    with pytest.raises(UsageError, match=f"--mask-path: {KONTEXT} takes none"):
        pictures.list_pictures(ask(picture, mask_path=mask), KONTEXT)
    with pytest.raises(UsageError, match="2 pictures, WanImageToVideoPipeline takes 1"):
        pictures.list_pictures(ask(picture, picture), TO_VIDEO)
    with pytest.raises(UsageError, match="--mask-path: it masks a picture"):
        pictures.list_pictures(ask(mask_path=mask), FILL)
    both = pictures.list_pictures(ask(picture, mask_path=mask), FILL)
    assert [one.argument for one in both] == ["image", "mask_image"]
    assert len(pictures.list_pictures(ask(picture, picture, picture), PLUS)) == 3


def test_the_call_gets_upright_pictures_in_the_order_named(tmp_path: Path) -> None:
    turned = Image.new("RGBA", (8, 4), (9, 8, 7, 255))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    first, second = (write_picture(name, tmp_path) for name in PICTURES[:2])
    [(argument, one)] = pictures.load_pictures(KONTEXT, ask(tmp_path / "turned.png"))
    assert (argument, one.mode, one.size) == ("image", "RGB", (4, 8))
    [(_, both)] = pictures.load_pictures(PLUS, ask(second, first))
    assert [image.getpixel((1, 0)) for image in both] == [(253, 0, 4), (4, 0, 253)]
    masked = dict(
        pictures.load_pictures(FILL, ask(first, mask_path=str(write_picture("mask.png", tmp_path))))
    )
    assert masked["mask_image"].mode == "L"
    assert sorted({masked["mask_image"].getpixel(at) for at in ((0, 0), (32, 32))}) == [0, 255]


def test_arguments_of_a_model_and_its_pictures_come_together(picture: Path) -> None:
    model = models.load("wan-2-2/WanImageToVideoPipeline")
    given = pictures.call_arguments(model, ask(picture, height=64, width=64))
    assert given.keys() == {"image", "height", "width"}
    with pytest.raises(UsageError, match="its call needs image: name a picture with --image-path"):
        pictures.call_arguments(model, Request(model_path="x"))


def test_placeholders_are_pictures_of_the_tiny_hub(tmp_path: Path) -> None:
    hub.ensure("/path/to/picture.png", tmp_path)
    request = ask("/path/to/picture.png", hub=hub.hub(tmp_path))
    [found] = pictures.list_pictures(request, KONTEXT)
    assert found.sha256.startswith("5da9419bbfe9dc9a")
    assert found.file == tmp_path / "local/path/to/picture.png"
    with pytest.raises(UsageError, match="placeholder of the guide"):
        pictures.list_pictures(ask("/path/to/picture.png", hub=Hub()), KONTEXT)


def test_a_request_holds_pictures_as_what_it_generates_from() -> None:
    flags = ["--model-path", "x", "--image-path", "a.png", "b.png", "--mask-path", "m.png"]
    request = Request.from_words(flags)
    assert (request.image_path, request.mask_path) == (("a.png", "b.png"), "m.png")
    assert request.component_paths == {}
    assert blank_generation()["image_path"] == ()
    assert strip_quantization(request, "base").image_path == request.image_path
    assert Request(model_path="x", image_path="one.png").image_path == ("one.png",)  # type: ignore[arg-type]


@pytest.mark.parametrize("pipeline", generic.BESIDE)
def test_pipelines_that_are_named_take_pictures(pipeline: str) -> None:
    import diffusers

    found = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    assert "image" in found


def test_a_picture_adds_no_tokens_unless_its_model_says_so(tmp_path: Path) -> None:
    picture = Picture("image", "a.png", tmp_path / "a.png", "0" * 64, 32, 48)
    assert picture.to_json()["tokens"] == 0
    assert (picture.to_json()["height"], picture.to_json()["width"]) == (32, 48)
