"""Writes many at a time: as one by one, but for the time they take."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.datapath import writes as w
from nbdfleece.datapath.workers import Lane, Op

SIZE = 1 << 18


@pytest.fixture(params=["kernel", "refused", "unknown machine"])
def writer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[w.BatchWriter]:
    """A BatchWriter with the kernel's batches, and without them for either reason."""
    if request.param == "refused":
        monkeypatch.setattr(w, "_set_up", lambda: 0)
    elif request.param == "unknown machine":
        monkeypatch.setattr(w, "_CALLS", None)
    made = w.BatchWriter()
    yield made
    made.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.truncate(number, SIZE)
    yield number
    os.close(number)


def buffer(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def run(writer: w.BatchWriter, writes: list[w.Write]) -> list[BaseException | None]:
    """Run writes as a lane does; return what the ops would raise."""
    lane = Lane("batch", 1)
    ops: list[Op[object]] = [Op(lane, write, None, None) for write in writes]
    for start in range(0, len(ops), w.MAX_BATCH):
        writer.run(ops[start : start + w.MAX_BATCH])
    return [op.error for op in ops]


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def test_a_batch_goes_through_the_kernel_at_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise AssertionError("one by one")

    monkeypatch.setattr(os, "pwrite", refuse)
    writer = w.BatchWriter()
    assert (
        run(writer, [w.Write(fd, 4096 * n, buffer(b"%d" % n * 9)) for n in range(16)])
        == [None] * 16
    )
    writer.close()
    assert content(fd)[4096 * 7 :][:9] == b"7" * 9


def test_random_histories_equal_writes_one_by_one(
    writer: w.BatchWriter, fd: int, rng: random.Random
) -> None:
    expected = bytearray(SIZE)
    for _ in range(60):
        writes: list[w.Write] = []
        at = rng.randrange(4096)
        for _ in range(rng.randrange(1, 45)):  # more than fit into one call
            data = rng.randbytes(rng.randrange(1, 9000))
            if at + len(data) > SIZE:
                break
            # What is read-only has no address that ctypes would tell.
            view = memoryview(data) if rng.random() < 0.1 else buffer(data)
            writes.append(w.Write(fd, at, view))
            expected[at : at + len(data)] = data
            at += len(data) + rng.randrange(5000)
        rng.shuffle(writes)
        assert run(writer, writes) == [None] * len(writes)
        assert content(fd) == expected


@pytest.mark.parametrize("bad", [0, 1, 5, 15, 16, 19])
def test_one_that_fails_keeps_no_other_from_its_end(
    writer: w.BatchWriter, fd: int, tmp_path: Path, bad: int
) -> None:
    closed = os.open(tmp_path / "disk", os.O_RDONLY)
    os.close(closed)
    writes = [
        w.Write(closed if number == bad else fd, 4096 * number, buffer(b"%04d" % number))
        for number in range(20)
    ]
    errors = run(writer, writes)
    failed = errors.pop(bad)
    assert isinstance(failed, OSError)
    assert failed.errno == errno.EBADF
    assert errors == [None] * 19
    for number in range(20):
        there = content(fd)[4096 * number :][:4]
        assert there == (bytes(4) if number == bad else b"%04d" % number)


def test_the_kernels_own_errors_are_told(writer: w.BatchWriter, fd: int, tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "disk", os.O_RDONLY)
    full = os.open("/dev/full", os.O_WRONLY)
    errors = run(
        writer,
        [
            w.Write(fd, 0, buffer(b"first")),
            w.Write(read_only, 0, buffer(b"second")),
            w.Write(full, 0, buffer(b"third")),
            w.Write(fd, -1, buffer(b"fourth")),
            w.Write(fd, 8192, buffer(b"fifth")),
        ],
    )
    os.close(read_only)
    os.close(full)
    numbers = [error.errno if isinstance(error, OSError) else error for error in errors]
    assert numbers == [None, errno.EBADF, errno.ENOSPC, errno.EINVAL, None]
    assert content(fd)[:5] == b"first"
    assert content(fd)[8192:][:5] == b"fifth"


def test_what_is_written_in_part_goes_on_there(writer: w.BatchWriter, fd: int) -> None:
    """The kernel writes up to the limit of a file's size; what is left then fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE + 1000, limits[1]))
        errors = run(
            writer,
            [w.Write(fd, SIZE - 100, buffer(b"a" * 4096)), w.Write(fd, 0, buffer(b"b" * 4096))],
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert isinstance(errors[0], OSError)
    assert errors[0].errno == errno.EFBIG
    assert errors[1] is None
    assert content(fd)[:4096] == b"b" * 4096
    assert content(fd)[SIZE - 100 :] == b"a" * 1100


def test_an_interrupted_wait_is_repeated(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = w._syscall5, list[int]()

    def interrupted(*args: int) -> int:
        calls.append(args[2])
        if len(calls) == 1:
            ctypes.set_errno(errno.EINTR)
            return -1
        return int(real(*args))

    monkeypatch.setattr(w, "_syscall5", interrupted)
    writer = w.BatchWriter()
    assert run(writer, [w.Write(fd, n, buffer(b"x")) for n in range(3)]) == [None] * 3
    writer.close()
    assert calls == [3, 3]
    assert content(fd)[:3] == b"xxx"


def test_contexts_of_the_kernel_are_given_back(fd: int) -> None:
    def held() -> int:
        return Path("/proc/self/maps").read_text(encoding="ascii").count("[aio]")

    before = held()
    writer = w.BatchWriter()
    assert held() == before  # none where writes come one by one
    run(writer, [w.Write(fd, n, buffer(b"x")) for n in range(2)])
    assert held() == before + 1
    writer.close()
    writer.close()
    assert held() == before
