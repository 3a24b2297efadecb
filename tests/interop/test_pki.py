"""What `nbdfleece pki` makes is taken by other programs as it is."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.check import find_program
from tests.support.daemon_process import make_disk, nbdfleece
from tests.support.live import run, started
from tests.support.pki import Pki

Program = Callable[[str], str]
SIZE = 1 << 20

# Becomes the program of the arguments, with a listening socket as service managers give it.
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    assert nbdfleece("pki", "init", folder, "--host", "localhost").code == 0
    for name in ("backup1", "stolen"):
        assert nbdfleece("pki", "client", folder, name, "--org", "Example").code == 0
    return folder


@contextlib.contextmanager
def qemu_nbd(program: Program, folder: Path, tls: Path) -> Iterator[int]:
    """A qemu-nbd that asks for client certificates; gives its port."""
    disk = make_disk(folder / "disk.raw", SIZE)
    credentials = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={tls}"
    words = [program("qemu-nbd"), "-t", "-r", "-e", "4", "-f", "raw"]
    words += ["--object", credentials, "--tls-creds", "tls", str(disk)]
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    fd = listener.fileno()
    with started(sys.executable, "-c", HAND_OVER, str(fd), *words, pass_fds=[fd]):
        listener.close()  # so that clients of a qemu-nbd that has died do not wait
        yield port


def nbdinfo(program: Program, port: int, client: Path, *, host: str = "localhost") -> int:
    uri = f"nbds://{host}:{port}/?tls-certificates={client}"
    return run(program("nbdinfo"), "--size", uri, code=None).returncode


def qemu_img(program: Program, port: int, client: Path, *, host: str = "localhost") -> int:
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={client}"
    image = f"driver=nbd,host={host},port={port},tls-creds=tls"
    words = ["info", "--object", credentials, "--image-opts", image]
    return run(program("qemu-img"), *words, code=None).returncode


def nbd_client(program: Program, port: int, client: Path, *, host: str = "localhost") -> int:
    words = ["-l", host, str(port)]
    for option, name in (("cert", "client-cert"), ("key", "client-key"), ("cacert", "ca-cert")):
        words += [f"-{option}file", str(client / f"{name}.pem")]
    return run(program("nbd-client"), *words, code=None).returncode


def where_there(name: str) -> str:
    """The path of a program that looks at certificates; they are no clients of ours."""
    path = find_program(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize("ask", [nbdinfo, qemu_img])
def test_qemu_nbd_and_its_clients_take_the_folders(
    program: Program, tmp_path: Path, tls: Path, ask: Callable[..., int]
) -> None:
    with qemu_nbd(program, tmp_path, tls) as port:
        assert ask(program, port, tls / "clients" / "backup1") == 0
        assert ask(program, port, tls / "clients" / "backup1", host="127.0.0.1") != 0  # not named


@pytest.mark.parametrize("ask", [nbdinfo, qemu_img, nbd_client])
def test_qemu_nbd_refuses_whom_the_list_names(
    program: Program, tmp_path: Path, tls: Path, ask: Callable[..., int]
) -> None:
    assert nbdfleece("pki", "revoke", tls, "stolen").code == 0
    with qemu_nbd(program, tmp_path, tls) as port:
        assert ask(program, port, tls / "clients" / "stolen") != 0
        assert ask(program, port, tls / "clients" / "backup1") == 0


def test_qemu_nbd_refuses_a_client_of_another_authority(
    program: Program, tmp_path: Path, tls: Path, pki: Pki
) -> None:
    with qemu_nbd(program, tmp_path, tls) as port:
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        (stranger / "ca-cert.pem").write_bytes((tls / "ca-cert.pem").read_bytes())
        for kind in ("cert", "key"):
            name = f"client-{kind}.pem"
            (stranger / name).write_bytes((pki.client() / name).read_bytes())
        assert nbdinfo(program, port, stranger) != 0
        assert nbdinfo(program, port, tls / "clients" / "backup1") == 0


@pytest.mark.parametrize("name", ["stolen", "backup1"])
def test_openssl_verifies_what_is_made(tls: Path, name: str) -> None:
    if name == "stolen":
        assert nbdfleece("pki", "revoke", tls, "stolen").code == 0
    both = ["-CAfile", str(tls / "ca-cert.pem"), "-CRLfile", str(tls / "ca-crl.pem")]
    strict = [where_there("openssl"), "verify", "-x509_strict", "-crl_check", *both]
    server = [*strict, "-purpose", "sslserver", "-verify_hostname", "localhost"]
    client = [*strict, "-purpose", "sslclient", tls / "clients" / name / "client-cert.pem"]
    assert run(*server, tls / "server-cert.pem").returncode == 0
    assert (run(*client, code=None).returncode == 0) == (name == "backup1")


def test_certtool_verifies_what_is_made(tls: Path) -> None:
    words = ["--verify", "--load-ca-certificate", tls / "ca-cert.pem"]
    words += ["--load-crl", tls / "ca-crl.pem"]
    client = tls / "clients" / "backup1" / "client-cert.pem"
    for purpose, path in (
        ("1.3.6.1.5.5.7.3.1", tls / "server-cert.pem"),
        ("1.3.6.1.5.5.7.3.2", client),
    ):
        found = [*words, "--verify-purpose", purpose, "--infile", path]
        assert "Verified" in run(where_there("certtool"), *found).stdout


def test_keys_are_readable_by_their_owner_alone(tls: Path) -> None:
    keys = list(tls.rglob("*-key.pem"))
    assert len(keys) == 4
    assert [path for path in keys if os.stat(path).st_mode & 0o077] == []
