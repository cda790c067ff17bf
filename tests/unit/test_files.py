"""Where results go: asked before the work, and never half-written."""

from __future__ import annotations

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

from quantmatrix.checkpoints.writer import save_tensors
from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, EXIT_TERMINATED
from quantmatrix.files import check_place, naming, write_whole
from quantmatrix.report import job_summary
from quantmatrix.report.render import read_evidence
from quantmatrix.tools import quantize

FULL = Path("/dev/full")


def fail_full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_path_through_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_place(tmp_path / "new" / "newer" / "x.png")
    with pytest.raises(UsageError, match=r"--output-path .*file is no folder"):
        check_place(tmp_path / "file" / "x.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_no_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="may not write"):
        check_place(tmp_path / "x.png")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.md"
    write_whole(target, b"old")
    monkeypatch.setattr(Path, "replace", fail_full)
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


def test_an_interruption_puts_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    made.write_text("new")
    target.write_text("old")
    replace = os.replace

    def interrupt(source: Path, place: Path) -> None:
        if source == made:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr("quantmatrix.tools.quantize.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize.replace_target(made, target)
    assert target.read_text() == "old"


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
