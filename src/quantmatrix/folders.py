"""Folders: one view of a local directory and of a hub repository at one commit.

Both list names relative to themselves, hand out small files as paths and read safetensors headers;
only a hub folder may have weight files that are not here yet. A reference is a path, a hub id
(`owner/repo`, `owner/repo/sub/folder`, `owner/repo/file.safetensors`) or a full hub URL.

A repository that is in the cache is used at its cached commit, so that what ran yesterday runs
today; its file list still comes from the hub where that can be reached, because a cached snapshot
may hold a part of the files only. `--revision`, or the hub's own download command, moves on to
another commit. Nothing here waits for the network when `Hub.offline` is set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import cast
from urllib.parse import unquote, urlsplit

from quantmatrix.checkpoint import (
    Header,
    Hub,
    RemoteFiles,
    check_ranges,
    read_contents,
    read_header,
)
from quantmatrix.errors import CheckpointError, UnreachableError
from quantmatrix.links import explain_link
from quantmatrix.quoting import quote

PLACEHOLDER = "/path/to/"
LOCAL_STARTS = ("/", "./", "../", "~")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
"""What a cache calls a commit; stand-ins of ours have digests of other lengths."""
LONGEST_NAME = 256
"""One more than the bytes that a file's name has at most."""


@dataclass(frozen=True)
class LocalFolder:
    """A directory on this machine."""

    root: Path
    base: Path | None = None
    """The folder that the user named, which nothing leads out of; None: the folder itself."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Files below the folder, relative, sorted; what is hidden is left out."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        shown = (path for path in found if not any(part.startswith(".") for part in path.parts))
        return tuple(sorted(path.as_posix() for path in shown))

    @cached_property
    def top(self) -> tuple[str, ...]:
        """Files directly in the folder, sorted; what is hidden is left out."""
        if not self.root.is_dir():
            return ()
        found = (path.name for path in self.root.iterdir() if path.is_file())
        return tuple(sorted(name for name in found if not name.startswith(".")))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        check_name(name, self)
        return (self.root / name).is_file()

    def path(self, name: str) -> Path:
        """A file of the folder as a path, which may be a link, but not one that leads out of it."""
        check_name(name, self)
        return check_link(self.root / name, self.base or self.root)

    def header(self, name: str) -> Header:
        """Header of a safetensors file."""
        return read_header(self.path(name))

    def contents(self, name: str, tensors: list[str]) -> dict[str, bytes]:
        """Bytes of small tensors of a safetensors file, by name."""
        with self.path(name).open("rb") as file:
            return read_contents(file, tensors)

    def enter(self, sub: str) -> LocalFolder:
        """A folder below this one."""
        check_name(sub, self)
        return LocalFolder(self.root / sub, self.base or self.root) if sub else self

    def is_local(self, name: str) -> bool:
        """Whether a file is on this machine."""
        return True

    def address(self, name: str) -> str:
        """How a file is named in a checkpoint: its path."""
        return str(self.root / name)

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
    revision: str = "main"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Files below the folder, relative, sorted."""
        prefix = f"{self.prefix}/" if self.prefix else ""
        return tuple(sorted(n.removeprefix(prefix) for n in self.all_names if n.startswith(prefix)))

    @cached_property
    def top(self) -> tuple[str, ...]:
        """Files directly in the folder, sorted."""
        return tuple(name for name in self.names if "/" not in name)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        check_name(name, self)
        return self.full(name) in self.all_names

    def full(self, name: str) -> str:
        """Name of a file in the repository."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def cached(self, name: str) -> Path | None:
        """A file of the folder if it is in the cache already."""
        root = cache_folder(self.repo, self.cache_dir) / "snapshots" / self.commit
        path = root / self.full(name)
        return check_link(path, root) if path.is_file() else None

    def path(self, name: str) -> Path:
        """A file of the folder as a path; downloaded when it is not in the cache."""
        cached = self.cached(name)
        if cached is not None:
            return cached
        from huggingface_hub import hf_hub_download

        full = self.full(name)
        with translate_hub_errors(f"{self.repo}/{full}: cannot be downloaded", self.repo):
            found = hf_hub_download(self.repo, full, revision=self.commit, cache_dir=self.cache_dir)
        self.keep_ref()
        return Path(found)

    def keep_ref(self) -> None:
        """Note in the cache which commit the revision led to: a download by commit does not.

        Without it the files would not be found again by the revision's name.
        """
        ref = cache_folder(self.repo, self.cache_dir) / "refs" / self.revision
        if not COMMIT.fullmatch(self.revision) and not ref.exists():
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit, encoding="utf-8")

    def header(self, name: str) -> Header:
        """Header of a safetensors file; of a remote one only the header is transferred."""
        cached = self.cached(name)
        if cached is not None:
            return read_header(cached)
        from huggingface_hub import HfApi

        full = self.full(name)
        with translate_hub_errors(f"{self.repo}/{full}: its header cannot be read", self.repo):
            found = HfApi().parse_safetensors_file_metadata(self.repo, full, revision=self.commit)
        ranges = {
            key: (str(info.dtype), tuple(info.shape), tuple(info.data_offsets))
            for key, info in found.tensors.items()
        }
        strings = {str(key): str(value) for key, value in (found.metadata or {}).items()}
        return check_ranges(ranges, self.address(name), None), strings

    def contents(self, name: str, tensors: list[str]) -> dict[str, bytes]:
        """Bytes of small tensors of a safetensors file, by name.

        Of a remote file, the ranges that hold them are transferred: those that lie together at once.
        """
        cached = self.cached(name)
        if cached is not None:
            return LocalFolder(cached.parent).contents(cached.name, tensors)
        from huggingface_hub import HfFileSystem

        full = self.full(name)
        with translate_hub_errors(f"{self.repo}/{full}: cannot be read", self.repo):
            place = f"{self.repo}/{full}"
            remote = HfFileSystem().open(place, revision=self.commit, cache_type="none")
            with remote as file:
                return read_contents(file, tensors)

    def enter(self, sub: str) -> HubFolder:
        """A folder below this one."""
        check_name(sub, self)
        return replace(self, prefix=self.full(sub)) if sub else self

    def is_local(self, name: str) -> bool:
        """Whether a file is in the cache."""
        return self.cached(name) is not None

    def address(self, name: str) -> str:
        """How a file is named in a checkpoint: its path, or its place on the hub."""
        cached = self.cached(name)
        if cached is not None:
            return str(cached)
        return RemoteFiles(self.repo, self.commit, ()).address(self.full(name))

    def __str__(self) -> str:
        """How errors name the folder."""
        return f"{self.repo}/{self.prefix}".rstrip("/")


Folder = LocalFolder | HubFolder


def check_name(name: str, place: object) -> None:
    """CheckpointError for the name of a file that does not lie in a folder: `../x`, `/x`.

    `place` is the folder, or the file in it that names this one.
    """
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if plain and all(len(part.encode("utf-8", "replace")) < LONGEST_NAME for part in path.parts):
        return
    what = "leads out of the folder" if not plain else "is longer than the name of any file"
    raise CheckpointError(
        f"{place}: the name {quote(name)} {what}: expected a file in it; the checkpoint is damaged, "
        "or was made to read your other files: do not use it"
    )


def check_link(path: Path, base: Path) -> Path:
    """The path itself; CheckpointError where a link in it leads out of the folder `base`.

    The links of a hub cache, from its snapshots to its blobs, do not count.
    """
    if why := explain_link(path, base):
        raise CheckpointError(f"{path}: {why}")
    return path


def open_folder(reference: str, hub: Hub) -> tuple[Folder, str]:
    """(folder, name of a file in it or "") that a reference leads to; raises CheckpointError."""
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


def find_local(reference: str, hub: Hub) -> Path | None:
    """The existing local path of a reference, or None when it must be a hub id or URL."""
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
            f"{reference}: no such file or folder here, and no hub id: those have the form "
            "owner/repo"
        )
    return None


def enter_cached(path: Path) -> Path:
    """The snapshot of a cache folder `models--owner--name`; any other folder is itself."""
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
            f"{reference}: no such file or folder here, and {repo} is no hub id: those have the "
            "form owner/repo"
        )
    return repo


def open_repository(repo: str, hub: Hub) -> Folder:
    """A hub repository at one commit: the cached one first, else the newest of the revision."""
    commit = find_cached_commit(repo, hub)
    if hub.offline:
        if commit is None:
            raise UnreachableError(
                f"{repo}: not in the cache {hub.cache_dir or '(default)'}, and we are offline. "
                "Download it first (`hf download` does), or use stand-ins: --tiny with generate "
                "and plan, made by `quantmatrix tiny-hub` for every repository of the tables"
            )
        return LocalFolder(cache_folder(repo, hub.cache_dir) / "snapshots" / commit)
    try:
        commit, names = list_repository(repo, commit or hub.revision)
    except CheckpointError:
        if commit is None:
            raise
        return LocalFolder(cache_folder(repo, hub.cache_dir) / "snapshots" / commit)
    return HubFolder(repo, commit, names, hub.cache_dir, revision=hub.revision or "main")


@cache
def list_repository(repo: str, revision: str | None) -> tuple[str, tuple[str, ...]]:
    """(commit, file names) of a repository on the hub; asked once per process and revision."""
    from huggingface_hub import HfApi

    with translate_hub_errors(f"{repo}: not in the cache, and not reachable on the hub", repo):
        info = HfApi().model_info(repo, revision=revision)
    return str(info.sha), tuple(sibling.rfilename for sibling in info.siblings or ())


def cache_folder(repo: str, cache_dir: str | None) -> Path:
    """Folder of a repository in the hub cache."""
    if cache_dir is None:
        from huggingface_hub import constants

        cache_dir = constants.HF_HUB_CACHE
    return Path(cache_dir).expanduser().absolute() / f"models--{repo.replace('/', '--')}"


def find_cached_commit(repo: str, hub: Hub) -> str | None:
    """Commit of the cached snapshot that serves a revision, or None."""
    folder = cache_folder(repo, hub.cache_dir)
    revision = hub.revision or "main"
    commit = revision if COMMIT.fullmatch(revision) else read_ref(folder, revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    return commit


def read_ref(folder: Path, revision: str) -> str | None:
    """Commit that a branch or tag had when it was cached, or None."""
    ref = folder / "refs" / revision
    if ".." in PurePosixPath(revision).parts or not ref.is_file():
        return None
    commit = check_link(ref, folder).read_bytes()[:LONGEST_NAME].decode("utf-8", "replace").strip()
    if not PLAIN_NAME.fullmatch(commit or "-"):
        raise CheckpointError(f"{ref}: {quote(commit)} is no commit; remove the file")
    return commit or None


def explain_partial(folder: Folder) -> str:
    """A hint for the end of an error about something missing in a cached snapshot."""
    if isinstance(folder, LocalFolder) and "snapshots" in folder.root.parts:
        return (
            "; this is a cached snapshot, which may hold a part of the repository only: go online "
            "or run `hf download` for the rest"
        )
    return ""


@contextmanager
def translate_hub_errors(what: str, repo: str) -> Iterator[None]:
    """Failures of the hub client as a CheckpointError that begins with `what`.

    UnreachableError where it is not the repository that is wrong; see `is_unreachable`.
    """
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    # The bases of HfHubHTTPError are OSError and the error of the HTTP library behind it.
    bases = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (ValueError, SafetensorsParsingError, *bases)
    try:
        yield
    except expected as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = lines[0].strip() if lines else type(error).__name__
        kind = UnreachableError if is_unreachable(error) else CheckpointError
        raise kind(
            f"{what} ({type(error).__name__}: {why}). Check the name and your connection; for a "
            f"gated repository accept its licence on https://huggingface.co/{repo} and run "
            "`hf auth login`; or use --tiny for a stand-in"
        ) from error


def is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be read: no connection, an answer of 401, 403, 429 or 5xx, a gated
    repository, or one that nobody without a token is told about. Names and revisions that the hub does
    not have, and files that are none, are a fault of whoever wrote them."""
    from huggingface_hub import errors, get_token

    if isinstance(error, (errors.GatedRepoError, errors.LocalEntryNotFoundError)):
        return True
    if isinstance(error, errors.RepositoryNotFoundError):
        return get_token() is None
    named = (errors.RevisionNotFoundError, errors.EntryNotFoundError)
    if isinstance(error, (*named, errors.SafetensorsParsingError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (401, 403, 408, 429) or status >= 500
    return not isinstance(error, ValueError)
