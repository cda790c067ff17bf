"""Tiny: a local hub cache with a stand-in for every repository and path that the tables name.

A stand-in has the true on-disk format at a small size. Base models are built of the model modules' data;
quantized checkpoints are made from them with the family's own `quantize`, as the row of
checkpoints.csv says. Everything is built in a temporary folder and renamed into place, so a reader
never sees a half-made one, and every build gives the same bytes.

A cache holds `models--owner--name/{refs/main,snapshots/<digest>/...}` as the hub's does; paths of
the guide such as /path/to/x lie under `local/path/to/x`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantmatrix
from quantmatrix import families, models
from quantmatrix.checkpoints.folders import split_quantization
from quantmatrix.errors import CheckpointError
from quantmatrix.files import put, remove_leftovers, write_whole
from quantmatrix.hardware.packages import read_versions
from quantmatrix.proof.code_digest import own_code
from quantmatrix.request import Hub
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.plan.sources import COMPATIBLE_BASES
from quantmatrix.tables.read import read, tables_folder
from quantmatrix.tables.rows import CheckpointRow, Matrix
from quantmatrix.tiny.pictures import PICTURES, write_picture

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantmatrix.request import Request

PLACEHOLDER = "/path/to/"
logger = logging.getLogger(__name__)
PICTURE_PATHS = tuple(f"{PLACEHOLDER}{name}" for name in PICTURES)
"""Pictures that rows may name."""
LORA_PATHS = {f"{PLACEHOLDER}{model}-lora.safetensors": model for model in models.IDS}
"""Adapters that rows may name, and the model of each."""
KEPT = 14 * 24 * 3600.0
"""Seconds for which a cache of stand-ins stays that nobody uses."""
MAKING = ".making-"
"""How the name of a folder begins in which a stand-in is being made."""


@lru_cache(maxsize=1)
def default_folder() -> Path:
    """The user's cache folder for stand-ins as these definitions, tables and packages write them.

    Folders of other definitions that nobody has used for `KEPT` seconds are deleted: each has up to
    a gigabyte, and every change of a definition begins another.
    """
    cache = Path.home() / ".cache" / "quantmatrix"
    digest = hashlib.sha256(find_writers(cache, Path(quantmatrix.__file__).parent).encode())
    digest.update((tables_folder() / "checkpoints.csv").read_bytes())
    versions = read_versions(("torch", "diffusers", "transformers", "numpy", "tokenizers"))
    digest.update(repr(sorted(versions.items())).encode())
    folder = cache / f"tiny-{digest.hexdigest()[:12]}"
    with suppress(OSError):  # not there yet, or nobody may write to it
        os.utime(folder)
    for pattern in ("tiny-*", "writers-*"):
        remove_leftovers(cache, pattern, older_than=KEPT)
    return folder


def find_writers(cache: Path, package: Path) -> str:
    """The digest of what writes stand-ins, in a cache under the content of the package's files.

    Following the code takes a second, reading the files a fiftieth of it.
    """
    content = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(f"{path.relative_to(package).as_posix()}\0".encode())
        content.update(hashlib.sha256(path.read_bytes()).digest())
    file = cache / f"writers-{content.hexdigest()[:32]}"
    with suppress(OSError, UnicodeDecodeError):
        kept = file.read_text(encoding="utf-8")
        if re.fullmatch(r"sha256:[0-9a-f]{64}", kept):
            os.utime(file)
            return kept
    found = own_code().digest_stand_ins()
    with suppress(OSError):  # nobody may write there
        write_whole(file, found.encode())
    return found


def hub(folder: Path) -> Hub:
    """The folder as a hub that is never left."""
    return Hub(cache_dir=str(folder), offline=True, local_root=str(folder / "local"))


def repository_of(reference: str) -> str:
    """The hub id, or the first level of a placeholder path, that a reference lies in."""
    if reference.startswith(PLACEHOLDER):
        return PLACEHOLDER + reference.removeprefix(PLACEHOLDER).split("/")[0]
    return "/".join(split_quantization(reference)[0].strip("/").split("/")[:2])


def path_of(repository: str, folder: Path) -> Path:
    """Where a repository's stand-in lies in the hub folder."""
    if repository.startswith(PLACEHOLDER):
        return folder / "local" / repository.lstrip("/")
    return folder / f"models--{repository.replace('/', '--')}"


def ensure(reference: str, folder: Path, tables: Matrix | None = None) -> None:
    """Make the stand-in of a hub id or placeholder path, if it is not there yet.

    References that lead to existing local files need none. Raises CheckpointError when the tables
    do not name the reference.
    """
    if not reference.startswith(PLACEHOLDER) and Path(reference).expanduser().exists():
        return
    repository = repository_of(reference)
    path = path_of(repository, folder)
    if path.exists():
        return
    build = find_builder(repository, folder, tables or read())
    if build is None:
        raise CheckpointError(
            f"{reference}: there is no tiny stand-in for it: the tables do not name it. Known are "
            "the repositories of matrix/models.csv and matrix/checkpoints.csv; without --tiny the "
            "real one is used"
        )
    logger.debug("writing the stand-in of %s to %s", repository, path)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, f"{MAKING}*")
    with tempfile.TemporaryDirectory(dir=folder, prefix=MAKING) as temporary:
        built = Path(temporary) / "content"
        built.mkdir()
        with quiet(), one_thread(), errors_of_the_system(path):
            build(built)
        if repository.startswith(PLACEHOLDER):
            files = [path for path in built.iterdir() if path.name == Path(repository).name]
            move_into_place(files[0] if files and files[0].is_file() else built, path)
        else:
            move_into_place(wrap_snapshot(built, Path(temporary) / "cache"), path)


@contextmanager
def errors_of_the_system(path: Path) -> Iterator[None]:
    """A disk that is full while a library writes tensors is an OSError, too."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: a singular value decomposition on two has other last bits."""
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def wrap_snapshot(content: Path, cache: Path) -> Path:
    """A repository's content in the layout of a hub cache, its commit being a digest of it."""
    commit = digest_folder(content)[:40]
    snapshot = cache / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    content.rename(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit, encoding="utf-8")
    return cache


def digest_folder(folder: Path) -> str:
    """SHA-256 over names and bytes of every file of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def move_into_place(built: Path, path: Path) -> None:
    """Rename; another process that was quicker made the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        put(built, path)
    except OSError:
        if not path.exists():
            raise
        if built.is_dir():
            shutil.rmtree(built)


def find_builder(repository: str, folder: Path, tables: Matrix) -> Callable[[Path], Any] | None:
    """How the content of a repository is made, or None when the tables do not name it."""
    if repository in LORA_PATHS:
        from quantmatrix.tiny.loras import write_lora

        return partial(write_lora, LORA_PATHS[repository], Path(repository).name)
    if found := find_encoder(repository, folder, tables):
        return found
    if repository in PICTURE_PATHS:
        return partial(write_picture, repository.removeprefix(PLACEHOLDER))
    rows = [
        row
        for row in tables.checkpoints.values()
        if row.form != "online" and repository_of(row.reference) == repository
    ]
    if rows:
        return lambda built: build_checkpoints(rows, built, folder, tables)
    bases = {row.repo: row.id for row in tables.models.values()}
    bases |= {repository_of(row.base): row.model for row in tables.checkpoints.values()}
    if repository in bases:
        from quantmatrix.tiny.pipelines import write_pipeline

        return partial(write_pipeline, bases[repository])
    return None


def find_encoder(repository: str, folder: Path, tables: Matrix) -> Callable[[Path], Any] | None:
    """How a quantized text encoder at a placeholder path is made; None: it is no such path."""
    if not repository.startswith(PLACEHOLDER):
        return None
    from quantmatrix.tiny.encoder_forms import FORMS, write_encoder

    name = repository.removeprefix(PLACEHOLDER)
    if name not in FORMS:
        return None
    base = tables.models[FORMS[name].model].repo

    def build(built: Path) -> None:
        ensure(base, folder, tables)
        write_encoder(name, find_snapshot(base, folder), built)

    return build


def build_checkpoints(rows: list[CheckpointRow], built: Path, folder: Path, tables: Matrix) -> None:
    """Make every checkpoint that lies in one repository."""
    from quantmatrix.tiny.checkpoints import write_checkpoint

    written: set[tuple[str, ...]] = set()
    files = {row.reference for row in rows if row.reference.endswith(".safetensors")}
    for row in rows:
        if row.form == "raw" and files and row.reference not in files:
            continue  # the repository as a whole: what it holds is said by the rows of its files
        name = row.reference.strip("/").removeprefix(repository_of(row.reference).strip("/"))
        key = (name, row.form, row.scheme, row.kept)
        if key in written:
            continue
        written.add(key)
        base = tables.models[row.model].repo
        ensure(base, folder, tables)
        inner = name.strip("/")
        if row.reference.startswith(PLACEHOLDER) and row.reference.endswith(".safetensors"):
            inner = Path(row.reference).name
        write_checkpoint(row, inner, built, find_snapshot(base, folder))


def find_snapshot(repository: str, folder: Path) -> Path:
    """The content of a stand-in that was made."""
    cache = path_of(repository, folder)
    return cache / "snapshots" / (cache / "refs" / "main").read_text(encoding="utf-8")


def ensure_all(folder: Path) -> list[str]:
    """Make the stand-in of every repository in the tables; returns their names."""
    from tqdm import tqdm

    remove_leftovers(folder, f"{MAKING}*")
    tables = read()
    written = families.written()
    unwritten = {row.id for row in tables.checkpoints.values() if row.family not in written}
    planned = unwritten | {c.checkpoint for c in tables.cells} - {
        c.checkpoint for c in tables.cells if c.claim != "planned"
    }
    skipped = {tables.checkpoints[key].reference for key in planned}
    wanted = [name for name in tables.repositories if name not in skipped]
    for name in tqdm(wanted, desc="tiny stand-ins", disable=None):
        ensure(name, folder, tables)
    return list(dict.fromkeys(repository_of(name) for name in wanted))


def open_tiny_hub(references: Iterable[str]) -> Hub:
    """The tiny hub, with a stand-in for each reference; made on first use."""

    folder = default_folder()
    for reference in references:
        ensure(reference, folder)
    return hub(folder)


def use_tiny(request: Request) -> Request:
    """A `--tiny` request with its hub: every reference in it leads to a tiny stand-in."""
    if not request.tiny or request.hub != Hub():
        return request
    bases = [base for marker, base in COMPATIBLE_BASES.items() if marker in request.model_path]
    overrides = [*request.component_paths.values(), *request.weights_paths.values()]
    pictures = [path for path in PICTURE_PATHS if path in " ".join(list_pictures(request))]
    loras = [path for path in request.lora_path if path in LORA_PATHS]
    wanted = [request.model_path, *bases, *overrides, *pictures, *loras]
    return replace(request, hub=open_tiny_hub(wanted))


def list_pictures(request: Request) -> list[str]:
    """The pictures that a request names, pins included."""
    return [*request.image_path, *([request.mask_path] if request.mask_path else [])]
