"""Record what real clients send: ``python -m tests.fuzz.record`` makes corpus/ again.

Each client talks to a server of ours, over a disk in memory, through a proxy that keeps what the
client said. Only its first requests are kept: a capture has a few KiB.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.check import find_program
from tests.fuzz.captures import CORPUS, Capture, take_apart
from tests.support.nbd_server import serving

MOST_BYTES = 2048  # of requests in one capture
MOST_CAPTURES = 2  # of one run: further connections say the same

# name -> command; {unix} and {tcp} stand for the URI, {path} and {port} for the proxy's sockets,
# {file} for a file of 1 KiB, {none} for one that is not there.
COMMANDS = {
    "nbdinfo": "nbdinfo {unix}",
    "nbdinfo-list": "nbdinfo --list {unix}",
    "nbdinfo-map": "nbdinfo --map {unix}",
    "nbdinfo-totals": "nbdinfo --map=qemu:allocation-depth --totals {unix}",
    "nbdinfo-tls": "nbdinfo nbds+unix:///disk?socket={path}",
    "nbdcopy-from": "nbdcopy --request-size=4096 {unix} null:",
    "nbdcopy-to": "nbdcopy --request-size=4096 --connections=1 {file} {unix}",
    "nbdcopy-zero": "nbdcopy --destination-is-zero --flush {file} {unix}",
    "qemu-img-info": "qemu-img info {unix}",
    "qemu-img-map": "qemu-img map --output=json {unix}",
    "qemu-img-convert": "qemu-img convert -f raw -O raw {unix} {none}",
    "qemu-img-write": "qemu-img convert -n -f raw -O raw {file} {unix}",
    "qemu-img-bitmap": "qemu-img map --output=json --image-opts"
    " driver=nbd,path={path},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:b0",
    "qemu-img-tls": "qemu-img info --object tls-creds-anon,id=t,endpoint=client --image-opts"
    " driver=nbd,path={path},export=disk,tls-creds=t",
    "qemu-nbd-list": "qemu-nbd --list -k {path}",
    "fio": "fio --name=job --ioengine=nbd --uri={unix} --rw=randrw --bs=512 --size=64k --iodepth=4"
    " --number_ios=32 --randseed=1",
    "fio-trim": "fio --name=job --ioengine=nbd --uri={unix} --rw=randtrim --bs=4k --size=64k"
    " --number_ios=16 --randseed=1",
    "nbd-client-list": "nbd-client -l 127.0.0.1 {port}",
}
QEMU_IO = ("read 0 4k", "write -P 3 512 512", "write -f -P 4 4k 512", "write -z 64k 64k")
QEMU_IO += ("write -z -u 128k 64k", "discard 256k 64k", "flush", "aio_read 8k 4k", "alloc 0 64k")


class Recorder:
    """A proxy that keeps what clients send, one stream for each connection, in order."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.streams: list[bytearray] = []

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = bytearray()
        self.streams.append(stream)
        from_server, to_server = await asyncio.open_unix_connection(self._server)
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass_on(reader, to_server, stream))
            group.create_task(_pass_on(from_server, writer, bytearray()))


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray
) -> None:
    try:
        while data := await reader.read(1 << 16):
            kept += data
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


@asynccontextmanager
async def recording(folder: Path) -> AsyncIterator[tuple[Recorder, str, int]]:
    """A server behind a proxy; gives the proxy, its unix socket and its TCP port."""
    async with serving(folder) as served:
        recorder = Recorder(served.path)
        path = str(folder / "proxy.sock")
        listener = socket.create_server(("127.0.0.1", 0))
        unix = await asyncio.start_unix_server(recorder.take, path)
        tcp = await asyncio.start_server(recorder.take, sock=listener)
        async with unix, tcp:
            yield recorder, path, listener.getsockname()[1]


async def record(name: str, words: list[str]) -> None:
    """Run one client, and save what it said."""
    with tempfile.TemporaryDirectory(prefix="nbdf-") as temporary:
        folder = Path(temporary)
        (folder / "file").write_bytes(bytes(range(1, 129)) * 8)
        async with recording(folder) as (recorder, path, port):
            places = {"path": path, "port": port, "unix": f"nbd+unix:///disk?socket={path}"}
            places |= {"file": folder / "file", "none": folder / "none"}
            command = [word.format(**places) for word in words]
            program = find_program(command[0])
            assert program is not None, f"{command[0]} is not installed"
            none = asyncio.subprocess.DEVNULL
            process = await asyncio.create_subprocess_exec(
                program, *command[1:], stdin=none, stdout=none, stderr=none, cwd=folder
            )
            code = await process.wait()
    found = [_shortened(take_apart(name, bytes(stream))) for stream in recorder.streams]
    found = [one for one in found if len(one.handshake) > 1]
    distinct = list({(one.handshake, one.transmission): one for one in found}.values())
    said = " ".join(words).replace("{", "").replace("}", "")
    for number, capture in enumerate(distinct[:MOST_CAPTURES]):
        named = f"{name}-{number + 1}" if number else name
        Capture(named, capture.handshake, capture.transmission).save(CORPUS, said)
    sizes = [sum(map(len, one.handshake + one.transmission)) for one in distinct]
    print(f"{name}: exit code {code}, bytes {sizes}")


def _shortened(capture: Capture) -> Capture:
    kept: list[bytes] = []
    for request in capture.transmission:
        if sum(map(len, kept)) + len(request) <= MOST_BYTES:
            kept.append(request)
    return Capture(capture.name, capture.handshake, tuple(kept))


async def main() -> None:
    """Make all captures again, but for those written by hand."""
    chosen = sys.argv[1:] or [*COMMANDS, "qemu-io"]
    commands = {name: text.split() for name, text in COMMANDS.items()}
    commands["qemu-io"] = ["qemu-io", "-f", "raw"]
    for part in QEMU_IO:
        commands["qemu-io"] += ["-c", part]
    commands["qemu-io"].append("{unix}")
    for name in chosen:
        await record(name, commands[name])


if __name__ == "__main__":
    asyncio.run(main())
