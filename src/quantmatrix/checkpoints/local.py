"""Local: a folder on this machine to read a checkpoint from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from quantmatrix.checkpoints import gguf
from quantmatrix.checkpoints.header import read_contents, read_header
from quantmatrix.links import check_link, check_name

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.checkpoints.header import Header


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
        """Header of a safetensors or GGUF file."""
        read = gguf.read_header if gguf.is_gguf(name) else read_header
        return read(self.path(name))

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
