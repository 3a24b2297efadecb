"""qemu-img of every generation that is here: before extended headers (QEMU < 8.2), and with them.

The system's, and one of 8.2 or later: unpacked by `.ci/run --long` from bookworm-backports, or in a
folder that the environment variable NBDFLEECE_BACKPORTS names.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd.constants import NBD_EXTENDED_REQUEST_MAGIC, NBD_REQUEST_MAGIC
from tests.support.daemon_process import ROOT, Daemon
from tests.support.live import MiB, blocks, program_run, run
from tests.support.pki import Pki

Program = Callable[[str], str]
SIZE = 8 * MiB
EXTENDED_SINCE = (8, 2)
FOLDER = Path(os.environ.get("NBDFLEECE_BACKPORTS") or ROOT / ".backports/usr/bin")
NEW = FOLDER / "qemu-img"
HOW_TO_GET_IT = (
    f"no qemu-img >= 8.2 at {NEW}: run `.ci/run --long` as root on Debian 12, or unpack qemu-utils "
    "of bookworm-backports (apt-get download, dpkg-deb -x) and name its usr/bin in "
    "NBDFLEECE_BACKPORTS"
)
GENERATIONS = ["system"]
if NEW.exists() or os.environ.get("NBDFLEECE_LONG") == "1":
    GENERATIONS.append("backports")


@pytest.fixture(params=GENERATIONS)
def qemu_img(request: pytest.FixtureRequest, program: Program) -> str:
    if request.param == "system":
        return program("qemu-img")
    if not NEW.exists():
        pytest.fail(HOW_TO_GET_IT, pytrace=False)
    assert version(str(NEW)) >= EXTENDED_SINCE, HOW_TO_GET_IT
    return str(NEW)


def version(qemu_img: str) -> tuple[int, int]:
    found = re.search(r"version (\d+)\.(\d+)", run(qemu_img, "--version").stdout)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def creds(request: pytest.FixtureRequest, pki: Pki) -> list[str]:
    """What tells qemu-img of its certificate, if it is to use TLS."""
    if not request.param:
        return []
    return ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={pki.client('backup1')}"]


@pytest.fixture
def content(short_tmp: Path) -> bytes:
    """Data, 2 MiB of hole, data; also in the file `before.raw`."""
    data = blocks(2 * MiB, 4096) + bytes(2 * MiB) + blocks(SIZE - 4 * MiB, 4096, first=99)
    for name in ("vda.raw", "before.raw"):
        with (short_tmp / name).open("wb") as file:
            file.write(data[: 2 * MiB])
            file.seek(4 * MiB)
            file.write(data[4 * MiB :])
    return data


@pytest.fixture
def daemon(short_tmp: Path, content: bytes, creds: list[str], pki: Pki) -> Iterator[Daemon]:
    more = ["--tls-creds", pki.server, "--listen", "tcp:127.0.0.1:0,tls=require"] if creds else []
    with Daemon(short_tmp, *more, short_tmp / "vda.raw") as running:
        running.ready()
        assert running.run("snapshot", "create", "vda", "--name", "one").code == 0
        yield running
        assert "Traceback" not in running.errors(), running.errors()


def image(path: Path | str, export: str, creds: list[str]) -> str:
    tls = ",tls-creds=tls,tls-hostname=localhost" if creds else ""
    return f"driver=nbd,server.type=unix,server.path={path},export={export}{tls}"


@pytest.mark.parametrize("export", ["vda", "vda@one"])
def test_convert_compare_and_map(
    daemon: Daemon, qemu_img: str, creds: list[str], short_tmp: Path, content: bytes, export: str
) -> None:
    source = image(daemon.socket, export, creds)
    if export == "vda@one":  # the guest goes on
        fill = short_tmp / "fill.raw"
        fill.write_bytes(blocks(SIZE, 512, first=7))
        live = image(daemon.socket, "vda", creds)
        run(
            *(qemu_img, "convert", *creds, "--image-opts", "-n", "--target-image-opts"),
            *(f"driver=raw,file.filename={fill}", live),
        )
    copy, before = short_tmp / "copy.raw", short_tmp / "before.raw"
    run(qemu_img, "convert", *creds, "--image-opts", "-O", "raw", source, copy)
    assert copy.read_bytes() == content
    compared = run(
        *(qemu_img, "compare", *creds, "--image-opts"),
        *(source, f"driver=raw,file.filename={before}"),
    )
    assert "identical" in compared.stdout
    mapped = json.loads(
        run(qemu_img, "map", *creds, "--image-opts", "--output=json", source).stdout
    )
    assert joined(mapped) == [
        (0, 2 * MiB, True),
        (2 * MiB, 2 * MiB, False),
        (4 * MiB, 4 * MiB, True),
    ]
    if creds:
        assert 'tls="TLSv1.3"' in daemon.errors()


def joined(rows: list[dict]) -> list[tuple[int, int, bool]]:
    found: list[tuple[int, int, bool]] = []
    for row in rows:
        if found and found[-1][2] == row["data"]:
            start, length, data = found.pop()
            found.append((start, length + row["length"], data))
        else:
            found.append((row["start"], row["length"], row["data"]))
    return found


@pytest.mark.parametrize("creds", [[]], ids=["plain"])
async def test_headers_are_the_best_that_both_know(
    daemon: Daemon, qemu_img: str, short_tmp: Path, content: bytes
) -> None:
    """Heard on the wire: the magic number of every request follows from the negotiation."""
    tap = short_tmp / "tap"
    async with wire_tap(tap, daemon.socket) as heard:
        source = image(tap, "vda@one", [])
        copy = short_tmp / "copy.raw"
        await program_run(qemu_img, "convert", "--image-opts", "-O", "raw", source, copy)
    assert copy.read_bytes() == content
    extended = version(qemu_img) >= EXTENDED_SINCE
    assert (NBD_EXTENDED_REQUEST_MAGIC.to_bytes(4, "big") in heard) == extended
    assert (NBD_REQUEST_MAGIC.to_bytes(4, "big") in heard) != extended


@asynccontextmanager
async def wire_tap(path: Path, server: Path) -> AsyncIterator[bytearray]:
    """A socket that leads to the server; gives what clients have said there."""
    heard = bytearray()

    async def pass_on(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, into: bytearray
    ) -> None:
        while data := await reader.read(1 * MiB):
            into += data
            writer.write(data)
            await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_read, to_write = await asyncio.open_unix_connection(server)
        async with asyncio.TaskGroup() as group:
            group.create_task(pass_on(reader, to_write, heard))
            group.create_task(pass_on(to_read, writer, bytearray()))

    async with await asyncio.start_unix_server(accept, path):
        yield heard
