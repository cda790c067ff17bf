"""Adapters: the ways of each form, ComfyUI's API against a stub server, libraries against stub modules."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quantmatrix import models, peers
from quantmatrix.peers import cache_dit, comfyui, common, diffusers, nunchaku, vllm_omni
from quantmatrix.peers.protocol import DONE, LOADED, Answer, Missing, RuntimeFailure, Task
from quantmatrix.tables import read
from quantmatrix.tables.rows import OWN

TABLES = read.read()


def make_task(checkpoint: str, weights: str = "", **more: Any) -> Task:
    row = TABLES.checkpoints[checkpoint]
    return Task(row, base=row.base, weights=weights or row.reference, **more)


@pytest.mark.parametrize("runtime", [name for name in TABLES.runtimes if name != OWN])
@pytest.mark.parametrize("checkpoint", TABLES.checkpoints)
def test_every_checkpoint_has_ways_and_commands(runtime: str, checkpoint: str) -> None:
    adapter = peers.load(runtime)
    task = make_task(checkpoint)
    for way in adapter.ways(task):
        command = adapter.command(Task(**{**vars(task), "way": way}))
        assert command
        assert "\n" not in command


@pytest.mark.parametrize(
    ("checkpoint", "weights", "ways"),
    [
        ("fp8-guide", "", ("from_pretrained",)),
        ("fp8-flux-1-single-file", "", ("from_single_file", "BFLQuantizationConfig")),
        ("fp8-flux-1-single-file", "a/flux1-dev-Q4_0.gguf", ("GGUFQuantizationConfig",)),
        ("fp8-flux-1-online", "", ("TorchAoConfig",)),
        ("msmodelslim-online-mxfp8", "", ()),
        ("msmodelslim-w8a8", "", ("from_pretrained",)),
    ],
)
def test_ways_of_diffusers(checkpoint: str, weights: str, ways: tuple[str, ...]) -> None:
    assert diffusers.ways(make_task(checkpoint, weights)) == ways


@pytest.mark.parametrize("runtime", ["diffusers", "xdit", "vllm-omni", "cache-dit"])
def test_what_quantizes_to_fp8_is_not_asked_for_another_form(runtime: str) -> None:
    """It would run, and its picture would be near: of weights that nobody asked for."""
    ways = peers.load(runtime).ways
    fp8, mxfp8 = make_task("fp8-flux-1-online"), make_task("msmodelslim-online-mxfp8")
    assert (len(ways(fp8)), ways(mxfp8)) == (1, ())
    assert ways(replace(mxfp8, baseline=True, weights="")) == ways(
        replace(fp8, baseline=True, weights="")
    )
    assert diffusers.command(mxfp8).startswith("WanTransformer3DModel.from_pretrained('Wan-AI/")


def test_a_file_of_a_repository_is_an_address_for_diffusers(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    assert diffusers.name_file(str(tmp_path / "x.safetensors")) == str(tmp_path / "x.safetensors")
    found = diffusers.name_file("some/repo/folder/x.safetensors")
    assert found == "https://huggingface.co/some/repo/blob/main/folder/x.safetensors"


def test_a_part_that_is_not_installed_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "find_package", lambda name: peers.protocol.Found(why=name))
    with pytest.raises(Missing, match="TorchAoConfig of diffusers needs the package torchao"):
        diffusers.run(make_task("fp8-flux-1-online", way="TorchAoConfig"), tmp_path)


def test_tasks_survive_the_way_to_a_child() -> None:
    task = make_task("modelopt-nvfp4-wan-2-2", flags=("--prompt", "a fox"), way="x", tiny=True)
    again = Task.from_json(json.loads(json.dumps(task.to_json())))
    assert again == task
    assert again.request.prompt == ("a fox",)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("ValueError", "first\nsecond", "ValueError: first"),
        (
            "exit code 1",
            "a\ntorch.OutOfMemoryError: much\nlast",
            "exit code 1: torch.OutOfMemoryError: much",
        ),
        ("exit code 1", "a\nlast\n\n", "exit code 1: last"),
        ("KeyError", "", "KeyError"),
    ],
)
def test_the_message_of_a_failure_is_one_line(kind: str, error: str, message: str) -> None:
    assert common.pick_message(Answer("failed", kind=kind, error=error)) == message


class Server(BaseHTTPRequestHandler):
    """ComfyUI's routes as they are documented; what it does next lies in `plan`."""

    plan = ""
    graphs: list[dict[str, Any]] = []  # noqa: RUF012
    asked = 0

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        Server.graphs.append(json.loads(self.rfile.read(length))["prompt"])
        Server.asked = 0
        if Server.plan == "invalid":
            detail = {"message": "Value not in list", "details": "unet_name: 'x' not in []"}
            told = {
                "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt failed"},
                "node_errors": {"1": {"errors": [detail], "class_type": "UNETLoader"}},
            }
            self.send(400, json.dumps(told).encode())
        else:
            self.send(
                200, json.dumps({"prompt_id": "id 1", "number": 1, "node_errors": {}}).encode()
            )

    def do_GET(self) -> None:
        Server.asked += 1
        if self.path == "/system_stats":
            self.send(200, b'{"system": {"comfyui_version": "0.33.1"}, "devices": []}')
        elif self.path.startswith("/view?filename=a+b.png&subfolder=&type=output"):
            from PIL import Image

            stream = BytesIO()
            Image.new("RGB", (8, 8)).save(stream, "PNG")
            self.send(200, stream.getvalue())
        elif self.path == "/history/id%201" and Server.asked > 1:
            self.send(200, json.dumps({"id 1": self.tell()}).encode())
        else:
            self.send(200, b"{}")

    def tell(self) -> dict[str, Any]:
        if Server.plan in ("UNETLoader", "KSampler"):
            facts = {
                "node_type": Server.plan,
                "exception_type": "torch.OutOfMemoryError",
                "exception_message": "much\nmore",
            }
            messages = [["execution_start", {}], ["execution_error", facts]]
            return {"status": {"status_str": "error", "messages": messages}, "outputs": {}}
        picture = {"filename": "a b.png", "subfolder": "", "type": "output"}
        return {"status": {"status_str": "success"}, "outputs": {"9": {"images": [picture]}}}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    running = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("COMFYUI_URL", f"http://127.0.0.1:{running.server_port}/")
    monkeypatch.setenv("COMFYUI_MODELS", str(tmp_path))
    monkeypatch.setattr(comfyui, "WAIT", 0.01)
    Server.plan, Server.graphs, Server.asked = "", [], 0
    yield Server
    running.shutdown()
    thread.join()
    running.server_close()


def test_comfyui_runs_the_graph_of_a_row(server: type[Server], tmp_path: Path) -> None:
    file = tmp_path / "flux-2-fp8.safetensors"
    file.touch()
    task = make_task("fp8-flux-2-comfyui", str(file), way="UNETLoader")
    task = replace(task, flags=("--width", "48", "--height", "32"))
    assert comfyui.probe().version == "0.33.1"
    assert comfyui.ways(task) == ("UNETLoader",)
    found = comfyui.run(task, tmp_path)
    assert (found.ending, found.media) == (DONE, "media.png")
    assert (tmp_path / LOADED).exists()
    linked = tmp_path / "diffusion_models" / "quantmatrix" / file.name
    assert linked.resolve() == file
    [graph] = server.graphs
    assert graph["1"]["inputs"]["unet_name"] == f"quantmatrix/{file.name}"
    assert graph["4"]["inputs"]["text"] == "a curious pikachu"
    kinds = {node["class_type"] for node in graph.values()}
    assert {"CLIPLoader", "VAELoader", "KSampler", "VAEDecode", "SaveImage"} <= kinds
    for node in graph.values():  # every link leads to a node
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
    assert json.dumps(graph) in comfyui.command(task)
    size = {name: graph["6"]["inputs"][name] for name in ("width", "height")}
    assert size == {"width": 48, "height": 32}
    plain = replace(task, flags=())
    usual = models.load("flux-2").DEFAULTS
    assert comfyui.render(plain, "x")["6"]["inputs"]["width"] == usual.width
    assert comfyui.render(plain, "x")["6"]["inputs"]["height"] == usual.height


@pytest.mark.parametrize(
    ("plan", "loaded", "message"),
    [
        ("invalid", False, "HTTP 400: Prompt failed; Value not in list unet_name: 'x' not in []"),
        ("UNETLoader", False, "OutOfMemoryError: much"),
        ("KSampler", True, "OutOfMemoryError: much"),
    ],
)
def test_comfyui_fails_in_its_own_words(
    plan: str, loaded: bool, message: str, server: type[Server], tmp_path: Path
) -> None:
    server.plan = plan
    task = make_task("fp8-flux-2-comfyui", "base", baseline=True)
    with pytest.raises(RuntimeFailure) as caught:
        comfyui.run(task, tmp_path)
    found = Answer("failed", kind=caught.value.kind, error=str(caught.value))
    assert (caught.value.loaded, comfyui.explain(found)) == (loaded, message)


def test_comfyui_wants_its_folder_and_loads_no_folders(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_MODELS", "")
    with pytest.raises(Missing, match="COMFYUI_MODELS names no folder"):
        comfyui.run(make_task("fp8-flux-2-comfyui", "x.safetensors"), tmp_path)
    assert comfyui.ways(make_task("fp8-flux-1-tensor-dynamic")) == ()
    monkeypatch.setenv("COMFYUI_URL", "file:///etc")
    assert "expected http://host:port" in comfyui.probe().why


class Stub(SimpleNamespace):
    """A class of a stub module: remembers what it was made from."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Stub:
        return cls(args=args, **kwargs)


def put_modules(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


def test_nunchaku_loads_by_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("svdq-z-image-int4-r32", "a/svdq-int4_r32-z-image-turbo.safetensors")
    engine = type("Engine", (Stub,), {})
    put_modules(
        monkeypatch,
        nunchaku={"NunchakuZImageTransformer2DModel": engine},
        diffusers={"ZImagePipeline": Stub},
    )
    pipeline = nunchaku.load_pipeline(task, models.load("z-image"))
    assert isinstance(pipeline.transformer, engine)
    assert pipeline.transformer.args == (task.weights,)
    assert pipeline.args == ("Tongyi-MAI/Z-Image-Turbo",)
    assert nunchaku.ways(task) == ("from_pretrained",)
    assert nunchaku.ways(make_task("fp8-wan-2-2-single-file")) == ()


def test_cache_dit_wraps_what_diffusers_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[Any] = []

    def quantize(part: Any, quant_type: str) -> tuple[Any, str]:
        return part, quant_type

    pipeline = type("Pipeline", (Stub,), {"transformer": "plain"})
    put_modules(
        monkeypatch,
        cache_dit={"enable_cache": wrapped.append, "quantize": quantize},
        diffusers={"FluxPipeline": pipeline, "FluxTransformer2DModel": Stub},
    )
    model = models.load("flux-1")
    online = cache_dit.load_pipeline(make_task("fp8-flux-1-online", way="quantize"), model)
    assert online.transformer == ("plain", "float8_weight_only")
    folder = cache_dit.load_pipeline(make_task("fp8-guide", "there", way="from_pretrained"), model)
    assert folder.transformer.args == ("there",)
    assert wrapped == [online, folder]


def test_vllm_omni_takes_a_pipeline_with_the_transformer_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, weights, runs = (tmp_path / name for name in ("base", "weights", "runs"))
    for folder in (base / "transformer", base / "vae", weights, runs):
        folder.mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    (weights / "config.json").write_text('{"quantization_config": {}}')
    made: list[dict[str, Any]] = []

    class Omni:
        def __init__(self, **settings: Any) -> None:
            made.append(settings)

        def generate(self, prompt: dict[str, Any]) -> list[Any]:
            from PIL import Image

            made.append(prompt)
            return [
                SimpleNamespace(request_output=SimpleNamespace(images=[Image.new("RGB", (8, 8))]))
            ]

    put_modules(
        monkeypatch,
        **{
            "vllm_omni": {},
            "vllm_omni.entrypoints": {},
            "vllm_omni.entrypoints.omni": {"Omni": Omni},
        },
    )
    row = TABLES.checkpoints["modelopt-fp8-flux-2"]
    task = Task(row, str(base), str(weights), way="folder with the transformer", tiny=True)
    found = vllm_omni.run(task, runs)
    assert (found.ending, found.media) == (DONE, "media.png")
    model = Path(made[0]["model"])
    assert (model / "transformer" / "config.json").is_file()
    assert (model / "model_index.json").is_file()
    assert made[1]["prompt"] == "a curious pikachu"
    assert made[1]["height"] == 64
    online = make_task("fp8-qwen-image-online", way="quantization_config")
    settings = vllm_omni.list_settings(online, runs)
    assert settings == {"model": "Qwen/Qwen-Image", "quantization_config": "fp8"}
    assert vllm_omni.ways(make_task("fp8-flux-1-single-file")) == ()
