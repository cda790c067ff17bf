"""Imports that must not exist, and what the light commands may cost."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import quantmatrix

PACKAGE = Path(quantmatrix.__file__).parent
LIGHT = (
    *("matrix", "hardware", "checkpoint", "references", "evidence", "errors", "scheme", "commands"),
    *("report", "states", "pages", "page_data", "page_html", "picture", "matrix_changes"),
    *("ratios", "bench_results", "bench_form", "bench_gate", "bench_pages", "bench_rows"),
    *("explain", "freshness", "carried", "agreement", "code_digest", "definitions", "census"),
    *("normal_form", "source_modules", "kernel_tables", "packets", "validation_page"),
    *("adapters", "experts", "original_names"),
    *("limits", "limit_samples", "rounding_model", "thumbnails", "record_form", "scopes", "offers"),
    *("packaged", "facts"),
)
HEAVY = {"torch", "diffusers", "transformers", "pandas", "accelerate", "numpy", "safetensors"}
VENDOR = {"flashinfer", "nunchaku", "torch_npu", "triton", "humming", "comfy_kitchen", "modelopt"}


def modules() -> list[str]:
    return sorted(
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
        for path in PACKAGE.rglob("*.py")
    )


def read_tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def imported(module: str, *, deep: bool) -> set[str]:
    """Names that a module imports: at import time, or (deep) inside functions, too."""
    names: set[str] = set()
    pending: list[ast.AST] = list(read_tree(module).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if deep or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", [m for m in modules() if m.split(".")[0] in (*LIGHT, "models")])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert not roots(imported(module, deep=False)) & HEAVY


@pytest.mark.parametrize("module", ["report", "matrix", "evidence"])
def test_tables_and_report_never_reach_torch(module: str) -> None:
    assert not roots(imported(module, deep=True)) & (HEAVY - {"pandas"})


@pytest.mark.parametrize("module", modules())
def test_vendor_packages_are_imported_inside_functions_of_kernels(module: str) -> None:
    assert not roots(imported(module, deep=False)) & VENDOR
    if not module.startswith("kernels."):
        assert not roots(imported(module, deep=True)) & (VENDOR - {"triton"})


@pytest.mark.parametrize("module", modules())
def test_layers_of_the_house(module: str) -> None:
    inside = {n for n in imported(module, deep=True) if n.startswith("quantmatrix")}
    where = module.split(".")[0]
    if where not in ("cli", "__main__", "commands"):
        assert not any(name.startswith("quantmatrix.cli.main") for name in inside)
    banned = {
        "families": ("models", "load", "planning", "plan", "cli"),
        "models": ("families", "kernels", "load", "planning"),
        "kernels": ("families", "models", "load", "planning"),
    }.get(where, ())
    for name in banned:
        assert not any(found.startswith(f"quantmatrix.{name}") for found in inside), (module, name)


@pytest.mark.parametrize("module", modules())
def test_only_the_command_line_reads_the_environment(module: str) -> None:
    if module.split(".")[0] == "cli":
        pytest.skip("the one place that may")
    source = ast.unparse(read_tree(module))
    assert "os.environ" not in source
    assert "getenv" not in source


LIGHT_COMMANDS = (
    *("--help", "matrix list", "matrix check", "matrix diff HEAD..HEAD", "report --check"),
    *("agreement", "bench --compare kept.json new.json", "thresholds"),
    "explain --checkpoint fp8-guide --hardware cpu",
)
PROGRAM = """
import contextlib, io, json, sys
from quantmatrix.cli.main import main

found = {}
for words in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words.split())
    found[words] = [m for m in ("torch", "diffusers", "pandas") if m in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def heavy_imports() -> dict[str, list[str]]:
    """What is imported after each command of one process."""
    command = [sys.executable, "-c", PROGRAM, *LIGHT_COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("words", LIGHT_COMMANDS)
def test_light_commands_import_no_torch(words: str, heavy_imports: dict[str, list[str]]) -> None:
    assert heavy_imports[words] == []
