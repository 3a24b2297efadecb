"""Random histories of a disk: the same for our qcow2 driver, for qemu-io, and for a bytearray."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options

Program = Callable[[str], str]

KiB, MiB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Step:
    """One thing done to the disk.

    Attributes:
        verb: write, zeroes, unmap (zeroes that may give space back), discard, flush or resize.
        offset: In bytes; of resize, the new size.
        length: In bytes.
        fill: The byte that is written.
    """

    verb: str
    offset: int = 0
    length: int = 0
    fill: int = 0

    def qemu_io(self) -> str:
        """The command for qemu-io -d unmap."""
        place = f"{self.offset} {self.length}"
        return {
            "write": f"write -P {self.fill} {place}",
            "zeroes": f"write -z {place}",
            "unmap": f"write -z -u {place}",
            "discard": f"discard {place}",
            "flush": "flush",
            "resize": f"truncate {self.offset}",
        }[self.verb]

    async def apply(self, node: Node) -> None:
        """Do it through a node."""
        if self.verb == "write":
            data = memoryview(bytes([self.fill]) * self.length)
            await node.write(self.offset, data, fua=False)
        elif self.verb in ("zeroes", "unmap"):
            unmap = self.verb == "unmap"
            await node.write_zeroes(
                self.offset, self.length, fua=False, may_unmap=unmap, no_fallback=False
            )
        elif self.verb == "discard":
            await node.discard(self.offset, self.length)
        elif self.verb == "flush":
            await node.flush()
        else:
            await node.truncate(self.offset)

    def model(self, disk: bytearray, cluster: int) -> None:
        """Do it to the bytes; a discard reaches whole clusters only."""
        end = self.offset + self.length
        if self.verb == "write":
            disk[self.offset : end] = bytes([self.fill]) * self.length
        elif self.verb in ("zeroes", "unmap"):
            disk[self.offset : end] = bytes(self.length)
        elif self.verb == "discard":
            first = -(-self.offset // cluster) * cluster
            last = end if end == len(disk) else end // cluster * cluster
            if first < last:
                disk[first:last] = bytes(last - first)
        elif self.verb == "resize":
            del disk[self.offset :]
            disk.extend(bytes(self.offset - len(disk)))


def random_step(
    rng: random.Random, size: int, cluster: int, *, verbs: Sequence[str], most: int
) -> Step:
    """A step inside a disk, in sectors, as qemu-io has them."""
    verb = rng.choice(verbs)
    if verb == "flush":
        return Step(verb)
    if verb == "resize":
        # In whole clusters: qemu-io shows what had been behind the end of the last one again.
        grown = rng.randrange(max(1, size // 2), size * 2) // cluster * cluster
        return Step(verb, min(max(cluster, grown), most))
    unit = rng.choice([512, 512, cluster])
    offset = rng.randrange(-(-size // unit)) * unit
    length = rng.choice([512, cluster, rng.randrange(1, 4 * cluster // 512 + 1) * 512])
    if rng.random() < 0.03:
        length = rng.randrange(512, size // 512 * 512 + 512)
    length = min(length // 512 * 512, size - offset)
    return Step(verb, offset, max(512, length), rng.randrange(1, 256))


def qemu_io(program: Program, image: Path, steps: Sequence[Step], *options: str) -> None:
    """Do the steps to an image by qemu-io."""
    commands = [part for step in steps for part in ("-c", step.qemu_io())]
    run(program("qemu-io"), "-f", "qcow2", "-d", "unmap", *options, *commands, str(image))


def run(*command: object) -> str:
    """Run a program that has to succeed, and return what it says."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def check(program: Program, image: Path) -> None:
    """Insist that `qemu-img check` finds neither corruption nor leak."""
    done = subprocess.run(
        [program("qemu-img"), "check", "-f", "qcow2", str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def qemu_map(program: Program, image: Path) -> list[tuple[int, int, bool, bool, int]]:
    """Runs of an image as qemu-img sees them: (start, length, zero, data, depth), merged."""
    found = json.loads(run(program("qemu-img"), "map", "-f", "qcow2", "--output=json", image))
    runs: list[tuple[int, int, bool, bool, int]] = []
    for each in found:
        flags = (each["zero"], each["data"], each["depth"])
        if runs and runs[-1][2:] == flags:
            runs[-1] = (runs[-1][0], runs[-1][1] + each["length"], *flags)
        else:
            runs.append((each["start"], each["length"], *flags))
    return runs


def raw_content(program: Program, image: Path, *options: str) -> bytes:
    """All bytes of an image's disk, by qemu-img."""
    target = image.with_suffix(".raw-content")
    run(program("qemu-img"), "convert", "-f", "qcow2", *options, "-O", "raw", image, target)
    return target.read_bytes()


async def open_image(graph: Graph, image: Path, name: str = "disk", **options: object) -> Node:
    """A writable node of our driver for an image, whose backing chain is found by its headers."""
    return await add_from_options(
        graph,
        {
            "driver": "qcow2",
            "node-name": name,
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(image)},
            **options,
        },
    )


async def read_all(node: Node, piece: int = 300 * KiB + 7) -> bytes:
    """Every byte of a node, in pieces that are aligned to nothing."""
    found = bytearray(node.size)
    view = memoryview(found)
    for offset in range(0, node.size, piece):
        await node.read(offset, view[offset : offset + piece])
    return bytes(found)
