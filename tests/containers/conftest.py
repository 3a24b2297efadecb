"""The project's image in podman, from a base that debootstrap makes: no registry is asked.

The base stays in podman's store, as `localhost/nbdfleece-base:bookworm`; making it takes a minute.
What the image needs from the package index is fetched on this machine and handed in, so that the
build itself needs no network.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require_program

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = "localhost/nbdfleece-base:bookworm"
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
NEEDS = ("cryptography>=42", "setuptools>=77")

# runc and these limits: podman's own choices want cgroups v2, and may raise the limits.
SETTINGS = """\
[engine]
runtime = "runc"
events_logger = "file"
cgroup_manager = "cgroupfs"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
"""


@dataclass
class Podman:
    """Runs podman; what is built and run under its settings."""

    environment: dict[str, str]
    build_options: list[str]

    def __call__(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["podman", *map(str, args)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"podman {args[0]}: {done.stderr}"
        return done


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """Podman, with the base image in its store."""
    for name in ("podman", "runc", "debootstrap"):
        require_program(name)
    if os.geteuid() != 0:
        pytest.skip("making a base image needs root")
    folder = tmp_path_factory.mktemp("podman")
    (folder / "containers.conf").write_text(SETTINGS)
    (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    options = ["--pull=never", "--format=docker", "--isolation=chroot"]
    options += [f"--volume={folder}/wheels:/wheels:ro"]
    options += [f"--volume={folder}/pip.conf:/etc/pip.conf:ro", f"--build-arg=BASE={BASE}"]
    environment = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
    found = Podman(environment, options)
    with open(Path(tempfile.gettempdir()) / "nbdfleece-base.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one run makes it, the others wait
        if found("image", "exists", BASE, check=False).returncode != 0:
            make_base(found, folder / "base")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(folder / "wheels")]
    fetch += ["--only-binary=:all:", "--python-version=3.11", *NEEDS]
    subprocess.run(fetch, check=True, capture_output=True)
    return found


def make_base(podman: Podman, folder: Path) -> None:
    """Put a small Debian with Python into podman's store."""
    options = ["--variant=minbase", f"--include={PACKAGES}"]
    subprocess.run(
        ["debootstrap", *options, "bookworm", folder], check=True, stdout=subprocess.DEVNULL
    )
    archive = folder.with_suffix(".tar")
    subprocess.run(["tar", "-C", folder, "-cf", archive, "."], check=True)
    podman("import", archive, BASE)
    archive.unlink()
    subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """The image, built as Dockerfile says."""
    podman("build", *podman.build_options, "-t", "nbdfleece", ROOT)
    return "localhost/nbdfleece"
