"""How files get into a folder."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from nbdfleece.pki import files
from nbdfleece.pki.errors import NoAuthority, PkiError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pem"
    files.write(path, b"old", private=False)
    seen: list[bytes] = []
    sync = os.fsync

    def look(fd: int) -> None:
        seen.append(path.read_bytes())
        sync(fd)

    monkeypatch.setattr(os, "fsync", look)
    files.write(path, b"new", private=False)
    assert seen == [b"old", b"new"]  # of the file, then of the name
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pem"]


def test_a_leftover_cannot_lend_a_new_key_its_mode(tmp_path: Path) -> None:
    leftover = tmp_path / ".x.pem.new"
    leftover.touch()
    leftover.chmod(0o666)
    files.write(tmp_path / "x.pem", b"secret", private=True)
    assert mode(tmp_path / "x.pem") == 0o600


def test_a_leftover_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / ".x.pem.new").symlink_to(tmp_path / "target")
    files.write(tmp_path / "x.pem", b"secret", private=True)
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "x.pem").is_symlink()


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    files.make_folder(tmp_path)
    files.make_folder(tmp_path / "new")
    assert (mode(tmp_path), mode(tmp_path / "new")) == (0o755, 0o700)


def test_the_lock_keeps_others_out(tmp_path: Path) -> None:
    def is_free() -> bool:
        with open(tmp_path / ".lock", "rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with files.locked(tmp_path):
        assert not is_free()
    assert is_free()


def test_errors_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "x.pem"
    for work in (files.read, files.sync_folder, files.remove_folder):
        with pytest.raises(PkiError, match="none"):
            work(missing)
    with pytest.raises(PkiError, match=r"x\.pem': No such file"):
        files.write(missing, b"", private=True)
    with pytest.raises(NoAuthority, match="pki init"), files.locked(tmp_path / "none"):
        pass
