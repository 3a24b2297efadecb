"""Exports and the NBD server by command: QEMU's words, and clients that go on or do not (T-N*)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import run
from tests.support.nbd_client import connected
from tests.support.pki import Pki
from tests.support.storage_daemon import StorageDaemon

Program = Callable[[str], str]
KiB = 1 << 10
MiB = 1 << 20
UNIX = {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[StorageDaemon]:
    make_disk(short_tmp / "a.raw", MiB)
    nodes = ("file,node-name=a,filename=a.raw,discard=unmap", "null-co,node-name=ro,read-only=on")
    options = [word for node in nodes for word in ("--blockdev", node)]
    with StorageDaemon(short_tmp, *options) as running:
        yield running


@pytest.fixture
def served(daemon: StorageDaemon) -> StorageDaemon:
    assert daemon.ask("nbd-server-start", UNIX) == {}
    return daemon


def export(export_id: str, node: str = "a", **more: object) -> dict:
    named = {name.replace("_", "-"): value for name, value in more.items()}
    return {"type": "nbd", "id": export_id, "node-name": node, **named}


def ids(daemon: StorageDaemon) -> list[str]:
    return [row["id"] for row in daemon.ask("query-block-exports")]


# --- T-N1: the server ----------------------------------------------------------------------------


def test_without_a_server_there_are_no_exports(daemon: StorageDaemon) -> None:
    """T-N1."""
    for command, arguments in (
        ("block-export-add", export("e")),
        ("nbd-server-add", {"device": "a"}),
        ("nbd-server-stop", None),
    ):
        assert daemon.error(command, arguments) == "NBD server not running"
    assert daemon.error("nbd-server-remove", {"name": "a"}) == "Export 'a' is not found"
    assert daemon.ask("query-block-exports") == []


def test_the_server_starts_and_stops_once(served: StorageDaemon) -> None:
    """T-N1."""
    assert served.error("nbd-server-start", UNIX) == "NBD server already running"
    served.ask("block-export-add", export("e1"))
    served.ask("block-export-add", export("e2", name="other"))
    assert served.ask("nbd-server-stop") == {}
    deleted = [served.event("BLOCK_EXPORT_DELETED"), served.event("BLOCK_EXPORT_DELETED")]
    assert deleted == [{"id": "e1"}, {"id": "e2"}]
    assert not (served.folder / "nbd.sock").exists()
    assert served.error("nbd-server-stop") == "NBD server not running"
    assert served.ask("nbd-server-start", UNIX) == {}
    served.ask("block-export-add", export("e1"))


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ({"type": "unix"}, "Parameter 'addr.data' is missing"),
        ({"type": "unix", "data": {}}, "Parameter 'addr.data.path' is missing"),
        (
            {"type": "unix", "data": {"path": "no/s"}},
            "Failed to bind socket to no/s: No such file or directory",
        ),
        (
            {"type": "unix", "data": {"path": "x" * 120}},
            f"UNIX socket path '{'x' * 120}' is too long",
        ),
        (
            {"type": "inet", "data": {"host": "127.0.0.1", "port": "abc"}},
            "address resolution failed for 127.0.0.1:abc: Servname not supported for ai_socktype",
        ),
        (
            {"type": "inet", "data": {"host": "192.0.2.1", "port": "7777"}},
            "Failed to bind socket: Cannot assign requested address",
        ),
        ({"type": "fd", "data": {"str": "3"}}, "only QEMU supports file descriptor passing"),
        ({"type": "vsock", "data": {"cid": "x", "port": "1"}}, "Failed to parse cid 'x'"),
    ],
)
def test_addresses_that_are_not_to_be_had(daemon: StorageDaemon, address: dict, error: str) -> None:
    assert daemon.error("nbd-server-start", {"addr": address}) == error
    assert daemon.ask("nbd-server-start", UNIX) == {}  # nothing has changed


def test_a_daemon_that_serves_keeps_its_server(short_tmp: Path) -> None:
    disk = make_disk(short_tmp / "vda.raw", MiB)
    with Daemon(short_tmp, disk) as running:
        running.ready()
        started = running.run("qmp", "nbd-server-start", json.dumps(UNIX))
        assert "NBD server already running" in started.err
        assert "as long as the daemon" in running.run("qmp", "nbd-server-stop").err
        removed = running.run("qmp", "block-export-del", '{"id": "vda", "mode": "hard"}')
        assert "export 'vda' belongs to disk 'vda' and goes with it" in removed.err
        assert running.run("health").code == 0


# --- T-N1, T-N4: exports -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (export("e", "nope"), "Cannot find device='' nor node-name='nope'"),
        (export("#x"), "Invalid block export id"),
        (export("9"), "Invalid block export id"),
        (export(""), "Invalid block export id"),
        (export("first"), "Block export id 'first' is already in use"),
        (export("e"), "NBD server already has export named 'a'"),
        (export("e", "ro", writable=True), "Cannot export read-only node as writable"),
        (export("e", iothread="io"), 'iothread "io" not found'),
        (export("e", name="n" * 4097), f"export name '{'n' * 4097}' too long"),
        (export("e", description="n" * 4097), f"description '{'n' * 4097}' too long"),
        (export("e", name="n", bitmaps=["b"]), "Bitmap 'b' is not found"),
        (
            export("e", name="n", bitmaps=[{"node": "a", "name": "b"}]),
            "Dirty bitmap 'b' not found",
        ),
        (export("e", bitmap="b"), "Parameter 'bitmap' is unexpected"),
        ({"id": "e", "node-name": "a"}, "Parameter 'type' is missing"),
        ({**export("e"), "type": "fuse"}, "Parameter 'type' does not accept value 'fuse'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_exports_that_are_refused(served: StorageDaemon, arguments: dict, error: str) -> None:
    """T-N1, T-N4."""
    served.ask("block-export-add", export("first"))
    assert served.error("block-export-add", arguments) == error
    assert ids(served) == ["first"]


def test_two_exports_of_one_node_are_listed_the_latest_first(served: StorageDaemon) -> None:
    """T-N4."""
    served.ask("block-export-add", export("e1", writable=True, description="the first"))
    served.ask("block-export-add", export("e2", name="other"))
    row = {"node-name": "a", "shutting-down": False, "type": "nbd"}
    assert served.ask("query-block-exports") == [{**row, "id": "e2"}, {**row, "id": "e1"}]


def test_the_old_commands(served: StorageDaemon) -> None:
    served.ask("block-export-add", export("e1", name="n1"))
    assert served.ask("nbd-server-add", {"device": "ro", "writable": True}) == {}  # as read-only
    assert served.error("nbd-server-add", {"device": "nope"}) == (
        "Cannot find device='nope' nor node-name='nope'"
    )
    assert served.error("nbd-server-add", {"device": "a", "name": "e1"}) == (
        "Block export id 'e1' is already in use"
    )
    assert served.error("nbd-server-add", {"device": "a", "name": "n1"}) == (
        "NBD server already has export named 'n1'"
    )
    # By id, which only exports of nbd-server-add have as their name.
    assert served.error("nbd-server-remove", {"name": "n1"}) == "Export 'n1' is not found"
    assert served.ask("nbd-server-remove", {"name": "ro"}) == {}
    assert served.event("BLOCK_EXPORT_DELETED") == {"id": "ro"}


async def test_description_and_flags_are_what_was_asked_for(
    served: StorageDaemon, program: Program
) -> None:
    """T-N4, T-N5, T-N6."""
    served.ask("block-export-add", export("e1", writable=True, description="the first"))
    served.ask("block-export-add", export("e2", name="deep", allocation_depth=True))
    listed = json.loads(run(program("nbdinfo"), "--list", "--json", served.uri("")).stdout)
    first, deep = sorted(listed["exports"], key=lambda row: row["export-name"])
    assert (first["description"], first["is_read_only"]) == ("the first", False)
    assert deep["is_read_only"] is True
    assert first["can_multi_conn"] is deep["can_multi_conn"] is True
    assert "qemu:allocation-depth" in deep["contexts"]
    assert "qemu:allocation-depth" not in first["contexts"]


def test_the_depth_of_an_overlay_is_told_layer_by_layer(
    served: StorageDaemon, program: Program
) -> None:
    """T-N5: two at the bottom, one where the overlay has data, none where nobody has."""
    for image, backing, where in (
        ("base", (), "write 0 2M"),
        ("top", ("-b", "base", "-F", "qcow2"), "write 1M 2M"),
    ):
        path = str(served.folder / image)
        run(program("qemu-img"), "create", "-q", "-f", "qcow2", *backing, path, "4M")
        run(program("qemu-io"), "-f", "qcow2", "-c", where, path)
    file = {"driver": "file", "filename": "top"}
    served.ask("blockdev-add", {"driver": "qcow2", "node-name": "top", "file": file})
    served.ask("block-export-add", export("d", "top", name="d", allocation_depth=True))
    words = ("--map=qemu:allocation-depth", "--json", served.uri("d"))
    rows = json.loads(run(program("nbdinfo"), *words).stdout)
    told = [(row["offset"] // MiB, row["length"] // MiB, row["type"]) for row in rows]
    assert told == [(0, 1, 2), (1, 2, 1), (3, 1, 0)]


@pytest.mark.parametrize(("most", "several"), [(0, True), (1, False), (2, True)])
async def test_one_connection_at_most_is_no_multi_conn(
    daemon: StorageDaemon, most: int, several: bool
) -> None:
    """T-N6."""
    daemon.ask("nbd-server-start", {**UNIX, "max-connections": most})
    daemon.ask("block-export-add", export("e"))
    async with connected(str(daemon.folder / "nbd.sock"), "a") as one:
        assert one.export is not None
        assert bool(one.export.flags & c.NBD_FLAG_CAN_MULTI_CONN) is several


async def test_writers_see_each_others_data_after_a_flush(served: StorageDaemon) -> None:
    """T-N6."""
    served.ask("block-export-add", export("e", writable=True, writethrough=True))
    path = str(served.folder / "nbd.sock")
    async with (
        connected(path, "a") as one,
        connected(path, "a") as two,
        connected(path, "a") as xyz,
    ):
        for number, writer in enumerate((one, two, xyz)):
            await writer.write(number * 64 * KiB, bytes((number + 7,)) * 64 * KiB)
            await writer.zero(MiB - (number + 1) * 4 * KiB, 4 * KiB)
            await writer.flush()
            for reader in (one, two, xyz):
                data = await reader.read(number * 64 * KiB, 64 * KiB)
                assert data == bytes((number + 7,)) * 64 * KiB
        await one.trim(512 * KiB, 64 * KiB)
    assert (served.folder / "a.raw").read_bytes()[-12 * KiB :] == bytes(12 * KiB)


# --- T-N3: removal -------------------------------------------------------------------------------


async def test_safe_removal_is_refused_while_there_is_a_client(served: StorageDaemon) -> None:
    """T-N3."""
    served.ask("block-export-add", export("e"))
    path = str(served.folder / "nbd.sock")
    async with connected(path, "a") as one:
        for arguments in ({"id": "e"}, {"id": "e", "mode": "safe"}):
            assert served.error("block-export-del", arguments) == "export 'e' still in use"
        assert await one.read(0, 512) == b"\1" * 512
        assert served.ask("query-block-exports")[0]["shutting-down"] is False
    # The client has said so that it leaves; the export is free as soon as that is read.
    while "error" in served.answer("block-export-del", {"id": "e"}):
        pass
    assert served.event("BLOCK_EXPORT_DELETED") == {"id": "e"}
    assert served.error("block-export-del", {"id": "e"}) == "Export 'e' is not found"
    with pytest.raises(Exception, match=r"(?i)export|unknown"):
        async with connected(path, "a"):
            pass


async def test_hard_removal_disconnects(served: StorageDaemon) -> None:
    """T-N3."""
    served.ask("block-export-add", export("e"))
    async with connected(str(served.folder / "nbd.sock"), "a") as one:
        assert served.ask("block-export-del", {"id": "e", "mode": "hard"}) == {}
        assert served.event("BLOCK_EXPORT_DELETED") == {"id": "e"}
        await one.wait_closed()
        assert ids(served) == []


@pytest.mark.parametrize("mode", ["hide", "soft"])
async def test_a_hidden_export_goes_with_its_last_client(served: StorageDaemon, mode: str) -> None:
    served.ask("block-export-add", export("e"))
    path = str(served.folder / "nbd.sock")
    async with connected(path, "a") as one:
        assert served.ask("block-export-del", {"id": "e", "mode": mode}) == {}
        assert served.ask("query-block-exports")[0]["shutting-down"] is True
        error = await one.error_of(c.NBD_CMD_READ, 0, 512)
        assert error == (0 if mode == "hide" else c.NBD_ESHUTDOWN)
        served.ask("block-export-add", export("e2"))  # the name is free
    assert served.event("BLOCK_EXPORT_DELETED") == {"id": "e"}
    assert ids(served) == ["e2"]


def test_an_iothread_in_use_stays(served: StorageDaemon) -> None:
    """QEMU lets it go, and dies of that."""
    served.ask("object-add", {"qom-type": "iothread", "id": "io"})
    served.ask("block-export-add", export("e", iothread="io"))
    assert served.error("object-del", {"id": "io"}) == "object 'io' is in use, can not be deleted"
    served.ask("block-export-del", {"id": "e"})
    assert served.ask("object-del", {"id": "io"}) == {}


# --- T-N7: TLS -----------------------------------------------------------------------------------


@pytest.fixture
def secured(daemon: StorageDaemon, pki: Pki) -> StorageDaemon:
    """Only clients whose name is backup1 are let in."""
    x509 = {"qom-type": "tls-creds-x509", "endpoint": "server", "dir": str(pki.server)}
    daemon.ask("object-add", {**x509, "id": "tls"})
    daemon.ask("object-add", {"qom-type": "authz-simple", "id": "who", "identity": "CN=backup1"})
    daemon.ask("nbd-server-start", {**UNIX, "tls-creds": "tls", "tls-authz": "who"})
    daemon.ask("block-export-add", export("e"))
    return daemon


def tls_uri(daemon: StorageDaemon, name: str, client: Path) -> str:
    path = daemon.folder / "nbd.sock"
    return f"nbds+unix:///{name}?socket={path}&tls-certificates={client}"


def test_the_authorization_object_lets_one_in_and_no_other(
    secured: StorageDaemon, pki: Pki, program: Program
) -> None:
    """T-N7."""
    nbdinfo = program("nbdinfo")
    let_in = run(nbdinfo, tls_uri(secured, "a", pki.client("backup1")))
    assert "newstyle-fixed with TLS" in let_in.stdout
    assert (
        'export="a"' in run(nbdinfo, "--list", tls_uri(secured, "", pki.client("backup1"))).stdout
    )
    for stranger in (pki.client("backup2"), pki.foreign_client("backup1")):
        for words in (
            [tls_uri(secured, "a", stranger)],
            ["--list", tls_uri(secured, "", stranger)],
        ):
            refused = run(nbdinfo, *words, code=None)
            assert refused.returncode != 0
            assert "export=" not in refused.stdout
    plain = run(nbdinfo, secured.uri("a"), code=None)
    assert plain.returncode != 0


def test_what_a_server_goes_by_is_not_deleted(secured: StorageDaemon) -> None:
    for name in ("tls", "who"):
        error = secured.error("object-del", {"id": name})
        assert error == f"object '{name}' is in use, can not be deleted"
    secured.ask("nbd-server-stop")
    for name in ("tls", "who"):
        assert secured.ask("object-del", {"id": name}) == {}


def test_unknown_objects_are_refused(daemon: StorageDaemon) -> None:
    """QEMU starts with an unknown authorization object, and lets nobody in."""
    daemon.ask("object-add", {"qom-type": "authz-list", "id": "list"})
    for more, error in (
        ({"tls-creds": "c"}, "No TLS credentials with id 'c'"),
        ({"tls-creds": "list"}, "Object with id 'list' is not TLS credentials"),
        ({"tls-authz": "z"}, "No authorization object with id 'z'"),
        ({"tls-authz": "list"}, "'tls-authz' needs 'tls-creds': without TLS nobody has a name"),
        ({"max-connections": -1}, "Parameter 'max-connections' expects uint32_t"),
    ):
        assert daemon.error("nbd-server-start", {**UNIX, **more}) == error
    assert daemon.ask("object-del", {"id": "list"}) == {}  # no failed start holds it


async def test_a_plain_server_serves_no_tls_client(
    served: StorageDaemon, pki: Pki, program: Program
) -> None:
    """T-N7."""
    served.ask("block-export-add", export("e"))
    assert run(
        program("nbdinfo"), tls_uri(served, "a", pki.client("backup1")), code=None
    ).returncode
