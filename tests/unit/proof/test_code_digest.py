"""The rule of freshness, shown by changing a copy of the package: what moves, keeps every digest; what
computes otherwise, changes those of the cells that compute with it, and no others."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import quantmatrix
from quantmatrix import families
from quantmatrix.families.protocol import Family, Needed, list_names
from quantmatrix.proof import code_digest
from quantmatrix.proof.code_digest import EDGES, FORMER, Code, Digests, Way, find_way
from quantmatrix.proof.scopes import COMPILED, STAND_IN, TRUE_SIZE
from quantmatrix.proof.source_modules import CodeError, Definition
from quantmatrix.tables import read

PACKAGE = Path(quantmatrix.__file__).parent
REPORTS = PACKAGE.parents[1] / "reports"


ENTRIES = {
    *EDGES,
    *(entry for way in code_digest.STARTS.values() for entry in way),
    *(*code_digest.PLAN, *code_digest.ON_DEVICES, *code_digest.ACCELERATED, *code_digest.SEVERAL),
}
MODELS = ("flux-1", "wan-2-2")
"""All families have records of these two."""


@pytest.fixture(scope="module")
def ways() -> Mapping[str, Way]:
    """The ways of committed records, each once, by one of their cells."""
    tables = read.read()
    found: dict[Way, str] = {}
    for path in sorted(REPORTS.glob("evidence/*/*.json")):
        record = json.loads(path.read_bytes())
        row = tables.hardware[record["cell"]["hardware"]]
        place = (row.vendor, row.arch)
        way = find_way(record["cell"], record["plan"], place, STAND_IN)
        if way.model in MODELS:
            found.setdefault(way, record["cell"]["id"])
    assert len(found) > 100
    return {cell: way for way, cell in found.items()}


@pytest.fixture(scope="module")
def before(ways: Mapping[str, Way]) -> Mapping[str, Digests]:
    code = Code(PACKAGE)
    return {cell: code.digest(way) for cell, way in ways.items()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    target = tmp_path / "somewhere"
    return Path(shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def list_changed(
    ways: Mapping[str, Way], before: Mapping[str, Digests], copy: Path
) -> Callable[[], dict[str, str]]:
    """Cells of which a digest of the copy is another one, and which."""

    def find() -> dict[str, str]:
        code, found = Code(copy), {}
        for cell, way in ways.items():
            now, then = code.digest(way), before[cell]
            names = [n for n in ("device", "shared") if getattr(now, n) != getattr(then, n)]
            if names:
                found[cell] = " ".join(names)
        return found

    return find


def edit(copy: Path, file: str, old: str, new: str) -> None:
    path = copy / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r}: the test is out of date"
    path.write_text(text.replace(old, new, 1))


def edit_all(copy: Path, change: Callable[[str], str]) -> int:
    """Change the text of every file; returns of how many it did."""
    count = 0
    for path in copy.rglob("*.py"):
        text = path.read_text()
        changed = change(text)
        count += changed != text
        path.write_text(changed)
    return count


KEPT = ("__init__", *(name.rpartition(".")[2] for name in code_digest.PROTOCOLS))
"""Modules that the rule knows by their name."""


def test_renaming_every_module_of_kernels_changes_nothing(
    copy: Path, list_changed: Callable[[], dict[str, str]]
) -> None:
    modules = [path for path in (copy / "kernels").glob("*.py") if path.stem not in KEPT]
    for path in modules:
        path.rename(path.with_stem(f"renamed_{path.stem}"))
    names = re.compile(rf"\b({'|'.join(path.stem for path in modules)})\b")
    assert edit_all(copy, lambda text: names.sub(r"renamed_\1", text)) > len(modules)
    assert list_changed() == {}


MOVED = {
    "runtime/plan/kernel_choice": ("choose_kernel", "choose_kernels", "count_rows"),
    "runtime/plan/decide": ("decide_offload", "check_memory"),
    "kernels/linear_fp8": ("find_input_scale", "TORCH_ARCHES", "prepare_decode"),
    "runtime/quantized_linear": ("SharedInput", "QuantizedLinear", "share_inputs"),
    "runtime/generate": ("generate_all", "generate_one", "timed_stages"),
    "tables/read": ("read", "tables_folder"),
    "kernels/linear_w4a16": ("DECODE", "ORDER"),
    "kernels/linear_int8": ("KERNELS",),
    "kernels/__init__": ("Kernel", "Needs"),
}


def test_moving_definitions_to_other_files_changes_nothing(
    copy: Path, list_changed: Callable[[], dict[str, str]]
) -> None:
    for module, names in MOVED.items():
        path = copy / f"{module}.py"
        move(path, path.with_name(f"new_{path.name}"), names)
    assert list_changed() == {}


def move(path: Path, target: Path, names: tuple[str, ...]) -> None:
    """Definitions of a module in a new one; each module imports what it needs of the other."""
    root = next(parent for parent in path.parents if (parent / "api.py").is_file())
    base = ".".join(["quantmatrix", *path.parent.relative_to(root).parts])
    tree = ast.parse(path.read_text())
    imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    moved = [n for n in tree.body if set(bound(n)) & set(names)]
    assert {name for node in moved for name in bound(node)} >= set(names)
    kept = [n for n in tree.body if n not in moved and n not in imports]
    others = [name for node in kept for name in bound(node)]
    own = f"from {base}.{path.stem} import {', '.join(others)}\n"
    target.write_text("\n".join([*map(ast.unparse, imports), own, *map(ast.unparse, moved)]))
    back = f"from {base}.{target.stem} import {', '.join(names)}"
    path.write_text("\n".join([*map(ast.unparse, imports), back, *map(ast.unparse, kept)]))


def bound(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


class Reword(ast.NodeTransformer):
    """Other docstrings, other words in what is raised, no annotations of functions."""

    def __init__(self) -> None:
        self.raised = 0
        self.docstrings = 0
        self.inside = False

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            self.docstrings += 1
            return ast.Expr(ast.Constant("Said otherwise."))
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.inside = True
        found = self.generic_visit(node)
        self.inside = False
        return found

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.raised += self.inside
        return ast.Constant("another error, in other words") if self.inside else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        for argument in (*node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        node.returns = None
        return self.generic_visit(node)


def test_rewording_docstrings_and_errors_changes_nothing(
    copy: Path, list_changed: Callable[[], dict[str, str]]
) -> None:
    reword = Reword()
    edit_all(
        copy, lambda text: ast.unparse(ast.fix_missing_locations(reword.visit(ast.parse(text))))
    )
    assert min(reword.raised, reword.docstrings) > 100
    assert list_changed() == {}


def test_other_names_and_another_order_change_nothing(
    copy: Path, list_changed: Callable[[], dict[str, str]]
) -> None:
    for name in ("round_e4m3", "E4M3_MAX", "generate_one", "ComponentPlan", "Needs", "Scheme"):
        assert edit_all(copy, lambda text, name=name: re.sub(rf"\b{name}\b", f"new_{name}", text))

    def turn(text: str) -> str:
        tree = ast.parse(text)
        head = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        tree.body = head + [n for n in tree.body if n not in head][::-1]
        return ast.unparse(tree)

    assert edit_all(copy, turn) > 50
    assert list_changed() == {}


E4M3 = ("fp8", "modelopt-fp8", "modelopt-nvfp4", "nunchaku-svdq")
"""Families that write or read e4m3: codes, or scales of e2m1 codes."""


def uses(way: Way, *backends: str) -> bool:
    return bool(set(way.backends) & set(backends))


def has_scheme(way: Way, part: str) -> bool:
    return any(part in name for name in way.schemes)


Expected = Callable[[Way], str]
"""Which digests of a way a change must change."""
MUTATIONS: dict[str, tuple[str, str, str, Expected]] = {
    "the seed": (
        "runtime/generate.py", "manual_seed(seed)", "manual_seed(seed + 1)",
        lambda w: "" if w.refused else "shared",
    ),
    "a default of the request": (
        "request.py", "seed: tuple[int, ...] = (0,)", "seed: tuple[int, ...] = (1,)",
        lambda w: "shared",
    ),
    "the steps of one model": (
        "models/flux_1.py", "TINY_DEFAULTS = ", "TINY_DEFAULTS = None or ",
        lambda w: "shared" if w.model == "flux-1" else "",
    ),
    "a constant of a number format": (
        "kernels/number_formats.py", "E4M3_MAX = 448.0", "E4M3_MAX = 240.0",
        lambda w: "device" if has_scheme(w, "MXFP8") and uses(w, "reference")
        else "" if w.refused or w.family not in E4M3 else "device shared"
        if uses(w, "torch", "reference", "fp8-recode", "packed-fp8") else "shared",
    ),
    "an order of backends": (
        "kernels/linear_fp8.py", '"sm90": ("torch", "torch-block"', '"sm90": ("torch-block", "torch"',
        lambda w: "device" if w.arch == "sm90" and not w.backend and uses(w, "torch") else "",
    ),
    "an order of backends elsewhere": (
        "kernels/linear_fp8.py", '"sm86": ("decode", "reference")', '"sm86": ("reference", "decode")',
        lambda w: "",
    ),
    "a tile of the SVDQuant kernel": (
        "kernels/packed_triton.py", "TILE = (4, 512)", "TILE = (8, 512)",
        lambda w: "device" if w.family == "nunchaku-svdq" and uses(w, "packed") else "",
    ),
    "a block of the FP8 kernels": (
        "kernels/fp8_triton.py", "BLOCK = 8192", "BLOCK = 4096",
        lambda w: "device" if uses(w, "torch", "fp8-recode", "packed-fp8") else "",
    ),
    "a tile of the files' layout": (
        "kernels/svdq_packing.py", "TILE = 128", "TILE = 64",
        lambda w: "shared" if w.family == "nunchaku-svdq" else "",
    ),
    "what a kernel needs": (
        "kernels/linear_fp8.py", "out_multiple=16", "out_multiple=32",
        lambda w: "device"
        if uses(w, "torch") or (w.refused and w.family in ("fp8", "modelopt-fp8")) else "",
    ),
    "the rule of a refusal": (
        "kernels/linear_fp8.py", '"fp8-torch-sm89"', '"fp8-torch-sm90"',
        lambda w: "device"
        if uses(w, "torch") or (w.refused and w.family in ("fp8", "modelopt-fp8")) else "",
    ),
    "how a stand-in is written": (
        "tiny/weights.py", "def ", "@print\ndef ", lambda w: "" if w.refused else "shared",
    ),
    "a part of one model's stand-in": (
        "models/flux_1.py", '"shift": 3.0', '"shift": 2.0',
        lambda w: "shared" if w.model == "flux-1" and not w.refused else "",
    ),
    "the builder of all stand-ins": (
        "tiny/pipelines.py", "def build_vae(", "@print\ndef build_vae(",
        lambda w: "" if w.refused else "shared",
    ),
    "a decoding": (
        "kernels/linear_int8.py", "def prepare_decode(", "@print\ndef prepare_decode(",
        lambda w: "device" if w.family == "msmodelslim" and uses(w, "decode")
        and not has_scheme(w, "MXFP") else "",
    ),
    "what only a GPU enters": (
        "runtime/pipeline.py", 'kind != "cpu"', 'kind != "xpu"',
        lambda w: "" if w.refused else "device shared" if w.vendor != "cpu" else "shared",
    ),
    "an exchange of heads": (
        "runtime/head_exchange.py", "def attend(", "@print\ndef attend(",
        lambda w: "device" if w.several else "",
    ),
    "a kernel of the exchange": (
        "kernels/exchange_triton.py", "WARPS = 4", "WARPS = 8",
        lambda w: "device" if w.several else "",
    ),
    "a share of the weights": (
        "runtime/sharded_weights.py", "def lay_out(", "@print\ndef lay_out(",
        lambda w: "device" if w.several else "",
    ),
    "a report": ("report/table.py", "def write_table(", "@print\ndef write_table(", lambda w: ""),
    "a limit": ("proof/limits.py", "MARGIN = 1.5", "MARGIN = 2.5", lambda w: ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_counts_where_it_is_computed_with(
    copy: Path, ways: Mapping[str, Way], list_changed: Callable[[], dict[str, str]], name: str
) -> None:
    file, old, new, expected = MUTATIONS[name]
    edit(copy, file, old, new)
    wanted = {cell: what for cell, way in ways.items() if (what := expected(way))}
    assert list_changed() == wanted


def test_a_further_model_counts_for_itself_and_its_model_file_for_it(copy: Path) -> None:
    """What is written in `models/further` is nobody else's; the file of its pipeline's model is its own, too."""
    names = ("flux-1-krea", "flux-1-kontext", "hunyuan-video", "flux-1", "qwen-image")
    ways = {name: Way("fp8", name, "cpu", "cpu", backends=("reference",)) for name in names}

    def digest() -> dict[str, Digests]:
        code = Code(copy)
        return {name: code.digest(way) for name, way in ways.items()}

    before = digest()
    edit(copy, "models/further/flux_1_krea.py", '"num_layers": 1', '"num_layers": 2')
    after = digest()
    assert {name for name in names if before[name] != after[name]} == {"flux-1-krea"}
    edit(copy, "models/flux_1.py", r"norm1|norm1_context", r"norm1|norm2")
    last = digest()
    assert {name for name in names if last[name] != after[name]} == {*names[:2], "flux-1"}


def test_a_name_that_means_nothing_is_an_error(copy: Path, ways: Mapping[str, Way]) -> None:
    edit(copy, "runtime/generate.py", "find_degeneration(stack", "find_nothing(stack")
    with pytest.raises(
        CodeError, match=r"generate.py: generate_one, line .*find_nothing cannot be"
    ):
        Code(copy).digest(next(way for way in ways.values() if not way.refused))


OFF_THE_WAY = {
    *("dequantize", "reference", "cut_rows"),  # what numbers are compared with
    *(
        "MODELS",
        "WHOLE_PIPELINE",
        "ENDING",
        "name_scheme",
        "check_output",
    ),  # asked by `quantmatrix quantize`
}
"""Names of the protocol that no cell computes with."""


def test_edges_and_optional_names_are_there() -> None:
    package = Code(PACKAGE).package
    for module, name in EDGES:
        assert isinstance(package.resolve(f"quantmatrix.{module}", name), Definition)
    parts = (code_digest.FAMILY_PLANS, code_digest.FAMILY_LOADS, code_digest.FAMILY_WRITES)
    names = {name for part in parts for name in part}
    offered = {*list_names(Needed), *list_names(Family)}
    assert names - offered == {"caveat"}  # of earlier revisions
    assert offered - names == OFF_THE_WAY
    for name in names - {"caveat"}:
        modules = [code_digest.module_of("families", family) for family in families.IDS]
        assert any(package.has(module, name) for module in modules)


def test_digests_of_all_cells_take_a_second_or_two(ways: Mapping[str, Way]) -> None:
    import time

    from quantmatrix.proof import source_modules

    source_modules.parse.cache_clear()
    start = time.process_time()
    code = Code(PACKAGE)
    cold = {cell: code.digest(way) for cell, way in ways.items()}
    middle = time.process_time()
    assert {cell: code.digest(way) for cell, way in ways.items()} == cold
    assert middle - start < 10
    assert time.process_time() - middle < 1


LAY_APART = {"open_tiny_hub": "sources", "plan": "planning", "generate_all": "run"}
"""Entries and edges that lay apart from the others of their module of today."""


def test_entries_and_edges_are_found_in_their_former_modules(tmp_path: Path) -> None:
    wanted = {
        (module, name): LAY_APART.get(name, FORMER.get(module, (module,))[0])
        for module, name in ENTRIES
    }
    for (module, name), former in wanted.items():
        if module in FORMER:
            with (tmp_path / f"{former}.py").open("a") as file:
                file.write(f"def {name}():\n    return 1\n")
    code = Code(tmp_path)
    for (module, name), former in wanted.items():
        assert code.locate(module, name) == (former, name)
        assert Code(PACKAGE).package.has(module, name)
    assert Definition("sources", "open_tiny_hub") in code.package.edges


BEFORE_MOVES = "60f12f3"
OWN_DIGESTS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from quantmatrix.code_digest import Code, Way
code = Code(Path(sys.argv[1]) / "quantmatrix")
for line in sys.stdin:
    one = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(line).items()}
    found = code.digest(Way(**one))
    print(found.device, found.shared)
"""


def test_a_revision_from_before_the_moves_has_the_digests_that_it_gave(
    ways: Mapping[str, Way], tmp_path: Path
) -> None:
    root = PACKAGE.parents[1]
    words = ["git", "-C", str(root), "archive", BEFORE_MOVES, "src"]
    archive = subprocess.run(words, capture_output=True)
    if archive.returncode:
        pytest.skip("no history here")
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    alone = [w for w in ways.values() if not w.several]  # it did not see what several processes run
    every = [replace(w, scope=s) for w in alone for s in (STAND_IN, TRUE_SIZE, COMPILED)]
    given = "\n".join(json.dumps(asdict(way)) for way in every)
    words = [sys.executable, "-c", OWN_DIGESTS, str(tmp_path / "src")]
    own = subprocess.run(words, input=given, capture_output=True, text=True, check=True)
    code = Code(tmp_path / "src/quantmatrix")
    found = [code.digest(way) for way in every]
    assert [f"{one.device} {one.shared}" for one in found] == own.stdout.splitlines()


def test_stand_ins_are_named_by_what_writes_them(copy: Path) -> None:
    before = Code(PACKAGE).digest_stand_ins()
    edit(copy, "runtime/plan/kernel_choice.py", "TEXT_ROWS = 512", "TEXT_ROWS = 1024")
    edit(copy, "tiny/text_encoders.py", '"""', '"""Other words. ')
    assert Code(copy).digest_stand_ins() == before
    edit(copy, "tools/recipe.py", "def quantize_layers(", "@print\ndef quantize_layers(")
    assert Code(copy).digest_stand_ins() != before


@pytest.mark.parametrize("name", ["python3.10", "python3.12", "python3.13", "python3.14"])
def test_every_python_gives_the_same_digests(name: str) -> None:
    python = shutil.which(name)
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"no {name} here")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from quantmatrix.proof.code_digest import own_code\n"
        "print(own_code().digest_stand_ins())"
    )
    words = [python, "-c", code, str(PACKAGE.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={})
    assert done.stdout.strip() == Code(PACKAGE).digest_stand_ins()
