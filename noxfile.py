"""Sessions: `nox -l` lists them. Two of them are for everybody: `matrix` and `tests`."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"  # uv does not find the CPU build of torch
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
TORCH = "torch==2.13.0"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def install(session: nox.Session, *extras: str) -> None:
    """Install the package with the versions of constraints.txt, torch's CPU build first."""
    session.env.update(ENVIRONMENT)
    session.install(TORCH)
    wanted = f".[{','.join(extras)}]" if extras else "."
    session.install("-c", "constraints.txt", "-e", wanted)


@nox.session
def matrix(session: nox.Session) -> None:
    """Run every `cpu` row (and every refusal), write evidence, render reports/. The main job."""
    install(session, "test")
    session.run("quantmatrix", "matrix", "check")
    session.run(
        "pytest",
        "tests/suites",
        "-n",
        "2",
        "--evidence-dir",
        "reports/evidence",
        "-q",
        *session.posargs,
    )
    session.run("quantmatrix", "report")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the unit tests, and every row of the matrix against the committed verdicts."""
    install(session, "test")
    session.run("pytest", "-q", "-n", "2", *(session.posargs or ["tests/unit", "tests/suites"]))


@nox.session
def browser(session: nox.Session) -> None:
    """Open reports/index.html in Chromium; skipped where none is installed."""
    install(session, "test", "browser")
    session.run("pytest", "-q", "-p", "no:xdist", "-rs", "tests/browser", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: style, imports, docstrings."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the package."""
    session.install(TORCH)
    needed = ["mypy", "pandas-stubs", "numpy", "safetensors", "huggingface_hub", "jinja2"]
    needed += ["pytest", "pytest-xdist"]
    session.install("-c", "constraints.txt", *needed)
    session.run("mypy")


@nox.session
def report(session: nox.Session) -> None:
    """Fail when reports/ differs from what claims and evidence render to."""
    session.install("-c", "constraints.txt", "jinja2")
    session.install("--no-deps", "-e", ".")  # rendering needs no torch, and must not
    session.run("quantmatrix", "report", "--check")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks: loading and kernels, without workers; an empty result is an error."""
    install(session, "test")
    session.run(
        "pytest", "benchmarks", "-q", "-p", "no:xdist", "--benchmark-only", *session.posargs
    )


@nox.session
def producers(session: nox.Session) -> None:
    """Tests against what others wrote: NVIDIA ModelOpt and friends, in their own environment."""
    session.env.update(ENVIRONMENT)
    session.install(TORCH)
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.install("-r", "tests/producers/requirements.txt")
    session.run(
        "pytest", "tests/producers", "-q", "--strict-producers", "-W", "ignore", *session.posargs
    )


@nox.session(name="producers-msmodelslim")
def producers_msmodelslim(session: nox.Session) -> None:
    """Tests against the real msmodelslim, whose engine runs on a CPU, in its own environment."""
    session.env.update(ENVIRONMENT)
    session.install(TORCH)
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.install("-r", "tests/producers/requirements-msmodelslim.txt")
    session.run("python", "-c", "import msmodelslim")  # or its tests would be skipped
    session.run("pytest", "tests/producers/test_real_msmodelslim.py", "-q", *session.posargs)
