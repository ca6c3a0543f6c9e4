"""`unbroken plan`: how often a cluster should save, and what failures cost it."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from rich.console import Console

from unbroken.cli.tables import (
    make_console,
    make_facts,
    make_table,
    print_json,
    print_table,
    size_text,
)
from unbroken.errors import ConfigError
from unbroken.goodput import seconds_text
from unbroken.planner import ClusterPlan

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_HABITS = (600.0, 1800.0, 3600.0, 4 * 3600.0)  # seconds: what people choose by feeling


def print_plan(plan: ClusterPlan, *, as_json: bool) -> int:
    """Print the plan; return the exit status."""
    if as_json:
        print_json(_as_json(plan))
        return 0
    console = make_console()
    print_table(console, make_facts(_facts(plan)))
    console.print()
    _print_other_intervals(console, plan)
    return 0


def number_of(text: str, where: str) -> float:
    """Return a number that may end in k, M, B, G or T, and in B/s: "405B", "2TB/s".

    Raises:
        ConfigError: It is no such number.

    Example:
        >>> number_of("8B", "--parameters"), number_of("50 GB/s", "--bandwidth")
        (8000000000.0, 50000000000.0)
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([kmgbt]?)(?:b/s)?", text.strip().lower())
    try:
        return float(found[1]) * _SCALES[found[2]] if found else float(text)
    except ValueError:
        raise ConfigError(where, expected="a number such as 8B or 50GB/s", found=text) from None


def _facts(plan: ClusterPlan) -> dict[str, str]:
    cluster, rhythm = plan.cluster, plan.rhythm
    in_steps = "" if plan.save_steps is None else f": save_steps={plan.save_steps}"
    return {
        "checkpoint": f"{size_text(round(cluster.state_bytes))}, "
        f"{seconds_text(cluster.transfer)} to write or read",
        "failures": f"one every {seconds_text(rhythm.between_failures)}, "
        f"{seconds_text(rhythm.restart)} until training goes on",
        "save every": seconds_text(rhythm.interval) + in_steps,
        "goodput": f"{rhythm.goodput:.2%} by the formula, {plan.simulated.goodput:.2%} "
        f"± {plan.simulated.error:.2%} in {plan.simulated.failures:,} simulated failures",
        "lost": f"{rhythm.saving:.2%} saving, {rhythm.repeated:.2%} done again, "
        f"{rhythm.starting:.2%} starting",
        "a day loses": seconds_text((1 - rhythm.goodput) * 24 * 3600),
        "storage": f"{size_text(round(plan.storage_bytes))}: {plan.kept} kept, 1 being written",
    }


def _print_other_intervals(console: Console, plan: ClusterPlan) -> None:
    best = plan.rhythm.interval
    others = {plan.cluster.rhythm(interval) for interval in (best, *_HABITS)}
    rhythms = sorted(others, key=lambda one: one.interval)
    rows = [
        [
            seconds_text(one.interval) + (" (best)" if one.interval == best else ""),
            *(f"{part:.2%}" for part in (one.goodput, one.saving, one.repeated, one.starting)),
        ]
        for one in rhythms
    ]
    columns = ["save every", "goodput", "saving", "done again", "starting"]
    print_table(console, make_table(columns, rows, columns[1:]))


def _as_json(plan: ClusterPlan) -> dict[str, Any]:
    rhythm = plan.rhythm
    return {
        "cluster": {**asdict(plan.cluster), "state_bytes": plan.cluster.state_bytes},
        "rhythm": asdict(rhythm),
        "save_steps": plan.save_steps,
        "goodput": rhythm.goodput,
        "simulated": asdict(plan.simulated),
        "lost": {
            "saving": rhythm.saving,
            "repeated": rhythm.repeated,
            "starting": rhythm.starting,
        },
        "storage_bytes": plan.storage_bytes,
    }
