"""ComfyUI, by its HTTP API: a graph rendered from the row, queued, waited for, and its picture fetched.

| request                 | answer |
| ----------------------- | ------ |
| `GET /system_stats`     | `system.comfyui_version` |
| `POST /prompt`          | `prompt_id`, or 400 with `error` and `node_errors` |
| `GET /history/<id>`     | nothing yet, or `status` (`status_str`, `messages`) and `outputs` |
| `GET /view?filename=..` | a picture |

`COMFYUI_URL` names a server that runs (`http://127.0.0.1:8188`), `COMFYUI_MODELS` its folder of models, into which the
checkpoint is linked; the base model's files lie there under the names of ComfyUI's examples. Whole files
only: it loads no folders. Known from docs.comfy.org (server routes, API examples).
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, Missing, RuntimeFailure, Task

ID = "comfyui"
URL, MODELS = "COMFYUI_URL", "COMFYUI_MODELS"
DEFAULT = "http://127.0.0.1:8188"
KIND = "diffusion_models"
LINKED = "quantmatrix"
"""Folder below `KIND` that checkpoints are linked into."""
LOADERS = {".safetensors": "UNETLoader"}
"""Node that loads a file of a suffix; GGUF files need nodes of others."""
MEDIA = "media.png"
WAIT = 0.2
LARGEST = 64 << 20
"""Bytes of an answer that are read."""


@dataclass(frozen=True)
class Files:
    """Names of a base model's files in ComfyUI's folders, and the kind of its text encoder."""

    model: str
    encoders: tuple[str, ...]
    kind: str
    vae: str
    latent: str = "EmptySD3LatentImage"


BASES = {
    "flux-1": Files(
        "flux1-dev.safetensors",
        ("t5xxl_fp16.safetensors", "clip_l.safetensors"),
        "flux",
        "ae.safetensors",
    ),
    "flux-2": Files(
        "flux2-dev.safetensors",
        ("mistral_3_small_flux2_bf16.safetensors",),
        "flux2",
        "flux2-vae.safetensors",
        "EmptyFlux2LatentImage",
    ),
    "qwen-image": Files(
        "qwen_image_bf16.safetensors",
        ("qwen_2.5_vl_7b.safetensors",),
        "qwen_image",
        "qwen_image_vae.safetensors",
    ),
    "z-image": Files(
        "z_image_turbo_bf16.safetensors", ("qwen_3_4b.safetensors",), "lumina2", "ae.safetensors"
    ),
}
"""Image models that have a graph here; a clip of Wan needs two experts in one, which it has not."""


def probe() -> Found:
    """The version that the server tells."""
    try:
        found = call("/system_stats")
    except (OSError, ValueError) as error:
        return Found(why=f"{os.environ.get(URL, DEFAULT)} ({URL}) does not answer: {error}")
    system = found.get("system") if isinstance(found, dict) else None
    version = str((system or {}).get("comfyui_version", "unknown"))
    return Found(version=version)


def ways(task: Task) -> tuple[str, ...]:
    """The loader of a single file's suffix, for a model that has a graph."""
    if task.checkpoint.model not in BASES:
        return ("none",) if task.baseline else ()
    if task.baseline:
        return ("UNETLoader",)
    loader = LOADERS.get(Path(task.weights).suffix)
    return (loader,) if loader else ()


def command(task: Task) -> str:
    """The request, with the graph."""
    return f"POST /prompt {json.dumps({'prompt': render(task, name_file(task))})}"


def run(task: Task, folder: Path) -> Answer:
    """Queue the graph and wait for its picture; Missing where a model has no graph here."""
    if task.checkpoint.model not in BASES:
        raise Missing(f"no graph of {task.checkpoint.model}")
    if not task.baseline:
        link(task)
    start = time.perf_counter()
    queued = call("/prompt", {"prompt": render(task, name_file(task))})
    outputs = wait(str(queued["prompt_id"]))
    common.mark_loaded(folder)
    picture = find_picture(outputs)
    (folder / MEDIA).write_bytes(fetch(f"/view?{urllib.parse.urlencode(picture)}"))
    return Answer(
        DONE, loaded=True, media=MEDIA, seconds={"total": round(time.perf_counter() - start, 3)}
    )


def link(task: Task) -> None:
    """Put a link to the checkpoint into the server's folder of models; Missing where that is not known."""
    models = os.environ.get(MODELS, "")
    if not Path(models).is_dir() or not models:
        raise Missing(f"{MODELS} names no folder: where does the server keep its models?")
    target = Path(models) / KIND / LINKED / Path(task.weights).name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    target.symlink_to(Path(task.weights).resolve())


def name_file(task: Task) -> str:
    """The name by which the graph asks for the model's weights."""
    base = BASES.get(task.checkpoint.model)
    plain = base.model if base else ""
    return plain if task.baseline else f"{LINKED}/{Path(task.weights).name}"


def render(task: Task, file: str) -> dict[str, Any]:
    """The graph in API form: a node's inputs are values, or [node, output]."""
    from quantmatrix import models

    base, request = BASES[task.checkpoint.model], task.request
    model = models.load(task.checkpoint.model)
    size = model.TINY_DEFAULTS if task.tiny else model.DEFAULTS
    names = {f"clip_name{n}": name for n, name in enumerate(base.encoders, 1)}
    if len(base.encoders) == 1:
        names = {"clip_name": base.encoders[0]}
    clip = "CLIPLoader" if len(base.encoders) == 1 else "DualCLIPLoader"
    picture = {
        "width": request.width or size.width,
        "height": request.height or size.height,
        "batch_size": 1,
    }
    sampler = {
        "seed": request.seed[0],
        "steps": request.num_inference_steps or size.steps,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    links = {
        "model": ["1", 0],
        "positive": ["4", 0],
        "negative": ["5", 0],
        "latent_image": ["6", 0],
    }
    return {
        "1": make_node("UNETLoader", unet_name=file, weight_dtype="default"),
        "2": make_node(clip, **names, type=base.kind),
        "3": make_node("VAELoader", vae_name=base.vae),
        "4": make_node("CLIPTextEncode", clip=["2", 0], text=request.prompt[0]),
        "5": make_node("CLIPTextEncode", clip=["2", 0], text=""),
        "6": make_node(base.latent, **picture),
        "7": make_node("KSampler", **links, **sampler),
        "8": make_node("VAEDecode", samples=["7", 0], vae=["3", 0]),
        "9": make_node("SaveImage", images=["8", 0], filename_prefix="quantmatrix"),
    }


def make_node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs}


def wait(prompt: str) -> dict[str, Any]:
    """The outputs of a queued graph once it is done; RuntimeFailure with the server's text."""
    while True:
        found = call(f"/history/{urllib.parse.quote(prompt)}").get(prompt)
        if found is None:
            time.sleep(WAIT)
            continue
        if found.get("status", {}).get("status_str") == "error":
            text, kind, loading = read_failure(found["status"].get("messages", []))
            raise RuntimeFailure(text, kind=kind, loaded=not loading)
        outputs: dict[str, Any] = found.get("outputs", {})
        return outputs


def read_failure(messages: list[Any]) -> tuple[str, str, bool]:
    """(text, class, whether the node that loads the weights failed) of what went wrong."""
    for name, facts in messages:
        if name == "execution_error":
            kind = str(facts.get("exception_type", "error")).split(".")[-1]
            loading = facts.get("node_type") in LOADERS.values()
            return str(facts.get("exception_message", "")), kind, loading
    return json.dumps(messages), "error", False


def find_picture(outputs: dict[str, Any]) -> dict[str, str]:
    """The first picture of a graph's outputs; RuntimeFailure where there is none."""
    for output in outputs.values():
        for picture in output.get("images", []):
            return {name: str(picture[name]) for name in ("filename", "subfolder", "type")}
    raise RuntimeFailure("the graph gave no picture", kind="no output", loaded=True)


def read_url() -> str:
    """Where the server listens; ValueError for another scheme than http."""
    url = os.environ.get(URL, DEFAULT).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{URL}={url}: expected http://host:port")
    return url


def fetch(path: str, data: bytes | None = None) -> bytes:
    """The bytes of an answer; RuntimeFailure with the words of one that is an error."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(read_url() + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: bytes = answer.read(LARGEST)
            return found
    except urllib.error.HTTPError as error:
        text = error.read(1 << 16).decode("utf-8", "backslashreplace")
        print(text)
        raise RuntimeFailure(read_message(text), kind=f"HTTP {error.code}") from error


def read_message(text: str) -> str:
    """The message in an error's JSON with its details, else the text."""
    try:
        found = json.loads(text)
        nodes = found.get("node_errors") or {}
        inner = [one for node in nodes.values() for one in node.get("errors", [])]
        listed = [found["error"], *inner]
        return "; ".join(f"{one['message']} {one.get('details', '')}".strip() for one in listed)
    except (ValueError, KeyError, TypeError, AttributeError):
        return text


def call(path: str, value: Any = None) -> Any:
    """The JSON of an answer."""
    return json.loads(fetch(path, None if value is None else json.dumps(value).encode()))


def explain(answer: Answer) -> str:
    """The class of the failure and the first line of the server's words."""
    return common.pick_message(answer)
