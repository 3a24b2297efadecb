"""Without the package for certificates, who needs them is told so in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdfleece.base.needs import CRYPTOGRAPHY, check_cryptography
from tests.support.daemon_process import ROOT, environment

MISSING = "raise ModuleNotFoundError(name='cryptography')"
OLD = "__version__ = '38.0.4'"


def run(folder: Path, package: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run nbdfleece where `cryptography` is this text."""
    (folder / "cryptography.py").write_text(package)
    return subprocess.run(
        [sys.executable, "-m", "nbdfleece", *words],
        env=environment(PYTHONPATH=f"{folder}:{ROOT}"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_the_tests_run_with_is_enough() -> None:
    check_cryptography()


def test_the_package_asks_for_the_same_version() -> None:
    assert f'"cryptography>={CRYPTOGRAPHY}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("package", "why"), [(MISSING, "has none"), (OLD, "has 38.0.4")])
@pytest.mark.parametrize(
    "words",
    [("init", "tls"), ("client", "tls", "guest"), ("revoke", "tls", "guest"), ("show", "tls")],
    ids=lambda words: words[0],
)
def test_pki_says_what_it_lacks(
    tmp_path: Path, package: str, why: str, words: tuple[str, ...]
) -> None:
    done = run(tmp_path, package, "pki", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nbdfleece: pki {words[0]}: certificates need the package cryptography")
    assert why in line
    assert not (tmp_path / "tls").exists()


def test_so_does_a_daemon_with_certificates(tmp_path: Path) -> None:
    for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
        (tmp_path / name).touch()
    (tmp_path / "vda.raw").write_bytes(bytes(4096))
    words = ["--listen", "tcp:localhost:0", "--control", "control", "--state-dir", "state"]
    done = run(tmp_path, MISSING, "serve", *words, "--tls-creds", ".", "vda.raw")
    assert done.returncode == 2
    assert "certificates need the package cryptography" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
