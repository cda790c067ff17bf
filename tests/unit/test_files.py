"""Where results go: asked before the work, and never half-written."""

from __future__ import annotations

import ast
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import quantmatrix
from quantmatrix.checkpoints.writer import save_tensors
from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, EXIT_TERMINATED
from quantmatrix.files import check_writable, naming, remove_leftovers, whole, write_whole
from quantmatrix.report import job_summary
from quantmatrix.report.render import read_evidence

FULL = Path("/dev/full")
PACKAGE = Path(quantmatrix.__file__).parent


def fail_full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_path_through_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "newer" / "x.png")
    with pytest.raises(UsageError, match=r"--output-path .*file is not a folder"):
        check_writable(tmp_path / "file" / "x.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_no_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="may not write"):
        check_writable(tmp_path / "x.png")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.md"
    write_whole(target, b"old")
    monkeypatch.setattr(os, "replace", fail_full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(target, b"new")
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert target.read_bytes() == b"old"


def test_an_error_that_names_its_file_keeps_the_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        (tmp_path / "none").read_bytes()
    assert caught.value.filename == str(tmp_path / "none")


def test_a_full_disk_is_an_error_of_the_system_for_tensors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"x": torch.zeros(4)}, tmp_path / "x.safetensors")


def test_a_summary_that_does_not_fit_leaves_the_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullFile(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "summary.md"
    target.write_text("earlier\n")
    monkeypatch.setattr(Path, "open", lambda path, mode: FullFile(path, mode))
    with pytest.raises(OSError, match="No space left") as caught:
        job_summary.append(target, [], [])
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"earlier\n"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interruption_puts_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = tmp_path / "target"
    make(target, kind, "old")
    replace = os.replace

    def interrupt(source: Path, place: Path) -> None:
        if source.name == "target" and place == target:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt), whole(target, overwrite=True) as temporary:
        make(temporary, kind, "new")
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def make(path: Path, kind: str, text: str) -> None:
    """A file with this text, or a folder with a file that has it."""
    if kind == "folder":
        path.mkdir()
        path = path / "inner"
    path.write_text(text)


def read(path: Path) -> str:
    return (path / "inner" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder", None])
def test_what_is_whole_takes_its_place(tmp_path: Path, old: str | None, new: str) -> None:
    target = tmp_path / "far" / ("a" * 250)  # as long as names may be
    if old:
        target.parent.mkdir()
        make(target, old, "old")
    with whole(target, overwrite=True) as temporary:
        assert temporary.name == target.name  # writers go by the ending
        make(temporary, new, "new")
        assert not old or read(target) == "old"
    assert read(target) == "new"
    assert list(target.parent.iterdir()) == [target]
    make(tmp_path / "ordinary", new, "")
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_folder_with_files_in_it_is_not_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "target"
    make(target, "folder", "old")
    with pytest.raises(OSError, match="not empty") as caught, whole(target) as temporary:
        make(temporary, "folder", "new")
    assert str(target) in str(caught.value)
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    with pytest.raises(FileNotFoundError) as caught, whole(target) as temporary:
        (temporary / "no" / "folder").write_text("x")
    assert caught.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as caught, whole(target):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")
    target.write_text("a file")
    with pytest.raises(OSError, match=r"page\.md") as caught, whole(target / "below"):
        pass
    assert ".tmp" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_that_is_a_text_alone_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^out of ink$"), whole(tmp_path / "x"):
        raise OSError("out of ink")


def test_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with whole(tmp_path / "x") as one, whole(tmp_path / "x") as two:
        two.write_text("second")
        one.write_text("first")
    assert (tmp_path / "x").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from quantmatrix.files import whole\n"
        "with whole(Path(sys.argv[1])) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / "result.tmp").write_text("not hidden")
    remove_leftovers(tmp_path)
    assert left.is_dir()  # young: another process may be writing
    remove_leftovers(tmp_path, older_than=-1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["result.tmp"]


def list_moves(source: str) -> list[str]:
    """Calls that put a temporary file or folder in its place, or make one by hand."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        moves = last in ("replace", "rename") and (
            name.startswith("os.") or ("." in name and len(node.args) == 1 and not node.keywords)
        )
        if moves or last in ("mkstemp", "mkdtemp") or name == "shutil.move":
            found.append(ast.unparse(node))
    return found


def test_files_alone_moves_what_is_complete_to_its_place() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if moves := list_moves(path.read_text(encoding="utf-8")):
            found[path.relative_to(PACKAGE).as_posix()] = moves
    assert len(found.pop("files.py")) == 5
    assert found == {
        "tiny/hub.py": ["content.rename(snapshot)"],  # inside a temporary folder
        "tools/dequantize.py": ["path.rename(path.with_name(names[-1]))"],  # so is this
    }


def test_a_move_by_hand_would_be_found() -> None:
    moves = ["os.replace(a, b)", "path.replace(target)", "tempfile.mkdtemp()", "os.rename(a, b)"]
    assert list_moves("\n".join(moves)) == moves
    assert list_moves("text.replace('a', 'b'); replace(row, id=1); replace(x, **y)") == []


def test_reports_that_are_not_there_are_no_empty_evidence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_evidence(tmp_path / "nowhere")


def test_a_terminated_command_cleans_up(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from quantmatrix.cli import main\n"
        "def work(words):\n"
        "    try:\n"
        "        print('started', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned', flush=True)\n"
        "main.run_command = work\n"
        "main.entry()\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "started\n"
    run.send_signal(signal.SIGTERM)
    said, complained = run.communicate(timeout=30)
    assert (said, complained, run.returncode) == ("cleaned\n", "terminated\n", EXIT_TERMINATED)


def test_a_reader_that_goes_away_sees_no_traceback() -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "quantmatrix", "matrix", "check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: word for name, word in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    assert run.wait(timeout=60) == 1
    assert b"Broken" not in run.stderr.read()
    run.stderr.close()


@pytest.mark.skipif(not FULL.is_char_device(), reason="no device that is always full here")
def test_an_output_that_is_full_sees_no_traceback() -> None:
    with FULL.open("w") as full:
        words = [sys.executable, "-m", "quantmatrix", "matrix", "list", "--json"]
        run = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == ENVIRONMENT_UNUSABLE
    assert run.stderr == "quantmatrix: [Errno 28] No space left on device\n"
