"""Damaged and hostile files, one kind a test: each ends as text, in little time and memory."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from weight_files import join_file, link_blob, make_cache, write_json, write_weights

import quantmatrix
from quantmatrix import files, strict_json
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.header import TensorHeader, read_header
from quantmatrix.checkpoints.opening import open_component, open_pipeline, open_weights
from quantmatrix.cli import main
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.files import remove_leftovers
from quantmatrix.proof import store
from quantmatrix.proof.record import EvidenceError
from quantmatrix.quoting import escape_lines, escape_markdown, limit_message, quote
from quantmatrix.report.job_summary import Shown, write_summary
from quantmatrix.request import Hub
from quantmatrix.runtime.plan import config_limits, other_parts
from quantmatrix.tiny.hub import MAKING
from quantmatrix.tools import (
    build_modelopt_fp8_transformer,
    build_modelopt_nvfp4_transformer,
    wan_repack,
)

PACKAGE = Path(quantmatrix.__file__).parent
CLASS = "WanTransformer3DModel"


def many_names(count: int, *more: str) -> bytes:
    entries = [
        f'"t{n:06}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}' for n in range(count)
    ]
    return ("{" + ",".join([*entries, *more]) + "}").encode()


TWICE = '"t000001":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}'
DIGITS = ",".join(["9" * 4000] * 2000)
SLOW_HEADERS = {
    "a name twice": (many_names(40_000, TWICE), "'t000001' appears twice"),
    "long numbers": (
        f'{{"a":{{"dtype":"U8","shape":[{DIGITS}],"data_offsets":[0,1]}}}}'.encode(),
        "a number has 4000 digits",
    ),
    "many dimensions": (
        b'{"a":{"dtype":"U8","shape":[' + b"9,9," * 200_000 + b'9],"data_offsets":[0,1]}}',
        "has 400001 dimensions, expected at most 64",
    ),
    "nested": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "levels deep"),
}


@pytest.mark.parametrize("case", SLOW_HEADERS)
def test_headers_are_judged_in_linear_time(tmp_path: Path, case: str) -> None:
    text, message = SLOW_HEADERS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(join_file(text, b""))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
    assert time.process_time() - began < 5  # was 19 s and more; takes a tenth of a second


def peak_of(act: Any) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_header_takes_little_memory(tmp_path: Path) -> None:
    count = 30_000
    path = tmp_path / "x.safetensors"
    text = many_names(count)
    path.write_bytes(join_file(text, bytes(count)))
    tracemalloc.start()
    found, _ = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == count
    assert peak < 10 * len(text)


@pytest.mark.parametrize("filler", ["{},", "[],", '"ab",', "1.5,"])
def test_headers_that_would_fill_the_memory_are_refused_unread(tmp_path: Path, filler: str) -> None:
    path = tmp_path / "x.safetensors"
    size = 20 * 10**6
    path.write_bytes(join_file(b'{"a":[' + filler.encode() * (size // len(filler)) + b"1]}", b""))
    assert peak_of(lambda: read_header(path)) < 100 * 10**6


def test_json_files_have_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # a hole: nothing on the disk
    with pytest.raises(CheckpointError, match="has 3221225472 bytes, the limit is"):
        read_json(path)
    assert peak_of(lambda: read_json(path)) < 10**6
    record = tmp_path / "cpu" / "a+b.json"
    record.parent.mkdir()
    path.rename(record)
    with pytest.raises(EvidenceError, match="the limit is"):
        store.read(record)


BAD_JSON = {
    "twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
    "nan": ('{"a": [NaN]}', "NaN is not a finite number"),
    "infinite": ('{"a": -Infinity}', "-Infinity is not a finite"),
    "too large": ('{"a": 1e999}', "1e999 is not a finite"),
    "digits": ('{"a": ' + "9" * 21 + "}", "21 digits, at most 20"),
    "name": ('{"a\\n::error::b": 1}', r"control characters: a\\n::error::b"),
    "surrogate": ('{"\\ud800": 1}', r"control characters: \\ud800"),
    "long name": ('{"' + "n" * 201 + '": 1}', "a name has 201 characters"),
    "deep": ("[" * 66 + "]" * 66, "more than 64 levels deep"),
    "very deep": ("[" * 10**5 + "]" * 10**5, "more than 64 levels deep"),
    "no json": ("{", "Expecting property name"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_strict_json(case: str) -> None:
    text, message = BAD_JSON[case]
    for given in (text, text.encode()):
        with pytest.raises(strict_json.JsonError, match=message):
            strict_json.parse(given)


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, None, True, "ü\n"]}, [[]], 18446744073709551615, "x" * 1000]
)
def test_strict_json_reads_what_json_writes(value: Any) -> None:
    assert strict_json.parse(json.dumps(value)) == value
    assert strict_json.parse(json.dumps(value, ensure_ascii=False).encode()) == value


FILLERS = {"object": "{}", "list": "[]", "text": '"ab"', "fraction": "1.5", "number": "999999"}
FILLERS |= {
    "small object": '{"a":1}',
    "same name": '{"dtype":1}',
    "new names": '{"a%d":1,"%db":[2]}',
}


@pytest.mark.parametrize("kind", FILLERS)
def test_estimates_are_no_less_than_what_reading_takes(kind: str) -> None:
    values = [FILLERS[kind].replace("%d", str(number)) for number in range(10_000)]
    names = ",".join(f'"{number}":{value}' for number, value in enumerate(values))
    for text in (f"[{','.join(values)}]".encode(), f"{{{names}}}".encode()):
        tracemalloc.start()
        json.loads(text, object_pairs_hook=dict)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken <= strict_json.estimate_memory(text)


def test_many_names_are_refused_unread(tmp_path: Path) -> None:
    text = "{" + ",".join(f'"{number}":1' for number in range(400_000)) + "}"
    (tmp_path / "config.json").write_text(text)  # 4 MB, which take 110
    assert peak_of(lambda: read_json(tmp_path / "config.json")) < 5 * 10**7


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    write_weights(folder / "secret.safetensors")
    write_json(folder / "config.json", {"_class_name": CLASS, "secret": 1})
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were opened, links followed."""
    seen: list[str] = []
    real = Path.open

    def note(path: Path, *words: Any, **named: Any) -> Any:
        seen.append(os.path.realpath(path))
        return real(path, *words, **named)

    monkeypatch.setattr(Path, "open", note)
    return seen


@pytest.mark.parametrize("shard", ["../outside/secret.safetensors", "{}", "a/../../outside/s"])
def test_an_index_that_leads_outside(
    tmp_path: Path, outside: Path, opened: list[str], shard: str
) -> None:
    shard = shard.format(outside / "secret.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"secret.weight": shard}})
    with pytest.raises(CheckpointError, match="leads out of the folder") as caught:
        open_weights(str(index.parent), Hub())
    assert str(index) in str(caught.value)
    assert not any(path.startswith(str(outside)) for path in opened)


@pytest.mark.parametrize("name", ["x.safetensors", "config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_that_leads_outside(
    tmp_path: Path, outside: Path, opened: list[str], name: str, relative: bool
) -> None:
    folder = tmp_path / "in"
    write_weights(folder / "x.safetensors")
    (folder / name).unlink(missing_ok=True)
    target = outside / ("secret.safetensors" if name.startswith("x") else "config.json")
    (folder / name).symlink_to(os.path.relpath(target, folder) if relative else target)
    for reference in (folder, folder / "x.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"is not in .*expected the file itself"
        ) as caught:
            open_weights(str(reference), Hub())
        assert str(folder / name) in str(caught.value)
    assert not any(path.startswith(str(outside)) for path in opened)


def test_links_that_stay_inside(tmp_path: Path) -> None:
    write_weights(tmp_path / "in" / "data" / "x.bytes")
    (tmp_path / "in" / "x.safetensors").symlink_to("data/x.bytes")
    assert open_weights(str(tmp_path / "in"), Hub()).tensors
    (tmp_path / "named").symlink_to(tmp_path / "in")
    assert open_weights(str(tmp_path / "named"), Hub()).tensors


def test_links_of_a_hub_cache(tmp_path: Path, outside: Path) -> None:
    snapshot = make_cache(tmp_path, "owner/repo")
    write_weights(snapshot / "x.safetensors")
    write_json(snapshot / "config.json", {"_class_name": CLASS})
    link_blob(snapshot, "x.safetensors", "b1")
    link_blob(snapshot, "config.json", "b2")
    hub = Hub(cache_dir=str(tmp_path), offline=True)
    for reference in ("owner/repo", str(snapshot), str(snapshot / "x.safetensors")):
        found = open_weights(reference, hub)
        assert found.tensors
        assert found.config == {"_class_name": CLASS}
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside / "config.json")
    with pytest.raises(CheckpointError, match="expected the file itself"):
        open_weights("owner/repo", hub)


@pytest.mark.parametrize("name", ["transformer/../../outside", "/etc", "transformer.x", "../x"])
def test_a_model_index_that_leads_outside(tmp_path: Path, name: str) -> None:
    index = {"_class_name": "WanPipeline", name: ["diffusers", CLASS]}
    write_json(tmp_path / "in" / "model_index.json", index)
    with pytest.raises(CheckpointError, match="expected a plain name"):
        open_pipeline(str(tmp_path / "in"), Hub())


@pytest.mark.parametrize("value", [["WanModel"], 1, {"a": 1}, "a b", "x\n::error::y", True])
def test_classes_of_wrong_types(tmp_path: Path, value: Any) -> None:
    for name in ("model_index.json", "config.json"):
        write_json(tmp_path / name / name, {"_class_name": value})
        with pytest.raises(CheckpointError, match=r"_class_name is .* expected the name") as caught:
            open_pipeline(str(tmp_path / name), Hub())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [["FluxTransformer2DModel"], "a\n::error::b", 1])
def test_classes_of_wrong_types_beside_weights(
    tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights(tmp_path / "x.safetensors")
    write_json(tmp_path / "config.json", {"_class_name": value})
    base = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev"]
    assert main.main(["plan", *base, "--transformer-path", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"config.json: _class_name is .* expected the name of a class", said)
    assert said.count("\n") == 1


BUILDERS = ("--modelopt-hf-dir=a", "--output-dir=b")
TOOLS = {
    wan_repack: ("repack", "--input-path=a", "--output-path=b"),
    build_modelopt_fp8_transformer: ("build", *BUILDERS, "--modelopt-backbone-ckpt=c"),
    build_modelopt_nvfp4_transformer: ("build", *BUILDERS, "--base-transformer-dir=c"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_errors_of_tools_are_escaped_and_cut(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **_named: Any) -> None:
        raise CheckpointError(f"\x1b[31m\n::error::{'x' * 5000}")

    act, *words = TOOLS[tool]
    monkeypatch.setattr(tool, act, fail)
    assert tool.main(words) == 1
    said = capsys.readouterr().err
    assert "\\x1b[31m\n\\::error::xxx" in said
    assert len(said) < 500


@pytest.mark.parametrize("shard", [1, None, ["a.safetensors"], {}])
def test_shards_of_wrong_types(tmp_path: Path, shard: Any) -> None:
    write_json(tmp_path / "x.safetensors.index.json", {"weight_map": {"a": shard}})
    with pytest.raises(CheckpointError, match="the shard of a is"):
        open_component(str(tmp_path), Hub())


def checkpoint_of(*shapes: tuple[int, ...]) -> Checkpoint:
    tensors = {f"t{n}": TensorHeader(f"t{n}", "F32", s, "x") for n, s in enumerate(shapes)}
    return Checkpoint("x", ("x",), tensors)


REAL = {"num_layers": 2, "attention_head_dim": 128, "ffn_dim": 13824, "eps": 1e-6, "text_dim": 4096}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 2**63),
        ("num_single_layers", 65),
        ("rope_max_seq_len", 2**31),
        ("axes_lens", [1, 2**20]),
        ("attention_head_dim", 2**12),
        ("axes_dims_rope", [16, 2048]),
        ("ffn_dim", 20_000),
        ("joint_attention_dim", -(2**31)),
        ("anything", 2**40),
        ("anything", 1e200),
        ("nested", {"deep": [{"num_layers": 2**63}]}),
    ],
)
def test_values_of_a_config_that_would_allocate_or_loop(key: str, value: Any) -> None:
    weights = checkpoint_of((13824, 8), (), (3,))
    config_limits.check_config(REAL, "config.json", weights)
    with pytest.raises(CheckpointError, match=rf"config.json: {key} is .*expected at most"):
        config_limits.check_config({**REAL, key: value}, "config.json", weights)


def test_a_table_of_positions_for_wide_heads() -> None:
    config = {"rope_max_seq_len": 2**15, "attention_head_dim": 1024}
    with pytest.raises(CheckpointError, match="a table of 32768 positions for heads of 1024"):
        config_limits.check_config(config, "config.json", checkpoint_of((1,)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.PT", "x.ckpt"])
def test_pickled_parts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "vae"
    write_json(folder / "config.json", {"_class_name": "AutoencoderKLWan"})
    (folder / name).write_bytes(b"\x80\x02}q\0.")
    with pytest.raises(CheckpointError, match=f"{name}: a pickle file .*--vae-path"):
        other_parts.check_part(folder, "vae", tmp_path)
    write_weights(folder / "diffusion_pytorch_model.safetensors")
    other_parts.check_part(folder, "vae", tmp_path)  # what is read is not the pickle


@pytest.mark.parametrize("kind", ["link", "folder", "index"])
def test_other_parts_that_lead_outside(tmp_path: Path, outside: Path, kind: str) -> None:
    folder = tmp_path / "in" / "vae"
    folder.mkdir(parents=True)
    if kind == "link":
        (folder / "config.json").symlink_to(outside / "config.json")
    elif kind == "folder":
        folder.rmdir()
        folder.symlink_to(outside)
    else:
        weight_map = {"weight_map": {"a": "../../outside/secret.safetensors"}}
        write_json(folder / "model.safetensors.index.json", weight_map)
    with pytest.raises(CheckpointError, match=r"leads out of the folder|expected the file itself"):
        other_parts.check_part(folder, "vae", tmp_path / "in")


def test_quoting() -> None:
    assert quote("transformer_blocks.0.weight") == "transformer_blocks.0.weight"
    assert quote("a\nb\x1b[31m\u202e\ud800ü") == r"a\nb\x1b[31m\u202e\ud800ü"
    assert quote([1, "a"]) == '[1, "a"]'
    long = quote("n" * 5000 + "/end")
    assert len(long) == 200
    assert "(5004 characters)" in long
    assert long.endswith("/end")
    assert len(quote(list(range(10**6)))) <= 200
    assert len(quote("\n" * 500)) <= 200


def test_messages() -> None:
    assert limit_message("one\n  two words") == "one\n  two words"
    assert limit_message("a\n::error::b\n  ::add-mask::x ##[error]") == (
        "a\n\\::error::b\n  \\::add-mask::x #\\#[error]"
    )
    assert escape_lines("a\x1b\rb\tc") == r"a\x1b\rb\tc"
    shown = limit_message("word " * 1000 + "x" * 999)
    assert len(shown.encode()) <= 2000
    assert max(map(len, limit_message(f"at {'x' * 999}").split())) <= 200


def test_an_error_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\\n::error::" + "q " * 3000
    text = f'{{"a":{{"dtype":"{name}","shape":[1],"data_offsets":[0,1]}}}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(join_file(text.encode(), b"\0"))
    assert main.main(["inspect", str(path), "--json"]) == 1
    said = capsys.readouterr()
    assert "has the dtype \\n::error::q q" in said.err
    assert len(said.err) < 1000
    assert json.loads(said.out)["error"]["message"] in said.err


def test_markdown_for_others() -> None:
    text = "[click](https://evil.example) <img src=x> `a` @someone #1 **b** www.evil.example|x_y"
    shown = escape_markdown(text)
    for mark in ("[", "]", "<", ">", "`", "@", "#", "*", "|"):
        assert shown.count(mark) == shown.count(f"\\{mark}") == text.count(mark)
    assert "://" not in shown
    assert "www." not in shown
    assert shown.endswith("x_y")
    assert shown.isascii()
    assert "https:\\//evil" in shown
    summary = write_summary([Shown("cell", "proven", "failing", text, True)], [text])
    assert "\\[click\\]" in summary
    assert not re.search(r"(?<!\\)[\[<@]", summary.replace("`", ""))


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    for name, age in ((".making-old", 7200), (".making-new", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_leftovers(tmp_path, f"{MAKING}*")
    assert [path.name for path in tmp_path.iterdir()] == [".making-new"]


def test_an_evidence_folder_that_is_a_file(tmp_path: Path) -> None:
    from quantmatrix.harness.plugin import check_evidence_folder

    path = tmp_path / "evidence"
    check_evidence_folder(path)
    path.write_text("x")
    with pytest.raises(pytest.UsageError, match="this is a file; name a folder"):
        check_evidence_folder(path)
    with pytest.raises(pytest.UsageError, match="is not a folder"):
        check_evidence_folder(path / "inner")


def test_weights_are_written_with_the_ordinary_mode(tmp_path: Path) -> None:
    import torch

    from quantmatrix.checkpoints.writer import save_tensors

    save_tensors({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "y").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_text_is_read_and_written_in_utf_8_whatever_the_locale() -> None:
    """Every call names its encoding: without one it is the locale's, ASCII under LC_ALL=C."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = {word.arg for word in node.keywords}
            if node.func.attr in ("read_text", "write_text") and "encoding" not in named:
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong


def test_a_locale_that_cannot_write_a_name(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "größe.safetensors", {"a.weight": ("BF16", (2, 2))})
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "quantmatrix", "inspect", str(path)]
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-500:]
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["file", "below a file"])
def test_places_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    path = tmp_path / "x"
    path.write_text("x")
    if where == "below a file":
        with pytest.raises(UsageError, match="leads through it"):
            files.check_writable(path / "y" / "z")


@pytest.mark.parametrize("about", ['"words"', "[1]", "1", "null"])
def test_a_saved_run_that_describes_itself_in_a_wrong_type(tmp_path: Path, about: str) -> None:
    from quantmatrix.measure import saved_runs

    path = tmp_path / "x.safetensors"
    write_weights(path, {"latents.000": ("F32", (1, 2))}, {saved_runs.KEY: about})
    with pytest.raises(CheckpointError, match=f"{saved_runs.KEY} is .*expected a run"):
        saved_runs.read(path)


def test_words_of_diffusers_about_a_configuration() -> None:
    """It names attributes that no constructor takes, with their values."""
    import logging

    from diffusers.utils.logging import get_logger

    from quantmatrix.runtime.library_logs import escaped

    handler = get_logger("diffusers").handlers[0]
    with escaped():
        record = logging.LogRecord("diffusers", 30, "", 1, "a %s", ("\x1b ##[error]x",), None)
        assert handler.filter(record)
        assert record.getMessage() == r"a \x1b #\#[error]x"
    assert not handler.filters


def test_a_huge_file_in_a_packet_is_refused_by_its_header(tmp_path: Path) -> None:
    from quantmatrix.harness import packets

    path = tmp_path / packets.LATENTS
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    began = time.process_time()
    said = {packets.LATENTS: {"bytes": 3 * 2**30, "sha256": "0"}}
    [problem] = packets.list_file_problems(tmp_path, said)
    assert "no complete safetensors header" in problem
    [problem] = packets.list_file_problems(tmp_path, {packets.LATENTS: {"bytes": 1}})
    assert "has 3221225472 bytes, packet.json says" in problem
    assert time.process_time() - began < 0.5  # its bytes are not read


def test_a_model_index_without_a_transformer() -> None:
    from quantmatrix.checkpoints.local import LocalFolder
    from quantmatrix.checkpoints.opening import PipelineFolder
    from quantmatrix.runtime.plan.sources import component_names

    parts = {"vae": ("diffusers", "AutoencoderKL")}
    found = PipelineFolder("x", LocalFolder(Path("x")), "FluxPipeline", parts)
    with pytest.raises(CheckpointError, match="names no transformer, only vae"):
        component_names("flux-1", found)


@pytest.mark.parametrize("stated", [1, "x", [1]])
def test_groups_of_a_declaration_of_wrong_types(stated: Any) -> None:
    from quantmatrix.families.modelopt_fp8 import check_groups

    block = {"quant_algo": "FP8", "config_groups": {"group_0": {"weights": stated}}}
    with pytest.raises(CheckpointError, match=r"config_groups.group_0.weights is .*quant_algo is"):
        check_groups(block, "config.json")


@pytest.mark.parametrize("value", [["diffusers", "a\nb\n::error::c"], ["a\nb", "AutoencoderKL"]])
def test_a_component_whose_class_is_no_name(value: list[str]) -> None:
    from quantmatrix.checkpoints.opening import read_components

    with pytest.raises(
        CheckpointError, match="expected a plain name, of a library and a class"
    ) as error:
        read_components({"vae": value}, "model_index.json")
    assert str(error.value).isprintable()
    kept = read_components({"vae": ["my.pipeline", "Vae"], "a": [None, "B"]}, "model_index.json")
    assert kept == {"vae": ("my.pipeline", "Vae"), "a": (None, "B")}


@pytest.mark.parametrize("key", ["what", "size", "device", "command"])
def test_a_benchmark_whose_names_are_several_lines(key: str) -> None:
    from benched import make_result

    from quantmatrix.proof import bench_results

    result = make_result()
    assert bench_results.list_problems(result) == []
    result[key] = "a\nb\n::error::c"
    [problem] = bench_results.list_problems(result)
    assert problem.startswith(f"{key}: ")
    assert problem.isprintable()
