"""Benchmarks of nbdfleece against qemu-storage-daemon, side by side on this machine.

    python3 tests/bench/run.py --quick
    python3 tests/bench/run.py --markdown results.md --json results.json
    python3 tests/bench/run.py --only 'read-*' --reference OTHER-QEMU-STORAGE-DAEMON

Every row is a ratio of runs that follow each other in turn: absolute rates of a shared machine
mean little. The modules beside this one: `rows` says what is measured and what we aim at, `sides`
are the servers, `loads` the clients, `compare` the order of runs, `huge` the 16 TiB disk, `crowd`
the thousand connections, `backups` backups and bitmaps, `report` the tables. Needs
qemu-storage-daemon, nbdcopy and fio with its nbd engine; nbdkit is shown beside them where it is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final, NoReturn

import backups
import crowd
import huge
import report
from compare import FIRST_SEED, Comparison, Settings, memory_at_rest, warm
from loads import Task, check_tools, socket_copy_rate
from processes import BenchError, run_command
from rows import (
    BACKUPS,
    CROWD,
    EXTRAS,
    HUGE_DISK,
    MEMORY,
    SOCKET_COPY,
    Disk,
    chosen,
    keys,
    matches,
)
from sides import (
    COMMAND_TIMEOUT_S,
    Fleece,
    Nbdkit,
    Reference,
    Side,
    TlsFolders,
    convert_to_qcow2,
    reference_label,
    reference_program,
)

ROOT: Final = Path(__file__).resolve().parents[2]
OURS: Final = "nbdfleece"
UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
FILL_BUFFER: Final = 4 << 20
SOCKET_SECONDS: Final = 2.0


def main() -> int:
    """Run the benchmarks the command line asks for; return the exit code."""
    options = _parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    try:
        check_tools()
        programs = _references(options.reference)
        with tempfile.TemporaryDirectory(prefix="nbdfleece-bench-", dir=options.dir) as folder:
            result = _measure(options, programs, Path(folder))
        _write(result, options)
    except BenchError as error:
        sys.stderr.write(f"run.py: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("run.py: interrupted\n")
        return 130
    return 1 if result.failures() else 0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Compare nbdfleece with qemu-storage-daemon, run by run in turn.",
        epilog=f"rows: {' '.join(keys())}",
    )
    parser.add_argument("--pairs", type=_count, help="runs of each row on each side (5)")
    parser.add_argument("--size", type=_size, help="size of the disk, such as 512M (512M)")
    parser.add_argument("--dir", type=Path, help="folder for the files (the temporary folder)")
    parser.add_argument(
        "--reference",
        action="append",
        metavar="PROGRAM",
        help="a qemu-storage-daemon to compare with, repeatable (the one on PATH)",
    )
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="rows: a name, a glob, or a part"
    )
    parser.add_argument("--quick", action="store_true", help="64M, one pair, short runs: a trial")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument(
        "--ours-command",
        type=shlex.split,
        default=_our_command(),
        metavar="COMMAND",
        help="what to run in place of `python -m nbdfleece`",
    )
    options = parser.parse_args(words)
    options.pairs = options.pairs or (1 if options.quick else 5)
    options.size = options.size or (64 << 20 if options.quick else 512 << 20)
    if not any(matches(options.only, key) for key in keys()):
        parser.error(f"--only: no row is called {options.only}; there are: {' '.join(keys())}")
    if options.dir is not None and not options.dir.is_dir():
        parser.error(f"--dir: {options.dir} is not a folder")
    return options


def _measure(options: argparse.Namespace, programs: dict[str, str], folder: Path) -> report.Report:
    """Make the files, run everything that was chosen, and return what came out."""
    settings = Settings(
        size=options.size,
        pairs=options.pairs,
        runtime_s=1.0 if options.quick else 3.0,
        scratch=folder / "copy.raw",
    )
    nbdkit = ["nbdkit"] if shutil.which("nbdkit") else []
    result = report.Report(settings, OURS, list(programs), nbdkit)
    wanted = {extra for extra in EXTRAS if matches(options.only, extra)}
    if SOCKET_COPY in wanted:
        _progress("socket-copy")
        result.socket_rate = socket_copy_rate(SOCKET_SECONDS)
    experiments = chosen(options.only)
    on_raw = [each for each in experiments if each.disk is Disk.RAW]
    if on_raw or MEMORY in wanted:
        _progress("making the files")
        writers, readers = _sides(options, programs, nbdkit, folder)
        is_tls = any(experiment.is_tls for experiment in on_raw)
        tls = _certificates(options, folder) if is_tls else None
        comparison = Comparison(settings, writers=writers, readers=readers, tls=tls)
        for experiment in on_raw:
            result.measured += comparison.run(experiment, _progress)
        if MEMORY in wanted:
            _progress("memory at rest")
            result.peak = comparison.peak
            for side in writers + readers:
                try:
                    result.at_rest[side.label] = memory_at_rest(side)
                except BenchError as error:
                    result.errors.append(f"memory: {side.label}: {error}")
    for disk in (Disk.QCOW2, Disk.NEW):
        on_qcow2 = [each for each in experiments if each.disk is disk]
        if on_qcow2:
            sides = _qcow2_sides(options, programs, folder, disk)
            comparison = Comparison(settings, writers=sides, readers=[], tls=None)
            for experiment in on_qcow2:
                result.measured += comparison.run(experiment, _progress)
    if HUGE_DISK in wanted:
        _measure_huge(options, programs, folder, result)
    if CROWD in wanted:
        _measure_crowd(options, settings, folder, result)
    if BACKUPS in wanted:
        _measure_backups(options, settings, programs, folder, result)
    _progress("")
    return result


def _measure_huge(
    options: argparse.Namespace, programs: dict[str, str], folder: Path, result: report.Report
) -> None:
    for label in (OURS, *programs):
        _progress(f"huge-disk: {label}")

        def make_side(active: Path, own: Path, label: str = label) -> Side:
            return _writer(label, active, own, options, programs)

        try:
            result.huge[label] = huge.measure(make_side, folder / "huge")
        except BenchError as error:
            result.errors.append(f"{HUGE_DISK}: {label}: {error}")


def _measure_crowd(
    options: argparse.Namespace, settings: Settings, folder: Path, result: report.Report
) -> None:
    _progress(f"{CROWD}: {crowd.COUNT} connections")
    active = folder / "active-crowd.raw"
    _fill([active], settings.size)
    warm(active)
    side = Fleece(OURS, active, folder / "side-crowd", command=options.ours_command, root=ROOT)

    def make_task(pair: int) -> Task:
        return Task(
            side.snapshot_uri(),
            settings.size,
            FIRST_SEED + pair,
            settings.runtime_s,
            settings.scratch,
        )

    try:
        result.crowd = crowd.measure(side, make_task, settings.pairs)
    except BenchError as error:
        result.errors.append(f"{CROWD}: {error}")


def _measure_backups(
    options: argparse.Namespace,
    settings: Settings,
    programs: dict[str, str],
    folder: Path,
    result: report.Report,
) -> None:
    _progress(BACKUPS)
    files = [folder / "active-backup.raw", folder / "active-convert.raw"]
    _fill(files, settings.size)
    for file in files:
        warm(file)
    ours = Fleece(OURS, files[0], folder / "side-backup", command=options.ours_command, root=ROOT)
    label, program = next(iter(programs.items()))
    reference = Reference(label, files[1], folder / "side-convert", program=program)

    def make_task(pair: int, uri: str) -> Task:
        return Task(uri, settings.size, FIRST_SEED + pair, settings.runtime_s, settings.scratch)

    try:
        result.backups = backups.measure(
            ours, reference, make_task, settings.pairs, folder / "backups"
        )
    except BenchError as error:
        result.errors.append(f"{BACKUPS}: {error}")


def _certificates(options: argparse.Namespace, folder: Path) -> TlsFolders:
    """Make a CA, a server and a client, as a user of ours does; all sides are given the same."""
    pki = folder / "pki"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (
        ["init", str(pki), "--host", "localhost", "--host", "127.0.0.1"],
        ["client", str(pki), "bench"],
    ):
        argv = [*options.ours_command, "pki", *words]
        run_command(argv, timeout_s=COMMAND_TIMEOUT_S, env=env)
    return TlsFolders(server=pki, client=pki / "clients" / "bench")


def _sides(
    options: argparse.Namespace, programs: dict[str, str], nbdkit: list[str], folder: Path
) -> tuple[list[Side], list[Side]]:
    """Return the sides that take part in everything, ours first, and those that only read.

    All their files are equal, and each side has its own.
    """
    labels = [OURS, *programs, *nbdkit]
    files = [folder / f"active-{number}.raw" for number in range(len(labels))]
    _fill(files, options.size)
    sides: list[Side] = []
    for number, label in enumerate(labels):
        own = folder / f"side-{number}"
        if label in nbdkit:
            sides.append(Nbdkit(label, files[number], own))
        else:
            sides.append(_writer(label, files[number], own, options, programs))
    count = 1 + len(programs)
    return sides[:count], sides[count:]


def _qcow2_sides(
    options: argparse.Namespace, programs: dict[str, str], folder: Path, disk: Disk
) -> list[Side]:
    """Return the sides that serve qcow2 images, ours first; the images are equal."""
    sides: list[Side] = []
    raw = folder / "content.raw"
    if disk is Disk.QCOW2:
        _fill([raw], options.size)
    for number, label in enumerate([OURS, *programs]):
        name = f"{disk.name.lower()}-{number}"
        active = folder / f"{name}.qcow2"
        if disk is Disk.QCOW2:
            convert_to_qcow2(raw, active)
        sides.append(_writer(label, active, folder / f"side-{name}", options, programs))
    raw.unlink(missing_ok=True)
    return sides


def _writer(
    label: str, active: Path, own: Path, options: argparse.Namespace, programs: dict[str, str]
) -> Side:
    if label == OURS:
        return Fleece(label, active, own, command=options.ours_command, root=ROOT)
    size = options.size if active.suffix == ".qcow2" else 0
    return Reference(label, active, own, program=programs[label], size=size)


def _references(names: list[str] | None) -> dict[str, str]:
    """Return the reference builds: label -> program. Two of one version are numbered."""
    programs: dict[str, str] = {}
    for name in names or ["qemu-storage-daemon"]:
        program = reference_program(name)
        version = reference_label(program)
        label, number = version, 2
        while label in programs:
            label, number = f"{version} ({number})", number + 1
        programs[label] = program
    return programs


def _fill(paths: list[Path], size: int) -> None:
    """Write the same `size` random bytes to each file: no hole, no zero, nothing compressible.

    All files are written in the same way and none is copied from another: how a file was written
    decides how the page cache holds it, and that changes the rate of small writes by half.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb", buffering=0)) for path in paths]
        for offset in range(0, size, FILL_BUFFER):
            data = os.urandom(min(FILL_BUFFER, size - offset))
            for file in files:
                file.write(data)
        for file in files:
            os.fsync(file.fileno())
    if any(path.stat().st_blocks * 512 < size for path in paths):
        raise BenchError("the file system of --dir does not allocate what is written")


def _write(result: report.Report, options: argparse.Namespace) -> None:
    sys.stdout.write(report.text(result))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown(result))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(result), indent=2) + "\n")


def _our_command() -> list[str]:
    python = ROOT / ".venv" / "bin" / "python"
    return [str(python) if python.exists() else sys.executable, "-m", "nbdfleece"]


def _count(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _size(word: str) -> int:
    unit = UNITS.get(word[-1:].upper())
    number = int(word[:-1] if unit else word)
    size = number * (unit or 1)
    if size < 1 << 20 or size % 4096:
        raise argparse.ArgumentTypeError("at least 1M, and a multiple of 4K")
    return size


def _progress(line: str) -> None:
    """Show on a terminal what is being done, on one line that is overwritten."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()


def _leave(number: int, _frame: object) -> NoReturn:
    """Turn a signal into an exception, so that servers are stopped and files removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
