"""Increments that libnbd and QEMU read from a snapshot by its bitmap, beside our own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, nbdfleece
from tests.support.live import KiB, MiB, blocks, qemu_io, run, serving

pytestmark = pytest.mark.interop("nbdsh", "nbdinfo", "qemu-img", "qemu-io")

Program = Callable[[str], str]
SIZE = 8 * MiB + 512
GRANULE = 64 * KiB
CONTEXT = "qemu:dirty-bitmap:b"

COPY = """
import json
h.add_meta_context(context)
h.connect_uri(uri)
found = []
def extents(name, offset, entries, error):
    for length, flags in zip(entries[::2], entries[1::2]):
        if name == context:
            found.append((offset, length, flags))
        offset += length
offset = 0
while offset < h.get_size():
    h.block_status(h.get_size() - offset, offset, extents)
    offset = sum(found[-1][:2])
with open(path, "r+b") as file:
    for offset, length, flags in found:
        if flags & 1:
            file.seek(offset)
            file.write(h.pread(length, offset))
print(json.dumps([each[:2] for each in found if each[2] & 1]))
"""

Extents = list[tuple[int, int]]


def joined(extents: Extents) -> Extents:
    found: Extents = []
    for offset, length in extents:
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


def by_libnbd(program: Program, uri: str, path: Path) -> Extents:
    """Copy what is dirty over the file of the last instant, with libnbd; return what that was."""
    given = f"uri, context, path = {uri!r}, {CONTEXT!r}, {str(path)!r}"
    # libnbd's module is the distribution's Python's, not that of the tests.
    done = run("env", "PATH=/usr/bin:/bin", program("nbdsh"), "-c", given, "-c", COPY)
    return [tuple(each) for each in json.loads(done.stdout)]


def by_qemu(program: Program, daemon: Daemon, base: Path, image: Path) -> Extents:
    """Copy what is dirty into an overlay, by reading it there; return what that was."""
    uri = daemon.uri("vda@two")
    where = f"server.type=unix,server.path={daemon.socket},export=vda@two"
    options = f"driver=nbd,{where},x-dirty-bitmap={CONTEXT}"
    told = run(program("qemu-img"), "map", "--output=json", "--image-opts", options)
    # With x-dirty-bitmap, what is dirty is shown as a hole.
    found = [(row["start"], row["length"]) for row in json.loads(told.stdout) if not row["data"]]
    run(program("qemu-img"), "create", "-f", "qcow2", "-b", uri, "-F", "raw", image)
    reads = [part for each in found for part in ("-c", f"read {each[0]} {each[1]}")]
    run(program("qemu-io"), "-C", "-f", "qcow2", *reads, image)
    run(program("qemu-img"), "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "raw", image)
    return found


def by_us(daemon: Daemon, to: Path) -> Path:
    """Restore our own increment, of a disk that has not changed since; return where."""
    assert daemon.run("backup", "create", "vda", "--to", to).code == 0
    points = json.loads(nbdfleece("backup", "list", to, "--json").out)
    assert [point["kind"] for point in points] == ["full", "inc"]
    path = to.parent / "ours.raw"
    assert nbdfleece("restore", f"{to}/vda", path, "--verify").code == 0
    return path


def test_libnbd_and_qemu_copy_what_is_dirty_and_have_what_we_have(
    short_tmp: Path, program: Program, rng: random.Random
) -> None:
    disk, base, to = (short_tmp / name for name in ("vda.raw", "base.raw", "backup"))
    disk.write_bytes(blocks(SIZE, 4096))
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one", "--bitmap", "b").code == 0
        run(program("qemu-img"), "convert", "-f", "raw", "-O", "raw", daemon.uri("vda@one"), base)
        assert daemon.run("backup", "create", "vda", "--to", to).code == 0
        assert daemon.run("snapshot", "delete", "vda@one", "--success").code == 0
        ours = set()
        for verb in ("write -P 7", "write -P 8", "write -z", "discard", "write -P 9"):
            length = rng.choice((512, 4096, 100 * KiB, 512 * KiB))
            offset = rng.randrange((SIZE - length) // 512 + 1) * 512
            qemu_io(program, daemon.uri("vda"), f"{verb} {offset} {length}")
            ours |= set(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))
        increment = by_us(daemon, to)
        expected = joined([(n * GRANULE, min(GRANULE, SIZE - n * GRANULE)) for n in sorted(ours)])
        assert daemon.run("snapshot", "create", "vda", "--name", "two", "--bitmap", "b").code == 0
        wanted = disk.read_bytes()
        qemu_io(program, daemon.uri("vda"), "write -P 66 0 3M")

        copy, image = short_tmp / "copy.raw", short_tmp / "increment.qcow2"
        copy.write_bytes(base.read_bytes())
        assert joined(by_libnbd(program, daemon.uri("vda@two"), copy)) == expected
        assert joined(by_qemu(program, daemon, base, image)) == expected
        listed = json.loads(
            run(program("nbdinfo"), f"--map={CONTEXT}", "--json", daemon.uri("vda@two")).stdout
        )
        told = [(row["offset"], row["length"]) for row in listed if row["type"] & 1]
        assert joined(told) == expected
    assert copy.read_bytes() == wanted
    assert increment.read_bytes() == wanted
    run(program("qemu-img"), "compare", "-F", "raw", image, copy)
    assert wanted != base.read_bytes()
