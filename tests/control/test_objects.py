"""object-add and object-del, in QEMU's words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import InUse
from nbdfleece.control.objects import Object, Objects
from tests.support.pki import Pki
from tests.support.storage_daemon import StorageDaemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageDaemon]:
    folder = Path(tmp_path_factory.mktemp("o"))
    with StorageDaemon(folder) as running:
        yield running


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"id": "o"}, "Parameter 'qom-type' is missing"),
        ({"qom-type": "nope", "id": "o"}, "Parameter 'qom-type' does not accept value 'nope'"),
        ({"qom-type": "authz-list"}, "Parameter 'id' is missing"),
        ({"qom-type": "authz-list", "id": "#o"}, "Parameter 'id' expects an identifier"),
        ({"qom-type": "authz-simple", "id": "o"}, "Parameter 'identity' is missing"),
        (
            {"qom-type": "authz-simple", "id": "o", "identity": 1},
            "Invalid parameter type for 'identity', expected: string",
        ),
        (
            {"qom-type": "authz-simple", "id": "o", "identity": "CN=x", "foo": 1},
            "Parameter 'foo' is unexpected",
        ),
        (
            {"qom-type": "authz-list", "id": "o", "policy": "maybe"},
            "Parameter 'policy' does not accept value 'maybe'",
        ),
        (
            {"qom-type": "authz-list", "id": "o", "rules": [{"match": "a"}]},
            "Parameter 'rules[0].policy' is missing",
        ),
        ({"qom-type": "tls-creds-x509", "id": "o"}, "Missing 'dir' property value"),
        (
            {"qom-type": "tls-creds-x509", "id": "o", "endpoint": "server", "dir": "no"},
            "Unable to access credentials no/ca-cert.pem: No such file or directory",
        ),
        (
            {"qom-type": "tls-creds-psk", "id": "o", "endpoint": "server", "dir": "."},
            "Unable to access credentials ./keys.psk: No such file or directory",
        ),
        (
            {"qom-type": "tls-creds-x509", "id": "o", "dir": "."},
            "Unable to access credentials ./ca-cert.pem: No such file or directory",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_is_refused(daemon: StorageDaemon, arguments: dict, error: str) -> None:
    assert daemon.error("object-add", arguments) == error
    assert daemon.error("object-del", {"id": "o"}) == "object 'o' not found"


def test_ids_are_unique_whatever_the_kind(daemon: StorageDaemon) -> None:
    daemon.ask("object-add", {"qom-type": "iothread", "id": "x", "poll-max-ns": 5})
    again = {"qom-type": "authz-list", "id": "x", "rules": [{"match": "CN=*", "policy": "allow"}]}
    assert daemon.error("object-add", again) == (
        "attempt to add duplicate property 'x' to object (type 'container')"
    )
    assert daemon.ask("object-del", {"id": "x"}) == {}
    assert daemon.ask("object-add", again) == {}
    assert daemon.ask("object-del", {"id": "x"}) == {}


@pytest.mark.parametrize("kind", ["authz-list-file", "authz-listfile"])
def test_a_list_in_a_file_has_both_names(daemon: StorageDaemon, kind: str) -> None:
    """QEMU 7.2 knows the one in its schema and the other in its code, and can make neither."""
    (daemon.folder / "rules.json").write_text('{"policy": "deny", "rules": []}')
    arguments = {"qom-type": kind, "id": "file", "filename": str(daemon.folder / "rules.json")}
    assert daemon.ask("object-add", arguments) == {}
    assert daemon.ask("object-del", {"id": "file"}) == {}


def test_a_missing_key_is_named(daemon: StorageDaemon, pki: Pki, tmp_path: Path) -> None:
    shutil.copytree(pki.server, tmp_path / "creds")
    (tmp_path / "creds" / "server-key.pem").unlink()
    arguments = {"qom-type": "tls-creds-x509", "id": "o", "endpoint": "server"}
    error = daemon.error("object-add", {**arguments, "dir": str(tmp_path / "creds")})
    missing = tmp_path / "creds" / "server-key.pem"
    assert error == f"Unable to access credentials {missing}: No such file or directory"


def test_an_object_that_cannot_let_go_stays() -> None:
    def refuse() -> None:
        raise InUse("someone needs it")

    objects = Objects()
    objects.add(Object("x", "thing", None, let_go=refuse))
    with pytest.raises(InUse, match="someone needs it"):
        objects.remove("x")
    assert [found.id for found in objects] == ["x"]


# --- throttle groups ---------------------------------------------------------------------------


@pytest.fixture
def group(daemon: StorageDaemon) -> Iterator[str]:
    limits = {"iops-total": 10, "bps-read": 5}
    daemon.ask("object-add", {"qom-type": "throttle-group", "id": "g", "limits": limits})
    yield "/objects/g"
    daemon.ask("object-del", {"id": "g"})


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (
            {"limits": {"iops-total": -1}},
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (
            {"limits": {"iops-total": 1, "iops-read": 2}},
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        ({"limits": {"iops": 1}}, "Parameter 'limits.iops' is unexpected"),
        ({"foo": 1}, "Parameter 'foo' is unexpected"),
    ],
)
def test_limits_that_make_no_sense(daemon: StorageDaemon, more: dict, error: str) -> None:
    """T-T3."""
    arguments = {"qom-type": "throttle-group", "id": "bad", **more}
    assert daemon.error("object-add", arguments) == error
    assert daemon.error("object-del", {"id": "bad"}) == "object 'bad' not found"


def test_limits_of_a_group_are_read_and_changed(daemon: StorageDaemon, group: str) -> None:
    """T-T3."""

    def limits() -> dict:
        return daemon.ask("qom-get", {"path": group, "property": "limits"})

    def change(name: str, value: object) -> str:
        return daemon.error("qom-set", {"path": group, "property": name, "value": value})

    assert (limits()["iops-total"], limits()["bps-read"]) == (10, 5)
    assert daemon.ask("qom-get", {"path": "g", "property": "x-iops-total"}) == 10
    value = {"iops-total": 20}
    daemon.ask("qom-set", {"path": group, "property": "limits", "value": value})
    assert (limits()["iops-total"], limits()["bps-read"]) == (20, 5)  # not given: as before
    assert "cannot be used at the same time" in change("limits", {"iops-read": 20})
    assert change("limits", 5) == "Invalid parameter type for 'limits', expected: object"
    assert change("x-iops-total", 5) == "Property cannot be set after initialization"
    assert change("nope", 5) == "Property 'throttle-group.nope' not found"
    assert limits()["iops-total"] == 20


def test_a_group_in_use_stays(daemon: StorageDaemon) -> None:
    """T-R9, T-T3."""
    daemon.ask("object-add", {"qom-type": "throttle-group", "id": "used", "x-bps-total": 7})
    node = {"driver": "throttle", "node-name": "t", "file": {"driver": "null-co"}}
    without = "Throttle group 'none' does not exist"
    assert daemon.error("blockdev-add", {**node, "throttle-group": "none"}) == without
    daemon.ask("blockdev-add", {**node, "throttle-group": "used"})
    in_use = "object 'used' is in use, can not be deleted"
    assert daemon.error("object-del", {"id": "used"}) == in_use
    daemon.ask("blockdev-del", {"node-name": "t"})
    assert daemon.ask("object-del", {"id": "used"}) == {}


def test_a_node_goes_by_credentials_of_a_client(
    daemon: StorageDaemon, short_tmp: Path, pki: Pki
) -> None:
    tls = {"qom-type": "tls-creds-x509"}
    daemon.ask("object-add", {**tls, "id": "mine", "dir": str(pki.client("backup1"))})
    daemon.ask("object-add", {**tls, "id": "theirs", "endpoint": "server", "dir": str(pki.server)})
    daemon.ask("object-add", {"qom-type": "authz-list", "id": "no-creds"})
    daemon.ask("blockdev-add", {"driver": "null-co", "node-name": "null", "size": 4096})
    port = {"type": "inet", "data": {"host": "localhost", "port": "0"}}
    refusal = daemon.error("nbd-server-start", {"addr": port, "tls-creds": "mine"})
    assert refusal == "Expected TLS credentials for a server endpoint"
    path = {"type": "unix", "path": str(short_tmp / "s")}
    daemon.ask(
        "nbd-server-start",
        {"addr": {"type": "unix", "data": {"path": path["path"]}}, "tls-creds": "theirs"},
    )
    daemon.ask("block-export-add", {"type": "nbd", "id": "e", "node-name": "null", "name": "x"})
    node = {
        "driver": "nbd",
        "node-name": "n",
        "server": path,
        "export": "x",
        "read-only": True,
        "tls-hostname": "localhost",
    }
    for name, text in (
        ("nope", "No TLS credentials with id 'nope'"),
        ("no-creds", "Object with id 'no-creds' is not TLS credentials"),
        ("theirs", "Expected TLS credentials for a client endpoint"),
    ):
        assert daemon.error("blockdev-add", {**node, "tls-creds": name}) == text
    raw = {"driver": "raw", "node-name": "r", "read-only": True}
    daemon.ask("blockdev-add", {**raw, "file": {**node, "tls-creds": "mine"}})
    daemon.ask("blockdev-reopen", {"options": [{**raw, "file": {**node, "tls-creds": "mine"}}]})
    daemon.ask("object-del", {"id": "mine"})
    daemon.ask("blockdev-del", {"node-name": "r"})
    daemon.ask("nbd-server-stop")
    daemon.ask("blockdev-del", {"node-name": "null"})
    for name in ("theirs", "no-creds"):
        daemon.ask("object-del", {"id": name})


def test_what_there_is(daemon: StorageDaemon, group: str) -> None:
    def rows(path: str) -> dict[str, str]:
        return {row["name"]: row["type"] for row in daemon.ask("qom-list", {"path": path})}

    assert rows("/")["objects"] == "child<container>"
    assert rows("/objects") == {"type": "string", "g": "child<throttle-group>"}
    assert rows(group)["limits"] == "ThrottleLimits"
    missing = daemon.answer("qom-list", {"path": "/none"})["error"]
    assert missing == {"class": "DeviceNotFound", "desc": "Device '/none' not found"}
    assert daemon.ask("qom-get", {"path": group, "property": "type"}) == "throttle-group"
