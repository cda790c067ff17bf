"""Networks: metrics of pictures that need weights of others, and are measured only where these lie already.

Nothing is downloaded: a metric whose weights are not in the user's caches is null, and `missing` says what to do.

| metric | definition | weights |
| ------ | ---------- | ------- |
| `lpips` | Zhang et al. 2018, version 0.1 with AlexNet: features of five | `weights/v0.1/alex.pth` of the |
|        | layers, each of unit length, squared differences weighted per | package `lpips`; torchvision's |
|        | channel, mean over pixels, summed; 0 where they are equal | AlexNet in torch's hub cache |
| `clip` | Hessel et al. 2021, as torchmetrics has it: 100 times the cosine | `CLIP` in the cache of |
|        | of picture and prompt, at least 0; `clip_bf16`: the base model's | huggingface_hub |

The packages `lpips` and torchvision are not imported: five convolutions are here, their weights are read. Both
networks run in FP32 on the CPU, on the same pictures whatever made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.nn import functional

from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIP = "openai/clip-vit-large-patch14"
"""What torchmetrics takes, too."""
ALEXNET = "alexnet-owt-7be5be79.pth"
"""torchvision's file of weights."""
LINEAR = Path("weights", "v0.1", "alex.pth")
"""The file of the package `lpips`, below its folder."""
CONVOLUTIONS = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
"""Number in `features`, stride and padding of AlexNet's convolutions; the first two are pooled afterwards."""
SMALLEST = 31
"""Pixels of a side that leave one after AlexNet's last layer."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the channels of a picture in -1..1, before AlexNet."""
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the channels of a picture in 0..1, before CLIP."""

DAMAGED = (KeyError, OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError)
"""What reading weights of another form raises."""

Distance = Callable[[torch.Tensor, torch.Tensor], float]
"""Of two uint8 pictures [height, width, 3]."""
Score = Callable[[torch.Tensor, str], float]
"""Of a uint8 picture [height, width, 3] and its prompt."""


@dataclass(frozen=True)
class Networks:
    """The metrics that can be had here, and why the others cannot."""

    lpips: Distance | None = None
    clip: Score | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def find_networks(cache: Path | None = None, torch_hub: Path | None = None) -> Networks:
    """Load what is in the caches: of huggingface_hub and of torch's hub, the user's where none is named."""
    missing: dict[str, str] = {}
    lpips = clip = None
    backbone = Path(torch_hub or torch.hub.get_dir()) / "checkpoints" / ALEXNET
    linear = find_linear()
    if linear is None:
        missing["lpips"] = (
            "optional; the package lpips, which has its linear weights, is not installed: "
            "pip install --no-deps lpips"
        )
    elif not backbone.is_file():
        address = f"https://download.pytorch.org/models/{ALEXNET}"
        missing["lpips"] = f"optional; AlexNet is not at {backbone}: put {address} there"
    else:
        try:
            lpips = load_lpips(backbone, linear)
        except DAMAGED as error:
            missing["lpips"] = (
                f"{backbone} or {linear} is damaged, or of another network "
                f"({type(error).__name__}: {quote(str(error))}): put the files there again"
            )
    folder = find_clip(cache)
    if folder is None:
        where = cache or "the cache of huggingface_hub (HF_HUB_CACHE)"
        missing["clip"] = f"optional; {CLIP} is not in {where}: hf download {CLIP}"
    else:
        try:
            clip = load_clip(folder)
        except DAMAGED as error:
            missing["clip"] = (
                f"{folder} is damaged, or of another network ({type(error).__name__}: "
                f"{quote(str(error))}): hf download {CLIP}"
            )
    return Networks(lpips, clip, missing)


def find_linear() -> Path | None:
    """The linear weights of the package `lpips`, which is not imported; None where it is not installed."""
    from importlib.util import find_spec

    spec = find_spec("lpips")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / LINEAR).is_file():
            return path
    return None


def load_lpips(backbone: Path, linear: Path) -> Distance:
    """The distance of two pictures by AlexNet's features; see the module's table.

    Raises KeyError for files of another network.
    """
    trunk, weights = (torch.load(path, "cpu", weights_only=True) for path in (backbone, linear))
    layers = [
        (trunk[f"features.{number}.weight"].float(), trunk[f"features.{number}.bias"].float())
        for number, _, _ in CONVOLUTIONS
    ]
    heads = [weights[f"lin{n}.model.1.weight"].float() for n in range(len(CONVOLUTIONS))]

    def list_features(picture: torch.Tensor) -> list[torch.Tensor]:
        x = picture.to("cpu", torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        x = (x - as_channels(SHIFT)) / as_channels(SCALE)
        found = []
        for n, ((_, stride, padding), layer) in enumerate(zip(CONVOLUTIONS, layers, strict=True)):
            x = functional.max_pool2d(x, 3, 2) if n in (1, 2) else x
            x = functional.conv2d(x, *layer, stride, padding).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def measure(reference: torch.Tensor, candidate: torch.Tensor) -> float:
        pairs = zip(list_features(reference), list_features(candidate), heads, strict=True)
        parts = [functional.conv2d((r - c) ** 2, head).mean() for r, c, head in pairs]
        return float(torch.stack(parts).sum())

    return measure


def as_channels(values: tuple[float, ...]) -> torch.Tensor:
    """float32 [1, channels, 1, 1]."""
    return torch.tensor(values).view(1, -1, 1, 1)


def find_clip(cache: Path | None = None) -> Path | None:
    """The folder of CLIP's snapshot in a cache of huggingface_hub, or None where files of it are missing."""
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        path = try_to_load_from_cache(CLIP, name, cache_dir=cache)
        return Path(path) if isinstance(path, str) else None

    config = find("config.json")
    weights = find("model.safetensors") or find("pytorch_model.bin")
    vocabulary = find("tokenizer.json") or find("vocab.json")
    return config.parent if config and weights and vocabulary else None


def load_clip(folder: Path) -> Score:
    """The score of a picture for its prompt, by a folder that CLIPModel and its tokenizer are read from."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    side = model.config.vision_config.image_size
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(picture: torch.Tensor, prompt: str) -> float:
        tokens = tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt")
        found: Any = model(**tokens, pixel_values=prepare_clip(picture, side))
        cosine = functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return 100 * max(float(cosine), 0.0)

    return score


def prepare_clip(picture: torch.Tensor, side: int) -> torch.Tensor:
    """CLIP's input float32 [1, 3, side, side]: the shorter side resized by Pillow's bicubic filter, and the
    middle cut out."""
    from PIL import Image

    image = Image.fromarray(picture.to("cpu").numpy())
    share = side / min(image.size)
    width, height = (max(side, int(length * share)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, side, side, 3)
    x = x.permute(0, 3, 1, 2).float() / 255
    return (x - as_channels(MEAN)) / as_channels(DEVIATION)
