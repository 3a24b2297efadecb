"""Real clients over TLS: who gets in and reads right, who does not and is in the log."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import client as talks
from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import MiB, blocks, eventually, run, soon
from tests.support.nbd_client import NbdClient
from tests.support.pki import Pki
from tests.support.python313 import python313

Program = Callable[[str], str]
SIZE = 3 * MiB + 512
CONTENT = blocks(SIZE, 4096)
POLICY = """
[[rule]]
who = { cert = "CN=backup*" }
exports = ["vda@*"]
allow = ["list", "read"]
[[rule]]
who = { cert = "CN=guest,O=Example" }
exports = ["vda"]
allow = ["all"]
[[rule]]
who = { psk = "alice" }
exports = ["vda@*"]
allow = ["list", "read"]
"""


@pytest.fixture
def policy(short_tmp: Path) -> Path:
    path = short_tmp / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def daemon(short_tmp: Path, pki: Pki, policy: Path) -> Iterator[Daemon]:
    with serving_tls(short_tmp, pki.server, policy) as running:
        yield running


@contextmanager
def serving_tls(folder: Path, creds: Path, policy: Path, **more: str) -> Iterator[Daemon]:
    """A daemon with a snapshot, on a unix socket and on TCP."""
    disk = folder / "vda.raw"
    disk.write_bytes(CONTENT)
    args = ["--listen", "tcp:127.0.0.1:0", "--tls-creds", creds, "--policy", policy, disk]
    with Daemon(folder, *args, **more) as running:
        running.ready()
        assert running.run("snapshot", "create", "vda", "--name", "one").code == 0
        yield running
        assert "Traceback" not in running.errors(), running.errors()


def port(daemon: Daemon) -> int:
    found = re.search(r"listening on tcp:127\.0\.0\.1:(\d+),tls=require", daemon.errors())
    assert found is not None, daemon.errors()
    return int(found[1])


def unix(daemon: Daemon, export: str, client: Path) -> str:
    return f"nbds+unix:///{export}?socket={daemon.socket}&tls-certificates={client}"


def tcp(daemon: Daemon, export: str, client: Path, *, host: str = "localhost") -> str:
    return f"nbds://{host}:{port(daemon)}/{export}?tls-certificates={client}"


def creds_of(client: Path) -> list[str]:
    return ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={client}"]


def opts(daemon: Daemon, export: str, *, tls: str = ",tls-creds=tls") -> str:
    server = f"server.type=inet,server.host=localhost,server.port={port(daemon)}"
    return f"driver=nbd,{server},export={export}{tls}"


def ending(daemon: Daemon, *texts: str) -> Callable[[], bool]:
    """Whether one client's last line in the log has all these texts."""

    def found() -> bool:
        lines = [line for line in daemon.errors().splitlines() if " ends: " in line]
        return any(all(text in line for text in texts) for line in lines)

    return found


# --- those who may ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", [unix, tcp])
async def test_nbdinfo(daemon: Daemon, pki: Pki, program: Program, place) -> None:
    done = run(program("nbdinfo"), place(daemon, "vda@one", pki.client("backup1")))
    assert "newstyle-fixed with TLS" in done.stdout
    assert f"export-size: {SIZE}" in done.stdout
    listed = run(program("nbdinfo"), "--list", place(daemon, "", pki.client("backup1")))
    assert 'export="vda@one"' in listed.stdout
    assert 'export="vda"' not in listed.stdout
    await eventually(ending(daemon, "CN=backup1", 'tls="TLSv1.3"', 'export="vda@one"'))


@pytest.mark.parametrize("connections", ["1", "4"])
@pytest.mark.parametrize("place", [unix, tcp])
def test_nbdcopy(
    daemon: Daemon, pki: Pki, program: Program, short_tmp: Path, place, connections: str
) -> None:
    guest = run(
        *(program("qemu-io"), *creds_of(pki.client("guest", org="Example")), "--image-opts"),
        *("-c", "write -P 7 0 1M", "-c", "flush", opts(daemon, "vda")),
    )
    assert "wrote 1048576" in guest.stdout
    copy = short_tmp / "copy.raw"
    uri = place(daemon, "vda@one", pki.client("backup1"))
    run(program("nbdcopy"), "--connections", connections, uri, copy)
    assert copy.read_bytes() == CONTENT
    assert (short_tmp / "vda.raw").read_bytes() == b"\7" * MiB + CONTENT[MiB:]


def test_qemu_img(daemon: Daemon, pki: Pki, program: Program, short_tmp: Path) -> None:
    copy = short_tmp / "copy.qcow2"
    run(
        *(program("qemu-img"), "convert", *creds_of(pki.client("backup1")), "--image-opts"),
        *("-O", "qcow2", opts(daemon, "vda@one"), copy),
    )
    run(program("qemu-img"), "compare", "-f", "qcow2", "-F", "raw", copy, short_tmp / "vda.raw")
    over_unix = f"driver=nbd,server.type=unix,server.path={daemon.socket},export=vda@one"
    run(
        *(program("qemu-img"), "compare", *creds_of(pki.client("backup1")), "--image-opts"),
        f"{over_unix},tls-creds=tls,tls-hostname=localhost",
        f"driver=qcow2,file.filename={copy}",
    )


def test_qemu_io(daemon: Daemon, pki: Pki, program: Program, short_tmp: Path) -> None:
    done = run(
        *(program("qemu-io"), *creds_of(pki.client("guest", org="Example")), "--image-opts"),
        *("-c", "write -P 0x55 4k 1M", "-c", "read -P 0x55 4k 1M", "-c", "write -z 2M 64k"),
        *("-c", "discard 2200k 64k", "-c", "read -P 0 2M 64k", "-c", "flush", opts(daemon, "vda")),
    )
    assert "failed" not in done.stdout + done.stderr
    assert (short_tmp / "vda.raw").read_bytes()[4096 : 4096 + MiB] == b"\x55" * MiB


def test_nbd_client_lists(daemon: Daemon, pki: Pki, program: Program) -> None:
    folder = pki.client("backup1")
    done = run(
        *(program("nbd-client"), "-l", "localhost", str(port(daemon)), "-x"),
        *("-certfile", folder / "client-cert.pem", "-keyfile", folder / "client-key.pem"),
        *("-cacertfile", folder / "ca-cert.pem"),
    )
    assert done.stdout.splitlines()[-1].startswith("vda@one: disk vda as of ")
    assert "\nvda\n" not in done.stdout


# --- those who may not -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "who", "why"),
    [
        ("nbdinfo", "foreign_client", "unable to get local issuer certificate"),
        ("nbdinfo", "expired_client", "certificate has expired"),
        ("nbdinfo", "revoked_client", "certificate revoked"),
        ("nbdinfo", "anonymous_client", "peer did not return a certificate"),
        ("nbdinfo", "server_as_client", "unsuitable certificate purpose"),
        # With the others, qemu does not even begin.
        ("qemu-img", "revoked_client", "certificate revoked"),
        ("qemu-img", "anonymous_client", "peer did not return a certificate"),
    ],
)
async def test_strangers_are_refused(
    daemon: Daemon, pki: Pki, program: Program, tool: str, who: str, why: str
) -> None:
    refuse(daemon, program, tool, getattr(pki, who)(), "vda@one")
    await eventually(ending(daemon, "WARNING", f"TLS handshake failed: {why}"))


@pytest.mark.parametrize("tool", ["nbdinfo", "qemu-img"])
async def test_of_the_right_ca_but_not_allowed(
    daemon: Daemon, pki: Pki, program: Program, tool: str
) -> None:
    said = refuse(daemon, program, tool, pki.client("mallory"), "vda@one")
    no_such = refuse(daemon, program, tool, pki.client("mallory"), "vda@two")
    assert said.replace("vda@one", "vda@two") == no_such
    await eventually(ending(daemon, "WARNING", "CN=mallory", 'refused="vda@one"'))
    refuse(daemon, program, tool, pki.client("backup1"), "vda")
    await eventually(ending(daemon, "WARNING", "CN=backup1", 'refused="vda"'))


@pytest.mark.parametrize("tool", ["nbdinfo", "qemu-img"])
async def test_without_tls_there_is_nothing(daemon: Daemon, program: Program, tool: str) -> None:
    if tool == "nbdinfo":
        run(program(tool), f"nbd://localhost:{port(daemon)}/vda@one", code=1)
        # A local user for whom no rule says anything gets no more.
        run(program(tool), daemon.uri("vda@one"), code=1)
    else:
        run(program(tool), "info", "--image-opts", opts(daemon, "vda@one", tls=""), code=1)
    await eventually(ending(daemon, "how="))
    assert "opens export" not in daemon.errors()


def refuse(daemon: Daemon, program: Program, tool: str, client: Path, export: str) -> str:
    if tool == "nbdinfo":
        done = run(program(tool), tcp(daemon, export, client), code=1)
    else:
        command = ["info", *creds_of(client), "--image-opts", opts(daemon, export)]
        done = run(program(tool), *command, code=1)
    return done.stderr


@pytest.mark.parametrize("server", ["expired_server", "foreign_server"])
async def test_client_that_refuses_the_server_is_in_the_log(
    short_tmp: Path, pki: Pki, policy: Path, program: Program, server: str
) -> None:
    with serving_tls(short_tmp, getattr(pki, server)(), policy) as daemon:
        refuse(daemon, program, "nbdinfo", pki.client("backup1"), "vda@one")
        await eventually(ending(daemon, "TLS handshake"))


# --- reloading -------------------------------------------------------------------------------


async def test_reloading_drops_nobody(
    short_tmp: Path, pki: Pki, policy: Path, program: Program
) -> None:
    creds = short_tmp / "creds"
    shutil.copytree(pki.server, creds)
    with serving_tls(short_tmp, creds, policy) as daemon:
        client = await connected(daemon, pki.client("backup1"))
        write(creds / "server-key.pem", "broken")
        write(policy, "[[rule]]\nwho = { any = tru }\n")
        daemon.process.send_signal(signal.SIGHUP)
        await eventually(lambda: daemon.errors().count("stay in use") == 2)
        assert "server-key.pem" in daemon.errors()
        run(program("nbdinfo"), tcp(daemon, "vda@one", pki.client("backup1")))

        shutil.copy(pki.server / "server-key.pem", creds / "server-key.pem")
        (creds / "ca-cert.pem").write_bytes(pki.stranger.pem)
        (creds / "ca-crl.pem").unlink()
        write(policy, POLICY.replace("vda@*", "vdb@*"))
        daemon.process.send_signal(signal.SIGHUP)
        await eventually(lambda: daemon.errors().count("read again") == 2)
        refuse(daemon, program, "nbdinfo", pki.client("backup1"), "vda@one")
        await eventually(ending(daemon, "unable to get local issuer"))
        refuse(daemon, program, "nbdinfo", pki.foreign_client(), "vda@one")
        await eventually(ending(daemon, 'refused="vda@one"'))
        assert await soon(client.read(0, MiB)) == CONTENT[:MiB]
        await client.close()


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def connected(daemon: Daemon, folder: Path) -> NbdClient:
    """A client of ours in transmission with the snapshot."""
    context = await asyncio.to_thread(ssl.create_default_context, cafile=folder / "ca-cert.pem")
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    one = await NbdClient.open(str(daemon.socket))
    await one.run(talks.begin_tls(no_zeroes=True))
    await one.start_tls(context)
    done = await one.run(
        talks.haggle("vda@one", no_zeroes=True, structured=True, contexts=[], extended=False)
    )
    one.begin_transmission(done.export, structured=True)
    return one


def test_expiry_is_in_the_status(short_tmp: Path, pki: Pki) -> None:
    disk = make_disk(short_tmp / "vda.raw", MiB)
    with Daemon(short_tmp, "--tls-creds", pki.server, disk) as daemon:
        daemon.ready()
        status = daemon.run("status", "--json").json
        assert status["daemon"]["tls"]["path"] == str(pki.server)
        files = {row["file"] for row in status["daemon"]["tls"]["expires"]}
        assert files == {"ca-cert.pem", "server-cert.pem", "ca-crl.pem"}
        (warning,) = [text for text in status["warnings"] if "server-cert.pem" in text]
        assert re.search(r"expires in \d+ days", warning)
        assert warning in daemon.run("status").out
        assert daemon.run("health").code == 0, "it is well now"


def test_what_has_expired_is_no_good_health(short_tmp: Path, pki: Pki) -> None:
    disk = make_disk(short_tmp / "vda.raw", MiB)
    with Daemon(short_tmp, "--tls-creds", pki.expired_server(), disk) as daemon:
        daemon.ready()
        assert re.search(r"WARNING .*server-cert\.pem.* has expired", daemon.errors())
        unwell = daemon.run("health")
        assert unwell.code == 1
        assert "server-cert.pem" in unwell.err


# --- pre-shared keys -------------------------------------------------------------------------


@pytest.fixture
def keys(short_tmp: Path) -> Path:
    """Folders of a server, and of the clients alice, bob, and eve, whose key is wrong."""
    root = short_tmp / "psk"
    right, wrong = "a5" * 32, "a6" * 32
    keys = {"server": [("alice", right), ("bob", right)], "alice": [("alice", right)]}
    keys |= {"bob": [("bob", right)], "eve": [("alice", wrong)]}
    for folder, lines in keys.items():
        (root / folder).mkdir(parents=True)
        text = "".join(f"{name}:{key}\n" for name, key in lines)
        (root / folder / "keys.psk").write_text(text)
    return root


async def test_pre_shared_keys(short_tmp: Path, policy: Path, keys: Path, program: Program) -> None:
    """Gnutls peers, TLS 1.2 and 1.3; the policy holds for users of keys too."""

    def psk(folder: str, user: str, priority: str) -> list[str]:
        where = f"dir={keys / folder},username={user}{priority}"
        return ["--object", f"tls-creds-psk,id=tls,endpoint=client,{where}"]

    old = ",priority=NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2"
    with serving_tls(short_tmp, keys / "server", policy, python=python313()) as daemon:
        where = ["--image-opts", opts(daemon, "vda@one")]
        for priority in ("", old):
            run(program("qemu-img"), "info", *psk("alice", "alice", priority), *where)
        await eventually(ending(daemon, "alice", "TLSv1.3", 'export="vda@one"'))
        await eventually(ending(daemon, "alice", "TLSv1.2", 'export="vda@one"'))
        copy = short_tmp / "copy.raw"
        uri = f"nbds://alice@localhost:{port(daemon)}/vda@one"
        run(program("nbdcopy"), f"{uri}?tls-psk-file={keys}/alice/keys.psk", copy)
        assert copy.read_bytes() == CONTENT
        run(program("qemu-img"), "info", *psk("bob", "bob", ""), *where, code=1)
        await eventually(ending(daemon, "WARNING", "bob", 'refused="vda@one"'))
        for priority in ("", old):
            run(program("qemu-img"), "info", *psk("eve", "alice", priority), *where, code=1)
        await eventually(lambda: daemon.errors().count("TLS handshake failed") == 2)
