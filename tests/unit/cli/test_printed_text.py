"""What commands print for people: whole texts of made-up results, with every unit and plural."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benched import make_memory, make_result

from quantmatrix.cli import (
    agreement,
    bench,
    compare,
    dry_run,
    fallback,
    generate,
    inspect,
    jobs,
    plan,
    recommend,
    run_column,
    thresholds,
    trace,
)
from quantmatrix.cli.compile import to_lines as compiled_lines
from quantmatrix.cli.explain import to_text as explained_text
from quantmatrix.cli.matrix_history import show as show_number
from quantmatrix.measure.compiled import Compiled
from quantmatrix.measure.trace_census import Census
from quantmatrix.proof.agreement import Agreement, Share, Task
from quantmatrix.proof.limits import Limits
from quantmatrix.report.answers import No, Option
from quantmatrix.report.recommend import Recommendation

MIB, GIB = 2**20, 2**30
Capture = pytest.CaptureFixture[str]


def component(**changes: Any) -> dict[str, Any]:
    """A component of a plan, as JSON."""
    return {
        "family": "fp8",
        "why": "its config",
        "files": ["a.safetensors", "b.safetensors"],
        "layout": "",
        "config_from": "some/base",
        "rank": 0,
        "quantized_layers": 26,
        "total_layers": 31,
        "precision": "",
        "backends": {"decode": 23, "reference": 3},
        "bytes": 3 * MIB + MIB // 4,
        **changes,
    }


def planned(**changes: Any) -> dict[str, Any]:
    return {
        "model": "flux-1",
        "machine": {"name": "A card", "arch": "sm90"},
        "processes": 1,
        "components": {"transformer": component()},
        "warnings": [],
        **changes,
    }


def test_a_plan(capsys: Capture) -> None:
    plan.print_plan(planned())
    assert capsys.readouterr().out == (
        "flux-1 on A card (sm90)\n"
        "  transformer: fp8 (its config)\n"
        "    weights      a.safetensors, b.safetensors\n"
        "    config       some/base\n"
        "    quantized    26 of 31 linear layers, -\n"
        "    kernels      23 decode, 3 reference\n"
        "    memory       3.2 MiB of weights\n"
    )


def test_a_plan_with_all_that_there_can_be(capsys: Capture) -> None:
    part = component(family=None, layout="tiles", rank=1, precision="int4", backends={})
    encoder = component(files=["c.safetensors"], bytes=1234 * MIB)
    picture = {"argument": "image", "path": "fox.png", "width": 640, "height": 480}
    pictures = [
        {**picture, "sha256": "0123456789abcdef0123", "tokens": 77},
        {**picture, "sha256": "f" * 64, "tokens": 0},
    ]
    plan.print_plan(
        planned(
            processes=2,
            components={"transformer": part},
            text_encoders={"text_encoder": encoder},
            true_bytes={"transformer": 11 * GIB + GIB // 5},
            pictures=pictures,
            warnings=["one", "two"],
        )
    )
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  transformer: full precision (its config)",
        "    weights      a.safetensors, b.safetensors",
        "    layout       tiles",
        "    config       some/base",
        "    quantized    26 of 31 linear layers, int4, rank 1",
        "    kernels      none",
        "    memory       3.2 MiB of weights in the stand-in; at true size 11.2 GiB in each of 2 processes",
        "  text_encoder: fp8 (its config)",
        "    weights      c.safetensors",
        "    config       some/base",
        "    quantized    26 of 31 linear layers, -",
        "    kernels      23 decode, 3 reference",
        "    memory       1,234.0 MiB of weights in each of 2 processes",
        "  image: fox.png (640 x 480, sha256 0123456789abcdef, 77 tokens a step)",
        f"  image: fox.png (640 x 480, sha256 {'f' * 16})",
        "  warning: one",
        "  warning: two",
    ]


@pytest.mark.parametrize("why", ["", "it does not fit"])
def test_the_true_size_of_a_plan(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "transformer": SimpleNamespace(whole=7 * GIB),
        "transformer_2": SimpleNamespace(whole=5),
    }
    monkeypatch.setattr("quantmatrix.runtime.true_bytes.measure_all", lambda plan: sizes)
    monkeypatch.setattr("quantmatrix.runtime.true_bytes.explain_fit", lambda sizes, plan: why)
    assert plan.describe_true_size("plan", ["first"]) == {
        "true_bytes": {"transformer": 7 * GIB, "transformer_2": 5},
        "warnings": ["first", why] if why else ["first"],
    }


def shares_of(model: str, processes: int, *heads: int, **asked: int) -> dict[str, Any]:
    size = SimpleNamespace(**{"height": None, "width": None, "num_frames": None, **asked})
    parts = {f"part-{n}": SimpleNamespace(config={"num_attention_heads": n}) for n in heads}
    given = SimpleNamespace(model=model, processes=processes, request=size, components=parts)
    return plan.describe_shares(given)


@pytest.mark.parametrize(
    ("model", "processes", "heads", "asked", "found", "degrees", "text"),
    [
        (
            "flux-1", 2, [24], {}, (1024, 1024, 1, 4096, [2048, 2048], True), [(2, 1)],
            "tokens: 4096 of 1024 x 1024 as 2048 + 2048, exchanged evenly (Ulysses); texts by their length",
        ),
        (
            "qwen-image", 2, [24], {"width": 1040, "height": 1008},
            (1008, 1040, 1, 4095, [2048, 2047], False), [(2, 1)],
            "tokens: 4095 of 1040 x 1008 as 2048 + 2047, exchanged by a rule that all processes know "
            "(Ulysses); texts by their length",
        ),
        (
            "wan-2-2", 4, [40, 24, 6], {}, (480, 832, 81, 32760, [8190] * 4, True), [(4, 1), (4, 1), (2, 2)],
            "tokens: 32760 of 832 x 480 x 81 as 8190 + 8190 + 8190 + 8190, exchanged evenly (Ulysses, "
            "Ulysses 2 x ring 2); texts by their length",
        ),
        (
            "wan-2-2", 2, [1], {"num_frames": 5}, (480, 832, 5, 3120, [1560, 1560], True), [(1, 2)],
            "tokens: 3120 of 832 x 480 x 5 as 1560 + 1560, exchanged evenly (ring); texts by their length",
        ),
    ],
)  # fmt: skip
def test_the_shares_of_a_plan(
    model: str, processes: int, heads: list[int], asked: dict[str, int], found: tuple[Any, ...],
    degrees: list[tuple[int, int]], text: str,
) -> None:  # fmt: skip
    names = ("height", "width", "frames", "tokens", "of_each", "even", "degrees")
    pairs = {
        f"part-{n}": {"ulysses": a, "ring": b} for n, (a, b) in zip(heads, degrees, strict=True)
    }
    shares = dict(zip(names, (*found, pairs), strict=True))
    assert shares_of(model, processes, *heads, **asked) == {"shares": shares}
    assert plan.describe_tokens(shares) == text
    assert shares_of(model, 1, **asked) == {}
    assert shares_of("sd-3-5", processes) == {}


def test_a_run(capsys: Capture) -> None:
    generate.print_run(
        {
            "output": "outputs/fox-0.png",
            "backends": {"transformer": {"decode": 23, "reference": 3}, "transformer_2": {}},
            "seconds": {"generate": 12.346},
            "step_seconds": [1.0, 2.0, 3.0],
        }
    )
    generate.print_run(
        {"output": None, "backends": {}, "seconds": {"generate": 2}, "step_seconds": []}
    )
    assert capsys.readouterr().out == (
        "outputs/fox-0.png\n"
        "  transformer: 26 quantized layers (23 decode, 3 reference), "
        "transformer_2: 0 quantized layers (none); 12.35 s, 4 steps\n"
        "(not saved)\n"
        "  ; 2.00 s, 1 steps\n"
    )


def inspected(**changes: Any) -> dict[str, Any]:
    return {
        "family": "fp8",
        "unknown": False,
        "why": "its config",
        "summary": "4 of 5 layers",
        "files": ["a.safetensors", "b.safetensors"],
        "left_out": [],
        "aside": {},
        "bytes": 1234 * MIB + MIB // 2,
        "tensors": 17,
        "quantization_from": "",
        "description_file": "",
        "names_note": "",
        "prefix": "",
        "names": ["diffusers"],
        "schemes": {"FP8": 4},
        "layouts": {},
        "layers": {"blocks.0": {"weight": "fp8", "activation": "none"}},
        **changes,
    }


@pytest.mark.parametrize(
    ("layers", "changes", "lines"),
    [
        (
            False,
            {},
            [
                "transformer: fp8 (its config): 4 of 5 layers",
                "  file         a.safetensors",
                "  file         b.safetensors",
                "  size         1,234.5 MiB in 17 tensors",
                "  declared in  -",
                "  names        diffusers",
                "  schemes      4 FP8",
            ],
        ),
        (
            True,
            {
                "family": None,
                "unknown": True,
                "left_out": ["lora.safetensors"],
                "aside": {"vae.": 3},
                "quantization_from": "config.json",
                "description_file": "quant.json",
                "names_note": "of two makers",
                "prefix": "model.",
                "names": ["bfl (flux-1)", "comfyui"],
                "layouts": {"tiles": 2, "rows": 5},
            },
            [
                "transformer: unknown quantization (its config): 4 of 5 layers",
                "  file         a.safetensors",
                "  file         b.safetensors",
                "  left out     lora.safetensors (a LoRA, which adds to a model)",
                "  left aside   3 tensors vae.* (another part of a whole checkpoint)",
                "  size         1,234.5 MiB in 17 tensors",
                "  declared in  config.json",
                "  names        bfl (flux-1), comfyui after the prefix model.: of two makers",
                "  schemes      4 FP8",
                "  layout       2 layers: tiles",
                "  layout       5 layers: rows",
                "    blocks.0: weight=fp8, activation=none",
            ],
        ),
        (
            False,
            {"family": None, "description_file": "quant.json", "files": [], "schemes": {}},
            [
                "transformer: full precision (its config): 4 of 5 layers",
                "  size         1,234.5 MiB in 17 tensors",
                "  declared in  quant.json",
                "  names        diffusers",
                "  schemes      none",
            ],
        ),
    ],
)
def test_what_a_checkpoint_is(
    layers: bool,
    changes: dict[str, Any],
    lines: list[str],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"components": {"transformer": inspected(**changes)}}
    monkeypatch.setattr("quantmatrix.runtime.plan.inspect.inspect", lambda *_: found)
    arguments = SimpleNamespace(
        checkpoint="x", tiny=False, against=None, json=False, layers=layers, component=None
    )
    assert inspect.run_inspect(arguments, []) == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(("second", "code"), [("agrees", 0), ("differs", 1), ("abacus", 1)])
def test_layers_beside_a_base(
    second: str,
    code: int,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = {"reading": "even low", "cosine": 0.98765, "relative_l2": 0.1234567}
    part = {
        "base": "some/base",
        "verdict": "agrees",
        "problems": [],
        "layers": [
            {**layer, "layer": "double.0", "module": "blocks.0", "verdict": "agrees"},
            {
                **layer,
                "layer": "output",
                "module": "output",
                "reading": "as it is",
                "verdict": "differs",
            },
        ],
    }
    short = {**layer, "layer": "out", "module": "out", "reading": "plain", "verdict": "differs"}
    other = {**part, "verdict": second, "problems": ["out differs"], "layers": [short]}
    found = {"components": {"transformer": part, "transformer_2": other}}
    monkeypatch.setattr("quantmatrix.runtime.witness.inspect_against.compare", lambda *_: found)
    arguments = SimpleNamespace(checkpoint="x", tiny=False, against="y", json=False, component=None)
    assert inspect.run_inspect(arguments, []) == code  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [
        "transformer beside some/base: agrees",
        "  layer                 reading   cosine  rel. L2  verdict",
        "  double.0 -> blocks.0  even low  0.9877   0.1235  agrees",
        "  output                as it is  0.9877   0.1235  differs",
        f"transformer_2 beside some/base: {second}",
        "  layer  reading  cosine  rel. L2  verdict",
        "  out    plain    0.9877   0.1235  differs",
    ]
    assert caplog.messages == ["out differs"]
    arguments.json = True
    assert inspect.run_inspect(arguments, []) == code  # type: ignore[arg-type]
    assert capsys.readouterr().out.startswith('{\n  "components": {')


def test_layers_to_keep(capsys: Capture) -> None:
    share = {"relative_l2": 0.0123456, "psnr_db": 34.5678, "name": "blocks.0", "kept": True}
    shares = [share, {**share, "psnr_db": None, "kept": False, "name": "out", "relative_l2": 0.0}]
    found = {"shares": shares, "kept": ["blocks.0"], "target_psnr_db": 30.5}
    fallback.print_table({**found, "met": True, "psnr_db": 31.256})
    fallback.print_table({**found, "met": False, "psnr_db": None, "kept": []})
    table = [
        " relative L2   PSNR dB  layer alone quantized",
        "   1.235e-02     34.57  blocks.0  (keep)",
        "   0.000e+00       inf  out",
    ]
    assert capsys.readouterr().out.splitlines() == [
        *table,
        "keeping 1 of the quantized layers gives 31.26 dB, which meets 30.5 dB",
        *table,
        "keeping 0 of the quantized layers gives inf dB, which does not meet 30.5 dB",
    ]


def test_a_comparison(capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    step = {"psnr_db": 41.23456789, "relative_l2": 0.00123456789, "cosine": 0.99999987}
    odd = {"psnr_db": None, "relative_l2": None, "cosine": None}
    found = {
        "reference": {"name": "one"},
        "candidate": {"name": "two"},
        "latents": {"steps": [odd, step], "worst": step, "identical": False},
        "media": {"psnr_db": None, "ssim": 0.87654321},
        "problems": ["too far"],
    }
    compare.print_comparison(found)
    same = {"steps": [], "worst": odd, "identical": True}
    compare.print_comparison({**found, "latents": same, "media": None, "problems": []})
    assert capsys.readouterr().out.splitlines() == [
        "A one",
        "B two",
        " step    PSNR dB       rel L2       cosine",
        "    0        inf          inf            -",
        "    1    41.2346   0.00123457            1",
        "worst    41.2346   0.00123457            1",
        "picture: PSNR inf dB, SSIM 0.876543",
        "A one",
        "B two",
        " step    PSNR dB       rel L2       cosine",
        "worst        inf          inf            -",
        "every step is identical bit for bit",
    ]
    assert caplog.messages == ["too far"]


def test_a_benchmark(capsys: Capture) -> None:
    def timing(bf16: float, quantized: float, low: float, high: float) -> dict[str, Any]:
        return {
            "median": {"bf16": bf16, "quantized": quantized},
            "ratio": quantized / bf16,
            "low": low,
            "high": high,
            "detectable": 0.0345,
            "verdict": "faster",
        }

    result = make_result("some-row@cpu", "A CPU")
    part = result["components"]["transformer"]
    part["layers"] = [{**part["layers"][0], **timing(1234.5678, 1000.5, 0.8012, 0.8198)}]
    part["step"], part["load"] = timing(3, 2, 0.65, 0.68), timing(7, 9, 1.2, 1.3)
    part["memory"] = make_memory(5000 * MIB, 1250 * MIB + MIB // 4, working=7 * MIB)
    bench.print_result(result)
    assert capsys.readouterr().out.splitlines() == [
        "some-row@cpu, tiny, on A CPU (wall clock)",
        "                                                     BF16 ms  quantized ms  ratio"
        "   95 % interval  noticed from  verdict",
        "  transformer layer 16x256->512 FP8 decode (4 such)     1235          1000  0.810"
        "  0.801 to 0.820          3.5%  faster",
        "  transformer step                                         3             2  0.667"
        "  0.650 to 0.680          3.5%  faster",
        "  transformer load                                         7             9  1.286"
        "  1.200 to 1.300          3.5%  faster",
        "  transformer weights: 1,250.25 MiB, BF16 5,000.00 MiB: 0.250, smaller",
        "  transformer weights and working memory: 1,257.25 MiB, BF16 5,007.00 MiB: 0.251, smaller",
        "  transformer working memory counted by live tensors",
    ]


def program(**changes: Any) -> Any:
    fields = {
        "kernel": "decode",
        "arch": "sm90",
        "registers": 48,
        "spilled": 3,
        "shared": 12345,
        "shared_limit": 101376,
        "warps": 8,
        "digest": "sha256:0123456789abcdef",
        "faults": [],
    }
    return SimpleNamespace(**{**fields, **changes})


def test_compiled_kernels() -> None:
    assert compiled_lines("a@h100", None) == ["a@h100: starts no kernel of ours"]
    packed = program(kernel="pack", digest="", faults=["was not built"])
    programs: Any = (program(), program(shared=12339), packed)
    found = Compiled("sm90", "3.3", programs, ("out: too wide",))
    assert compiled_lines("a@h100", found) == [
        "a@h100: decode x 2, pack",
        "  decode: 48 registers, 3 bytes spilled, 12.1 of 99 KiB shared, 8 warps, "
        "sha256:0123456789ab",
        "  decode: 48 registers, 3 bytes spilled, 12 of 99 KiB shared, 8 warps, sha256:0123456789ab",
        "  pack: not built",
        "  FAULT out: too wide",
        "  FAULT pack on sm90 was not built",
    ]


def dry(**changes: Any) -> dict[str, Any]:
    return {
        "cell": "a@h200",
        "command": "quantmatrix generate",
        "ok": True,
        "kernels": {"transformer": {"decode": 23, "torch": 3}, "transformer_2": {}},
        "true_bytes": 13 * GIB + GIB // 4,
        "tiny_bytes": 3 * MIB + MIB // 5,
        "memory_bytes": 7 * GIB,
        "devices": 1,
        "warnings": [],
        **changes,
    }


def test_a_dry_run() -> None:
    first = [
        "",
        "a@h200",
        "  quantmatrix generate",
        "  kernels  transformer: 23 x decode, 3 x torch (tiny stand-in)",
        "  kernels  transformer_2: full precision (tiny stand-in)",
    ]
    assert dry_run.to_lines(dry()) == [
        *first,
        "  memory   7.0 GiB of weights at true size, 13.2 GiB in files (3.2 MiB tiny)",
    ]
    assert dry_run.to_lines(dry(devices=2, warnings=["slow"])) == [
        *first,
        "  memory   7.0 GiB of weights at true size on each of 2 devices, 13.2 GiB in files "
        "(3.2 MiB tiny)",
        "  warning: slow",
    ]
    refused = dry(ok=False, refusal={"rule": "fp8-arch", "message": "no such units"})
    assert dry_run.to_lines(refused) == [*first[:3], "  refused [fp8-arch]: no such units"]


def test_jobs() -> None:
    assert jobs.to_lines([]) == ["nothing collected: no claimed cell of this hardware can be run"]
    job = {"job": "GPU", "hardware": "h100", "shard": "1/2", "rows": ["a", "b"], "seconds": 61.6}
    other = {**job, "job": "a longer one", "shard": "12/34", "rows": ["c"], "seconds": 1800.4}
    assert jobs.to_lines([job, other]) == [
        "job          hardware     shard  cells  seconds",
        "GPU          h100         1/2        2       62",
        "a longer one h100         12/34      1     1800",
    ]


OPTION = Option(
    *("flux-1-fp8", "flux-1", "h200", "fp8", "some/repo", "torch"),
    cell="a@h200",
    state="proven",
    scope="true size",
    proof=0,
    psnr_db=44.56,
    relative_l2=0.0504,
    error_on="h200, true size",
    step=0.6449,
    step_on="h100",
    peak_mib=13000,
    peak_on="b200",
    weights_mib=11900,
    commands=("quantmatrix quantize", "quantmatrix generate --x"),
)


def advise(count: int, **changes: Any) -> Recommendation:
    ranked = tuple((n % 3, replace(OPTION, checkpoint=f"c{n}")) for n in range(count))
    fields = {"memory_gib": 24.0, "prefer": "speed", "ranked": ranked, "refused": ()}
    return Recommendation("h200", "flux-1", **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("proof", "claimed", "said"),
    [
        (0, "a@h200", "proven · true size"),
        (1, "a@h200", "proven · true size"),
        (2, "a@h200", "claimed, not run"),
        (3, "a@h200", "proven · true size"),
        (3, "", "plan alone"),
    ],
)
def test_how_far_an_option_is_proven(proof: int, claimed: str, said: str) -> None:
    cells = recommend.list_cells(3, 0, replace(OPTION, proof=proof, cell=claimed))
    assert cells == (
        *("3", "flux-1-fp8", "fp8", "torch", said, "44.6 dB, 0.050 (h200, true size)"),
        *("0.64 (h100)", "11.6 GiB", "12.7 GiB (b200)", "fits"),
    )


def test_an_option_that_nobody_measured() -> None:
    one = replace(OPTION, relative_l2=None, step=None, peak_mib=None, weights_mib=None)
    assert recommend.list_cells(12, 2, one)[5:] == (
        *("", "", "", "", "fits with --dit-layerwise-offload"),
    )
    far = replace(OPTION, psnr_db=None, step=0.0, peak_mib=0, weights_mib=0)
    assert recommend.list_cells(1, 3, far)[5:] == (
        *("0.050 (h200, true size)", "0.00 (h100)", "0.0 GiB", "0.0 GiB (b200)", "does not fit"),
    )


@pytest.mark.parametrize(
    ("count", "shown", "left"),
    [(3, 2, "  and 1 more: --model flux-1 --json"), (2, 2, ""), (1, 2, ""), (9, 2, "  and 7 more")],
)
def test_an_answer_with_its_first_options(count: int, shown: int, left: str) -> None:
    title, head, *lines = recommend.write_answer(advise(count), shown).splitlines()
    assert title == "flux-1 on h200, 24 GiB, by speed"
    assert head.split()[:3] == ["checkpoint", "family", "kernel"]
    rows, rest = lines[: min(count, shown)], lines[min(count, shown) :]
    assert [row.split()[:2] for row in rows] == [[f"{n + 1}", f"c{n}"] for n in range(len(rows))]
    more = rest[:-3]
    assert [line.startswith(left) for line in more] == ([True] if left else [])
    assert rest[-3:] == ["  1. c0:", "  quantmatrix quantize", "  quantmatrix generate --x"]


def test_an_answer_without_an_option() -> None:
    no = No("c", "flux-1", "h200", "no units", "some-rule")
    found = advise(0, memory_gib=0, refused=(no,))
    assert recommend.write_answer(found, 2) == (
        f"flux-1 on h200, by speed: nothing\n  {found.reason}"
    )
    assert recommend.SHOWN == 8


def test_columns_without_a_word_are_left_out() -> None:
    lines = [("", "name", "error", "memory"), ("1", "a", "", "x"), ("12", "longer", "", "")]
    assert recommend.align(lines) == [
        "    name    memory",
        "1   a       x",
        "12  longer",
    ]


def test_outcomes_of_a_column() -> None:
    cell: Any = SimpleNamespace(id="c@cpu:sglang")

    def outcome(record: Any, problem: str = "", *, skipped: bool = False) -> Any:
        return SimpleNamespace(cell=cell, record=record, problem=problem, skipped=skipped)

    record = SimpleNamespace(verdict="works", reason="", command="run it")
    found = outcome(record)
    assert run_column.to_line(found) == "c@cpu:sglang: works"
    record.reason = "slowly"
    assert run_column.to_line(found) == "c@cpu:sglang: works slowly"
    expected = {"verdict": "works", "reason": "slowly", "command": "run it"}
    assert run_column.describe(found) == expected
    left = outcome(None, "no file", skipped=True)
    assert run_column.to_line(left) == "c@cpu:sglang: left out: no file"
    assert run_column.to_line(outcome(None, "killed")) == "c@cpu:sglang: no verdict: killed"
    assert run_column.describe(left) == {"verdict": "", "reason": "no file"}


def test_a_limit(capsys: Capture) -> None:
    sample: Any = SimpleNamespace(kind="w8a8", model="flux-1", side="cpu")
    allowed = Limits(9.876, 0.987654, 0.12345, 0.054321, "three runs", "measured")
    thresholds.print_limit(sample, allowed)
    assert capsys.readouterr().out == (
        "w8a8                       flux-1      cpu           9.88 dB  rel L2 0.1235  "
        "cosine 0.98765  layer 0.0543  decided by: measured  (three runs)\n"
    )


@pytest.mark.parametrize(
    ("loosened", "code", "said"),
    [([], 0, "no limit is wider than in HEAD~3\n"), (["one", "two"], 1, "one\ntwo\n")],
)
def test_loosened_limits(loosened: list[str], code: int, said: str, capsys: Capture) -> None:
    assert thresholds.tell_loosened(loosened, "HEAD~3", as_json=False) == code
    assert capsys.readouterr().out == said


def test_a_census(capsys: Capture) -> None:
    def layer(backend: str, calls: int, seconds: float, matmul: float) -> Any:
        return SimpleNamespace(
            backend=backend, calls=calls, seconds=seconds, matmul_seconds=matmul,
            matmuls={}, kernels={},
        )  # fmt: skip

    layers = {"a": layer("decode", 4, 3.0, 2.0), "b": layer("decode", 3, 1.0, 0.5)}
    stages = {"step": {"calls": 4.0, "seconds": 1.23456}, "load": {"calls": 1.0, "seconds": 0.01}}
    trace.show(Census(stages, {**layers, "c": layer("torch", 5, 4.0, 4.0)}, []), "out.json.gz")
    assert capsys.readouterr().out.splitlines() == [
        "load               1 calls      10.00 ms",
        "step               4 calls    1234.56 ms",
        "2 quantized layers ran by decode, 7 calls",
        "1 quantized layers ran by torch, 5 calls",
        "18.8% of their time went into quantizing and scaling",
        "out.json.gz",
    ]


def make_tasks(count: int) -> tuple[Task, ...]:
    tasks = (Task(f"a{n}@cpu", "fp8", "cpu", "expected", "stale", "old") for n in range(count))
    return (Task("z@h100", "fp8", "h100", "expected", "missing", "no run", "stand-in"), *tasks)


@pytest.mark.parametrize(
    ("shown", "named", "more"),
    [(None, 3, ""), (4, 3, ""), (3, 3, ""), (2, 2, "  and 1 more: --all")],
)
def test_an_agreement(shown: int | None, named: int, more: str) -> None:
    runs = {"cpu": "run cpu", "h100": "run h100"}
    good = Share(13, {"fresh": 12, "stale": 1, "missing": 0})
    found = Agreement(
        Share(26, {"fresh": 24, "stale": 1, "missing": 1}),
        {"fp8": good, "gguf": Share()},
        {"h100": Share(7, {"fresh": 7})},
        make_tasks(3),
        {"stand-in": 20, "true size": 4},
    )
    lines = agreement.to_text(found, runs, shown).splitlines()
    assert lines == [
        "all claims        92.3 % of 26    1 stale, 1 missing",
        "",
        "fresh by scope",
        "  stand-in            20 with random weights at a tiny size",
        "  true size            4 with random weights at true size",
        "",
        "by family",
        "  fp8               92.3 % of 13    1 stale",
        "",
        "by hardware",
        "  h100             100.0 % of 7",
        "",
        "missing on h100: 1",
        "  run h100",
        "  z@h100 · stand-in: no run",
        "",
        "stale on cpu: 3",
        "  run cpu",
        *(f"  a{n}@cpu: old" for n in range(named)),
        *([more] if more else []),
    ]
    assert agreement.SHOWN == 10


def test_an_agreement_about_nothing() -> None:
    text = agreement.to_text(Agreement(Share(), {}, {}, ()), {}, 3)
    assert text.splitlines()[:4] == [
        "all claims         0.0 % of 0",
        "",
        "fresh by scope",
        "  none",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0, "0"), (41.23456, "41.23"), (0.000123456, "0.0001235")]
)
def test_numbers_of_a_history(value: float | None, text: str) -> None:
    assert show_number(value) == text


def explained(**changes: Any) -> Any:
    fields = {
        "cell": "a@h100",
        "checkpoint": "flux-1-fp8",
        "hardware": "h100",
        "state": "refused",
        "scope": "stand-in",
        "why": "no units",
        "ran": "",
        "title": "run it",
        "commands": ("one", "two"),
        "evidence": "",
        "alternatives": (),
    }
    return SimpleNamespace(**{**fields, **changes})


def test_an_explanation() -> None:
    head = ["a@h100: refused · stand-in", "  why       no units"]
    commands = ["  run it", "            one", "            two"]
    nothing = "  instead   nothing in the tables"
    assert explained_text(explained()).splitlines() == [*head, *commands, nothing]
    proven = explained(cell="", state="proven", scope="", ran="today", evidence="h100/a.json")
    assert explained_text(proven).splitlines() == [
        "flux-1-fp8 on h100: proven",
        head[1],
        "  ran       today",
        *commands,
        "  evidence  h100/a.json",
    ]
    other = SimpleNamespace(
        state="proven", scope="true size", how="another backend", cell="b@h100", commands=("three",)
    )
    assert explained_text(explained(alternatives=(other,))).splitlines() == [
        *head,
        *commands,
        "  instead   another backend: b@h100 (proven · true size)",
        "            three",
    ]


def test_files_of_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(found: Any, path: Path) -> None:
        path.write_text("picture")

    monkeypatch.setattr("quantmatrix.measure.fallback.draw_shares", draw)
    fallback.write_results({"b": 1, "a": [2.5]}, tmp_path)
    assert (tmp_path / "fallback.svg").read_text() == "picture"
    expected = '{\n  "a": [\n    2.5\n  ],\n  "b": 1\n}\n'
    assert (tmp_path / "fallback.json").read_text() == expected
    with pytest.raises(ValueError, match="Out of range float values"):
        fallback.write_results({"a": float("nan")}, tmp_path)
    assert (tmp_path / "fallback.json").read_text() == expected
