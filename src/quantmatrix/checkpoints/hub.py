"""Hub: a repository at one commit, online or in the local cache."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from quantmatrix.checkpoints import gguf
from quantmatrix.checkpoints.checkpoint import RemoteFiles
from quantmatrix.checkpoints.header import check_ranges, read_contents
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError, UnreachableError
from quantmatrix.links import LONGEST_NAME, PLAIN_NAME, check_link, check_name
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantmatrix.checkpoints.header import Header
    from quantmatrix.request import Hub


logger = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOCK = 2**20
"""Bytes that are transferred together of a GGUF header, whose length nothing says."""


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
        logger.debug("downloading %s/%s at commit %s", self.repo, full, self.commit)
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
        """Header of a safetensors or GGUF file; of a remote one only the header is transferred."""
        cached = self.cached(name)
        if cached is not None:
            return LocalFolder(cached.parent).header(cached.name)
        from huggingface_hub import HfApi, HfFileSystem

        full = self.full(name)
        if gguf.is_gguf(name):
            with translate_hub_errors(f"{self.repo}/{full}: its header cannot be read", self.repo):
                path = f"{self.repo}/{full}"
                with HfFileSystem().open(path, revision=self.commit, block_size=BLOCK) as file:
                    return gguf.parse_header(file, file.size, self.address(name))
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
            path = f"{self.repo}/{full}"
            remote = HfFileSystem().open(path, revision=self.commit, cache_type="none")
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
        """How a file is named in a checkpoint: its path, or its address on the hub."""
        cached = self.cached(name)
        if cached is not None:
            return str(cached)
        return RemoteFiles(self.repo, self.commit, ()).address(self.full(name))

    def __str__(self) -> str:
        """How errors name the folder."""
        return f"{self.repo}/{self.prefix}".rstrip("/")


Folder = LocalFolder | HubFolder


def open_repository(repo: str, hub: Hub) -> Folder:
    """A hub repository at one commit: the cached one first, else the newest of the revision.

    Raises UnreachableError offline without a cached copy, and CheckpointError (or UnreachableError)
    where the hub gives no list of its files and nothing is cached.
    """
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
    """Commit that a branch or tag had when it was cached, or None.

    Raises CheckpointError for a ref file that holds no commit.
    """
    ref = folder / "refs" / revision
    if ".." in PurePosixPath(revision).parts or not ref.is_file():
        return None
    commit = check_link(ref, folder).read_bytes()[:LONGEST_NAME].decode("utf-8", "replace").strip()
    if not PLAIN_NAME.fullmatch(commit or "-"):
        raise CheckpointError(f"{ref}: {quote(commit)} is not a commit; remove the file")
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
    """Failures of the hub client within the block as errors that begin with `what`.

    Raises UnreachableError where it is not the repository that is wrong (`is_unreachable`), else
    CheckpointError.
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
    repository, or one that is hidden from anyone without a token. Names and revisions that the hub
    does not have, and files that are none, are a fault of whoever wrote them."""
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
