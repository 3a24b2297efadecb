"""Numbered, checksummed records on a disk, from which a copy's instant can be told.

    records.py write URI PROGRESS               writes records over NBD, without pause
    records.py verify FILE [LOW [HIGH]]         tells of which instant a copy is

The guest writes record 1, 2, 3, ... each into the slot that its number says, and begins the next
one when the server has acknowledged the last. So at every instant the disk is what the first k
records have made of it, for one k. A copy is of one instant if, with k the highest number in it,
every slot holds the latest of the records 1 to k that belong there, complete to the byte. A copy
that took time while the guest wrote has records from between: it is of no instant.
"""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import sys
import time
from pathlib import Path

RECORD = 4096  # bytes
SLOTS = 16384  # 64 MiB
STEP = 6553  # odd, so that the slots of SLOTS records in a row are all different, and far apart
HEADER = struct.Struct(">8sQ")
MAGIC = b"RECORD\0\0"
CONNECT_S = 60


def slot(number: int) -> int:
    """Return where a record goes."""
    return number * STEP % SLOTS


def record(number: int) -> bytes:
    """Return a record: its number, what follows from it, and a checksum over both."""
    head = HEADER.pack(MAGIC, number)
    body = hashlib.shake_128(head).digest(RECORD - len(head) - 32)
    return head + body + hashlib.sha256(head + body).digest()


def expected(highest: int) -> dict[int, int]:
    """Return the number that each slot holds when `highest` records have been written."""
    return {slot(number): number for number in range(max(1, highest - SLOTS + 1), highest + 1)}


class TornError(Exception):
    """The copy is of no instant; the text says why."""


def instant_of(path: Path) -> int:
    """Return how many records had been written at the instant of a copy.

    Raises:
        TornError: It is of no one instant.
    """
    found: dict[int, int] = {}
    with path.open("rb") as file:
        for index in range(SLOTS):
            data = file.read(RECORD)
            if len(data) < RECORD:
                raise TornError(f"the copy is too short: {index} slots of {SLOTS}")
            if data.strip(b"\0"):
                found[index] = _number_in(index, data)
    highest = max(found.values(), default=0)
    wanted = expected(highest)
    wrong = sum(found.get(index) != wanted.get(index) for index in range(SLOTS))
    if wrong:
        raise TornError(
            f"{wrong} of {SLOTS} slots do not belong to the instant of record {highest}"
        )
    return highest


def _number_in(index: int, data: bytes) -> int:
    """Return the number of the record in a slot, which must be whole."""
    magic, number = HEADER.unpack_from(data)
    if magic != MAGIC or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise TornError(f"slot {index} holds no whole record")
    if data != record(number) or slot(number) != index:
        raise TornError(f"slot {index} holds record {number}, which does not belong there")
    return int(number)


def write(uri: str, progress: Path) -> None:
    """Write records until SIGTERM; keep the number of the last acknowledged one in a file."""
    import nbd  # Debian: python3-libnbd

    running = True

    def stop(_number: int, _frame: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    deadline = time.monotonic() + CONNECT_S
    while True:
        handle = nbd.NBD()
        try:
            handle.set_uri_allow_local_file(True)  # the certificates
            handle.connect_uri(uri)
            break
        except nbd.Error as error:
            if time.monotonic() > deadline:
                raise
            print(f"guest: waiting for the server ({error.string})", flush=True)
            time.sleep(0.5)
    print("guest: connected, writing without pause", flush=True)
    number = 0
    while running:
        number += 1
        handle.pwrite(record(number), slot(number) * RECORD)
        new = progress.with_suffix(".new")
        new.write_text(f"{number}\n")
        os.replace(new, progress)
    handle.flush()
    handle.shutdown()
    print(f"guest: wrote {number} records", flush=True)


def verify(path: Path, low: int, high: int | None) -> int:
    """Say what a copy is; return the exit code."""
    try:
        number = instant_of(path)
    except TornError as error:
        print(f"TORN: {error}")
        return 1
    # One more may have been written and not yet been acknowledged.
    if number < low or (high is not None and number > high + 1):
        print(f"WRONG INSTANT: record {number}, asked for between {low} and {high}")
        return 1
    print(f"PROVED: exactly the disk after record {number}, all {SLOTS} slots to the byte")
    return 0


def main(words: list[str]) -> int:
    """Run one command."""
    match words:
        case ["write", uri, progress]:
            write(uri, Path(progress))
            return 0
        case ["verify", path]:
            return verify(Path(path), 0, None)
        case ["verify", path, low]:
            return verify(Path(path), int(low), None)
        case ["verify", path, low, high]:
            return verify(Path(path), int(low), int(high))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
