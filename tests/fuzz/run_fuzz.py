"""A fuzzing campaign: `python tests/fuzz/run_fuzz.py --cases 20000 --seed 1`.

Each case takes a folder of good files (`fuzz_seeds`), damages some of them (`fuzz_mutations`) and asks
one command about it in a process of its own (`fuzz_sandbox`). A case depends on the seed and its
number alone: `--only N` runs one again and shows what it said. Exit code 1 when an ending is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import fuzz_mutations
import fuzz_sandbox
from fuzz_seeds import Seed, make_outside, make_seeds

SHOWN = 20
"""Bad endings that are told in full."""


@dataclass
class Result:
    """What a campaign counted."""

    cases: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    """By seed, command and exit code."""
    bad: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"cases": self.cases, "endings": dict(sorted(self.endings.items())), "bad": self.bad}


def load_transformer(argv: Sequence[str]) -> int:
    """LOAD: the transformer of a request, as `generate` builds it."""
    import quantmatrix
    from quantmatrix.errors import QuantmatrixError

    flags = dict(zip(argv[::2], argv[1::2], strict=True))
    names = {
        "--transformer-path": "transformer_path",
        "--transformer-weights-path": "transformer_weights_path",
    }
    fields = {names[flag]: value for flag, value in flags.items() if flag in names}
    try:
        quantmatrix.load_transformer(flags["--model-path"], backend="decode", **fields)
    except QuantmatrixError as error:
        return report(error)
    return 0


def check_parts(argv: Sequence[str]) -> int:
    """PARTS: what stands before diffusers loads the other parts of a model."""
    from quantmatrix.errors import QuantmatrixError
    from quantmatrix.runtime.plan import other_parts

    folder = Path(argv[argv.index("--model-path") + 1])
    try:
        other_parts.check_folder(folder, "WanPipeline", {"transformer", "transformer_2"})
    except QuantmatrixError as error:
        return report(error)
    return 0


def read_tables(argv: Sequence[str]) -> int:
    """TABLES: the matrix of a folder."""
    from quantmatrix.errors import QuantmatrixError
    from quantmatrix.tables import read

    try:
        read.read(Path(argv[0]).resolve())
    except QuantmatrixError as error:
        return report(error)
    return 0


def report(error: Any) -> int:
    """An error as the command line prints it."""
    from quantmatrix import exit_codes
    from quantmatrix.cli import output

    return output.report_error(error, exit_codes.EXIT_PROBLEM, as_json=False)


def run_words(argv: Sequence[str]) -> int:
    """A command line."""
    from quantmatrix.cli import main as cli_main

    return cli_main.main(list(argv))


ACTS: dict[str, Callable[[Sequence[str]], int]] = {
    "LOAD": load_transformer,
    "PARTS": check_parts,
    "TABLES": read_tables,
}
"""What is asked of the library and not of the command line."""


def choose_act(argv: Sequence[str]) -> Callable[[], int]:
    """What a child does."""
    act = ACTS.get(argv[0])
    return (lambda: act(argv[1:])) if act else (lambda: run_words(argv))


class Campaign:
    """Seeds that are made once, and cases made of them."""

    def __init__(self, root: Path, seed: int, only: str = "") -> None:
        """Make the seeds below a folder; `only` is a part of the names of those that are taken."""
        self.root = root
        self.seed = seed
        seeds = [found for found in make_seeds(root / "seeds") if only in found.name]
        self.seeds = seeds
        self.weights = [found.weight for found in seeds]
        self.allowed = fuzz_sandbox.list_allowed()
        make_outside(root)
        self._warm()

    def _warm(self) -> None:
        """Run every command once on good files, so that children find everything imported."""
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own: children are forked
        here = Path.cwd()
        for found in self.seeds:
            os.chdir(found.folder)
            for argv in found.commands:
                with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    target = self.root / "warm"
                    choose_act([str(target) if w.startswith("./out/") else w for w in argv])()
                    fuzz_sandbox.clear(target)
        os.chdir(here)
        fuzz_sandbox.freeze()

    def run_case(self, number: int) -> tuple[Seed, Sequence[str], list[str], fuzz_sandbox.Ending]:
        """(seed, command, what was done to its files, ending) of one case."""
        rng = random.Random(f"{self.seed}:{number}")
        found = rng.choices(self.seeds, self.weights)[0]
        folder = self.root / "case"
        link_folder(found.folder, folder)
        done = fuzz_mutations.change(rng, folder, list(found.files))
        if found.name == "packet" and rng.random() < 0.6:
            refit_packet(folder / "packet")
        argv = rng.choice(found.commands)
        ending = fuzz_sandbox.run(choose_act(argv), folder, self.allowed)
        fuzz_sandbox.clear(folder)
        return found, argv, done, ending

    def run(self, numbers: range) -> Iterator[tuple[int, str, list[str], dict[str, Any]]]:
        """(number, what it is counted under, problems, the case as text) of every case."""
        for number in numbers:
            found, argv, done, ending = self.run_case(number)
            kind = {"as_json": "--json" in argv, "as_lines": argv[0] == "TABLES"}
            problems = fuzz_sandbox.judge(ending, **kind)
            name = f"{found.name} {argv[0]} {ending.code}"
            said = {
                "case": number, "seed": self.seed, "command": f"{found.name}: {' '.join(argv)}",
                "changed": done, "problems": problems, "code": ending.code,
                "errors": ending.errors[-3000:], "out": ending.out[-1000:],
            }  # fmt: skip
            yield number, name, problems, said


def link_folder(source: Path, target: Path) -> None:
    """A folder of hard links, of which one is written anew when it is damaged."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)


def refit_packet(folder: Path) -> None:
    """Digests that fit the damaged files of a packet, as somebody hostile would write them."""
    from quantmatrix.harness import packets

    card = folder / packets.CARD
    if not all(path.is_file() or path.is_dir() for path in folder.rglob("*")):
        return  # a pipe, or a link to nowhere
    try:
        said = json.loads(card.read_text(encoding="utf-8"))
        said["files"] = {name: packets.describe(folder / name) for name in said["files"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return  # the card itself is what was damaged
    fuzz_mutations.replace(card, json.dumps(said).encode("utf-8", "surrogatepass"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; 1 when an ending is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone, and show what it said")
    parser.add_argument("--seeds", default="", help="a part of the names of the seeds to take")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    numbers = range(arguments.first, arguments.first + arguments.cases)
    if arguments.only is not None:
        numbers = range(arguments.only, arguments.only + 1)
    result = Result()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        campaign = Campaign(Path(root).resolve(), arguments.seed, arguments.seeds)
        for number, name, problems, said in campaign.run(numbers):
            result.cases += 1
            result.endings[name] += 1
            if problems:
                result.bad.append(said)
            if arguments.only is not None or (problems and len(result.bad) <= SHOWN):
                print(json.dumps(said, indent=1), file=sys.stderr, flush=True)
            if number % 500 == 499:
                print(f"{number + 1} cases, {len(result.bad)} bad", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        for name, count in sorted(result.endings.items()):
            print(f"{count:6} {name}")
        print(f"{result.cases} cases, {len(result.bad)} bad endings, seed {arguments.seed}")
    return 1 if result.bad else 0


if __name__ == "__main__":
    sys.exit(main())
