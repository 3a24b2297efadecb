"""FileIo against its plain twin, and against what the kernel does at the edges."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.datapath import fileio
from nbdfleece.datapath.fileio import FileIo
from nbdfleece.datapath.writes import Save, SaveError, SaveStates
from tests.reference.fileio import FileIo as PlainFileIo

KiB = 1024

STATES = SaveStates(4096, 2, None)


class OpenFile:
    """A file with a FileIo on it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self.fd, size)
        self.io = FileIo(self.fd, path.name)

    def close(self) -> None:
        self.io.close()
        os.close(self.fd)

    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenFile]:
    file = OpenFile(tmp_path / "image", 1024 * KiB)
    yield file
    file.close()


def random_bytes(rng: random.Random, length: int) -> bytes:
    """Return data that often is zero, and seldom is all."""
    return bytes(length) if rng.random() < 0.2 else rng.randbytes(length)


@pytest.mark.parametrize("size", [1, 511, 4096, 100_003])
async def test_random_history_equals_the_plain_twin(
    size: int, tmp_path: Path, rng: random.Random, *, long_run: bool
) -> None:
    file = OpenFile(tmp_path / "image", size)
    plain_path = tmp_path / "plain"
    plain_path.write_bytes(bytes(size))
    plain_fd = os.open(plain_path, os.O_RDWR)
    plain = PlainFileIo(plain_fd, "plain")
    try:
        for _ in range(1000 if long_run else 60):
            offset = rng.randrange(size)
            length = rng.randrange(size - offset) + 1
            verb = rng.choice(["write", "fua", "punch_hole", "zero_range", "sync", "none"])
            if verb in ("write", "fua"):
                data = memoryview(random_bytes(rng, length))
                for io in (file.io, plain):
                    await io.write(offset, data, fua=verb == "fua")
            elif verb in ("punch_hole", "zero_range"):
                for io in (file.io, plain):
                    await getattr(io, verb)(offset, length)
            elif verb == "sync":
                await file.io.sync()

            offset = rng.randrange(size)
            length = rng.randrange(size - offset) + 1
            got, expected = bytearray(length), bytearray(length)
            await file.io.read(offset, memoryview(got))
            await plain.read(offset, memoryview(expected))
            assert got == expected
            if file.io.read_now(offset, memoryview(got)):
                assert got == expected
            check_claims(
                await file.io.status(offset, length),
                await plain.status(offset, length),
                offset,
                length,
            )
        assert os.fstat(file.fd).st_size == size
        assert file.content() == plain_path.read_bytes()
    finally:
        file.close()
        os.close(plain_fd)


def check_claims(found: list[Extent], plain: list[Extent], offset: int, length: int) -> None:
    """Extents are in order without gaps; what claims to be zero is."""
    assert found[0].offset == offset
    for extent, following in itertools.pairwise(found):
        assert extent.end == following.offset
    assert all(extent.length > 0 for extent in found)
    data = [extent for extent in plain if extent.flags == DATA]
    for extent in found:
        if extent.flags & ZERO:
            assert not any(
                part.offset < extent.end and extent.offset < part.end for part in data
            ), "a range that holds data was said to be zero"


# --- reading ---------------------------------------------------------------------------------


async def test_what_is_cached_is_read_at_once(opened: OpenFile) -> None:
    os.pwrite(opened.fd, b"cached", 5)
    view = memoryview(bytearray(6))

    assert opened.io.read_now(5, view)
    assert bytes(view) == b"cached"


async def test_what_is_not_cached_is_not_read_at_once(opened: OpenFile) -> None:
    os.pwrite(opened.fd, os.urandom(256 * KiB), 0)
    os.fsync(opened.fd)
    os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    view = memoryview(bytearray(64 * KiB))
    if opened.io.read_now(64 * KiB, view):
        pytest.skip("the file system keeps its pages, or is all memory")

    await opened.io.read(64 * KiB, view)

    assert bytes(view) == opened.content()[64 * KiB : 128 * KiB]


async def test_not_readable_now_means_never_at_once(opened: OpenFile) -> None:
    io = FileIo(opened.fd, "direct", readable_now=False)
    assert not io.read_now(0, memoryview(bytearray(1)))
    io.close()


async def test_reading_over_the_end_is_an_error_and_not_short(opened: OpenFile) -> None:
    os.truncate(opened.fd, 1000)
    view = memoryview(bytearray(100))

    assert not opened.io.read_now(950, view)
    with pytest.raises(IoError) as caught:
        await opened.io.read(950, view)

    assert caught.value.errno == errno.EIO
    assert "read of 100 bytes at 950" in str(caught.value)


async def test_short_reads_and_writes_go_on_where_they_ended(
    opened: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_preadv, real_pwrite, real_pwritev = os.preadv, os.pwrite, os.pwritev
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at, *flags: real_preadv(fd, (views[0][:7],), at, *flags)
    )
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_pwrite(fd, data[:5], at))
    monkeypatch.setattr(
        os, "pwritev", lambda fd, views, at, *flags: real_pwritev(fd, (views[0][:3],), at, *flags)
    )
    data = os.urandom(100)

    await opened.io.write(11, memoryview(data), fua=False)
    await opened.io.write(311, memoryview(data), fua=True)
    view = memoryview(bytearray(100))
    await opened.io.read(11, view)

    assert bytes(view) == data
    assert opened.content()[311:411] == data


# --- writing ---------------------------------------------------------------------------------


async def test_small_writes_take_effect_in_order_of_submission(opened: OpenFile) -> None:
    loop = asyncio.get_running_loop()
    pieces = [memoryview(bytes((index,)) * 4096) for index in range(50)]

    tasks = [loop.create_task(opened.io.write(0, piece, fua=False)) for piece in pieces]
    await asyncio.gather(*tasks)

    assert opened.content()[:4096] == pieces[-1]


async def test_errors_carry_the_errno_and_the_range(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDONLY)
    io = FileIo(fd, "read-only one")

    for fua in (False, True):
        with pytest.raises(IoError) as caught:
            await io.write(4096, memoryview(b"1234"), fua=fua)
        assert caught.value.errno == errno.EBADF
        assert "'read-only one': write of 4 bytes at 4096" in str(caught.value)
    with pytest.raises(IoError) as caught:
        await io.punch_hole(0, 4096)
    assert caught.value.errno == errno.EBADF
    io.close()
    os.close(fd)


@pytest.mark.parametrize("first", ["sync", "fua"])
async def test_what_the_kernel_could_not_write_is_told_to_every_flush(
    opened: OpenFile, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """It tells the one that asks first, and drops the pages: the next one would hear of success."""

    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, "written back in vain")

    data = memoryview(b"x" * 4096)
    await opened.io.write(0, data, fua=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync" if first == "sync" else "pwritev", fail)
        with pytest.raises(IoError):
            await (opened.io.sync() if first == "sync" else opened.io.write(0, data, fua=True))
    for again in (opened.io.sync, opened.io.sync):
        with pytest.raises(IoError) as caught:
            await again()
        assert caught.value.errno == errno.EIO
    with pytest.raises(IoError):
        await opened.io.write(0, data, fua=True)
    await opened.io.write(0, data, fua=False)


@pytest.mark.parametrize("is_full", [True, False])
async def test_a_durable_write_without_space_spoils_flushes_if_others_have_lost_data(
    opened: OpenFile, monkeypatch: pytest.MonkeyPatch, *, is_full: bool
) -> None:
    """On NFS a durable write is told what became of earlier ones; a full disk has lost nothing."""

    def fail(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        if is_full:
            patch.setattr(os, "pwrite", fail)
        with pytest.raises(IoError) as caught:
            await opened.io.write(0, memoryview(b"x"), fua=True)
    assert caught.value.errno == errno.ENOSPC
    if is_full:
        await opened.io.sync()
        return
    for _ in range(2):
        with pytest.raises(IoError) as caught:
            await opened.io.sync()
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("uses_cache", [False, True])
async def test_what_goes_past_the_page_cache_is_not_lost_by_it(
    opened: OpenFile, monkeypatch: pytest.MonkeyPatch, *, uses_cache: bool
) -> None:
    """A device that was away for a moment can be flushed again; not so what it was in the cache."""

    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, "away")

    io = FileIo(opened.fd, "direct", readable_now=False)
    io.uses_cache = uses_cache
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(IoError):
            await io.sync()
    if uses_cache:
        with pytest.raises(IoError):
            await io.sync()
    else:
        await io.sync()
    io.close()


async def test_a_full_file_system_is_told(opened: OpenFile) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    io = FileIo(fd, "full")
    with pytest.raises(IoError) as caught:
        await io.write(0, memoryview(b"x"), fua=False)
    assert caught.value.errno == errno.ENOSPC
    io.close()
    os.close(fd)


# --- holes -----------------------------------------------------------------------------------


async def test_a_hole_gives_space_back_and_a_zeroed_range_keeps_it(opened: OpenFile) -> None:
    await opened.io.write(0, memoryview(b"x" * 1024 * KiB), fua=True)
    full = os.fstat(opened.fd).st_blocks

    await opened.io.zero_range(0, 256 * KiB)
    kept = os.fstat(opened.fd).st_blocks
    await opened.io.punch_hole(256 * KiB, 256 * KiB)
    punched = os.fstat(opened.fd).st_blocks

    assert opened.content() == bytes(512 * KiB) + b"x" * 512 * KiB
    assert kept == full
    assert punched <= full - 256 * KiB // 512


async def test_status_tells_holes_from_data(opened: OpenFile) -> None:
    await opened.io.write(512 * KiB, memoryview(b"x" * 64 * KiB), fua=True)

    extents = await opened.io.status(0, 1024 * KiB)

    assert extents == [
        Extent(0, 512 * KiB, HOLE | ZERO),
        Extent(512 * KiB, 64 * KiB, DATA),
        Extent(576 * KiB, 448 * KiB, HOLE | ZERO),
    ]


async def test_remembered_data_is_forgotten_with_the_hole(opened: OpenFile) -> None:
    await opened.io.write(0, memoryview(b"x" * 256 * KiB), fua=True)
    assert await opened.io.status(0, 256 * KiB) == [Extent(0, 256 * KiB, DATA)]
    assert await opened.io.status(64 * KiB, 512) == [Extent(64 * KiB, 512, DATA)]

    await opened.io.punch_hole(64 * KiB, 64 * KiB)

    assert await opened.io.status(64 * KiB, 64 * KiB) == [Extent(64 * KiB, 64 * KiB, HOLE | ZERO)]


async def test_status_of_very_many_extents_is_cut_and_goes_on(tmp_path: Path) -> None:
    file = OpenFile(tmp_path / "image", 3000 * 8192)
    for index in range(1, 3000, 2):
        os.pwrite(file.fd, b"x" * 8192, index * 8192)
    found: list[Extent] = []
    offset = 0
    while offset < 3000 * 8192:
        part = await file.io.status(offset, 3000 * 8192 - offset)
        found += part
        offset = part[-1].end
    file.close()

    assert len(found) == 3000
    assert found[1::2] == [Extent(index * 8192, 8192, DATA) for index in range(1, 3000, 2)]


async def test_a_hole_punched_while_status_looks_makes_no_empty_extent(
    opened: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened.io.write(0, memoryview(b"x" * 128 * KiB), fua=True)
    real = os.lseek

    def lseek(fd: int, offset: int, how: int) -> int:
        found = real(fd, offset, how)
        if how == os.SEEK_DATA and offset == 0 and found == 0:
            fileio._fallocate(fd, 3, 0, 64 * KiB)
        return found

    monkeypatch.setattr(os, "lseek", lseek)
    extents = await opened.io.status(0, 128 * KiB)

    assert extents == [
        Extent(0, 64 * KiB, HOLE | ZERO),
        Extent(64 * KiB, 64 * KiB, DATA),
    ]


async def test_where_holes_cannot_be_found_all_is_data(
    opened: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, how: int) -> int:
        raise OSError(errno.EINVAL, "no SEEK_DATA here")

    monkeypatch.setattr(os, "lseek", lseek)

    assert await opened.io.status(0, 1024 * KiB) == [Extent(0, 1024 * KiB, DATA)]


# --- saving before writing ---------------------------------------------------------------------


async def test_old_data_is_saved_and_marked_before_the_write(
    opened: OpenFile, tmp_path: Path, rng: random.Random
) -> None:
    before = rng.randbytes(1024 * KiB)
    os.pwrite(opened.fd, before, 0)
    target = OpenFile(tmp_path / "target", 1024 * KiB)
    page = bytearray(b"\1" * 10)
    saves: list[Save] = [
        (8192, bytearray(before[8192:12288]), page, 2, 3),  # read already
        (12288, 4096, page, 3, 4),  # to be read
    ]

    states = SaveStates(4096, 7, None)
    await opened.io.save_then_write(target.io, saves, states, 10_000, memoryview(b"n" * 5000))

    assert target.content()[8192:16384] == before[8192:16384]
    assert target.content()[:8192] == bytes(8192)
    assert opened.content() == before[:10_000] + b"n" * 5000 + before[15_000:]
    assert page == bytes([1, 1, 7, 7, 1, 1, 1, 1, 1, 1])
    target.close()


async def test_a_failed_save_leaves_the_rest_of_the_states_and_the_file(
    opened: OpenFile, tmp_path: Path
) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"")
    target_fd = os.open(path, os.O_RDONLY)
    target = FileIo(target_fd, "target")
    page = bytearray(b"\1\1")
    saves: list[Save] = [(0, 4096, page, 0, 1)]

    with pytest.raises(SaveError) as caught:
        await opened.io.save_then_write(target, saves, STATES, 0, memoryview(b"new"))

    assert caught.value.error.errno == errno.EBADF
    assert page == b"\1\1"
    assert opened.content() == bytes(1024 * KiB)
    target.close()
    os.close(target_fd)


async def test_a_failed_write_behind_good_saves_is_an_io_error(
    opened: OpenFile, tmp_path: Path
) -> None:
    source_fd = os.open(opened.path, os.O_RDONLY)
    source = FileIo(source_fd, "source")
    target = OpenFile(tmp_path / "target", 8192)
    page = bytearray(b"\1\1")
    saves: list[Save] = [(0, 4096, page, 0, 1)]

    with pytest.raises(IoError) as caught:
        await source.save_then_write(target.io, saves, STATES, 0, memoryview(b"new"))

    assert caught.value.errno == errno.EBADF
    assert page == b"\2\1"
    source.close()
    os.close(source_fd)
    target.close()


@pytest.mark.parametrize("io_class", [FileIo, PlainFileIo], ids=["fileio", "plain"])
@pytest.mark.parametrize("zero", [None, 3], ids=["zeroes-too", "no-zeroes"])
async def test_saving_gives_the_same_files_as_the_plain_twin(
    io_class: type[FileIo] | type[PlainFileIo], zero: int | None, tmp_path: Path, seed: int
) -> None:
    """Runs of clusters, some of them zero, the last one short."""
    rng = random.Random(seed)
    size = 63 * KiB + 100
    before = bytearray(rng.randbytes(size))
    for index in rng.sample(range(16), 7):
        before[index * 4096 : (index + 1) * 4096] = bytes(len(before[index * 4096 :][:4096]))
    (tmp_path / "source").write_bytes(before)
    (tmp_path / "target").write_bytes(b"t" * size)
    fds = [os.open(tmp_path / name, os.O_RDWR) for name in ("source", "target")]
    ios = [io_class(fd, "x") for fd in fds]
    page = bytearray(16)
    current = bytearray(before)
    states = SaveStates(4096, 1, zero)
    for first, last in ((0, 1), (2, 7), (7, 8), (10, 16)):
        old = before[first * 4096 : last * 4096]
        saves: list[Save] = [(first * 4096, rng.choice([old, len(old)]), page, first, last)]
        new = rng.randbytes(100)
        at = first * 4096 + rng.randrange(3000)
        await ios[0].save_then_write(ios[1], saves, states, at, memoryview(new))  # type: ignore[arg-type]
        current[at : at + 100] = new

    target = (tmp_path / "target").read_bytes()
    assert (tmp_path / "source").read_bytes() == current
    for index in range(16):
        piece = slice(index * 4096, (index + 1) * 4096)
        is_zero = not any(before[piece])
        if index in (1, 8, 9):
            assert page[index] == 0
        else:
            assert page[index] == (zero if is_zero and zero is not None else 1)
        saved = page[index] == 1
        assert target[piece] == (before[piece] if saved else b"t" * len(before[piece]))
    for io, fd in zip(ios, fds, strict=True):
        if isinstance(io, FileIo):
            io.close()
        os.close(fd)
