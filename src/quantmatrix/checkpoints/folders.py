"""Folders: one view of a local directory and of a hub repository at one commit.

Both list names relative to themselves, hand out small files as paths and read safetensors headers;
only a hub folder may have weight files that are not here yet. A reference is a path, a hub id
(`owner/repo`, `owner/repo/sub/folder`, `owner/repo/file.safetensors`) or a full hub URL. Of the
GGUF files in a folder or repository one is named by its quantization, `owner/repo:Q4_K_M`.

A repository that is in the cache is used at its cached commit, so that what ran yesterday runs
today; its file list still comes from the hub where that can be reached, because a cached snapshot
may hold a part of the files only. `--revision`, or the hub's own download command, moves on to
another commit. Nothing here waits for the network when `Hub.offline` is set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from quantmatrix.checkpoints import gguf
from quantmatrix.checkpoints.hub import explain_partial, open_repository, read_ref
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError
from quantmatrix.links import check_link
from quantmatrix.request import Hub

if TYPE_CHECKING:
    from quantmatrix.checkpoints.hub import Folder

PLACEHOLDER = "/path/to/"
LOCAL_STARTS = ("/", "./", "../", "~")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZATION = re.compile(r"(.*[^:/\\]):([A-Za-z][A-Za-z0-9_]*)", re.DOTALL)
"""A folder or repository, and which of its GGUF files."""

OPENED: ContextVar[dict[tuple[str, Hub], tuple[Folder, str]] | None] = ContextVar(
    "opened folders", default=None
)
"""Folders of the request that is being planned, by reference and hub."""


@contextmanager
def open_once() -> Iterator[None]:
    """Inside, a reference is opened once: its files are listed, and its commit looked up, once.

    A plan asks for the same folder as pipeline, as component and as the base that weights are held
    against. Folders that were opened outside are not reused: files change between requests.
    """
    token = OPENED.set({})
    try:
        yield
    finally:
        OPENED.reset(token)


def open_folder(reference: str, hub: Hub) -> tuple[Folder, str]:
    """(folder, name of a file in it or "") that a reference leads to; raises CheckpointError."""
    opened = OPENED.get()
    if opened is None:
        return look_up(reference, hub)
    if (reference, hub) not in opened:
        opened[reference, hub] = look_up(reference, hub)
    return opened[reference, hub]


def look_up(reference: str, hub: Hub) -> tuple[Folder, str]:
    """As `open_folder`, looked up now; raises CheckpointError where nothing is there."""
    above, quantization = split_quantization(reference)
    if quantization:
        folder, name = look_up(above, hub)
        return find_quantized(folder, name, quantization)
    local = find_local(reference, hub)
    if local is not None:
        if local.is_dir():
            return LocalFolder(enter_cached(local)), ""
        check_link(local, local.parent)
        return LocalFolder(local.parent), local.name
    repo, inner, revision = parse_hub_reference(reference, hub)
    folder = open_repository(repo, replace(hub, revision=revision))
    if not inner:
        return folder, ""
    if folder.has(inner):
        path = PurePosixPath(inner)
        parent = "" if str(path.parent) == "." else str(path.parent)
        return folder.enter(parent), path.name
    inside = folder.enter(inner)
    if not inside.names:
        here = ", ".join(sorted({name.split("/")[0] for name in folder.names})) or "nothing"
        raise CheckpointError(
            f"{reference}: no such path on this machine, and {repo} has no file or folder {inner}; "
            f"{folder} has {here}{explain_partial(folder)}"
        )
    return inside, ""


def split_quantization(reference: str) -> tuple[str, str]:
    """(folder or repository, quantization) of `owner/repo:Q4_K_M`; others have no quantization."""
    found = QUANTIZATION.fullmatch(reference)
    if found is None or Path(reference).exists():
        return reference, ""
    return found[1], found[2]


def find_quantized(folder: Folder, name: str, quantization: str) -> tuple[Folder, str]:
    """The GGUF file of a quantization in a folder; CheckpointError for a file, none or several."""
    if name:
        raise CheckpointError(
            f"{folder}/{name}:{quantization}: a quantization is chosen in a folder or repository "
            "of GGUF files, and this is a single file: leave it out"
        )
    found = gguf.find_quantized(folder.names, quantization)
    if len(found) == 1:
        path = PurePosixPath(found[0])
        return folder.enter("" if str(path.parent) == "." else str(path.parent)), path.name
    others = found or list(gguf.list_wholes(folder.names))
    listed = "".join(f"\n  {folder}/{one}" for one in others) or " it has no .gguf file"
    raise CheckpointError(
        f"{folder}: {len(found) or 'no'} GGUF files of the quantization {quantization}: expected one; "
        f"name a file, or another quantization:{listed}"
    )


def find_local(reference: str, hub: Hub) -> Path | None:
    """The existing local path of a reference, or None when it must be a hub id or URL.

    Raises CheckpointError for an empty reference, and for one that can only be a local path (or a
    placeholder of the guide) where nothing lies there.
    """
    if not reference.strip():
        raise CheckpointError("an empty path: name a file, a folder or a hub id")
    try:
        path = Path(reference).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{reference}: no such user on this machine") from error
    if path.exists():
        return path.absolute()
    if reference.startswith(PLACEHOLDER):
        if hub.local_root and (Path(hub.local_root) / reference.lstrip("/")).exists():
            return Path(hub.local_root) / reference.lstrip("/")
        raise CheckpointError(
            f"{reference}: no such file or folder. It is a placeholder of the guide: name a path "
            "of yours, or add --tiny, which makes a stand-in for it"
        )
    if reference.startswith(LOCAL_STARTS):
        raise CheckpointError(f"{reference}: no such file or folder")
    if "/" not in reference.strip("/"):
        raise CheckpointError(
            f"{reference}: no such file or folder here, and not a hub id, which has the "
            "form owner/repo"
        )
    return None


def enter_cached(path: Path) -> Path:
    """The snapshot of a cache folder `models--owner--name`; any other folder is itself.

    Raises CheckpointError where refs/main names no snapshot that is there and several, or none,
    are.
    """
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    commit = read_ref(path, "main")
    snapshots = sorted((path / "snapshots").iterdir())
    if commit is not None and (path / "snapshots" / commit).is_dir():
        return check_link(path / "snapshots" / commit, path)
    if len(snapshots) == 1:
        return check_link(snapshots[0], path)
    listed = "".join(f"\n  {snapshot}" for snapshot in snapshots)
    ref = "without refs/main" if commit is None else f"whose refs/main names {commit}"
    what = f"name one of them:{listed}" if snapshots else "download it again with `hf download`"
    raise CheckpointError(
        f"{path}: a cache folder {ref} and with {len(snapshots)} snapshots; {what}"
    )


def parse_hub_reference(reference: str, hub: Hub) -> tuple[str, str, str | None]:
    """(owner/repo, path inside it, revision) of a hub id or URL."""
    if "://" in reference:
        return _parse_hub_url(reference, hub)
    owner, name, *inner = [part for part in reference.split("/") if part]
    return _check_repository(reference, f"{owner}/{name}"), "/".join(inner), hub.revision


def _parse_hub_url(reference: str, hub: Hub) -> tuple[str, str, str | None]:
    address = urlsplit(reference)
    if address.scheme not in ("https", "http") or address.hostname not in HUB_HOSTS:
        raise CheckpointError(
            f"{reference}: not an address of the hub; known hosts: {', '.join(HUB_HOSTS)}. "
            "Download the files and name the folder"
        )
    parts = [part for part in address.path.split("/") if part]
    if parts[:1] in (["datasets"], ["spaces"]):
        raise CheckpointError(f"{reference}: this names a {parts[0][:-1]}, expected a model")
    if len(parts) < 2:
        raise CheckpointError(f"{reference}: expected an owner and a name in the address")
    repo = _check_repository(reference, "/".join(parts[:2]))
    kind, revision, inner = parts[2:3], parts[3:4], [unquote(part) for part in parts[4:]]
    if not kind:
        return repo, "", hub.revision
    if kind[0] not in ("tree", "blob", "resolve") or not revision:
        raise CheckpointError(
            f"{reference}: expected /tree/, /blob/ or /resolve/ and a revision after {repo}"
        )
    named = unquote(revision[0])
    if hub.revision and hub.revision != named:
        raise CheckpointError(
            f"{reference}: the address names revision {named}, --revision says {hub.revision}: "
            "leave one of them out"
        )
    return repo, "/".join(inner), named


def _check_repository(reference: str, repo: str) -> str:
    if not REPOSITORY.fullmatch(repo):
        raise CheckpointError(
            f"{reference}: no such file or folder here, and {repo} is not a hub id, which has "
            "the form owner/repo"
        )
    return repo
