"""What a recorder keeps of a check."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from quantmatrix.harness.recorder import Proof, Recorder


def test_folders_of_a_machine_stand_in_no_result() -> None:
    """Neither in a message nor in what was measured, however deep."""
    recorder = Recorder(lambda: None, None, None)  # type: ignore[arg-type, return-value]
    cell: Any = SimpleNamespace(id="row@cpu")
    proof = Proof()
    proof.folders = {"/home/someone": "$HOME", "/home/someone/hub": "$HUB"}
    found = {"layout": "modelopt in /home/someone/x/config.json", "layers": 14}
    proof.metrics = {"text_encoder": {"witness": [found]}, "files": ["/home/someone/hub/a"]}
    recorder.add(cell, "load", "passed", "read from /home/someone/y", proof)
    result = recorder._results["row@cpu"]["load"]
    assert result.message == "read from $HOME/y"
    assert result.metrics == {
        "text_encoder": {"witness": [{**found, "layout": "modelopt in $HOME/x/config.json"}]},
        "files": ["$HUB/a"],
    }
    assert proof.metrics["files"] == ["/home/someone/hub/a"]
