"""`quantmatrix agreement`: how many claims have fresh, agreeing evidence, and what to run next."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.proof.agreement import Agreement, Share

SHOWN = 10
"""Cells of one kind and hardware that are named; `--all` and `--json` name every one."""


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import parse_number

    text = "show the percentage of claims with fresh, agreeing evidence, and list the others"
    parser = add_command(commands, "agreement", text, run_agreement)
    parser.add_argument(
        "--today", metavar="DATE", help="compute ages as of this date (default: today)"
    )
    text = "list evidence older than this as due for another run (default 90)"
    parser.add_argument("--max-age-days", type=int, metavar="N", help=text)
    parser.add_argument(
        "--fail-under", type=parse_number, metavar="PERCENT", help="exit 1 below this percentage"
    )
    parser.add_argument("--all", action="store_true", help="list every cell")
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument("--json", action="store_true")


def run_agreement(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the shares; 1 when a record contradicts its claim or the share is too small."""
    from quantmatrix.cli.matrix import tell_where
    from quantmatrix.cli.output import print_json
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.proof import reports_folder
    from quantmatrix.proof.agreement import measure, suggest_runs
    from quantmatrix.proof.freshness import MAX_AGE_DAYS, read_now
    from quantmatrix.report import render
    from quantmatrix.tables import read

    limit = MAX_AGE_DAYS if arguments.max_age_days is None else arguments.max_age_days
    check_numbers(limit, arguments.fail_under)
    today = read_today(arguments.today)
    evidence = render.read_evidence(arguments.reports)
    now = read_now(reports_folder.find_source(arguments.reports), evidence)
    found = measure(read.read(), evidence, now, today=today, max_age_days=limit)
    low = arguments.fail_under is not None and found.overall.percent < arguments.fail_under
    bad = low or found.overall.lives["contradicting"] > 0
    if arguments.json:
        runs = suggest_runs(found.tasks)
        judged = {"today": str(today), "max_age_days": limit}
        source = {"read_from": reports_folder.tell_source(arguments.reports)}
        print_json(
            {"ok": not bad, **found.to_json(), "runs": runs, "judged_against": judged, **source}
        )
    else:
        print(to_text(found, suggest_runs(found.tasks), None if arguments.all else SHOWN))
        tell_where(arguments.reports)
        if found.due:
            count = f"{len(found.due)} fresh records are older than {limit} days"
            print(f"\n{count}: due for another run, see --json")
    return EXIT_PROBLEM if bad else 0


def check_numbers(days: int, percent: float | None) -> None:
    """UsageError for an age that no record has, and a share that none can miss or reach."""
    if days < 0:
        raise UsageError(f"--max-age-days {days}: expected 0 or more")
    if percent is not None and not 0 <= percent <= 100:
        raise UsageError(f"--fail-under {percent:g}: expected a percentage, 0 to 100")


def read_today(text: str | None) -> date:
    """The day that ages are counted to; UsageError when the text is no date."""
    if text is None:
        return datetime.now(timezone.utc).date()
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--today {text}: expected a date, 2026-11-24") from error


def to_text(found: Agreement, runs: Mapping[str, str], shown: int | None) -> str:
    """Shares and burn-down list for people; `shown` cells of a kind are named."""
    from quantmatrix.proof.scopes import WEIGHTS, label

    lines = [describe_share("all claims", found.overall), "", "fresh by scope"]
    lines += [f"  {s:16} {n:5} with {WEIGHTS[s]}" for s, n in found.by_scope.items()] or ["  none"]
    for title, shares in (("family", found.by_family), ("hardware", found.by_hardware)):
        lines += ["", f"by {title}"]
        lines += [f"  {describe_share(name, s)}" for name, s in shares.items() if s.claims]
    kinds = Counter((task.life, task.hardware) for task in found.tasks)
    for (life, hardware), count in kinds.items():
        lines += ["", f"{life} on {hardware}: {count}", f"  {runs[hardware]}"]
        tasks = [task for task in found.tasks if (task.life, task.hardware) == (life, hardware)]
        lines += [f"  {label(task.cell, task.scope)}: {task.reason}" for task in tasks[:shown]]
        if shown is not None and count > shown:
            lines.append(f"  and {count - shown} more: --all")
    return "\n".join(lines)


def describe_share(name: str, share: Share) -> str:
    """`fp8              92.3 % of 26   1 stale, 1 missing`."""
    others = [f"{n} {life}" for life, n in share.lives.items() if n and life != "fresh"]
    text = f"{name:16} {share.percent:5.1f} % of {share.claims:<5} {', '.join(others)}"
    return text.rstrip()
