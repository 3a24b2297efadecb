"""`nbdfleece storage-daemon`: options as qemu-storage-daemon reads them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdfleece import __version__
from nbdfleece.protocol.nbd import constants
from tests.support import stuck
from tests.support.daemon_process import START_S, environment, make_disk, nbdfleece
from tests.support.image_with_bitmap import image_with_a_bitmap
from tests.support.live import eventually
from tests.support.nbd_client import connected
from tests.support.storage_daemon import StorageDaemon

NAME = "storage-daemon"
MiB = 1 << 20


def test_help_and_version() -> None:
    for word in ("-V", "--version"):
        assert nbdfleece(NAME, word).out == f"nbdfleece storage-daemon version {__version__}\n"
    for word in ("-h", "--help"):
        assert "example: nbdfleece storage-daemon" in nbdfleece(NAME, word).out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--dance"], "option --dance not recognized"),
        (["--monitor"], "option --monitor requires argument"),
        (["extra"], "extra: Unexpected argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(words: list[str], error: str) -> None:
    done = nbdfleece(NAME, *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert error in done.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--blockdev", "driver=file"], "Parameter 'filename' is missing"),
        (["--blockdev", "driver=null-co,node-name=a,size=1M"], "Parameter 'size' expects integer"),
        (
            ["--blockdev", "driver=null-co,node-name=a,read-only=maybe"],
            "Parameter 'read-only' expects 'on' or 'off'",
        ),
        (["--blockdev", "driver=null-co,node-name=a,foo"], "Expected '=' after parameter 'foo'"),
        (
            ["--blockdev", "driver=null-co,node-name=a,cache.direct=on,cache=x"],
            "Parameters 'cache.*' used inconsistently",
        ),
        (
            ["--blockdev", "raw,node-name=a,file.driver=null-co,file.foo=3"],
            "Parameter 'file.foo' is unexpected",
        ),
        (["--blockdev", '{"driver": 5x}'], "JSON parse error, Expecting ',' delimiter"),
        (["--object", "authz-simple,id=x"], "Parameter 'identity' is missing"),
        (["--object", "nope,id=x"], "Parameter 'qom-type' does not accept value 'nope'"),
        (
            ["--object", "authz-list,id=x,rules.0.match=a,rules.0.policy=allow,rules.2.match=x"],
            "Parameter 'rules.1' missing",
        ),
        (["--nbd-server", "addr.type=unix"], "path' is missing"),
        (["--export", "nbd,id=x,node-name=a"], "Cannot find device='' nor node-name='a'"),
        (
            ["--object", '{"qom-type": "tls-creds-x509", "id": "x", "dir": "\\u0000"}'],
            r"Unable to access credentials: '\x00' is no folder",
        ),
        (["--monitor", "chardev=none"], 'chardev "none" not found'),
        (["--chardev", "pty,id=c"], "'pty' is not a character device of this program"),
        (["--chardev", "socket,id=c"], "only unix sockets with server=on and a path"),
        (["--chardev", "socket,id=c,server,nowait,path=x,telnet=on"], "Invalid parameter 'telnet'"),
        (["--pidfile", "/no/such/folder/x"], "cannot create PID file: Could not create"),
    ],
    ids=lambda value: value[-1][:40] if isinstance(value, list) else None,
)
def test_the_option_that_fails_is_named(words: list[str], error: str) -> None:
    done = nbdfleece(NAME, *words)
    assert done.code != 0
    assert (done.out, done.err.count("\n")) == ("", 1), done.err
    if words[0] != "--pidfile":
        assert done.err.startswith(f"nbdfleece: storage-daemon: {words[0]} {words[1]}: ")
    assert error in done.err


def test_options_are_carried_out_in_order_and_once(short_tmp: Path) -> None:
    server = ["--nbd-server", f"addr.type=unix,addr.path={short_tmp}/s"]
    null = ["--blockdev", "null-co,node-name=a"]
    export = ["--export", "nbd,id=x,node-name=a"]
    early = nbdfleece(NAME, *null, *export, *server)
    assert "--export nbd,id=x,node-name=a: NBD server not running" in early.err
    twice = nbdfleece(NAME, *server, *server)
    assert "NBD server already running" in twice.err
    assert not (short_tmp / "s").exists()


def test_json_commas_and_nested_keys(short_tmp: Path) -> None:
    make_disk(short_tmp / "a,b.raw", MiB)
    raw = {"driver": "raw", "node-name": "two", "offset": 4096, "file": "one", "read-only": True}
    options = (
        *("--blockdev", "driver=raw,node-name=zero,file.driver=null-co,file.size=0x1000"),
        *("--blockdev", "file,node-name=one,filename=a,,b.raw,read-only=yes"),
        *("--blockdev", json.dumps(raw)),
        *("--object", "authz-list,id=z,rules.0.match=CN=x,,O=y,rules.0.policy=allow"),
        *("--object", '{"qom-type": "iothread", "id": "io"}'),
        *("--nbd-server", '{"addr": {"type": "unix", "path": "nbd.sock"}, "max-connections": 3}'),
        *("--export", '{"type": "nbd", "id": "two", "node-name": "two"}'),
        "--export=zero,id=zero,node-name=zero,type=nbd,writable=on,name=a,,b",
        *("-T", "whatever", "--trace", "enable=x"),
    )
    with StorageDaemon(short_tmp, *options) as daemon:
        rows = daemon.ask("query-block-exports")
        assert [row["id"] for row in rows] == ["zero", "two"]
        assert daemon.ask("object-del", {"id": "z"}) == {}
        assert daemon.errors().count("there is no tracing here") == 2
        assert daemon.stop() == 0
    assert not (short_tmp / "nbd.sock").exists()
    assert not (short_tmp / "qmp.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it(short_tmp: Path, number: int) -> None:
    with StorageDaemon(short_tmp, "--pidfile", "pid") as daemon:
        assert (short_tmp / "pid").read_text() == f"{daemon.process.pid}\n"
        assert daemon.stop(number) == 0
    assert not (short_tmp / "pid").exists()


def test_quit_ends_it_and_what_was_written_is_there(short_tmp: Path) -> None:
    make_disk(short_tmp / "a.raw", MiB)
    with StorageDaemon(short_tmp, "--blockdev", "file,node-name=a,filename=a.raw") as daemon:
        assert daemon.ask("quit") == {}
        assert daemon.process.wait(START_S) == 0


def test_a_limited_export_ends_as_any_other(short_tmp: Path) -> None:
    """The filter goes by itself with the export, while all else is closed."""
    words = ["--blockdev", "null-co,node-name=n", "--nbd-server", "addr.type=unix,addr.path=s"]
    words += ["--export", "nbd,id=e,node-name=n,writable=on"]
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd"), 0)
    with StorageDaemon(short_tmp, *words) as daemon:
        daemon.ask("block_set_io_throttle", {"id": "e", **limits, "iops_wr": 100})
        assert daemon.stop() == 0, daemon.errors()
        assert not daemon.errors()


def test_there_is_no_state_folder(short_tmp: Path) -> None:
    make_disk(short_tmp / "a.raw", MiB)
    with StorageDaemon(short_tmp) as daemon:
        where = {"disk": "vda", "location": str(short_tmp / "a.raw")}
        assert "has no state folder" in daemon.error("fleece-disk-add", where)
        assert daemon.ask("query-fleece-disks") == []
        daemon.ask("query-fleece-status")
        assert daemon.stop() == 0


def test_a_pid_file_of_a_living_daemon_is_not_taken(short_tmp: Path) -> None:
    with StorageDaemon(short_tmp, "--pidfile", "pid"):
        other = nbdfleece(NAME, "--pidfile", short_tmp / "pid")
        assert (other.code != 0, "cannot create PID file" in other.err) == (True, True)


def test_it_goes_into_the_background_when_all_is_ready(short_tmp: Path) -> None:
    make_disk(short_tmp / "a.raw", MiB)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nbdfleece", NAME, "--daemonize", "--pidfile", "pid"),
            *("--blockdev", "file,node-name=a,filename=a.raw"),
            *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
            *("--export", "nbd,id=a,node-name=a"),
        ],
        capture_output=True,  # ends only if the daemon has let go of the terminal
        cwd=short_tmp,
        env=environment(),
        timeout=START_S,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    process = int((short_tmp / "pid").read_text())
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(short_tmp / "nbd.sock"))
            assert client.recv(8) == b"NBDMAGIC"
        assert os.readlink(f"/proc/{process}/cwd") == "/"
    finally:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + START_S
    while (short_tmp / "pid").exists() or (short_tmp / "nbd.sock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_failure_in_the_background_is_told(short_tmp: Path) -> None:
    done = nbdfleece(NAME, "--daemonize", "--blockdev", "file,node-name=a,filename=/no/such/file")
    assert done.code == 1
    assert "No such file or directory" in done.err


def test_a_chardev_waits_for_its_client(short_tmp: Path) -> None:
    options = ["--chardev", "socket,id=w,path=wait.sock,server=on", "--monitor", "w"]
    options += ["--pidfile", "pid"]
    command = [sys.executable, "-m", "nbdfleece", NAME, *options]
    with subprocess.Popen(
        command, cwd=short_tmp, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert "waiting for connection on" in process.stderr.readline()
            assert not (short_tmp / "pid").exists()  # not ready before
            with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
                client.settimeout(START_S)
                client.connect(str(short_tmp / "wait.sock"))
                assert "QMP" in json.loads(answers.readline())
                assert (short_tmp / "pid").exists()
        finally:
            process.terminate()
            process.wait(START_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_while_it_waits_for_a_client(short_tmp: Path, number: int) -> None:
    options = ["--chardev", "socket,id=w,path=wait.sock,server=on", "--monitor", "w"]
    command = [sys.executable, "-m", "nbdfleece", NAME, *options]
    with subprocess.Popen(
        command, cwd=short_tmp, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert "waiting for connection on" in process.stderr.readline()
            process.send_signal(number)
            assert process.wait(START_S) == 0
            assert process.stderr.read() == ""
            assert not (short_tmp / "wait.sock").exists()
        finally:
            process.kill()


@pytest.mark.interop("qemu-img")
def test_a_node_that_is_stuck_at_the_end_keeps_no_other_from_being_closed(short_tmp: Path) -> None:
    image, names = image_with_a_bitmap(short_tmp)
    make_disk(short_tmp / stuck.NAME, 4096)
    options = ["--blockdev", f"driver=file,node-name=a,filename={stuck.NAME}"]
    options += ["--blockdev", f"driver=qcow2,node-name=b,file.driver=file,file.filename={image}"]
    program = (stuck.python_that_is_stuck(short_tmp, "fdatasync"), "-m", "nbdfleece", NAME)
    with StorageDaemon(short_tmp, *options, program=program) as daemon:
        daemon.process.terminate()
        assert daemon.process.wait(START_S) == 1
        assert "stopped by force" in daemon.errors()
    assert names() == [("b0", ["auto"])]


@pytest.mark.interop("qemu-img")
async def test_a_request_that_is_stuck_at_the_end_keeps_no_node_from_being_closed(
    short_tmp: Path,
) -> None:
    image, names = image_with_a_bitmap(short_tmp)
    make_disk(short_tmp / stuck.NAME, 4096)
    options = ["--blockdev", f"driver=file,node-name=a,filename={stuck.NAME}"]
    options += ["--blockdev", f"driver=qcow2,node-name=b,file.driver=file,file.filename={image}"]
    options += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    for node in ("a", "b"):
        options += ["--export", f"nbd,id={node},node-name={node},writable=on"]
    program = (stuck.python_that_is_stuck(short_tmp, "pwrite"), "-m", "nbdfleece", NAME)
    with StorageDaemon(short_tmp, *options, program=program) as daemon:
        async with connected(str(short_tmp / "nbd.sock"), "a") as guest:
            await guest.submit(constants.NBD_CMD_WRITE, 0, 1, data=b"x")
            await eventually(lambda: "it is stuck" in daemon.errors())
            daemon.process.terminate()
            assert await asyncio.to_thread(daemon.process.wait, START_S) == 1
    assert names() == [("b0", ["auto"])]
