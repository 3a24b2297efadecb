"""The image: not root, a read-only root, one process, health, signals, disks that are served."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece import __version__
from tests.containers.conftest import Podman

pytestmark = [pytest.mark.slow, pytest.mark.interop("podman"), pytest.mark.deadline(900)]

SIZE = 4 << 20
UID = 10809
# As little as a container can be given.
TIGHT = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--network=none")
TIGHT += ("--security-opt=no-new-privileges", "--pull=never")


@pytest.fixture
def disks(short_tmp: Path) -> Path:
    """A folder that holds vda.raw, for the container's user."""
    folder = short_tmp / "disks"
    folder.mkdir()
    (folder / "vda.raw").write_bytes(b"\1" * SIZE)
    for path in (folder, folder / "vda.raw"):
        os.chown(path, UID, UID)
    return folder


@pytest.fixture
def container(podman: Podman, image: str, disks: Path) -> Iterator[str]:
    """A running container; its id."""
    done = podman(
        *("run", "-d", *TIGHT, "-v", f"{disks}:/disks", image),
        *("serve", "--listen", "unix:/disks/nbd.sock", "/disks/vda.raw"),
    )
    name = done.stdout.split()[-1]
    yield name
    podman("rm", "-f", "-v", name)


def wait_until_ready(podman: Podman, container: str) -> None:
    """Return when the daemon has said where its disk is."""
    with subprocess.Popen(
        ["podman", "logs", "--follow", container],
        env=podman.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as logs:
        assert logs.stdout is not None
        line = logs.stdout.readline()
        logs.kill()
    assert line == "vda nbd+unix:///vda?socket=/disks/nbd.sock\n"


def test_the_image_says_what_it_is(podman: Podman, image: str) -> None:
    (facts,) = json.loads(podman("inspect", image).stdout)
    labels = facts["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert facts["Config"]["User"] == f"{UID}:{UID}"
    assert facts["Config"]["StopSignal"] in ("SIGTERM", "15")
    assert facts["Healthcheck"]["Test"] == ["CMD", "nbdfleece", "health", "--quiet"]
    assert set(facts["Config"]["Volumes"]) == {"/disks", "/run/nbdfleece", "/var/lib/nbdfleece"}
    done = podman("run", "--rm", *TIGHT, image, "--version")
    assert done.stdout == f"nbdfleece {__version__}\n"


def test_it_serves_as_nobody_in_particular_and_ends_when_told(
    podman: Podman, container: str, disks: Path, program: Callable[[str], str]
) -> None:
    wait_until_ready(podman, container)
    podman("healthcheck", "run", container)
    assert podman("exec", container, "id", "-u").stdout == f"{UID}\n"
    root = podman("exec", container, "touch", "/x", check=False)
    assert "Read-only file system" in root.stderr
    processes = podman("top", container, "pid", "comm").stdout.splitlines()[1:]
    assert [row.split()[0] for row in processes] == ["1"]

    podman("exec", container, "nbdfleece", "snapshot", "create", "vda", "--name", "one")
    uri = f"nbd+unix:///vda?socket={disks}/nbd.sock"
    write = [program("qemu-io"), "-f", "raw", "-c", "write -P 2 0 64k", uri]
    subprocess.run(write, check=True, capture_output=True)
    copy = disks / "copy"
    at_one = uri.replace("vda", "vda@one", 1)
    subprocess.run([program("nbdcopy"), at_one, copy], check=True, capture_output=True)
    assert copy.read_bytes() == b"\1" * SIZE
    assert (disks / "vda.raw").read_bytes()[:65537] == b"\2" * 65536 + b"\1"

    podman("stop", "-t", "30", container)
    assert podman("inspect", "-f", "{{.State.ExitCode}}", container).stdout == "0\n"
    assert "SIGTERM: stopping" in podman("logs", container).stderr
