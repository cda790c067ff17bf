"""Folders: one view of a local directory and of a hub repository at one commit.

Both list names relative to themselves, hand out small files as paths and read safetensors headers;
only a hub folder may have weight files that are not here yet. A reference is a path, a hub id
(`owner/repo`, `owner/repo/sub/folder`, `owner/repo/file.safetensors`) or a full hub URL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from quantmatrix.checkpoint import Hub, TensorHeader, read_header
from quantmatrix.errors import CheckpointError

PLACEHOLDER = "/path/to/"
HUB_URL = re.compile(r"https?://(?P<host>[^/]+)/(?P<path>.+)")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")

Header = tuple[dict[str, TensorHeader], dict[str, str]]


@dataclass(frozen=True)
class LocalFolder:
    """A directory on this machine."""

    root: Path

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Files below the folder, relative, sorted; hidden folders are left out."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        names = (str(path.relative_to(self.root)) for path in found)
        return tuple(sorted(n for n in names if not any(p.startswith(".") for p in Path(n).parts)))

    def path(self, name: str) -> Path:
        """A file of the folder as a path."""
        return self.root / name

    def header(self, name: str) -> Header:
        """Header of a safetensors file."""
        return read_header(self.root / name)

    def enter(self, sub: str) -> LocalFolder:
        """A folder below this one."""
        return LocalFolder(self.root / sub) if sub else self

    def is_local(self, name: str) -> bool:
        """Whether a file is on this machine."""
        return True

    def __str__(self) -> str:
        """How errors name the folder."""
        return str(self.root)


@dataclass(frozen=True)
class HubFolder:
    """A hub repository, or a folder of it, at one commit."""

    repo: str
    commit: str
    all_names: tuple[str, ...]
    cache_dir: str | None
    prefix: str = ""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Files below the folder, relative, sorted."""
        prefix = f"{self.prefix}/" if self.prefix else ""
        return tuple(sorted(n.removeprefix(prefix) for n in self.all_names if n.startswith(prefix)))

    def _full(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def cached(self, name: str) -> Path | None:
        """A file of the folder if it is in the cache already."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.repo, self._full(name), cache_dir=self.cache_dir, revision=self.commit
        )
        return Path(found) if isinstance(found, str) else None

    def path(self, name: str) -> Path:
        """A file of the folder as a path; downloaded when it is not in the cache."""
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self.repo, self._full(name), revision=self.commit, cache_dir=self.cache_dir
            )
        )

    def header(self, name: str) -> Header:
        """Header of a safetensors file, read without downloading the file."""
        cached = self.cached(name)
        if cached is not None:
            return read_header(cached)
        from huggingface_hub import HfApi

        full = self._full(name)
        found = HfApi().parse_safetensors_file_metadata(self.repo, full, revision=self.commit)
        tensors = {
            key: TensorHeader(key, str(info.dtype), tuple(info.shape), name)
            for key, info in found.tensors.items()
        }
        return tensors, {str(k): str(v) for k, v in (found.metadata or {}).items()}

    def enter(self, sub: str) -> HubFolder:
        """A folder below this one."""
        return replace(self, prefix=self._full(sub)) if sub else self

    def is_local(self, name: str) -> bool:
        """Whether a file is in the cache."""
        return self.cached(name) is not None

    def __str__(self) -> str:
        """How errors name the folder."""
        return f"{self.repo}/{self.prefix}".rstrip("/")


Folder = LocalFolder | HubFolder


def open_folder(reference: str, hub: Hub) -> tuple[Folder, str]:
    """(folder, name of a file in it or "") that a reference leads to; raises CheckpointError."""
    if not reference:
        raise CheckpointError("an empty path: name a file, a folder or a hub id")
    local = find_local(reference, hub)
    if local is not None:
        return (
            (LocalFolder(local), "") if local.is_dir() else (LocalFolder(local.parent), local.name)
        )
    repo, inner, revision = parse_hub_reference(reference, hub)
    folder = open_repository(repo, replace(hub, revision=revision))
    if not inner:
        return folder, ""
    if inner in folder.names:
        path = PurePosixPath(inner)
        parent = "" if str(path.parent) == "." else str(path.parent)
        return folder.enter(parent), path.name
    inside = folder.enter(inner)
    if not inside.names:
        raise CheckpointError(
            f"{reference}: {repo} has no file or folder {inner}; it has "
            f"{', '.join(sorted({n.split('/')[0] for n in folder.names}))}"
        )
    return inside, ""


def find_local(reference: str, hub: Hub) -> Path | None:
    """The existing local path of a reference, or None when it must be a hub id."""
    path = Path(reference).expanduser()
    if path.exists():
        return path.absolute()
    if reference.startswith(PLACEHOLDER) and hub.local_root:
        stand_in = Path(hub.local_root) / reference.lstrip("/")
        if stand_in.exists():
            return stand_in
    if reference.startswith(("/", "./", "../", "~")) or "/" not in reference.strip("/"):
        hint = " (a hub id has the form owner/repo)" if "/" not in reference else ""
        placeholder = reference.startswith(PLACEHOLDER)
        more = (
            "; this is a placeholder: with --tiny a stand-in is made for it" if placeholder else ""
        )
        raise CheckpointError(f"{reference}: no such file or folder{hint}{more}")
    return None


def parse_hub_reference(reference: str, hub: Hub) -> tuple[str, str, str | None]:
    """(owner/repo, path inside it, revision) of a hub id or URL."""
    match = HUB_URL.match(reference)
    if not match:
        owner, repo, *inner = reference.strip("/").split("/")
        return f"{owner}/{repo}", "/".join(inner), hub.revision
    if match["host"] not in HUB_HOSTS:
        raise CheckpointError(
            f"{reference}: not a hub address; known hosts: {', '.join(HUB_HOSTS)}"
        )
    owner, _, rest = match["path"].partition("/")
    if owner in ("datasets", "spaces"):
        raise CheckpointError(f"{reference}: this names a {owner[:-1]}, not a model")
    repo, _, rest = rest.partition("/")
    kind, _, rest = rest.partition("/")
    if not kind:
        return f"{owner}/{repo}", "", hub.revision
    if kind not in ("tree", "blob", "resolve"):
        raise CheckpointError(f"{reference}: expected /tree/, /blob/ or /resolve/ after the name")
    revision, _, inner = rest.partition("/")
    if hub.revision and hub.revision != revision:
        raise CheckpointError(
            f"{reference}: the address names revision {revision}, --revision says {hub.revision}"
        )
    return f"{owner}/{repo}", inner.split("?")[0], revision


def open_repository(repo: str, hub: Hub) -> Folder:
    """A hub repository: the cached snapshot when offline or complete, else its remote listing."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = snapshot_download(
            repo, revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, ValueError) as error:
        if hub.offline:
            raise CheckpointError(
                f"{repo}: not in the cache {hub.cache_dir or '(default)'} and offline. Download it "
                "first, or use --tiny: `quantmatrix tiny-hub` has stand-ins for the repositories "
                "of the tables"
            ) from error
        root = None
    if hub.offline and root is not None:
        return LocalFolder(Path(root))
    try:
        info: Any = HfApi().model_info(repo, revision=hub.revision)
    except (HfHubHTTPError, OSError) as error:
        if root is not None:
            return LocalFolder(Path(root))
        raise CheckpointError(
            f"{repo}: neither in the cache nor reachable on the hub ({_first_line(error)}). Check "
            "the name and your connection, log in for a gated repository, or use --tiny"
        ) from error
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return HubFolder(repo, str(info.sha), names, hub.cache_dir)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
