#!/usr/bin/env python3
"""The one command: ``python3 tests/check.py [--fast | --long] [--require-clients] [pytest args]``.

Makes ``.venv`` at the root of the repository (again when the needs in pyproject.toml change),
installs the project and its tools there, says which real client programs are missing, then runs
ruff format, ruff check, mypy and pytest. Exit code 0 only when all passed. Standard library only.

Arguments it does not know go to pytest: ``python3 tests/check.py -k handshake -x``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "nbdfleece-stamp"
PYTHON = VENV / "bin" / "python"

# Real client programs and the Debian package that holds each. tests/conftest.py reads this too.
CLIENTS = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "nbdkit": "nbdkit",
    "nbd-server": "nbd-server",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "nbd-client": "nbd-client",
    "fio": "fio",
    "bash": "bash",
    "borg": "borgbackup",
    "zsh": "zsh",
    "fish": "fish",
    "mandoc": "mandoc",
    "systemd-analyze": "systemd",
    "podman": "podman",
    "podman-compose": "podman-compose",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "busybox": "busybox-static",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-ga": "qemu-guest-agent",
    "linux-image": "linux-image-cloud-amd64",  # no program: see find_kernel
    "restic": "restic",
    "zstd": "zstd",
}
KERNEL = ROOT / ".kernel"


# Groups of tests that take minutes: folders whose tests share something that is dear to make.
FIRST = ("containers", "control")
# Folders whose files take so long that each is a group of its own, the slowest folder first.
ONE_BY_ONE = ("interop", "fuzz", "block", "model", "fault", "backup", "cli")
MOST_AT_ONCE = 4  # groups of tests; more would be a load of its own, and tests have deadlines
NO_TESTS = 5  # pytest's exit code

Result = tuple[str, int, float]  # name of a step, exit code, seconds


class CheckError(Exception):
    """The checks cannot run at all; the text says why and what to do."""


@dataclass(frozen=True)
class Kernel:
    """A Linux kernel for the virtual machines of the tests.

    Attributes:
        image: What a boot loader loads.
        modules: The folder with its modules.
    """

    image: Path
    modules: Path


def find_kernel() -> Kernel | None:
    """Return a kernel with its modules: from a package unpacked in .kernel, or this machine's."""
    for root in (KERNEL, Path("/")):
        for image in sorted((root / "boot").glob("vmlinuz-*-amd64"), reverse=True):
            modules = root / "lib/modules" / image.name.removeprefix("vmlinuz-")
            if modules.is_dir() and os.access(image, os.R_OK):
                return Kernel(image, modules)
    return None


def find_program(name: str) -> str | None:
    """Return the path of a program, also from the sbin folders a user's PATH lacks.

    For "linux-image" it is the path of a kernel.
    """
    if name == "linux-image":
        kernel = find_kernel()
        return None if kernel is None else str(kernel.image)
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def missing_clients() -> list[str]:
    """Return the names of the real client programs that are not installed."""
    return [name for name in CLIENTS if find_program(name) is None]


def apt_line(names: list[str]) -> str:
    """Return the command that installs the named programs on Debian."""
    return "apt-get install " + " ".join(sorted({CLIENTS[name] for name in names}))


def environment_stamp() -> str:
    """Return what .venv depends on: a different text means that it must be made again."""
    import tomllib  # not at the top: an older Python must get as far as being told

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings["tool"] = settings["tool"]["setuptools"]  # the other tools read theirs at each run
    project = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return f"{project} {sys.version_info[:3]} {sys.base_prefix} {ROOT}\n"


def install(command: list[str], failed: str) -> None:
    """Run one step of making .venv; show its last lines only when it fails."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | quiet,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = done.stdout.strip().splitlines()
        told = [line for line in lines if "ERROR: " in line][-4:] or lines[-8:]
        raise CheckError("\n    ".join([f"{failed}; it said:", *map(str.strip, told)]))


def make_environment() -> None:
    """Make .venv with the project, the tests' needs and the tools, unless it is up to date."""
    stamp = environment_stamp()
    with (ROOT / ".venv.lock").open("w") as lock:
        # Two runs at once in one checkout: the second waits, and then finds it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if STAMP.is_file() and STAMP.read_text() == stamp and PYTHON.exists():
            return
        print("== making .venv (only when needs in pyproject.toml changed)", flush=True)
        install(
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            "could not make .venv (on Debian: apt-get install python3-venv)",
        )
        install(
            [str(PYTHON), "-m", "pip", "install", "-q", "-e", ".[test,dev]"],
            "could not install the project's tools into .venv with pip"
            " (is there a network, or a package index that pip can reach?)",
        )
        STAMP.write_text(stamp)


def say_missing(missing: list[str], *, required: bool) -> None:
    """Say in plain words which real client programs are missing and how to get them."""
    if not missing:
        print("== all real client programs are here", flush=True)
        return
    print("== missing client programs: " + ", ".join(missing))
    fate = "fail" if required else "are skipped"
    print(f"   tests that need them {fate}; to have them: {apt_line(missing)}", flush=True)


def run_step(name: str, command: list[str], environment: dict[str, str]) -> Result:
    """Run one check, its output going straight through; return its name, exit code and seconds."""
    print(f"\n== {name}: {shlex.join(command[2:])}", flush=True)
    began = time.monotonic()
    code = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False
    ).returncode
    return name, code, time.monotonic() - began


def groups_of_tests() -> list[list[str]]:
    """Return what one pytest runs at a time: what takes long first."""
    tests = ROOT / "tests"
    top = sorted(tests.glob("test_*.py"))
    alone = [path for folder in ONE_BY_ONE for path in sorted((tests / folder).rglob("test_*.py"))]
    folders = [
        folder
        for folder in sorted(tests.iterdir())
        if folder.name not in FIRST + ONE_BY_ONE and any(folder.rglob("test_*.py"))
    ]
    groups = [*([tests / name] for name in FIRST), top, *([path] for path in [*alone, *folders])]
    return [[str(path.relative_to(ROOT)) for path in group] for group in groups]


def run_tests_at_once(name: str, command: list[str], environment: dict[str, str]) -> Result:
    """Run all tests, group by group, several at a time; the output of each in one piece.

    Tests share nothing but the machine: each has folders, sockets and ports of its own. Many of
    them wait more than they compute, so there is one group more than processors.
    """
    workers = min((os.cpu_count() or 1) + 1, MOST_AT_ONCE)
    print(f"\n== {name}: {shlex.join(command[2:])}, {workers} groups at a time", flush=True)
    began = time.monotonic()
    codes: set[int] = set()
    counts: dict[str, int] = {}

    def run(group: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            [*command, *group],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, done.stdout

    with ThreadPoolExecutor(workers) as pool:
        for waiting in as_completed([pool.submit(run, group) for group in groups_of_tests()]):
            code, output = waiting.result()
            print(output, flush=True)
            if code != NO_TESTS:  # all of a group may be left out by what was selected
                codes.add(code)
            closing = output.strip().rpartition("\n")[2]
            for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", closing):
                counts[what] = counts.get(what, 0) + int(count)
    print(f"== {name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return name, max(codes, default=NO_TESTS), time.monotonic() - began


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return our own options and what is left over for pytest."""
    parser = argparse.ArgumentParser(
        description="Run every check of the project.", epilog="Other arguments go to pytest."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--fast", action="store_true", help="leave out slow and interop tests")
    length.add_argument("--long", action="store_true", help="long random histories")
    parser.add_argument(
        "--require-clients", action="store_true", help="a missing client program is a failure"
    )
    options, rest = parser.parse_known_args()
    return options, [argument for argument in rest if argument != "--"]


def check() -> int:
    """Run everything; return the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - an older one gets here too, and must be told
        raise CheckError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    options, pytest_arguments = parse_arguments()
    missing = missing_clients()
    make_environment()
    say_missing(missing, required=options.require_clients)

    environment = dict(os.environ)
    if options.long:
        environment["NBDFLEECE_LONG"] = "1"
    if options.require_clients:
        environment["NBDFLEECE_REQUIRE_CLIENTS"] = "1"
    selection = "not bench and not slow and not interop" if options.fast else "not bench"
    python = [str(PYTHON), "-m"]
    results = [
        run_step(name, python + arguments, environment)
        for name, arguments in (
            ("format", ["ruff", "format", "--check"]),
            ("lint", ["ruff", "check"]),
            ("types", ["mypy"]),
        )
    ]
    pytest = [*python, "pytest", "-m", selection, *pytest_arguments]
    run_tests = run_step if pytest_arguments else run_tests_at_once
    results.append(run_tests("tests", pytest, environment))

    print("\n== summary")
    for name, code, seconds in results:
        print(f"   {name:<7} {'ok' if code == 0 else f'FAILED (exit {code})'}  {seconds:.1f} s")
    if missing:
        verdict = "FAILED, missing" if options.require_clients else "not tried with"
        print(f"   clients {verdict}: {', '.join(missing)}")
    lacking = bool(missing) and options.require_clients
    return int(lacking or any(code != 0 for _, code, _ in results))


def main() -> int:
    """Run the checks; a reason why they cannot run is one clear message, not a traceback."""
    try:
        return check()
    except CheckError as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
