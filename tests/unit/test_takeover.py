"""Take-over: records under the former rule get their digests from the commit that made them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import quantmatrix
from quantmatrix import takeover
from quantmatrix.code_digest import Code
from quantmatrix.takeover import FormerRule

PACKAGE = Path(quantmatrix.__file__).parent
RECORD = PACKAGE.parents[1] / "reports/evidence/cpu/modelopt-fp8-flux-1+decode.json"


def git(root: Path, *words: str) -> str:
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(root), *person, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A repository of three commits of the package: a kernel is changed, then changed again."""
    root = tmp_path_factory.mktemp("project")
    git(root, "init", "-q")
    package = root / "src" / "quantmatrix"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    commits = []
    for number in range(3):
        path = package / "kernels" / "linear_fp8.py"
        path.write_text(path.read_text().replace("ROWS = 4", f"ROWS = 4 + {number}"))
        git(root, "add", "-A")
        git(root, "commit", "-qm", f"commit {number}", "--date", f"2026-11-2{number}T00:00:00Z")
        commits.append(git(root, "rev-parse", "HEAD"))
    return root, commits


def make_record(root: Path, commit: str, of: str) -> Path:
    """A record that names a commit and has the former digest of another's files."""
    git(root, "checkout", "-q", of)
    record: dict[str, Any] = json.loads(RECORD.read_bytes())
    digest = FormerRule(root / "src" / "quantmatrix").digest("modelopt-fp8", "flux-1")
    record["cell"] = {
        key: value
        for key, value in record["cell"].items()
        if key not in ("device_digest", "shared_digest")
    } | {"code_digest": digest}
    record["commit"] = commit
    git(root, "checkout", "-q", "-")
    path = root / "reports" / "evidence" / "cpu" / RECORD.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return path


@pytest.mark.parametrize(
    ("named", "of", "told"),
    [(0, 0, "from its commit"), (0, 1, "from "), (2, 2, "from its commit")],
)
def test_digests_come_from_the_files_that_fit(
    history: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    named: int,
    of: int,
    told: str,
) -> None:
    root, commits = history
    path = make_record(root, commits[named] + ("" if named == of else "+changes"), commits[of])
    before = json.loads(path.read_bytes())
    assert takeover.main([str(root / "reports")]) == 0
    said = capsys.readouterr().out
    assert f"1 record: taken over {told}" in said
    assert named == of or commits[of][:12] in said
    after = json.loads(path.read_bytes())
    found = {name: after["cell"].pop(f"{name}_digest") for name in ("device", "shared")}
    assert after == before
    git(root, "checkout", "-q", commits[of])
    expected = Code(root / "src" / "quantmatrix").describe(
        before["cell"], before["plan"], ("cpu", "cpu"), "stand-in"
    )
    git(root, "checkout", "-q", "-")
    assert expected == {f"{name}_digest": digest for name, digest in found.items()}
    assert takeover.main([str(root / "reports")]) == 0
    assert capsys.readouterr().out.strip() == ""


def test_a_record_that_fits_nowhere_stays_as_it_is(
    history: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, commits = history
    path = make_record(root, commits[0], commits[0])
    text = path.read_text()
    digest = json.loads(text)["cell"]["code_digest"]
    path.write_text(text.replace(digest, "sha256:0"))
    before = path.read_bytes()
    takeover.main([str(root / "reports")])
    assert "1 record: fits no commit" in capsys.readouterr().out
    assert path.read_bytes() == before
