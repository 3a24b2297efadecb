"""The image writer: qemu-img finds its images clean, and in them the disk that it was told of."""

from __future__ import annotations

import json
import random
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2.header import parse_header
from nbdfleece.formats.qcow2.writer import ImageWriter, Piece

Program = Callable[[str], str]

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Target:
    """The file that a caller of the writer would write; no byte may be written twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._written: list[tuple[int, int]] = []
        self.largest = 0

    def put(self, pieces: Iterable[Piece]) -> None:
        for offset, piece in pieces:
            self._file.seek(offset)
            self._file.write(piece)
            self._written.append((offset, len(piece)))
            self.largest = max(self.largest, len(piece))

    def close(self) -> None:
        self._file.close()
        at = 0
        for offset, length in sorted(self._written):
            assert offset == at, "written twice, or left out"
            at += length
        assert self._written[-1][0] == 0, "the header comes last"


def deflate(cluster: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -12)
    return packer.compress(cluster) + packer.flush()


def check(program: Program, path: Path) -> None:
    found = subprocess.run(
        [program("qemu-img"), "check", "-f", "qcow2", "--output=json", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(found.stdout)
    assert found.returncode == 0, found.stderr
    assert result["check-errors"] == result.get("corruptions", 0) == result.get("leaks", 0) == 0


def compare(program: Program, image: Path, raw: Path) -> None:
    command = [program("qemu-img"), "compare", "-f", "qcow2", "-F", "raw"]
    done = subprocess.run([*command, str(image), str(raw)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def tell(
    writer: ImageWriter, disk: bytearray, rng: random.Random, *, dense: float
) -> Iterator[Piece]:
    """Tell the writer of random runs, and change `disk` to what it is told."""
    cluster = writer.cluster_size
    offset = 0
    while offset < len(disk):
        length = rng.choice([1, 1, 2, rng.randrange(1, 40)]) * cluster
        end = min(offset + length, len(disk))
        what = rng.choice(["data", "compressed", "zeroes"]) if rng.random() < dense else "skip"
        if what == "data":
            disk[offset:end] = rng.randbytes(end - offset)
            yield from writer.data(offset, bytes(disk[offset:end]))
        elif what == "zeroes":
            disk[offset:end] = bytes(end - offset)
            yield from writer.zeroes(offset, end - offset)
        elif what == "compressed":
            end = min(offset + cluster, end)
            random_part = rng.randbytes(rng.randrange(cluster * 4 // 5))
            whole = (random_part + b"x" * cluster)[:cluster]
            disk[offset:end] = whole[: end - offset]
            blob = deflate(disk[offset:end] + bytes(cluster - (end - offset)))
            if len(blob) < cluster:
                yield from writer.compressed(offset, blob)
            else:
                yield from writer.data(offset, bytes(disk[offset:end]))
        offset = end


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.interop("qemu-img")
def test_random_images_are_clean_and_equal_what_the_writer_was_told(
    tmp_path: Path, program: Program, rng: random.Random, cluster_bits: int, *, backed: bool
) -> None:
    cluster = 1 << cluster_bits
    for round_ in range(4):
        size = rng.randrange(1, min(700 * cluster, 20 * MiB)) // 512 * 512 + 512
        disk = bytearray(rng.randbytes(size) if backed else size)
        base = tmp_path / "base.raw"
        base.write_bytes(disk)
        writer = ImageWriter(
            size,
            cluster_bits=cluster_bits,
            backing=("base.raw", "raw") if backed else None,
        )
        target = Target(tmp_path / f"{round_}.qcow2")
        target.put(tell(writer, disk, rng, dense=rng.random()))
        target.put(writer.finish())
        target.close()
        check(program, target.path)
        (tmp_path / "disk.raw").write_bytes(disk)
        compare(program, target.path, tmp_path / "disk.raw")


@pytest.mark.interop("qemu-img")
def test_64_tib_with_few_clusters_stay_small(tmp_path: Path, program: Program) -> None:
    writer = ImageWriter(64 * TiB)
    target = Target(tmp_path / "big.qcow2")
    for offset in (0, 1 * TiB, 63 * TiB + 5 * 64 * KiB):
        target.put(writer.data(offset, b"x" * 64 * KiB))
    target.put(writer.finish())
    target.close()
    assert target.path.stat().st_size < 2 * MiB
    assert target.largest <= MiB
    check(program, target.path)


@pytest.mark.interop("qemu-img", "qemu-io")
def test_zeroes_over_a_backing_file_share_their_l2_tables(tmp_path: Path, program: Program) -> None:
    (tmp_path / "base.raw").write_bytes(b"old" * MiB)
    size = 5 * GiB + 3 * 512
    writer = ImageWriter(size, cluster_bits=12, backing=("base.raw", "raw"))
    target = Target(tmp_path / "zero.qcow2")
    target.put(writer.data(0, b"x" * 4096))
    target.put(writer.zeroes(4096, 3 * GiB))
    target.put(writer.data(4 * GiB, b"x" * 4096))
    target.put(writer.zeroes(4 * GiB + 4096, size - 4 * GiB - 4096))
    target.put(writer.finish())
    target.close()
    assert target.path.stat().st_size < MiB
    check(program, target.path)
    io = [program("qemu-io"), "-f", "qcow2", str(target.path)]
    commands = ["read -P 0 4k 4k", "read -P 0 2G 16M", "read -P 120 4G 4k", "write -P 7 2G 4k"]
    commands += ["read -P 7 2G 4k", f"read -P 0 {2 * GiB + 4096} 8M", "read -P 0 1G 8M"]
    done = subprocess.run(
        [*io, *(part for command in commands for part in ("-c", command))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    check(program, target.path)


@pytest.mark.interop("qemu-img")
def test_one_shared_l2_table_is_no_shared_one(tmp_path: Path, program: Program) -> None:
    """QEMU takes a refcount of 1 without the flag for corruption."""
    (tmp_path / "base.raw").touch()
    size = 3 * MiB
    writer = ImageWriter(size, cluster_bits=12, backing=("base.raw", "raw"))
    target = Target(tmp_path / "zero.qcow2")
    target.put(writer.zeroes(0, 2 * MiB))
    target.put(writer.finish())
    target.close()
    check(program, target.path)


@pytest.mark.interop("qemu-img")
def test_an_l2_table_is_shared_no_more_often_than_a_refcount_counts(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdfleece.formats.qcow2.writer._MAX_REFCOUNT", 3)
    (tmp_path / "base.raw").touch()
    size = 7 * 64 * 512
    writer = ImageWriter(size, cluster_bits=9, backing=("base.raw", "raw"))
    target = Target(tmp_path / "zero.qcow2")
    target.put(writer.zeroes(0, size))
    target.put(writer.finish())
    target.close()
    assert len(set(writer._l1)) == 3
    check(program, target.path)


@pytest.mark.interop("qemu-img")
def test_an_empty_disk_has_an_image(tmp_path: Path, program: Program) -> None:
    for size in (0, 1, 64 * KiB, 1 * GiB):
        writer = ImageWriter(size)
        target = Target(tmp_path / f"{size}.qcow2")
        target.put(writer.finish())
        target.close()
        check(program, target.path)
        assert target.path.stat().st_size <= 4 * 64 * KiB


def test_the_header_names_the_backing_file_and_its_format(tmp_path: Path) -> None:
    writer = ImageWriter(1 * MiB, backing=("full.qcow2", "qcow2"))
    *_, (offset, data) = writer.finish()
    header = parse_header(bytes(data))
    assert offset == 0
    assert (header.backing_file, header.backing_format) == ("full.qcow2", "qcow2")
    assert (header.version, header.size, header.refcount_bits) == (3, 1 * MiB, 16)


def test_memory_stays_small_while_a_disk_is_written() -> None:
    """Of all that was told before, only the tables that may change are kept."""
    writer = ImageWriter(4 * GiB, cluster_bits=12)
    data = bytes(1 * MiB)
    for offset in range(0, 256 * MiB, 1 * MiB):
        for _ in writer.data(offset, data):
            pass
        assert len(writer._counts.unplaced()) <= 2


def test_what_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ImageError, match="larger cluster size"):
        ImageWriter(64 * TiB, cluster_bits=9)
    with pytest.raises(ImageError, match="Backing file name"):
        ImageWriter(64 * TiB, backing=("x" * 1024, "raw"))


def test_ranges_come_in_order_and_in_clusters() -> None:
    writer = ImageWriter(1 * MiB + 512)
    list(writer.data(64 * KiB, bytes(64 * KiB)))
    for offset, length in ((64 * KiB, 64 * KiB), (0, 64 * KiB), (512, 512), (128 * KiB, 100)):
        with pytest.raises(AssertionError):
            list(writer.data(offset, bytes(length)))
    list(writer.data(1 * MiB, bytes(512)))
