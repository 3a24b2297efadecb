"""Signals at bad moments."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import ssl
from pathlib import Path

from nbdfleece.base.errors import PeerViolation
from nbdfleece.protocol.nbd import client as talks
from tests.support.daemon_process import Daemon
from tests.support.live import KiB, MiB, ask, blocks, client, clients, descriptors, eventually
from tests.support.nbd_client import NbdClient
from tests.support.pki import Pki

POLICY = '[[rule]]\nwho = { any = true }\nexports = ["*"]\nallow = ["all"]\n'
CONTENT = blocks(MiB, 4 * KiB)
HANGUPS = 100


async def test_cve_2015_0847_storm_of_hangups_while_clients_come_and_go(
    short_tmp: Path, pki: Pki, rng: random.Random
) -> None:
    """Certificates and policy are read again and again, and nobody is disturbed."""
    policy, disk = short_tmp / "policy.toml", short_tmp / "vda.raw"
    policy.write_text(POLICY)
    disk.write_bytes(CONTENT)
    listen = ["--listen", "tcp:127.0.0.1:0,tls=allow", "--listen", f"unix:{short_tmp}/t,tls=allow"]
    creds = ["--tls-creds", pki.server, "--policy", policy]
    with Daemon(short_tmp, *listen, *creds, disk) as daemon:
        daemon.ready()
        async with client(daemon, "vda") as steady:
            before = descriptors(daemon)
            storming = True

            async def storm() -> None:
                nonlocal storming
                for _ in range(HANGUPS):
                    os.kill(daemon.process.pid, signal.SIGHUP)
                    await asyncio.sleep(rng.random() * 0.01)  # when, not until
                storming = False

            async def come_and_go() -> int:
                count = 0
                while storming:
                    await visit(str(short_tmp / "t"), pki, rng.randrange(4))
                    count += 1
                return count

            async with asyncio.TaskGroup() as group:
                visitors = [group.create_task(come_and_go()) for _ in range(4)]
                group.create_task(storm())
                while storming:
                    offset = rng.randrange(MiB - 64 * KiB)
                    read = await steady.read(offset, 64 * KiB)
                    assert read == CONTENT[offset : offset + 64 * KiB]
            assert all(each.result() for each in visitors)

            async def alone() -> bool:
                return len(await clients(daemon)) == 1

            await eventually(alone)
            await eventually(lambda: descriptors(daemon) == before)
            assert await ask(daemon, "query-fleece-snapshots") == []
            assert await steady.read(0, 4 * KiB) == CONTENT[: 4 * KiB]
        assert daemon.stop() == 0
        said = daemon.errors()
        assert "policy read again" in said
        assert "Traceback" not in said


async def visit(path: str, pki: Pki, how_far: int) -> None:
    """Connect, and leave at some point of the way into an export over TLS."""
    one = await NbdClient.open(path)
    try:
        if how_far > 0:
            await one.run(talks.begin_tls(no_zeroes=True))
        if how_far > 1:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            folder = pki.client("backup1")
            context.load_verify_locations(folder / "ca-cert.pem")
            context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
            await one.start_tls(context)
        if how_far > 2:
            export = await one.run(talks.go("vda"))
            one.begin_transmission(export, structured=False)
            assert await one.read(0, 4 * KiB) == CONTENT[: 4 * KiB]
    except (OSError, EOFError, PeerViolation) as error:
        raise AssertionError(f"a visitor was disturbed at step {how_far}") from error
    finally:
        await one.close()
