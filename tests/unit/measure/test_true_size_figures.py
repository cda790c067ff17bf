"""True size by value: a pretended device, scheduler and model; options of classes; requests of bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantmatrix.errors import MachineError, UsageError
from quantmatrix.measure import saved_runs, true_size
from quantmatrix.measure.bench import pairs, synthetic
from quantmatrix.measure.classes import options
from quantmatrix.request import Request
from quantmatrix.tables import read

ROW = read.read().checkpoints["modelopt-fp8-flux-2"]


class Device:
    """An accelerator that counts."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def reset_peak_memory_stats(self, device: str) -> None:
        self.done.append(f"reset {device}")

    def max_memory_allocated(self, device: str) -> float:
        self.done.append(f"peak {device}")
        return 777.0

    def synchronize(self) -> None:
        self.done.append("wait")

    def empty_cache(self) -> None:
        self.done.append("empty")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(torch, "pretended", found, raising=False)
    return found


def test_an_accelerator_is_waited_for_and_a_cpu_is_not(device: Device) -> None:
    for name in ("cpu", "cpu:0"):
        true_size.synchronize(name)
        true_size.release(name)
    assert device.done == []
    true_size.synchronize("pretended:3")
    true_size.release("pretended")
    assert device.done == ["wait", "empty"]
    assert true_size.accelerator("pretended:1") is device


@pytest.mark.parametrize(
    ("name", "peak", "done"),
    [("cpu", 0, []), ("pretended:1", 777, ["empty", "reset pretended:1", "peak pretended:1"])],
)
@pytest.mark.parametrize("same", [True, False])
def test_steps_are_made_twice(
    name: str,
    peak: int,
    done: list[str],
    same: bool,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = [torch.ones(2)], [torch.ones(2) + (0 if same else 1)]
    runs = iter([(first, 9.0), (second, 0.25)])
    monkeypatch.setattr(true_size, "make_steps", lambda *_: next(runs))
    found = true_size.measure_steps("m", "base", nn.Linear(3, 2, bias=False), name)
    assert found.latents is second
    assert (found.seconds, found.repeats, found.peak_bytes) == (0.25, same, peak)
    assert found.weight_bytes == 24
    assert device.done == done


@pytest.mark.parametrize(("sign", "expected"), [(1, 3.0), (-1, -3.0)])
def test_steps_of_a_scheduler(
    sign: int, expected: float, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SimpleNamespace(latents="x", time="t", left=False, per=10, listed=False, sign=sign)
    clock = iter([50.0, 56.0])
    asked: list[Any] = []

    class Scheduler:
        timesteps = torch.tensor([30.0, 20.0, 10.0])

        def step(self, guess: torch.Tensor, moment: torch.Tensor, latents: torch.Tensor) -> Any:
            asked.append((guess.tolist(), float(moment), latents.dtype))
            return (latents + guess,)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return (t.expand(2).to(x.dtype),)

    monkeypatch.setattr(true_size.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(true_size.models, "load", lambda name: SimpleNamespace(STEP=step))
    given = {"x": torch.zeros(1, 2, dtype=torch.bfloat16), "t": torch.zeros(1)}
    monkeypatch.setattr(true_size, "choose_inputs", lambda *_: given)
    monkeypatch.setattr(true_size, "open_scheduler", lambda *_: Scheduler())
    kept, seconds = true_size.make_steps("m", "base", Model(), "pretended:0")
    assert seconds == 2.0
    assert [one.tolist() for one in kept] == [
        [[expected] * 2], [[expected / 3 * 5] * 2], [[expected / 3 * 6] * 2],
    ]  # fmt: skip
    assert [moment for _, moment, _ in asked] == [30.0, 20.0, 10.0]
    assert asked[0][0] == [[expected] * 2]
    assert {dtype for *_, dtype in asked} == {torch.float32}
    assert {one.dtype for one in kept} == {torch.float32}
    assert given["x"].dtype == torch.bfloat16
    assert device.done == ["wait", "wait"]


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_scheduler_of_a_model(
    dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import diffusers

    from quantmatrix.tiny import hub

    asked: list[Any] = []

    class Own:
        @classmethod
        def from_pretrained(cls, path: Path) -> Own:
            asked.append(path)
            return cls()

        def set_timesteps(self, count: int, **given: Any) -> None:
            asked.append((count, given))

    monkeypatch.setattr(diffusers, "Own", Own, raising=False)
    monkeypatch.setattr(hub, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(hub, "ensure", lambda *_: None)
    monkeypatch.setattr(hub, "find_snapshot", lambda *_: tmp_path)
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "Own", "use_dynamic_shifting": dynamic}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    inputs = {"hidden_states": torch.zeros(3, 256, 7)}
    true_size.open_scheduler("base", nn.Linear(1, 1), inputs, "cpu")
    more = {"mu": 0.5} if dynamic else {}
    assert asked == [tmp_path / "scheduler", (4, {"device": "cpu", **more})]


@pytest.mark.parametrize(
    ("device_name", "asked", "deep"),
    [
        (None, None, False),
        ("cpu", None, False),
        ("cuda:1", None, True),
        ("cpu", True, True),
        ("cuda", False, False),
    ],
)
def test_what_is_measured_at_true_size(
    device_name: str | None,
    asked: bool | None,
    deep: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    place = device_name or "cpu"
    clock = iter([1.0, 4.5, 10.0, 12.25])

    def put(name: str, value: Any) -> None:
        monkeypatch.setattr(true_size, name, lambda *given, **_: done.append(name) or value)

    monkeypatch.setattr(true_size.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(true_size, "measure_plain", lambda *given: done.append(given[2:]) or "bf16")
    plan = SimpleNamespace(components={"transformer": "part"}, request="r")
    for name, value in (
        ("release", None), ("draw_blocks", "shallow"), ("write_once", tmp_path),
        ("plan_checkpoint", plan), ("load_component", "quantized"), ("deepen", None),
        ("compare_layers", "errors"), ("measure_steps", "found"),
    ):  # fmt: skip
        put(name, value)
    request: Any = SimpleNamespace(device=device_name)
    found: Any = true_size.measure(ROW, request, read.read(), tmp_path, deep=asked)
    assert done[0] == (place, deep)
    assert ("deepen" in done) is deep
    assert done[1:4] == ["release", "draw_blocks", "write_once"]
    assert done[-2:] == ["compare_layers", "measure_steps"]
    assert found.size == (
        "true width and depth" if deep else "one block of each kind at true width"
    )
    assert (found.bf16, found.quantized, found.errors) == ("bf16", "found", "errors")
    assert found.seconds == {"write": 3.5, "load": 2.25}


def test_the_only_block_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(count: int, other: int) -> nn.Module:
        model = nn.Module()
        model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
        model.others = nn.ModuleList(nn.Linear(3, 3) for _ in range(other))
        return model

    monkeypatch.setattr(
        true_size.models, "load", lambda name: SimpleNamespace(BLOCKS=("blocks", "others"))
    )
    monkeypatch.setattr(true_size, "build_plain", lambda model, size: make(5, 1))
    shared: list[Any] = []
    monkeypatch.setattr(true_size, "share_inputs", shared.append)
    module = make(1, 1)
    first = module.blocks[0]
    assert true_size.deepen(module, "m") is module
    assert (len(module.blocks), len(module.others)) == (5, 1)
    assert module.blocks[0] is first
    assert len({id(block.weight) for block in module.blocks}) == 5
    assert all(torch.equal(block.weight, first.weight) for block in module.blocks)
    assert shared == [module]


@pytest.mark.parametrize(("bias", "error"), [(True, 0.25), (False, 0.0)])
def test_layers_are_compared_on_their_own_input(
    bias: bool, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quantized(nn.Module):
        def forward(self, x: torch.Tensor, other: Any) -> torch.Tensor:
            return x * 2

    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.a = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.a(x, x * 9)
            return self.a(x * 5, None)  # the first call counts

    twin = nn.Linear(2, 2, bias=bias)
    twin.weight.data = torch.eye(2) * 2
    if bias:
        twin.bias.data = torch.tensor([0.0, 2.0])
    monkeypatch.setattr(true_size, "choose_inputs", lambda *_: {"x": torch.tensor([[0.0, 3.0]])})
    plan: Any = SimpleNamespace(components={"transformer": SimpleNamespace(layers={"a": ()})})
    quantized = Model(Quantized())
    found = true_size.compare_layers("m", plan, Model(twin), quantized, "cpu")
    assert found.found == {"transformer": {"a": error}}
    assert not quantized.a._forward_hooks


def test_the_energy_of_a_structured_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(512, 192, generator=generator) / 192**0.5
    found = true_size.structure(white, generator)
    assert float(found.square().sum(1).mean()) == pytest.approx(1, rel=0.1)
    sizes = found.square().mean(0).sqrt()
    large = sizes > 3 * sizes.median()
    assert int(large.sum()) == 3
    assert float(sizes[large].mean() / sizes[~large].mean()) == pytest.approx(6, rel=0.2)
    share = torch.linalg.svdvals(found[:, ~large]).square()
    assert float(share[:8].sum() / share.sum()) > 0.5
    narrow = true_size.structure(torch.ones(4, 20, dtype=torch.bfloat16), generator)
    assert (narrow.shape, narrow.dtype) == ((4, 20), torch.bfloat16)


@pytest.mark.parametrize("form", ["online", "a", "z"])
def test_rows_that_have_no_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ROW, form=form, id="own")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "written").write_text("there")
    given: Any = (row, None, tmp_path, "base", "cpu")
    if form != "online":
        assert true_size.write_once(*given) == Path("there")
        return
    with pytest.raises(UsageError) as caught:
        true_size.write_once(*given)
    assert str(caught.value) == "own is quantized while it is loaded: it has no file to write"


@pytest.mark.parametrize(("form", "files"), [("raw", True), ("q", False), ("sharded", False)])
def test_the_base_of_a_raw_file_has_weights(form: str, files: bool, tmp_path: Path) -> None:
    class Model(nn.Linear):
        def save_config(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").touch()

    folder = true_size.name_base(tmp_path, replace(ROW, id="own"))
    assert folder == tmp_path / "base-of-own"
    true_size.write_base(replace(ROW, form=form), Model(2, 3), folder)
    expected = {"config.json", *(["diffusion_pytorch_model.safetensors"] if files else [])}
    assert {path.name for path in folder.iterdir()} == expected


# --- options of classes --------------------------------------------------------------------------


RULES = {
    "num_layers": 1, "n_refiner_blocks": 1, "depth": 1, "dit_depth": 1, "nlayers": 1,
    "num_attention_heads": 2, "audio_num_kv_heads": 2, "n_heads": 2, "nheads": 2, "dit_heads": 2,
    "num_key_value_attention_heads": 2, "attention_head_dim": 32, "d_kv": 32, "head_dim": 32,
    "hidden_size": 64, "d_model": 64, "token_dim": 64, "ffn_dim": 128, "audio_ff_dim": 128,
    "moe_intermediate_dim": 128, "text_dim": 64, "text_in_dim": 64, "in_text_dim": 64,
    "in_text_dim2": 64, "cross_attention_dim": 64, "text_encoder_dim": 64, "prior_x_size": 64,
    "vocab_size": 64, "time_embed_dim": 64, "time_step_dim": 64, "multiple_of": 64, "text_len": 64,
    "sample_width": 8, "num_experts": 8,
}  # fmt: skip


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_a_rule_makes_a_larger_number_small(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    import diffusers

    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value + more)
        for name, value in RULES.items()
    ]
    own.append(inspect.Parameter("patch", inspect.Parameter.KEYWORD_ONLY, default=2000))
    own.append(inspect.Parameter("num_x_blocks", inspect.Parameter.KEYWORD_ONLY, default=True))
    monkeypatch.setattr(diffusers, "Own", type("Own", (), {}), raising=False)
    monkeypatch.setattr(
        options.inspect, "signature", lambda _: SimpleNamespace(parameters={p.name: p for p in own})
    )
    assert options.shrink("Own") == (RULES if more else {})


# --- requests that are timed ----------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["dit_layerwise_offload", "dit_cpu_offload"])
def test_what_is_offloaded_is_not_timed(flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        pairs.bench_request(Request(**{flag: True}), "base", 3)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "bench measures transformers that lie on their device: leave out the offload flags"
    )


@pytest.mark.parametrize(("tiny", "size"), [(True, "tiny"), (False, "full")])
def test_parts_of_a_request_are_measured(
    tiny: bool, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = SimpleNamespace(name="t")
    plan = SimpleNamespace(
        components={"t": SimpleNamespace(backends={"int8": 3}), "u": SimpleNamespace(backends={})},
        machine=SimpleNamespace(name="a GPU"),
    )
    monkeypatch.setattr(pairs, "require_plan", lambda request: plan)
    monkeypatch.setattr(pairs, "strip_quantization", lambda request, base: base)
    monkeypatch.setattr(pairs, "capture_inputs", lambda plain: ((), {}))
    monkeypatch.setattr(pairs, "open_parts", lambda *_: iter([part]))
    monkeypatch.setattr(pairs, "measure_part", lambda one, repeats, say: {"repeats": repeats})
    monkeypatch.setattr(pairs, "describe", lambda measured, *_: {"measured": measured})
    said: list[str] = []
    watched: list[Any] = []
    request = Request(tiny=tiny)
    found = pairs.bench_request(request, "base", 7, said.append, watched.append)
    assert found == {
        "size": size,
        "backends": {"t": {"int8": 3}},
        "measured": {"t": {"repeats": 7}},
    }
    assert (said, watched) == (["inputs"], [part])

    def fill(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(pairs, "measure_part", fill)
    with pytest.raises(MachineError) as caught:
        pairs.bench_request(request, "base", 7)
    assert str(caught.value) == (
        "a GPU cannot hold BF16 and the quantized form together, which timing them in turn needs: "
        "CUDA out of memory; try a smaller --height and --width"
    )


@pytest.mark.parametrize(("tiny", "end"), [(True, " --tiny"), (False, "")])
def test_a_cell_is_named_in_its_result(
    tiny: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = read.read()
    cell = tables.cells[0]
    monkeypatch.setattr(pairs, "bench_request", lambda *given: {"asked": given[1:3]})
    monkeypatch.setattr(pairs.bench_results, "sign", lambda *_: {"signed": 1})
    bench: Any = SimpleNamespace(tables=tables, tiny=tiny, request=lambda cell: None)
    assert pairs.bench_cell(bench, cell, 9) == {
        "what": cell.id,
        "cell": {"signed": 1},
        "command": f"quantmatrix bench --row {cell.id}{end}",
        "asked": (tables.models[cell.model].repo, 9),
    }


def test_components_that_are_not_quantized_are_not_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Any] = []

    def load(component: Any, request: Any, *, device: str) -> str:
        loaded.append((component.name, request, device))
        return f"{component.name} of {request}"

    def plan(kind: str, **layers: Any) -> Any:
        components = {name: SimpleNamespace(name=name, layers=own) for name, own in layers.items()}
        request = SimpleNamespace(model_path="o/n", __str__=lambda: kind)
        return SimpleNamespace(
            components=components, request=request, machine=SimpleNamespace(device=f"{kind}:0")
        )

    monkeypatch.setattr(pairs, "load_component", load)
    quantized, plain = plan("q", t={"a": 1}, u={}), plan("p", t={}, u={})
    [part] = pairs.open_parts(quantized, plain, (1,), {"x": 2})
    assert (part.name, part.device, part.args, part.kwargs) == ("t", "q:0", (1,), {"x": 2})
    assert [(name, place) for name, _, place in loaded] == [("t", "p:0"), ("t", "q:0")]
    with pytest.raises(UsageError) as caught:
        next(pairs.open_parts(plan("q", u={}), plain, (), {}))
    assert str(caught.value) == (
        "o/n: no transformer component is quantized, so there is nothing to compare with BF16; name "
        "a checkpoint with --transformer-path"
    )


def test_random_blocks_have_scales_of_gain_one() -> None:
    from quantmatrix.families import gguf
    from quantmatrix.kernels import linear_gguf
    from quantmatrix.scheme import BLOCKS

    for name, scheme in gguf.SCHEMES.items():
        columns = 512
        size = columns // BLOCKS[name][0] * BLOCKS[name][1]
        generator = torch.Generator().manual_seed(0)
        blocks = torch.randint(0, 256, (64, size), generator=generator, dtype=torch.uint8)
        synthetic.set_block_scales(blocks, scheme, columns)
        decoded = linear_gguf.decode({"weight": blocks}, scheme)
        assert float(decoded.square().sum(1).mean()) == pytest.approx(1, rel=0.2)


def test_a_run_is_saved_where_it_may_be(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    assert saved_runs.check_target(path, several=False) == Path(path)
