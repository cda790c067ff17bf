"""Heads exchanged without processes, marks of pictures, pieces of plans and of base weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refusal

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, QuantmatrixError, UsageError
from quantmatrix.families.layouts import Layout
from quantmatrix.request import Request
from quantmatrix.runtime import acceleration, head_exchange, light_processor, parallel, pictures
from quantmatrix.runtime.plan import inspect
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.witness import base as witness_base
from quantmatrix.scheme import Scheme

MARK = light_processor.MARK
NVFP4 = Scheme("linear.nvfp4", "NVFP4", "e2m1", "group", "group-dynamic", group_size=16)


def make(stored: Mapping[str, tuple[str, tuple[int, ...]]], **more: Any) -> Checkpoint:
    tensors = {n: TensorHeader(n, dtype, shape, "f.st") for n, (dtype, shape) in stored.items()}
    return Checkpoint("here", ("f.st",), tensors, **more)


# --- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "shares", "most", "own"),
    [(4, [3, 3], 2, 2), (5, [3, 3], 3, 2), (7, [2, 2, 2], 3, 1), (6, [2, 2, 2], 2, 2)],
)
def test_what_a_process_sends_and_computes(
    heads: int, shares: list[int], most: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the processes, with all others holding as many tokens and the same numbers."""
    count, tokens = len(shares), shares[-1]
    seen: list[tuple[list[int], list[int]]] = []

    def exchange(x: torch.Tensor, received: Any, sent: Any, group: Any) -> torch.Tensor:
        seen.append((list(received), list(sent)))
        return x

    monkeypatch.setattr(head_exchange, "exchange", exchange)
    monkeypatch.setattr(head_exchange.distributed, "get_rank", lambda group: count - 1)
    q = torch.arange(2.0 * tokens * heads * 3).reshape(2, tokens, heads, 3) + 1
    given: list[tuple[int, ...]] = []

    def attention(*parts: torch.Tensor) -> torch.Tensor:
        given.extend(tuple(part.shape) for part in parts)
        return parts[0] + 10 * parts[1] + 100 * parts[2]

    group = SimpleNamespace(group_name="unconnected")
    found = head_exchange.attend(q, 2 * q, 3 * q, shares, group, attention)
    assert seen == [(shares, [tokens] * count), ([tokens] * count, shares)]
    assert given == [(2, sum(shares), own, 3)] * 3
    assert found.shape == (2, tokens, heads, 3)
    expected = 321 * q
    for rank in range(count):
        first = rank * most
        kept = list(range(first, min(first + own, heads)))
        lost = list(range(first + own, min(first + most, heads)))
        assert found[:, :, kept].equal(expected[:, :, kept])
        assert not found[:, :, lost].any()


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, True), ({"scale": 0.5}, True), ({"key": 7}, False), ({"value": 7}, False),
        ({"attn_mask": torch.ones(1, 1, 1, 8)}, False), ({"attn_mask": torch.ones(1, 8)}, False),
        ({"dropout_p": 0.1}, False), ({"query": 7, "dropout_p": 0.1}, False), ({"is_causal": True}, False),
        ({"enable_gqa": True}, False), ({"return_lse": True}, False), ({"known": None}, False),
        ({"ring": 2, "return_lse": True}, False), ({"ring": 2, "is_causal": True}, False),
    ],
)  # fmt: skip
def test_only_plain_attention_over_tokens_of_all_is_exchanged(
    changes: dict[str, Any], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-attention has keys and values of another length, each of which counts."""
    from diffusers.models import attention_dispatch

    def original(*args: Any, **words: Any) -> tuple[Any, ...]:
        return ("original", args[3:], words)

    def attend(query: Any, key: Any, value: Any, shares: Any, group: Any, run: Any) -> Any:
        return ("ours", shares, group, run(query, key, value))

    monkeypatch.setattr(attention_dispatch, "_templated_context_parallel_attention", original)
    monkeypatch.setattr(head_exchange, "attend", attend)
    head_exchange.replace_attention({4: changes.get("known", [4, 4])}.get)
    templated: Any = attention_dispatch._templated_context_parallel_attention
    head_exchange.replace_attention(None)  # type: ignore[arg-type]
    assert attention_dispatch._templated_context_parallel_attention is templated
    parts = [torch.empty(1, changes.get(n, 4), 2, 3) for n in ("query", "key", "value")]
    mesh = SimpleNamespace(get_group=lambda: "group")
    config = SimpleNamespace(
        ring_degree=changes.get("ring", 1), _ulysses_mesh=mesh, _flattened_mesh=None
    )
    words = {
        "_parallel_config": SimpleNamespace(context_parallel_config=config),
        "forward_op": lambda context, *parts, **more: (context, *parts, more),
        "backward_op": "backward",
    }
    given = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "return_lse")
    found = templated(*parts, **words, **{n: v for n, v in changes.items() if n in given})
    if ours:
        more = {"_save_ctx": False, "_parallel_config": words["_parallel_config"]}
        options = (None, 0.0, False, changes.get("scale"), False, False)
        assert found == ("ours", [4, 4], "group", (None, *parts, *options, more))
    else:
        defaults = dict(zip(given, (None, 0.0, False, None, False, False), strict=True))
        known = {n: v for n, v in changes.items() if n in given}
        assert found == ("original", tuple((defaults | known).values()), words)


@pytest.mark.parametrize(
    ("ring", "queries", "known", "mask", "masked", "way"),
    [
        (2, 4, [4, 4], None, None, "groups"), (2, 4, None, None, None, "groups"),
        (2, 4, [4, 4], (1, 1, 1, 4), (1, 1, 1, 8), "groups"), (2, 4, None, (2, 4), (2, 8), "groups"),
        (2, 4, [4, 4], (1, 8), (1, 8), "groups"), (2, 4, [4, 4], (1, 2, 1, 4), (1, 2, 1, 8), "all"),
        (2, 4, [4, 4], (1, 1, 4, 4), (1, 1, 4, 8), "all"), (1, 4, [4, 4], (1, 2, 1, 4), (1, 2, 1, 8), "all"),
        (1, 3, [4, 4], None, None, "all"), (1, 3, None, (1, 2, 1, 4), (1, 2, 1, 8), "all"),
        (2, 5, [4, 4], (1, 1, 1, 4), (1, 1, 1, 8), "all"),
    ],
)  # fmt: skip
def test_keys_and_masks_are_gathered(
    ring: int, queries: int, known: list[int] | None, mask: Any, masked: Any, way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where heads are too few, and of cross-attention and masks of heads or queries wherever they are.

    Tokens that no rule names are asked for; a mask of all keys is taken as it is.
    """
    from diffusers.models import attention_dispatch

    asked: list[Any] = []

    def ask(size: int, group: str) -> tuple[int, ...]:
        asked.append((size, group))
        return 4, 4

    def gather(x: torch.Tensor, counts: list[int], group: str) -> torch.Tensor:
        assert (counts, group) == ([4, 4], "everyone")
        return torch.cat((x, x))

    def attend(query: Any, key: Any, value: Any, shares: Any, config: Any, run: Any) -> Any:
        return ("groups", shares, config, run(query, key, value))

    def attend_to_all(query: Any, key: Any, value: Any, shares: Any, group: Any, run: Any) -> Any:
        return ("all", shares, group, run(query, key, value))

    monkeypatch.setattr(head_exchange, "attend_to_all", attend_to_all)
    monkeypatch.setattr(attention_dispatch, "_templated_context_parallel_attention", None)
    monkeypatch.setattr(attention_dispatch, "gather_size_by_comm", ask)
    monkeypatch.setattr(head_exchange, "attend_in_groups", attend)
    monkeypatch.setattr(head_exchange, "gather", gather)
    head_exchange.replace_attention({4: known}.get)
    templated: Any = attention_dispatch._templated_context_parallel_attention
    parts = [torch.empty(1, tokens, 2, 3) for tokens in (queries, 4, 4)]
    everyone = SimpleNamespace(get_group=lambda: "everyone")
    config = SimpleNamespace(ring_degree=ring, _flattened_mesh=everyone)
    given = None if mask is None else torch.ones(mask)
    found = templated(
        *parts, given, scale=0.5, forward_op=lambda context, *all, **more: all, backward_op=None,
        _parallel_config=SimpleNamespace(context_parallel_config=config),
    )  # fmt: skip
    name, shares, passed, (*same, seen, dropout, causal, scale, gqa, lse) = found
    assert (name, shares, same) == (way, [4, 4], parts)
    assert passed == (config if way == "groups" else "everyone")
    assert (dropout, causal, scale, gqa, lse) == (0.0, False, 0.5, False, False)
    assert (None if seen is None else seen.shape) == masked
    assert asked == ([] if known else [(4, "everyone")])


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "counts", "found"),
    [
        ([f"a{MARK}b"], [3], [f"a{MARK * 3}b"]), (["ab"], [], ["ab"]), ([f"{MARK}"], [0], [""]),
        ([f"{MARK}x{MARK}", f"y{MARK}"], [1, 2, 4], [f"{MARK}x{MARK * 2}", f"y{MARK * 4}"]),
    ],
)  # fmt: skip
def test_marks_are_spread(texts: list[str], counts: list[int], found: list[str]) -> None:
    assert light_processor.spread_marks(texts, counts) == found


@pytest.mark.parametrize(
    ("texts", "counts"), [(["a"], [1]), ([f"{MARK}{MARK}"], [1]), ([MARK], [])]
)
def test_marks_that_are_not_counted(texts: list[str], counts: list[int]) -> None:
    marks = sum(text.count(MARK) for text in texts)
    assert refusal(ValueError, light_processor.spread_marks, texts, counts) == (
        f"{marks} marks of pictures in the text, expected {len(counts)}"
    )


@pytest.mark.parametrize(("merge", "tokens"), [(1, 24), (2, 6), (3, 2)])
def test_tokens_of_pictures(merge: int, tokens: int) -> None:
    class Images:
        merge_size = merge

        def __call__(self, images: Any, **options: Any) -> dict[str, Any]:
            return {"image_grid_thw": torch.tensor([[1, 4, 6]]), "options": options}

    asked: list[Any] = []

    def tokenizer(texts: list[str], **options: Any) -> dict[str, Any]:
        asked.append((texts, options))
        return {"input_ids": 1}

    processor = light_processor.LightProcessor(Images(), tokenizer)
    found = processor([f"a{MARK}"], images=[1], padding=True, return_tensors="pt")
    assert asked.pop() == ([f"a{MARK * tokens}"], {"padding": True, "return_tensors": "pt"})
    assert found["options"] == {"return_tensors": "pt"}
    processor(["a"])
    assert asked == [(["a"], {"padding": False})]


@pytest.mark.parametrize(
    ("pipeline", "count", "mask", "text"),
    [
        ("FluxKontextPipeline", 1, False, ""),
        ("FluxKontextPipeline", 2, False, "--image-path: 2 pictures, FluxKontextPipeline takes 1"),
        ("QwenImageEditPlusPipeline", 3, False, ""),
        ("QwenImageEditPlusPipeline", 4, False, "--image-path: 4 pictures, QwenImageEditPlusPipeline takes 3"),
        ("FluxPipeline", 1, False, "--image-path: FluxPipeline takes none; leave the flag out"),
        ("FluxKontextPipeline", 1, True, "--mask-path: FluxKontextPipeline takes none; leave the flag out"),
        ("FluxFillPipeline", 1, True, ""),
        ("FluxFillPipeline", 0, True, "--mask-path: it masks a picture, and --image-path names none"),
    ],
)  # fmt: skip
def test_pictures_that_a_pipeline_takes(pipeline: str, count: int, mask: bool, text: str) -> None:
    request = Request(
        model_path="m", image_path=("x.png",) * count, mask_path="m.png" if mask else None
    )
    if text:
        assert refusal(UsageError, pictures.check_taken, request, pipeline) == text
    else:
        pictures.check_taken(request, pipeline)


# --- inspection ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "bits"),
    [(None, True), (Layout("high", "tiles", ""), True), (Layout(None, "tiles", ""), False)],
)
def test_schemes_as_data(layout: Layout | None, bits: bool) -> None:
    scheme = Scheme(
        "linear.nvfp4", "N", "e2m1", "block", "none", (2, 0), 16, 7, False, True, True, True
    )
    found = inspect.describe_scheme(scheme, layout)
    assert found == {
        "op": "linear.nvfp4", "name": "N", "weight": "e2m1", "scale": "block", "activation": "none",
        "block": (2, 0), "group_size": 16, "rank": 7, "smoothed": True,
        **({"swap_nibbles": True, "tiled_scales": True} if bits else {}),
    }  # fmt: skip
    assert list(inspect.describe_scheme(NVFP4, None)) == [
        "op", "name", "weight", "scale", "activation", "group_size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "names", "note"),
    [
        ("x.weight", ["diffusers"], None),
        ("distilled_guidance_layer.in_proj.weight", ["original (chroma)"],
         "These are Chroma's original names. It is none of the base models here"),
        ("blocks.0.self_attn.q.weight", None, None),
    ],
)  # fmt: skip
def test_whose_names_a_file_has(name: str, names: list[str] | None, note: str | None) -> None:
    checkpoint = make({name: ("BF16", (2, 2))})
    found = inspect.find_names(checkpoint)
    assert found == names if names else found[0].endswith("(wan-2-2)")
    assert inspect.find_note(checkpoint) == note


def test_the_first_reading_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def read(checkpoint: Checkpoint) -> Any:
        seen.append(dict(checkpoint.chosen))
        if checkpoint.chosen.get("nvfp4_layout") != "tiles":
            raise CheckpointError(f"no {len(seen)}")
        return {"a": NVFP4}

    monkeypatch.setattr(inspect.families, "load", lambda family: SimpleNamespace(schemes=read))
    assert inspect.read_schemes(make({}), "f", Layout("low", None, "")) == {"a": NVFP4}
    assert seen == [
        {"nibble_order": "low", "nvfp4_layout": "rows"},
        {"nibble_order": "low", "nvfp4_layout": "tiles"},
    ]
    seen.clear()
    assert refusal(
        CheckpointError, inspect.read_schemes, make({}), "f", Layout(None, "rows", "")
    ) == ("no 1")
    for layout in (None, Layout("low", "rows", "")):
        seen.clear()
        with pytest.raises(CheckpointError):
            inspect.read_schemes(make({}), "f", layout)
        assert seen == [{}]


# --- base weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ("o/r", "o/r"), ("/c/models--o--r-x/snapshots/1", "o/r-x"), ("models--o--r", "o/r"), ("/o/r", ""),
        ("o/r/s", ""), ("o", ""), ("", ""), (3, ""), (None, ""), ("C:\\models--o--r\\x", "o/r"), (".o/r", ""),
        ("xmodels--o--r", ""),
    ],
)  # fmt: skip
def test_the_base_that_a_config_names(
    stated: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert witness_base.find_declared(make({}, config={"_name_or_path": stated})) == found
    assert witness_base.find_declared(make({})) == ""
    (tmp_path / "o" / "r").mkdir(parents=True)
    here = witness_base.find_declared(make({}, config={"_name_or_path": stated}))
    assert here == ("" if stated == "o/r" else found)


@pytest.mark.parametrize(
    ("name", "stated", "base", "found"),
    [
        ("transformer", "o/r", "b/c", [("b/c", True), ("o/r", True), ("REPO", False)]),
        ("transformer", "b/c", "b/c", [("b/c", True), ("REPO", False)]),
        ("transformer", "", "b/c", [("b/c", True), ("REPO", False)]),
        ("transformer", "REPO", "b/c", [("b/c", True), ("REPO", True)]),
        ("transformer", "o/r", "REPO", [("REPO", True), ("o/r", True)]),
        ("text_encoder", "o/r", "b/c", [("b/c", True)]),
    ],
)
def test_where_base_weights_may_be(
    name: str,
    stated: str,
    base: str,
    found: list[tuple[str, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(COMPONENTS=("transformer",), REPO="REPO")
    monkeypatch.setattr(witness_base.models, "load", lambda model: module)
    monkeypatch.setattr(witness_base, "find_declared", lambda checkpoint: stated)
    source: Any = SimpleNamespace(base=base, siblings={name: "folder"}, checkpoint=make({}))
    got = list(witness_base.list_candidates(name, source, "m"))
    assert [(reference, certain) for reference, _, certain in got] == found
    assert [folders for _, folders, _ in got] == [
        {name: "folder"}, *[{"transformer": "transformer"}] * (len(found) - 1),
    ]  # fmt: skip


def test_weights_in_full_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = SimpleNamespace(checkpoint=make({}))
    whole = Checkpoint("o/r", ("g.st",), make({"a.weight": ("BF16", (2, 2))}).tensors)
    coded = Checkpoint("o/r", ("g.st",), make({"a.weight": ("I8", (2, 2))}).tensors)
    remote: Any = Checkpoint("o/r", ("g.st",), {}, remote=object())  # type: ignore[arg-type]
    hub: Any = None
    for found, text in (
        (whole, ""), (remote, "o/r: the weights of t are not on this machine"),
        (make({}), "o/r: t is the checkpoint itself"), (coded, "f.st: a.weight is I8, quantized, too"),
    ):  # fmt: skip
        monkeypatch.setattr(witness_base, "open_component", lambda *_, found=found: found)
        if text:
            assert (
                refusal(QuantmatrixError, witness_base.open_plain, "o/r", hub, "t", source) == text
            )
        else:
            assert witness_base.open_plain("o/r", hub, "t", source) is whole


def test_base_weights_of_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_plain(reference: str, hub: Any, folder: str, source: Any) -> str:
        if (reference, folder) in (("one", "a"), ("two", "c")):
            raise QuantmatrixError(f"{reference} lacks {folder}\nmore")
        return f"{reference}/{folder}"

    siblings = {"transformer": "a", "second": "b", "third": "c"}
    candidates = [("one", siblings, True), ("two", siblings, False)]
    monkeypatch.setattr(witness_base, "open_plain", open_plain)
    monkeypatch.setattr(witness_base, "list_candidates", lambda *_: candidates)
    given: Any = ("transformer", None, "m", None)
    found = witness_base.look_for_base(*given)
    assert found.weights == {"transformer": "two/a", "second": "two/b"}
    assert list(found.weights) == ["transformer", "second"]
    assert (found.name, found.reference, found.certain) == ("transformer", "two", False)
    assert found.missing == ""
    lacking = [("one", siblings, True), ("one", siblings, False)]
    monkeypatch.setattr(witness_base, "list_candidates", lambda *_: lacking)
    found = witness_base.look_for_base(*given)
    assert (found.weights, found.reference) == ({}, "")
    assert found.missing == "one lacks a; one lacks a"


def test_graphs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    graphed = acceleration.graph_forward(model)
    assert model.forward is graphed
    graphed.graphs["x"] = None  # type: ignore[assignment]
    acceleration.forget(model)
    assert graphed.graphs == {}
    graphed.graphs["x"] = None  # type: ignore[assignment]
    monkeypatch.setattr(model, "forward", lambda x: graphed(x))  # what diffusers' hooks do
    acceleration.forget(model)
    assert graphed.graphs == {}
    assert refusal(UsageError, model, torch.ones(2, 1)) == (
        "--cuda-graph: an argument of the transformer lies in host memory (shape (2, 1)), so its forward "
        "cannot be captured"
    )


# --- processes -------------------------------------------------------------------------------


def make_plan(device: str = "cpu", processes: int = 3, **heads: int) -> Any:
    machine = SimpleNamespace(device=device)
    parts = {
        name: SimpleNamespace(config={"num_attention_heads": count})
        for name, count in (heads or {"transformer": 3}).items()
    }
    return Plan(
        Request(model_path="m"), "flux-1", machine, "b", "P", parts, False, False, processes
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "cuda", "a"])
def test_each_transformer_is_split(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Part:
        def enable_parallelism(self, config: Any) -> None:
            seen.append((config.ulysses_degree, config.ulysses_anything, config.ring_degree))
            seen.append(torch.accelerator.device_count())

    before = torch.accelerator.device_count()
    monkeypatch.setattr(parallel, "follow_tokens", lambda part, config, count: seen.append(count))
    pipe = SimpleNamespace(one=Part(), two=Part())
    parallel.split(pipe, make_plan(device, 6, one=24, two=4), 6)
    counted = 1 if device == "cpu" else before
    assert seen == [(6, True, 1), counted, 6, (2, False, 3), counted, 6]


@pytest.mark.parametrize(
    ("count", "processes", "shards", "acts"),
    [
        (3, 3, False, ["build 3", "split 3"]), (1, 1, False, ["build 1"]),
        (3, 3, True, ["build 3", "split 3", "shard"]), (1, 1, True, ["build 1", "shard"]), (2, 3, False, []),
    ],
)  # fmt: skip
def test_a_process_joins_the_others(
    count: int, processes: int, shards: bool, acts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    found = make_plan("cpu", processes)
    own = SimpleNamespace(
        init_process_group=lambda kind: seen.append(kind), get_rank=lambda: count - 1,
        get_world_size=lambda: count, barrier=lambda: seen.append("barrier"),
        destroy_process_group=lambda: seen.append("destroy"),
    )  # fmt: skip
    pipe = SimpleNamespace(transformer=1)
    monkeypatch.setattr(parallel, "distributed", own)
    monkeypatch.setattr(parallel, "free_graphs", lambda: seen.append("free"))
    monkeypatch.setattr(parallel, "find_plan", lambda request: found)
    monkeypatch.setattr(
        parallel, "build_pipeline", lambda plan: seen.append(f"build {plan.processes}") or pipe
    )
    monkeypatch.setattr(parallel, "split", lambda p, plan, n: seen.append(f"split {n}"))
    monkeypatch.setattr(parallel, "shard", lambda part, blocks: seen.append("shard"))
    request: Any = SimpleNamespace(device=None, shard_weights=shards)

    def act() -> None:
        with parallel.join(request) as (rank, plan, built):
            assert (rank, plan, built) == (count - 1, found, pipe)
            seen.append("run")

    if count != processes:
        assert refusal(UsageError, act) == "2 processes were started, the plan has 3"
        assert seen == ["gloo", "free", "destroy"]
    else:
        act()
        assert seen == ["gloo", *acts, "run", "barrier", "free", "destroy"]


def test_a_device_that_waits_in_vain_ends_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    own = SimpleNamespace(
        init_process_group=lambda kind: None, get_rank=lambda: 1, get_world_size=lambda: 3,
        barrier=None, destroy_process_group=lambda: ended.append(True),
    )  # fmt: skip
    monkeypatch.setattr(parallel, "distributed", own)
    monkeypatch.setattr(parallel, "find_plan", lambda request: make_plan("cpu", 3))
    monkeypatch.setattr(parallel, "build_pipeline", lambda plan: SimpleNamespace())
    monkeypatch.setattr(parallel, "split", lambda pipe, plan, count: None)
    request: Any = SimpleNamespace(device=None, shard_weights=False)

    def act() -> None:
        with parallel.join(request):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with")

    assert refusal(QuantmatrixError, act) == (
        "process 1 of 3: its device failed, or waited 600 s for another process: "
        "CUDA error: unspecified launch failure"
    )
    assert ended == [True]


@pytest.mark.parametrize(("code", "written"), [(0, True), (0, False), (3, True)])
@pytest.mark.parametrize("problem", ["", "it broke"])
def test_what_processes_say(
    code: int, written: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    given = {"prompt": "p", "seed": 7, "latents": [], "media": [], "is_video": False, "fps": 1,
             "seconds": {}, "step_seconds": [], "peak_bytes": 0, "census": {}, "plan": None}  # fmt: skip

    def run(command: list[str], **words: Any) -> Any:
        folder = Path(command[-1])
        assert command[-3:-1] == ["-m", "quantmatrix.runtime.parallel"]
        assert pickle.loads((folder / "request").read_bytes()) == "asked"
        if written:
            (folder / "run").write_bytes(pickle.dumps(given))
        if problem:
            (folder / "problem").write_text(problem)
        return SimpleNamespace(returncode=code, stderr=f" a{'b' * 2000}\n")

    monkeypatch.setattr(parallel.subprocess, "run", run)
    request: Any = "asked"
    if not code and written:
        found = parallel.generate_together(request, plan)
        assert (found.plan, found.seed) == (plan, 7)
    else:
        said = problem or "b" * 2000
        assert refusal(QuantmatrixError, parallel.generate_together, request, plan) == (
            f"3 processes gave no run: {said}"
        )
