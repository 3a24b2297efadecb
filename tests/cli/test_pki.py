"""`nbdfleece pki`, through the real command line."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from tests.support.daemon_process import Result, nbdfleece


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tls"
    assert nbdfleece("pki", "init", made, "--host", "disks.example").code == 0
    return made


def at_once(commands: Sequence[Sequence[str | Path]]) -> list[Result]:
    """Run commands at the same time."""
    results: list[Result] = []
    threads = [
        threading.Thread(target=lambda words=words: results.append(nbdfleece(*words)))
        for words in commands
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("command", ["", "init", "client", "revoke", "show"])
def test_help_has_an_example(command: str) -> None:
    done = nbdfleece("pki", *command.split(), "--help")
    assert done.code == 0
    assert "example: nbdfleece pki" in done.out


def test_init_says_what_it_made(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tls"
    done = nbdfleece("pki", "init", folder, "--host", "disks.example", "--host", "192.0.2.7")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == ["ca:", "server:", "hosts:"]
    assert done.out.splitlines()[2].split() == ["hosts:", "disks.example", "192.0.2.7"]
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {name for name, mode in files.items() if not mode & 0o077} == {
        *(".lock", "ca-key.pem", "server-key.pem"),
    }
    assert set(files) == {
        *(".lock", "ca-key.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem"),
        "server-cert.pem",
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_init_finds_the_hosts_itself(tmp_path: Path) -> None:
    nbdfleece("pki", "init", tmp_path)
    hosts = nbdfleece("pki", "show", tmp_path, "--json").json["server"]["hosts"]
    assert hosts[-3:] == ["localhost", "127.0.0.1", "::1"] or "localhost" in hosts
    assert {"localhost", "127.0.0.1", "::1"} <= set(hosts)


def test_init_does_not_overwrite(folder: Path) -> None:
    before = (folder / "ca-key.pem").read_bytes()
    done = nbdfleece("pki", "init", folder)
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
    assert done.err.startswith(f"nbdfleece: pki init: '{folder}' has an authority")
    assert (folder / "ca-key.pem").read_bytes() == before


def test_a_client_is_made_and_its_folder_printed(folder: Path) -> None:
    done = nbdfleece("pki", "client", folder, "backup1", "--org", "Example")
    made = folder / "clients" / "backup1"
    assert (done.code, done.out, done.err) == (0, f"{made}\n", "")
    certificate = x509.load_pem_x509_certificate((made / "client-cert.pem").read_bytes())
    assert certificate.subject.rfc4514_string() == "O=Example,CN=backup1"
    again = nbdfleece("pki", "client", folder, "backup1")
    assert (again.code, again.out, again.err.count("\n")) == (4, "", 1)


def test_revoke(folder: Path) -> None:
    nbdfleece("pki", "client", folder, "backup1")
    done = nbdfleece("pki", "revoke", folder, "backup1")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"backup1 is revoked: {folder}/ca-crl.pem\n")
    again = nbdfleece("pki", "revoke", folder, "backup1")
    assert again.code == 0
    assert again.out.startswith("backup1 was revoked before")


def test_quiet_says_nothing(tmp_path: Path) -> None:
    for words in (["init", tmp_path], ["client", tmp_path, "a"], ["revoke", tmp_path, "a"]):
        assert nbdfleece("pki", *words, "-q") == Result(0, "", "")


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["client", "{tls}", "../x"], 2, "cannot be a client's name"),
        (["client", "{tls}", "a", "--org", ""], 2, "cannot be an organization"),
        (["init", "{none}", "--host", "a b"], 2, "neither a host name nor an address"),
        (["client", "{tls}"], 2, "missing: NAME"),
        (["dance"], 2, "there is no 'dance'"),
        (["client", "{none}", "a"], 5, "there is no folder"),
        (["revoke", "{none}", "a"], 5, "there is no folder"),
        (["show", "{none}"], 5, "there is no"),
        (["revoke", "{tls}", "a"], 5, "no client 'a'"),
        (["init", "{tls}/ca-key.pem"], 1, "File exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(
    folder: Path, tmp_path: Path, words: list[str], code: int, why: str
) -> None:
    none = tmp_path / "none"
    done = nbdfleece("pki", *[word.format(tls=folder, none=none) for word in words])
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done.err
    assert done.err.startswith("nbdfleece: pki")
    assert why in done.err
    assert not none.exists()


def test_show(folder: Path) -> None:
    nbdfleece("pki", "client", folder, "backup1", "--org", "Example")
    nbdfleece("pki", "client", folder, "backup2")
    nbdfleece("pki", "revoke", folder, "backup2")
    done = nbdfleece("pki", "show", folder)
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["KIND", "NAME", "SUBJECT", "EXPIRES", "STATE", "HOSTS"]
    assert lines[2][-2:] == ["ok", "disks.example"]
    assert lines[3][:3] == ["client", "backup1", "CN=backup1,O=Example"]
    assert lines[4][-1] == "revoked"
    assert lines[5][:4] == ["revocation", "list:", "1", "revoked,"]


def test_show_as_json(folder: Path) -> None:
    nbdfleece("pki", "client", folder, "backup1", "--org", "Example")
    shown = nbdfleece("pki", "show", folder, "--json").json
    assert sorted(shown) == ["ca", "clients", "crl", "server"]
    (client,) = shown["clients"]
    assert sorted(client) == [
        *("hosts", "name", "not-after", "not-before", "path", "serial", "state", "subject"),
    ]
    assert client["path"] == str(folder / "clients" / "backup1")
    assert client["subject"] == "CN=backup1,O=Example"
    ends = datetime.fromisoformat(client["not-after"])
    assert timedelta(days=364) < ends - datetime.now(UTC) < timedelta(days=826)
    assert shown["crl"]["revoked"] == 0
    assert shown["server"]["state"] == "ok"


def test_show_needs_no_right_to_write(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    done = nbdfleece("pki", "show", folder)
    folder.chmod(0o700)
    assert done.code == 0


def test_of_many_runs_at_once_each_does_its_work_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    made = at_once([["pki", "init", folder]] * 4)
    assert sorted(done.code for done in made) == [0, 4, 4, 4]

    names = ["a", "b", "c", "c", "c"]
    made = at_once([["pki", "client", folder, name] for name in names])
    assert sorted(done.code for done in made) == [0, 0, 0, 4, 4]

    made = at_once([["pki", "revoke", folder, name] for name in "abc"])
    assert [done.code for done in made] == [0, 0, 0]
    crl = x509.load_pem_x509_crl((folder / "ca-crl.pem").read_bytes())
    serials = {
        x509.load_pem_x509_certificate(path.read_bytes()).serial_number
        for path in folder.glob("clients/*/client-cert.pem")
    }
    assert {entry.serial_number for entry in crl} == serials
    assert len(serials) == 3
