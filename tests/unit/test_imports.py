"""Imports that must not exist, and what the light commands may cost."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import quantmatrix

PACKAGE = Path(quantmatrix.__file__).parent
GROUND = {
    *("__init__", "errors", "exit_codes", "files", "links", "quoting", "request", "scheme"),
    "strict_json",
}
"""Modules at the top that every folder may import."""
BELOW: dict[str, set[str]] = {"hardware": set(), "checkpoints": set(), "models": set()}
BELOW["tables"] = {"hardware"}
BELOW["proof"] = {"tables", *BELOW["tables"]}
BELOW["report"] = {"proof", *BELOW["proof"]}
BELOW["kernels"] = {"hardware"}
BELOW["families"] = {"checkpoints", "kernels"}
BELOW["runtime"] = {"families", "kernels", "models", "checkpoints", "hardware"}
BELOW["tools"] = {"runtime", "tables", *BELOW["runtime"]}
BELOW["tiny"] = {"tools", *BELOW["tools"]}
BELOW["api"] = {"tiny", *BELOW["tiny"]}
BELOW["measure"] = {"api", "proof", *BELOW["api"]}
BELOW["harness"] = {"measure", *BELOW["measure"]}
BELOW["fleet"] = {"harness", *BELOW["harness"]}
BELOW["peers"] = {"harness", *BELOW["harness"]}
BELOW["cli"] = {"fleet", "peers", "report", *BELOW["fleet"]}
BELOW["suites"] = {"cli", *BELOW["cli"]}
"""The house: folders that a folder may import, inside functions too. CONTRIBUTING tells of them."""
ARROWS = {
    ("runtime.witness.verdict", "proof.witness_limits"),
    ("tiny.hub", "proof.code_digest"),
    ("measure.validation_page", "report.table"),
    ("measure.validation_page", "report.template"),
}
"""Single modules that may be imported against the table; CONTRIBUTING gives the reasons."""
LIGHT = (
    "checkpoints",
    "cli",
    "fleet",
    "hardware",
    "models",
    "proof",
    "report",
    "tables",
    *sorted(GROUND),
)
"""Folders and modules that import nothing heavy when they are imported; proof, report and tables
import none inside functions either."""
HEAVY = {"torch", "diffusers", "transformers", "pandas", "accelerate", "numpy", "safetensors"}
VENDOR = {"flashinfer", "nunchaku", "torch_npu", "triton", "humming", "comfy_kitchen", "modelopt"}


@cache
def modules() -> tuple[str, ...]:
    names = (
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
        for path in PACKAGE.rglob("*.py")
    )
    return tuple(sorted(names))


@cache
def read_tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


@cache
def imported(module: str, *, deep: bool) -> frozenset[str]:
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
    return frozenset(names)


def roots(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def is_light(module: str) -> bool:
    """Whether a module promises it: all of `harness` does, but for the mutations of its sub-folder."""
    return module.split(".")[0] in (*LIGHT, "harness") and not module.startswith("harness.mutation")


@pytest.mark.parametrize("module", filter(is_light, modules()))
def test_light_folders_import_nothing_heavy(module: str) -> None:
    """Nor does what they import: the program below follows the imports of every module."""
    assert not roots(imported(module, deep=False)) & HEAVY


PROBE = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = [m for m in ("torch", "diffusers", "transformers", "pandas") if m in sys.modules]
    if found[name]:
        break
print(json.dumps(found))
"""


def test_light_folders_bring_nothing_heavy() -> None:
    names = [
        f"quantmatrix.{module}".removesuffix(".__init__")
        for module in modules()
        if is_light(module)
    ]
    assert len(names) > 80
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names], capture_output=True, text=True, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert {name: heavy for name, heavy in found.items() if heavy} == {}
    assert len(found) == len(names)


@pytest.mark.parametrize(
    "module", [m for m in modules() if m.split(".")[0] in ("proof", "report", "tables")]
)
def test_tables_proof_and_report_never_reach_torch(module: str) -> None:
    assert not roots(imported(module, deep=True)) & (HEAVY - {"pandas"})


@pytest.mark.parametrize("module", modules())
def test_vendor_packages_are_imported_inside_functions_of_kernels_and_peers(module: str) -> None:
    assert not roots(imported(module, deep=False)) & VENDOR
    if not module.startswith(("kernels.", "peers.")):  # an adapter is of one vendor's program
        assert not roots(imported(module, deep=True)) & (VENDOR - {"triton"})


@pytest.mark.parametrize("module", modules())
def test_ray_is_imported_inside_functions_of_its_engine(module: str) -> None:
    assert "ray" not in roots(imported(module, deep=False))
    assert ("ray" in roots(imported(module, deep=True))) == (module == "fleet.engine")


@cache
def known_modules() -> frozenset[str]:
    return frozenset(module.removesuffix(".__init__") for module in modules())


@cache
def arrows(module: str) -> frozenset[str]:
    """Modules of the package that a module imports, inside functions too, without its own package."""
    known = known_modules()
    found = set()
    for name in imported(module, deep=True):
        target = name.removeprefix("quantmatrix.")
        if not name.startswith("quantmatrix."):
            continue
        while target and target not in known:
            target = target.rpartition(".")[0]
        found.add(target or "__init__")
    packages = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
    return frozenset(found - packages - {module.removesuffix(".__init__")})


@pytest.mark.parametrize("module", modules())
def test_arrows_of_the_house(module: str) -> None:
    """Every import goes down: from a folder to the ground or to a folder below it."""
    folder = module.split(".")[0]
    if module in ("__init__", "__main__"):
        return
    below = BELOW.get(folder, set())
    wrong = {
        found
        for found in arrows(module)
        if found.split(".")[0] not in {folder, *GROUND, *below} and (module, found) not in ARROWS
    }
    assert wrong == set()
    if folder in GROUND:
        assert {found.split(".")[0] for found in arrows(module)} <= GROUND


def test_every_folder_has_its_line() -> None:
    """A new folder takes its place in the table; the top of the package stays small."""
    top = {module.split(".")[0] for module in modules()}
    assert top - GROUND - {"__main__"} == set(BELOW)
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    used = {
        (module, found)
        for module in modules()
        for found in arrows(module)
        if (module, found) in ARROWS
    }
    assert used == ARROWS


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions counted; a package and its own modules are one."""
    edges = {m.removesuffix(".__init__"): arrows(m) for m in modules()}
    edges = {
        m: {f for f in found if f in edges and not m.startswith(f"{f}.") and f != "__init__"}
        for m, found in edges.items()
    }
    while free := [m for m, found in edges.items() if not found & edges.keys()]:
        for module in free:
            del edges[module]
    assert sorted(edges) == []


@pytest.mark.parametrize("module", modules())
def test_only_the_command_line_reads_the_environment(module: str) -> None:
    if module.split(".")[0] == "cli" or module == "tables.source":
        pytest.skip("may: flags of a command, and the tables that a whole process reads")
    if module == "peers.comfyui":
        pytest.skip("its child asks where a server of somebody else listens")
    source = ast.unparse(read_tree(module))
    assert "os.environ" not in source
    assert "getenv" not in source


LIGHT_COMMANDS = (
    *("--help", "matrix list", "matrix check", "matrix diff HEAD..HEAD", "agreement"),
    *("bench --compare kept.json new.json", "thresholds"),
    "explain --checkpoint fp8-guide --hardware cpu",
)
"""`report --check` is not among them: `nox -s report` runs it where there is no torch."""
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
