"""The daemon as a process: start, mistakes, signals, state folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.daemon import _keep_alive, _watchdog_interval_s
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.server import tls
from tests.support import stuck
from tests.support.daemon_process import START_S, Daemon, environment, make_disk, nbdfleece
from tests.support.image_with_bitmap import image_with_a_bitmap
from tests.support.live import client, eventually
from tests.support.pki import Pki

SIZE = 1 << 20


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    return make_disk(short_tmp / "disk.raw", SIZE)


def refused(folder: Path, *args: str | Path) -> tuple[int, str]:
    """Run a daemon that cannot start; return exit code and what it said."""
    with Daemon(folder, *args) as daemon:
        code = daemon.process.wait(20)
        said = [line for line in daemon.errors().splitlines() if line.startswith("nbdfleece:")]
        assert "Traceback" not in daemon.errors()
        assert len(said) == 1, daemon.errors()
        return code, said[0]


def test_readiness_lines_name_export_and_uri(short_tmp: Path, disk: Path) -> None:
    other = make_disk(short_tmp / "other.img", 12345)
    with Daemon(short_tmp, f"vda={disk}", other) as daemon:
        assert daemon.ready(2) == [
            f"vda {daemon.uri('vda')}",
            f"other {daemon.uri('other')}",
        ]


def test_print_uri_prints_nothing_else(short_tmp: Path, disk: Path) -> None:
    with Daemon(short_tmp, "--print-uri", f"vda={disk}") as daemon:
        assert daemon.ready() == [daemon.uri("vda")]


@pytest.mark.parametrize("stdout", [">&-", ">/dev/full", "<&- >&- 2>&-"])
async def test_nobody_need_hear_that_it_is_ready(short_tmp: Path, disk: Path, stdout: str) -> None:
    with Daemon(short_tmp, f"vda={disk}", stdout=stdout) as daemon:
        await eventually(lambda: daemon.run("health").code == 0)
        descriptors = Path(f"/proc/{daemon.process.pid}/fd")
        assert not {os.readlink(descriptors / str(fd)) for fd in range(3)} & {str(disk)}
        assert daemon.stop() == 0


def test_file_names_that_are_no_text_are_shown(short_tmp: Path) -> None:
    disk = make_disk(short_tmp / "\udcff.raw", SIZE)
    with Daemon(short_tmp, f"vda={disk}", "--listen", f"unix:{short_tmp}/\udcfe") as daemon:
        daemon.ready()
        (found,) = daemon.run("disk", "list", "--json").json
        assert found["location"] == f"{short_tmp}/\ufffd.raw"
        assert f"unix:{short_tmp}/\ufffd" in daemon.run("status").out


def test_sockets_and_state_are_the_owners_alone(short_tmp: Path, disk: Path) -> None:
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        for path in (daemon.socket, daemon.control):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(daemon.state.stat().st_mode) == 0o700
        assert json.loads((daemon.state / "vda" / "disk.json").read_text())["version"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(short_tmp: Path, disk: Path, number: int) -> None:
    pid_file = short_tmp / "pid"
    with Daemon(short_tmp, "--pid-file", pid_file, f"vda={disk}") as daemon:
        daemon.ready()
        assert pid_file.read_text() == f"{daemon.process.pid}\n"
        assert daemon.run("snapshot", "create", "vda").code == 0
        assert daemon.stop(number) == 0
        assert not daemon.socket.exists()
        assert not daemon.control.exists()
        assert not pid_file.exists()
        assert list(daemon.state.glob("*/snapshots/*")) == []
        facts = json.loads((daemon.state / "vda" / "disk.json").read_text())
        assert facts["mtime-ns"] == disk.stat().st_mtime_ns


@pytest.mark.interop("qemu-img")
def test_a_start_that_fails_keeps_what_is_in_the_images(short_tmp: Path) -> None:
    image, names = image_with_a_bitmap(short_tmp)
    code, said = refused(short_tmp, f"vda={image},format=qcow2", "nowhere.raw")
    assert (code, "No such file" in said) == (5, True)
    assert names() == [("b0", ["auto"])]


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_before_it_is_ready(short_tmp: Path, number: int) -> None:
    image, names = image_with_a_bitmap(short_tmp)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(short_tmp / "silent"))
        silent.listen()
        disks = [f"vda={image},format=qcow2", f"vdb=nbd+unix:///x?socket={short_tmp}/silent"]
        with Daemon(short_tmp, *disks) as daemon:
            connection, _ = silent.accept()
            daemon.process.send_signal(signal.SIGHUP)  # which asks for nothing of this
            assert daemon.stop(number) == 0
            connection.close()
            assert "told to stop before it was ready" in daemon.errors()
            assert "Traceback" not in daemon.errors()
            assert not daemon.control.exists()
    assert names() == [("b0", ["auto"])]


@pytest.mark.interop("qemu-img")
def test_a_disk_that_is_stuck_at_the_end_keeps_no_other_from_being_closed(short_tmp: Path) -> None:
    image, names = image_with_a_bitmap(short_tmp)
    disks = [make_disk(short_tmp / stuck.NAME, 4096), f"vdb={image},format=qcow2"]
    python = stuck.python_that_is_stuck(short_tmp, "fdatasync")
    with Daemon(short_tmp, "--drain-timeout", "0.5", *disks, python=python) as daemon:
        daemon.ready(2)
        assert daemon.stop() == 1
        assert "stopped by force" in daemon.errors()
    assert names() == [("b0", ["auto"])]


@pytest.mark.interop("qemu-img")
def test_a_backup_that_is_stuck_keeps_no_disk_from_being_closed(short_tmp: Path) -> None:
    image, names = image_with_a_bitmap(short_tmp)
    (far := short_tmp / "far").mkdir()
    with Daemon(far, make_disk(far / "vda.raw", 1 << 20)) as server:
        server.ready()
        disks = [f"vda={server.uri('vda')}", f"vdb={image},format=qcow2"]
        with Daemon(short_tmp, "--drain-timeout", "0.5", *disks) as daemon:
            daemon.ready(2)
            server.process.send_signal(signal.SIGSTOP)
            backup = {"dir": str(short_tmp / "backups"), "disks": ["vda"]}
            assert daemon.run("qmp", "fleece-backup", json.dumps(backup)).code == 0
            assert daemon.stop() == 1
            assert "Traceback" not in daemon.errors()
    assert names() == [("b0", ["auto"])]


def test_a_signal_ends_it_while_a_disk_does_not_open(short_tmp: Path) -> None:
    disk = make_disk(short_tmp / stuck.NAME, 4096)
    python = stuck.python_that_is_stuck(short_tmp, "open")
    with Daemon(short_tmp, "--drain-timeout", "0.5", disk, python=python) as daemon:
        until_it_is_stuck(daemon)
        assert daemon.stop() == 1
        assert "stopped by force" in daemon.errors()
        assert not daemon.control.exists()


def until_it_is_stuck(daemon: Daemon) -> None:
    deadline = time.monotonic() + START_S
    while "it is stuck" not in daemon.errors():
        assert time.monotonic() < deadline, daemon.errors()
        time.sleep(0.005)


@pytest.mark.parametrize("snapshots", [0, 2])
def test_the_end_is_clean_whatever_was_exported(
    short_tmp: Path, disk: Path, snapshots: int
) -> None:
    """Exports of a user stand on the nodes of disks and snapshots, which go all the same."""
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        nodes = ["vda"]
        for _ in range(snapshots):
            (made,) = daemon.run("snapshot", "create", "vda", "--json").json
            nodes.append(made["node-name"])
        for number, node in enumerate(nodes):
            export = {"type": "nbd", "node-name": node, "id": f"x{number}", "name": f"x{number}"}
            assert daemon.run("qmp", "block-export-add", json.dumps(export)).code == 0
        assert daemon.stop() == 0, daemon.errors()
        facts = json.loads((daemon.state / "vda" / "disk.json").read_text())
        assert facts["mtime-ns"] == disk.stat().st_mtime_ns


def test_hup_does_not_kill(short_tmp: Path, disk: Path) -> None:
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.run("status").code == 0


def test_two_daemons_on_one_state_folder(short_tmp: Path, disk: Path) -> None:
    second = short_tmp / "b"
    second.mkdir()
    other = make_disk(second / "other.raw", SIZE)
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        with Daemon(second, f"vdb={other}", state=daemon.state) as late:
            assert late.process.wait(20) == 4
            assert "another nbdfleece daemon is using it" in late.errors()
        assert daemon.run("status").code == 0


def test_two_daemons_on_one_control_socket(short_tmp: Path, disk: Path) -> None:
    other = make_disk(short_tmp / "other.raw", SIZE)
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        with Daemon(short_tmp, f"vdb={other}", state=short_tmp / "state2") as late:
            assert late.process.wait(20) == 4
            assert "another daemon is listening there" in late.errors()
        assert daemon.run("status").code == 0
        assert daemon.socket.exists()


def test_two_daemons_on_one_disk(short_tmp: Path, disk: Path) -> None:
    second = short_tmp / "b"
    second.mkdir()
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        code, said = refused(second, f"vda={disk}")
        assert code in (1, 4)
        assert '" lock: Is another process using the image' in said


def test_one_file_as_two_disks_is_called_that(short_tmp: Path, disk: Path) -> None:
    code, said = refused(short_tmp, f"vda={disk}", f"vdb={disk}")
    assert code == 4
    assert said == f"nbdfleece: serve: '{disk}' is served as disk 'vda' already"


def test_after_a_kill_the_leftovers_are_removed(short_tmp: Path, disk: Path) -> None:
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        left = daemon.state / "vda" / "snapshots" / "one"
        assert sorted(path.name for path in left.iterdir()) == ["meta.json", "temp.raw"]
    with Daemon(short_tmp, f"vda={disk}") as daemon:
        daemon.ready()
        assert "WARNING snapshot vda@one of an earlier run is lost" in daemon.errors()
        assert not left.exists()
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0


def test_leftovers_in_a_folder_of_their_own(short_tmp: Path, disk: Path) -> None:
    temp = short_tmp / "temp"
    with Daemon(short_tmp, "--temp-dir", temp, f"vda={disk}") as daemon:
        daemon.ready()
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        assert [path.name for path in temp.iterdir()] == ["vda@one.raw"]
        daemon.stop(signal.SIGKILL)
    with Daemon(short_tmp, "--temp-dir", temp, f"vda={disk}") as daemon:
        daemon.ready()
        assert list(temp.iterdir()) == []


def test_a_state_file_of_another_version_is_named(short_tmp: Path, disk: Path) -> None:
    meta = short_tmp / "state" / "vda" / "snapshots" / "one" / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text('{"version": 99}')
    code, said = refused(short_tmp, f"vda={disk}")
    assert code == 1
    assert str(meta) in said
    assert "99" in said
    assert meta.exists()


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ([], 2, "no disk is given"),
        (["nowhere.raw"], 5, "No such file"),
        (["9=DISK"], 2, "cannot be the name of a disk"),
        (["a b=DISK"], 2, "cannot be the name of a disk"),
        (["vda=DISK,format=qcow2"], 1, "not in qcow2 format"),
        (["vda=DISK,colour=red"], 2, "unknown key 'colour'"),
        (["vda=DISK,read-only=maybe"], 2, "none of on, off"),
        (["vda=nbd://127.0.0.1:1/x"], 1, "127.0.0.1:1"),
        (["vda=DISK", "vda=DISK"], 2, "two disks are called 'vda'"),
        (["vda=FOLDER"], 1, "is a folder"),
        (["vda=QCOW2"], 1, "looks like a qcow2 image"),
        (["--listen", "udp:1", "vda=DISK"], 2, "udp"),
        (["--listen", "tcp:0.0.0.0:0", "vda=DISK"], 2, "--allow-insecure"),
        (["--listen", "tcp:a..b:1", "vda=DISK"], 2, "cannot listen on tcp:a..b:1"),
        (["--listen", "fd:4294967295", "vda=DISK"], 2, "is not a number between"),
        (["--tls-creds", "/no", "vda=DISK"], 2, "'/no' is not a folder"),
        (["--tls-creds", "FOLDER", "vda=DISK"], 2, "server-cert.pem"),
        (["--tls-verify-peer", "maybe", "vda=DISK"], 2, "--tls-verify-peer"),
        (["--policy", "/no", "vda=DISK"], 2, "/no"),
        (["--listen", "tcp:127.0.0.1:0,tls=require", "vda=DISK"], 2, "without --tls-creds"),
        (["--listen", "tcp:127.0.0.1:0,tls=maybe", "vda=DISK"], 2, "off, allow or require"),
        (["--metrics", "x:1", "vda=DISK"], 2, "--metrics is not built yet"),
        (["--max-connections", "x", "vda=DISK"], 2, "--max-connections"),
        (["--config", "nowhere.toml"], 2, "No such file"),
        (["--handshake-timeout", "soon", "vda=DISK"], 2, "is not a duration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(
    short_tmp: Path, disk: Path, args: list[str], code: int, text: str
) -> None:
    qcow2 = short_tmp / "image.qcow2"
    qcow2.write_bytes(b"QFI\xfb" + bytes(1000))
    places = {"DISK": str(disk), "FOLDER": str(short_tmp), "QCOW2": str(qcow2)}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    found, said = refused(short_tmp, *args)
    assert text in said
    assert found == code


def test_a_foreign_image_is_served_when_format_is_said(short_tmp: Path) -> None:
    image = short_tmp / "image.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(4092))
    with Daemon(short_tmp, f"vda={image},format=raw") as daemon:
        daemon.ready()


def test_tcp_on_loopback_needs_no_word(short_tmp: Path, disk: Path) -> None:
    with Daemon(short_tmp, "--listen", "tcp:127.0.0.1:0", f"vda={disk}") as daemon:
        daemon.ready()
        listening = daemon.run("status", "--json").json["daemon"]["listen"]
        assert [text.partition(":")[0] for text in listening] == ["unix", "tcp"]


# --- TLS and policy (real clients: tests/interop/test_tls.py) ---------------------------------


def listening(daemon: Daemon) -> list[str]:
    found = daemon.run("status", "--json").json["daemon"]["listen"]
    return [re.sub(r"unix:[^,]*|:\d+(,|$)", r"\1", text) for text in found]


def test_tls_where_nobody_says(short_tmp: Path, disk: Path, pki: Pki) -> None:
    """Unix sockets may have it, TCP must."""
    args = ["--listen", "tcp:127.0.0.1:0", "--listen", "tcp:0.0.0.0:0", "--tls-creds", pki.server]
    with Daemon(short_tmp, *args, f"vda={disk}") as daemon:
        daemon.ready()
        assert listening(daemon) == [
            *(",tls=allow", "tcp:127.0.0.1,tls=require", "tcp:0.0.0.0,tls=require")
        ]
        uris = daemon.run("status", "--json").json["daemon"]["exports"][0]["uris"]
        assert [uri.partition(":")[0] for uri in uris] == ["nbd+unix", "nbds", "nbds"]


def test_tls_where_somebody_says(short_tmp: Path, disk: Path, pki: Pki) -> None:
    args = ["--listen", "tcp:127.0.0.1:0,tls=off", "--listen", "tcp:127.0.0.1:0,tls=allow"]
    args += ["--listen", f"unix:{short_tmp}/s,tls=require", "--tls-creds", str(pki.server)]
    with Daemon(short_tmp, *args, f"vda={disk}") as daemon:
        daemon.ready()
        assert listening(daemon) == [
            *(",tls=allow", "tcp:127.0.0.1", "tcp:127.0.0.1,tls=allow", ",tls=require")
        ]


@pytest.mark.parametrize("mode", ["off", "allow"])
def test_the_network_without_tls_needs_a_word(
    short_tmp: Path, disk: Path, pki: Pki, mode: str
) -> None:
    args = ["--listen", f"tcp:0.0.0.0:0,tls={mode}", "--tls-creds", pki.server, f"vda={disk}"]
    code, said = refused(short_tmp, *args)
    assert code == 2
    assert "--allow-insecure" in said
    with Daemon(short_tmp, "--allow-insecure", *args) as daemon:
        daemon.ready()


def test_what_the_policy_gives_without_tls_needs_none(
    short_tmp: Path, disk: Path, pki: Pki
) -> None:
    policy = short_tmp / "policy.toml"
    policy.write_text('[[rule]]\nwho = { cert = "CN=x" }\nexports = ["*"]\nallow = ["all"]\n')
    args = ["--listen", "tcp:0.0.0.0:0,tls=allow", "--tls-creds", pki.server, f"vda={disk}"]
    with Daemon(short_tmp, "--policy", policy, *args) as daemon:
        daemon.ready()


def test_keys_where_python_has_none(short_tmp: Path, disk: Path) -> None:
    if tls.HAS_PSK:
        pytest.skip("this Python has pre-shared keys")
    (short_tmp / "psk").mkdir()
    (short_tmp / "psk" / "keys.psk").write_text("alice:00ff\n")
    code, said = refused(short_tmp, "--tls-creds", short_tmp / "psk", f"vda={disk}")
    assert code == 2
    assert "Python 3.13" in said


async def test_policy_by_user_and_its_reload(short_tmp: Path, disk: Path) -> None:
    policy = short_tmp / "policy.toml"
    rule = f'[[rule]]\nwho = {{ uid = {os.getuid()} }}\nexports = ["vda"]\nallow = ["read"]\n'
    write(policy, rule)
    with Daemon(short_tmp, "--policy", policy, f"vda={disk}") as daemon:
        daemon.ready()
        async with client(daemon, "vda") as one:
            assert await one.error_of(c.NBD_CMD_WRITE, 0, 4, data=b"evil") == c.NBD_EPERM
            write(policy, rule.replace("[[rule]]", "[[rule"))
            daemon.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "the old policy stay" in daemon.errors())
            assert f"{policy}:1" in daemon.errors()
            async with client(daemon, "vda") as other:
                assert await other.read(0, 4) == b"\1" * 4

            write(policy, rule.replace("vda", "vdb"))
            daemon.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "policy read again" in daemon.errors())
            with pytest.raises(OptionRefused):
                async with client(daemon, "vda"):
                    pass
            assert await one.read(0, 4) == b"\1" * 4
            await eventually(lambda: 'refused="vda"' in daemon.errors())


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def test_limits_of_the_command_line(short_tmp: Path, disk: Path) -> None:
    args = ["--max-connections-per-export", "1", "--max-requests", "2", "--idle-timeout", "0.5"]
    args += ["--max-request-bytes", "1M", "--write-stall-timeout", "5", "--extended-headers", "off"]
    with Daemon(short_tmp, *args, f"vda={disk}") as daemon:
        daemon.ready()
        async with client(daemon, "vda") as one:
            with pytest.raises(OptionRefused, match="1 connections"):
                async with client(daemon, "vda"):
                    pass
            assert await one.wait_closed() is None
        await eventually(lambda: re.search(r'export="vda".*how=".*0.5 s', daemon.errors()))


def test_listening_socket_that_was_handed_over(short_tmp: Path, disk: Path, pki: Pki) -> None:
    """A unix socket that somebody else made is one all the same: TLS is allowed, not required."""
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(short_tmp / "given"))
        given.listen()
        fd = given.fileno()
        args = ["--listen", f"fd:{fd}", "--tls-creds", pki.server, f"vda={disk}"]
        with Daemon(short_tmp, *args, pass_fds=[fd]) as daemon:
            daemon.ready()
            assert f"fd:{fd},tls=allow" in daemon.run("status", "--json").json["daemon"]["listen"]
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(str(short_tmp / "given"))
                assert one.recv(8) == b"NBDMAGIC"


AS_A_SERVICE_MANAGER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.mark.parametrize("listen", ["fd:3,tls=off", "fd:3"])
def test_a_socket_of_the_service_manager_may_be_named(
    short_tmp: Path, disk: Path, pki: Pki, listen: str
) -> None:
    """As with `,tls=`: it is the same socket, and listened on once."""
    with socket.socket(socket.AF_UNIX) as given, socket.socket(socket.AF_UNIX) as one:
        given.bind(str(short_tmp / "given"))
        given.listen()
        serve = ["-m", "nbdfleece", "serve", "--listen", listen, f"vda={disk}"]
        serve += ["--control", str(short_tmp / "control.sock"), "--tls-creds", str(pki.server)]
        serve += ["--state-dir", str(short_tmp / "state")]
        with subprocess.Popen(
            [sys.executable, "-c", AS_A_SERVICE_MANAGER, str(given.fileno()), *serve],
            pass_fds=[given.fileno()],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline().startswith("vda nbd")
            one.connect(str(short_tmp / "given"))
            assert one.recv(8) == b"NBDMAGIC"
            process.terminate()
            errors = process.stderr.read()
            assert process.wait(20) == 0, errors
            assert errors.count("listening on fd:3") == 1


def test_a_descriptor_is_listened_on_once(short_tmp: Path, disk: Path) -> None:
    args = ["--listen", "fd:3", "--listen", "fd:3,tls=off", f"vda={disk}"]
    code, said = refused(short_tmp, *args)
    assert (code, "'fd:3' is listened on twice" in said) == (2, True)


def test_vsock(short_tmp: Path, disk: Path) -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        pytest.skip("this kernel has no vsock")
    asked = ["--listen", "vsock:any:10999"]
    code, said = refused(short_tmp, *asked, f"vda={disk}")
    assert (code, "any virtual machine of this host" in said) == (2, True)
    policy = short_tmp / "policy.toml"
    write(policy, '[[rule]]\nwho = { cid = 3 }\nexports = "vda"\nallow = "all"\n')
    with Daemon(short_tmp, *asked, "--policy", policy, f"vda={disk}") as daemon:
        daemon.ready()
    with Daemon(short_tmp, *asked, "--allow-insecure", f"vda={disk}") as daemon:
        daemon.ready()
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as one:
            try:
                one.connect((1, 10999))  # VMADDR_CID_LOCAL
            except OSError:
                pytest.skip("this kernel has no vsock to itself")
            assert one.recv(8) == b"NBDMAGIC"


# --- configuration file ----------------------------------------------------------------------


def test_config_file_and_the_command_line_over_it(short_tmp: Path, disk: Path) -> None:
    config = short_tmp / "c.toml"
    config.write_text(f'disks = ["vda={disk}"]\nprint-uri = true\nlisten = "unix:/nowhere/x"\n')
    with Daemon(short_tmp, "--config", config) as daemon:
        assert daemon.ready() == [daemon.uri("vda")]  # --listen of the command line


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('control = "x"\nlisten = 5\n', 2, "listen: expected an address"),
        ('\n\ncolour = "red"\n', 3, "unknown key 'colour'"),
        ("disks = [\n", 1, ""),
        ('disks = ["DISK"]\ntls-creds = "/no"\n', 2, "'/no' is not a folder"),
        ('disks = ["DISK"]\n\npolicy = "/no"\n', 3, "/no"),
        ('disks = ["DISK"]\ntls-verify-peer = 3\n', 2, "expected on or off"),
        ('disks = ["DISK"]\nmax-request-bytes = "many"\n', 2, "not a size"),
        ('disks = ["DISK"]\nmetrics = "x:1"\n', 2, "'metrics' is not built yet"),
        ('drain-timeout = "soon"\n', 1, "not a duration"),
        ("drain-timeout = nan\n", 1, "expected seconds"),
        ("drain-timeout = inf\n", 1, "expected seconds"),
        ('listen = ["unix:x"]\ndisks = ["vda=DISK,x=1"]\n', 2, "unknown key 'x'"),
        ('disks = ["DISK"]\n\nlisten = ["unix:x",\n "udp:1"]\n', 4, "udp"),
    ],
)
def test_check_config_names_file_and_line(
    short_tmp: Path, disk: Path, text: str, line: int, says: str
) -> None:
    config = short_tmp / "c.toml"
    config.write_text(text.replace("DISK", str(disk)))
    done = nbdfleece("serve", "--check-config", "--config", config)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert says in done.err
    assert done.err.startswith(f"nbdfleece: serve: {config}:{line}")


@pytest.mark.parametrize("text", [f"max-connections = {'9' * 5000}\n", f"a = {'[' * 5000}\n"])
def test_a_config_file_that_is_no_sense_at_all_is_one_line(short_tmp: Path, text: str) -> None:
    config = short_tmp / "c.toml"
    config.write_text(text)
    done = nbdfleece("serve", "--check-config", "--config", config)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"nbdfleece: serve: {config}: ")


def test_check_config_opens_nothing(short_tmp: Path, disk: Path) -> None:
    done = nbdfleece(
        *("serve", "--check-config", "--listen", f"unix:{short_tmp}/s", "--control"),
        *(short_tmp / "c", "--state-dir", short_tmp / "state", disk),
    )
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in short_tmp.iterdir()] == ["disk.raw"]


# --- service managers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_service_manager_hears_of_ready_and_stopping(
    short_tmp: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from tests.support import daemon_process

    plain = daemon_process.environment
    path = str(short_tmp / "notify")
    address = path
    if kind == "abstract":
        path, address = f"@{path}", f"\0{path}"
    monkeypatch.setattr(
        daemon_process, "environment", lambda **extra: plain(NOTIFY_SOCKET=path, **extra)
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(20)
        with Daemon(short_tmp, f"vda={disk}") as daemon:
            assert sock.recv(1000).startswith(b"READY=1")
            daemon.process.send_signal(signal.SIGHUP)
            assert sock.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert sock.recv(1000).startswith(b"READY=1")
            daemon.process.send_signal(signal.SIGTERM)
            assert sock.recv(1000) == b"STOPPING=1"
            assert daemon.process.wait(20) == 0


def test_a_service_manager_that_does_not_listen_holds_nobody_up(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loop:
        def call_later(self, *_: object) -> None:
            """Not now."""

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(short_tmp / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_tmp / "notify"))
        for _ in range(2000):  # more than a socket holds
            _keep_alive(Loop(), 1.0)  # type: ignore[arg-type]


@pytest.mark.deadline(20)
def test_a_service_manager_that_is_late_still_hears_that_it_is_ready(
    short_tmp: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take a start that it hears nothing of for one that hangs."""
    from tests.support import daemon_process

    plain, path = daemon_process.environment, str(short_tmp / "notify")
    monkeypatch.setattr(
        daemon_process, "environment", lambda **extra: plain(NOTIFY_SOCKET=path, **extra)
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as late:
        late.bind(path)
        late.settimeout(10)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
            others.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # as many as it holds
                while True:
                    others.sendto(b"of others", path)
        with Daemon(short_tmp, f"vda={disk}") as daemon:
            daemon.ready()
            time.sleep(1.5)  # longer than guests wait for it
            while not late.recv(1000).startswith(b"READY=1"):
                pass
            assert daemon.stop() == 0


def receive_for_ever(sock: socket.socket) -> None:
    while True:
        sock.recv(1000)


def test_the_service_manager_hears_that_the_loop_turns(
    short_tmp: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import daemon_process

    plain = daemon_process.environment
    path = str(short_tmp / "notify")
    monkeypatch.setattr(
        daemon_process,
        "environment",
        lambda **extra: plain(NOTIFY_SOCKET=path, WATCHDOG_USEC="100000", **extra),
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(20)
        with Daemon(short_tmp, f"vda={disk}") as daemon:
            assert sock.recv(1000).startswith(b"READY=1")
            assert [sock.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            # A loop that does not turn is what the manager wants to know.
            daemon.process.send_signal(signal.SIGSTOP)
            sock.settimeout(1)
            with pytest.raises(TimeoutError):
                receive_for_ever(sock)
            daemon.process.send_signal(signal.SIGCONT)
            sock.settimeout(20)
            assert sock.recv(1000) == b"WATCHDOG=1"
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(20) == 0


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "42"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "41"}, None),
    ],
)
def test_how_often_the_service_manager_wants_to_hear_of_us(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert _watchdog_interval_s(environ, 42) == seconds


@pytest.mark.interop("nbdcopy")
def test_socket_activation_by_libnbd(
    short_tmp: Path, disk: Path, program: Callable[[str], str]
) -> None:
    import subprocess
    import sys

    from tests.support.daemon_process import environment

    copy = short_tmp / "copy.raw"
    serve = [sys.executable, "-m", "nbdfleece", "serve", "-q", f"vda={disk}"]
    serve += ["--control", str(short_tmp / "c"), "--state-dir", str(short_tmp / "state")]
    subprocess.run(
        [program("nbdcopy"), "--", "[", *serve, "]", str(copy)],
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=30,
    )
    assert copy.read_bytes() == disk.read_bytes()


# --- other mistakes --------------------------------------------------------------------------


def test_a_second_signal_stops_at_once(short_tmp: Path, disk: Path) -> None:
    with Daemon(short_tmp, "--drain-timeout", "60", f"vda={disk}") as daemon:
        daemon.ready()
        # A client that never says anything, and a monitor that has sent half a request.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.control))
            os.kill(daemon.process.pid, signal.SIGTERM)
            os.kill(daemon.process.pid, signal.SIGTERM)
            assert daemon.process.wait(20) in (0, 1)
        assert not daemon.control.exists()
