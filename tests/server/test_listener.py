from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.server import listener as listener_module
from nbdfleece.server.addresses import (
    VSOCK_ANY,
    FdAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
)
from nbdfleece.server.listener import Listener, open_listener
from tests.support.waiting import turns, until


async def accept_one(listener: Listener) -> socket.socket:
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
    listener.start(accepted.put_nowait)
    return await accepted.get()


def unix(folder: Path) -> UnixAddress:
    return UnixAddress(str(folder / "s"))


# --- unix ------------------------------------------------------------------------------------


async def test_unix_socket_is_its_owners_alone_whatever_the_umask(short_tmp: Path) -> None:
    before = os.umask(0)
    try:
        listener = await open_listener(unix(short_tmp))
    finally:
        os.umask(before)

    assert stat.S_IMODE((short_tmp / "s").stat().st_mode) == 0o600
    listener.close()


async def test_unix_socket_is_never_open_to_others(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is looked at between bind and listen, when a chmod would still be to come."""
    seen = []
    bind = socket.socket.bind

    class Watched(socket.socket):
        def bind(self, address):
            bind(self, address)
            seen.append(stat.S_IMODE(os.stat(address).st_mode))

    monkeypatch.setattr(listener_module.socket, "socket", Watched)
    before = os.umask(0)
    try:
        listener = await open_listener(unix(short_tmp))
    finally:
        os.umask(before)

    assert seen == [0o600]
    listener.close()


async def test_socket_file_is_removed_at_close(short_tmp: Path) -> None:
    listener = await open_listener(unix(short_tmp))
    listener.close()
    listener.close()

    assert not (short_tmp / "s").exists()


async def test_socket_file_of_somebody_else_is_left_alone(short_tmp: Path) -> None:
    listener = await open_listener(unix(short_tmp))
    (short_tmp / "s").unlink()
    other = await open_listener(unix(short_tmp))

    listener.close()

    assert (short_tmp / "s").exists()
    other.close()


async def test_stale_socket_is_replaced(short_tmp: Path) -> None:
    """Killed servers leave their socket file; nbdkit cannot start over it."""
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(short_tmp / "s"))
    dead.listen()
    dead.close()

    listener = await open_listener(unix(short_tmp))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(short_tmp / "s"))
        (await accept_one(listener)).close()
    listener.close()


async def test_live_socket_is_refused(short_tmp: Path) -> None:
    live = await open_listener(unix(short_tmp))

    with pytest.raises(ConfigError, match="another server is listening there"):
        await open_listener(unix(short_tmp))

    assert (short_tmp / "s").exists()
    live.close()


async def test_live_socket_with_a_full_queue_is_refused(short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as waiting:
        live.bind(str(short_tmp / "s"))
        live.listen(0)
        waiting.connect(str(short_tmp / "s"))

        with pytest.raises(ConfigError, match="another server"):
            await open_listener(unix(short_tmp))


async def test_other_file_is_refused_and_kept(short_tmp: Path) -> None:
    (short_tmp / "s").write_text("precious")

    with pytest.raises(ConfigError, match="not a socket"):
        await open_listener(unix(short_tmp))

    assert (short_tmp / "s").read_text() == "precious"


async def test_missing_folder_is_a_clear_error(short_tmp: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        await open_listener(UnixAddress(str(short_tmp / "missing" / "s")))


# --- tcp -------------------------------------------------------------------------------------


async def test_tcp_port_may_be_chosen_by_the_system() -> None:
    listener = await open_listener(TcpAddress("127.0.0.1", 0))

    assert isinstance(listener.address, TcpAddress)
    assert listener.address.port == listener.sockets[0].getsockname()[1] != 0
    listener.close()


async def test_taken_tcp_port_is_refused() -> None:
    first = await open_listener(TcpAddress("127.0.0.1", 0))
    assert isinstance(first.address, TcpAddress)

    with pytest.raises(ConfigError, match=f"tcp:127.0.0.1:{first.address.port}: Address already"):
        await open_listener(first.address)
    first.close()


async def test_unknown_host_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_args: object, **_kwargs: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", nothing)

    with pytest.raises(ConfigError, match="Name or service not known"):
        await open_listener(TcpAddress("nowhere", 1))


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "\udcff"])
async def test_what_cannot_be_a_host_is_a_clear_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^cannot listen on tcp:"):
        await open_listener(TcpAddress(host, 1))


async def test_every_address_of_a_host_is_listened_on_at_one_port() -> None:
    try:
        listener = await open_listener(TcpAddress("", 0))
    except ConfigError as error:
        pytest.skip(str(error))
    ports = {sock.getsockname()[1] for sock in listener.sockets}
    families = [sock.family for sock in listener.sockets]

    assert len(ports) == 1
    assert socket.AF_INET in families
    assert len(set(families)) == len(families)
    listener.close()


async def test_failed_second_address_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = await open_listener(TcpAddress("127.0.0.1", 0))
    assert isinstance(taken.address, TcpAddress)
    places = [("127.0.0.2", taken.address.port), ("127.0.0.1", taken.address.port)]

    async def both(*_args: object, **_kwargs: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
    with pytest.raises(ConfigError):
        await open_listener(TcpAddress("two", taken.address.port))
    monkeypatch.undo()

    again = await open_listener(TcpAddress("127.0.0.2", taken.address.port))
    again.close()
    taken.close()


# --- fd --------------------------------------------------------------------------------------


async def test_handed_over_socket_is_used() -> None:
    made = socket.create_server(("127.0.0.1", 0))
    address = made.getsockname()

    listener = await open_listener(FdAddress(made.detach()))
    with socket.create_connection(address):
        (await accept_one(listener)).close()
    listener.close()


async def test_descriptor_that_is_not_listening_is_refused_and_left_open() -> None:
    with socket.socket() as idle:
        with pytest.raises(ConfigError, match="not a listening"):
            await open_listener(FdAddress(idle.fileno()))
        idle.getsockname()


async def test_closed_descriptor_is_refused() -> None:
    with pytest.raises(ConfigError, match="Bad file descriptor"):
        await open_listener(FdAddress(999))


# --- vsock -----------------------------------------------------------------------------------


async def test_vsock() -> None:
    try:
        listener = await open_listener(VsockAddress(VSOCK_ANY, 54321))
    except ConfigError as error:
        pytest.skip(str(error))
    assert listener.sockets[0].getsockname()[1] == 54321

    with pytest.raises(ConfigError, match="vsock:any:54321: Address already in use"):
        await open_listener(VsockAddress(VSOCK_ANY, 54321))
    listener.close()


# --- accepting -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED])
async def test_failed_accept_is_tried_again(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(listener_module, "ACCEPT_RETRY_S", 0)
    failures = [OSError(number, os.strerror(number))] * 3

    class Failing(socket.socket):
        def accept(self):
            if failures:
                raise failures.pop()
            return super().accept()

    monkeypatch.setattr(listener_module.socket, "socket", Failing)
    listener = await open_listener(unix(short_tmp))
    monkeypatch.undo()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(short_tmp / "s"))
        (await accept_one(listener)).close()

    assert not failures
    listener.close()


async def test_lack_of_descriptors_stops_nothing_but_accepting(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(socket.socket):
        def accept(self):
            calls.append(self)
            raise OSError(errno.EMFILE, "Too many open files")

    calls: list[socket.socket] = []
    monkeypatch.setattr(listener_module.socket, "socket", Failing)
    listener = await open_listener(unix(short_tmp))
    monkeypatch.undo()
    listener.start(lambda connection: connection.close())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(short_tmp / "s"))
        await until(lambda: calls)
        await turns(50)

        assert len(calls) == 1  # it waits, instead of turning at full speed
    listener.close()
