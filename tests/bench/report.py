"""The results as plain text, as Markdown and as JSON, from one list of tables.

The machine is named by its cores and kernel version only, and programs by their versions, never by
a host name or a path: the Markdown goes into the documentation.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

import backups
import crowd
from compare import Measured, Ratio, Settings, ratio

if TYPE_CHECKING:
    from backups import Backups
    from crowd import Crowd
    from huge import HugeDisk

MIB: Final = 1 << 20
NONE: Final = "-"


@dataclass(slots=True)
class Report:
    """Everything that was measured.

    Fields:
        ours: Label of our side.
        references: Labels of the sides it is compared with.
        others: Labels of sides shown beside them.
        measured: The rows, in order.
        socket_rate: MiB/s between two processes over a Unix socket; None when not measured.
        at_rest, peak: Side's label -> bytes of peak resident memory.
        huge: Side's label -> what 16 TiB took.
        crowd: What a thousand connections leave to a working client; None when not measured.
        backups: What backups and bitmaps take; None when not measured.
        errors: What could not be measured besides the rows, one line each.
    """

    settings: Settings
    ours: str
    references: list[str]
    others: list[str]
    measured: list[Measured] = field(default_factory=list)
    socket_rate: float | None = None
    at_rest: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    huge: dict[str, HugeDisk] = field(default_factory=dict)
    crowd: Crowd | None = None
    backups: Backups | None = None
    errors: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Return one line for everything that could not be measured."""
        rows = [f"{one.row.key}: {one.error}" for one in self.measured if one.error]
        return rows + self.errors


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column names, and rows of as many words each; the first column is text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def text(report: Report) -> str:
    """Return the report for a terminal, in aligned columns."""
    blocks = ["\n".join(_facts(report))]
    blocks += [f"{table.title}\n\n{_aligned(table)}" for table in _tables(report)]
    return "\n\n".join([*blocks, *_failure_block(report)]) + "\n"


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    blocks = ["\n".join(f"- {fact}" for fact in _facts(report))]
    blocks += [f"### {table.title}\n\n{_piped(table)}" for table in _tables(report)]
    return "\n\n".join([*blocks, *_failure_block(report)]) + "\n"


def as_json(report: Report) -> dict[str, object]:
    """Return the report with every single value, as what json.dump takes."""
    settings = report.settings
    return {
        "machine": {"cores": os.cpu_count(), "kernel": platform.release()},
        "settings": {
            "size": settings.size,
            "pairs": settings.pairs,
            "runtime-seconds": settings.runtime_s,
        },
        "ours": report.ours,
        "references": report.references,
        "others": report.others,
        "rows": [_row_json(report, one) for one in report.measured],
        "socket-copy-mib-per-second": report.socket_rate,
        "memory-at-rest-bytes": report.at_rest,
        "memory-peak-bytes": report.peak,
        "crowd": asdict(report.crowd) if report.crowd is not None else None,
        "backups": asdict(report.backups) if report.backups is not None else None,
        "errors": report.errors,
        "huge-disk": {name: asdict(found) for name, found in report.huge.items()},
    }


def _row_json(report: Report, one: Measured) -> dict[str, object]:
    ratios = {name: ratio(one, report.ours, name) for name in report.references}
    return {
        **asdict(one.row),
        "samples": one.samples,
        "ratios": {name: asdict(found) for name, found in ratios.items() if found is not None},
        "error": one.error or None,
    }


def _facts(report: Report) -> list[str]:
    settings = report.settings
    facts = [
        f"machine: {os.cpu_count()} cores, Linux {platform.release()},"
        f" Python {platform.python_version()}",
        f"disk: {settings.size // MIB} MiB, fully allocated, in the page cache",
        f"pairs per row: {settings.pairs}, run in turn; {settings.runtime_s:g} s per timed run",
    ]
    if report.socket_rate is not None:
        facts.append(f"one process to another over a Unix socket: {report.socket_rate:,.0f} MiB/s")
    return facts


def _tables(report: Report) -> list[Table]:
    tables = []
    if report.measured:
        tables = [_ratio_table(report, name) for name in report.references]
    if report.at_rest:
        tables.append(_memory_table(report))
    if report.huge:
        tables.append(_huge_table(report))
    if report.crowd is not None:
        tables.append(_crowd_table(report.crowd))
    if report.backups is not None:
        tables.append(_backup_table(report.backups))
    return tables


def _ratio_table(report: Report, reference: str) -> Table:
    columns = ["row", "unit", report.ours, reference, *report.others]
    columns += ["ratio", "min", "max", "target", "holds"]
    rows = []
    for one in report.measured:
        values = [_number(one.middle(name)) for name in (report.ours, reference, *report.others)]
        found = ratio(one, report.ours, reference)
        rows.append([one.row.title, one.row.unit, *values, *_ratio_words(one, found)])
    return Table(f"{report.ours} against {reference}", columns, rows)


def _ratio_words(one: Measured, found: Ratio | None) -> list[str]:
    target = NONE
    if one.row.target is not None:
        target = f"{'<=' if one.row.is_lower_better else '>='} {one.row.target:g}x"
    if found is None:
        return [NONE, NONE, NONE, target, "failed" if one.error else NONE]
    numbers = [f"{value:.2f}x" for value in (found.median, found.minimum, found.maximum)]
    holds = {True: "yes", False: "NO", None: NONE}[found.holds]
    return [*numbers, target, holds]


def _memory_table(report: Report) -> Table:
    rows = [
        [name, _mib(report.at_rest[name]), _mib(report.peak.get(name))] for name in report.at_rest
    ]
    return Table(
        "Peak resident memory, all processes of the server",
        ["server", "one disk, at rest (MiB)", "under the load (MiB)"],
        rows,
    )


def _huge_table(report: Report) -> Table:
    rows = [
        [name, f"{found.serve_s:.2f}", f"{found.snapshot_s:.2f}", _mib(found.added_bytes)]
        for name, found in report.huge.items()
    ]
    return Table(
        "A sparse disk of 16 TiB",
        ["server", "start (s)", "snapshot (s)", "additional memory (MiB)"],
        rows,
    )


def _crowd_table(found: Crowd) -> Table:
    rows = []
    for name, ratios in found.ratios.items():
        median = found.median(name)
        numbers = [f"{value:.2f}x" for value in (median, min(ratios), max(ratios))]
        holds = "yes" if median >= crowd.TARGET else "NO"
        rows.append([name, *numbers, f">= {crowd.TARGET:g}x", holds])
    rows.append(["additional memory (MiB)", _mib(found.added_bytes), *[NONE] * 4])
    return Table(
        f"A client among {crowd.COUNT} others, as a ratio of itself alone",
        ["client", "median", "min", "max", "target", "holds"],
        rows,
    )


def _backup_table(found: Backups) -> Table:
    name = f"full backup by qemu-img convert ({median(found.full_rate):,.0f} MiB/s)"
    rows = [_backup_row(name, found.full_ratios(), backups.FULL_TARGET)]
    rows += [
        _backup_row(
            f"writes of 4 KiB, depth {depth}, by those without bitmap",
            ratios,
            backups.BITMAP_TARGET,
        )
        for depth, ratios in found.bitmap.items()
    ]
    name = f"incremental backup of 8 GiB, {_mib(found.changed_bytes)} MiB written (s)"
    times = [median(found.incremental_s), min(found.incremental_s), max(found.incremental_s)]
    rows.append([name, *(f"{value:.2f}" for value in times), NONE, NONE])
    read = found.incremental_bytes
    sizes = [_mib(round(median(read))), _mib(min(read)), _mib(max(read))]
    rows.append(["bytes that it read (MiB)", *sizes, NONE, NONE])
    return Table("Backups", ["", "median", "min", "max", "target", "holds"], rows)


def _backup_row(name: str, ratios: list[float], target: float) -> list[str]:
    middle = median(ratios)
    numbers = [f"{value:.2f}x" for value in (middle, min(ratios), max(ratios))]
    return [name, *numbers, f">= {target:g}x", "yes" if middle >= target else "NO"]


def _failure_block(report: Report) -> list[str]:
    failures = report.failures()
    if not failures:
        return []
    return ["\n".join(["Not measured:", "", *(f"- {line}" for line in failures)])]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _mib(value: int | None) -> str:
    return NONE if value is None else f"{value / MIB:.1f}"


def _aligned(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _piped(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [table.columns, rule, *table.rows])
