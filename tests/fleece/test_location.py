from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, ConfigError
from nbdfleece.fleece.errors import LocationNotFound
from nbdfleece.fleece.location import check_snapshot_name, is_block_device, parse_location


@pytest.mark.parametrize(
    ("text", "disk", "path"),
    [
        ("/srv/disk.raw", "disk", "/srv/disk.raw"),
        ("vda=/srv/disk.raw", "vda", "/srv/disk.raw"),
        ("vda=/srv/a=b.raw", "vda", "/srv/a=b.raw"),
        ("vda=/srv/a,,b.raw", "vda", "/srv/a,b.raw"),
        ("/srv/a=b/disk.raw", "disk", "/srv/a=b/disk.raw"),
        ("/srv/disk.tar.gz", "disk.tar", "/srv/disk.tar.gz"),
        ("/dev/sdb", "sdb", "/dev/sdb"),
    ],
)
def test_name_and_path(text: str, disk: str, path: str) -> None:
    location = parse_location(text)
    assert (location.disk, location.path) == (disk, path)


def test_keys() -> None:
    usual = parse_location("vda=/x")
    assert (usual.read_only, usual.discard, usual.direct, usual.locking) == (
        False,
        True,
        False,
        True,
    )
    location = parse_location(
        "vda=/x,format=raw,read-only=on,discard=ignore,cache=none,locking=off"
    )
    assert location.format_given
    assert location.read_only
    assert not location.discard
    assert location.direct
    assert not location.locking


@pytest.mark.parametrize(
    "text",
    [
        *("", "vda=", "=x", "9=x", "a b=x", "x" * 65 + "=y", "vda=x,ro", "vda=x,format=vmdk"),
        *(",x=y", "vda=x,discard=unmap,discard=unmap", "vda=x,Format=raw", "/1.raw"),
        "/srv/\u00e9.raw",
    ],
)
def test_mistakes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_location(text)


def test_an_image_is_opened_as_what_the_user_says_it_is() -> None:
    assert parse_location("vda=/x,format=qcow2").is_qcow2
    assert not parse_location("vda=/x,format=raw").is_qcow2
    assert not parse_location("vda=/x").is_qcow2


@pytest.mark.parametrize(
    ("text", "disk", "export"),
    [
        ("nbd+unix:///vda?socket=/s", "vda", "vda"),
        ("vdb=nbd+unix:///x?socket=/s", "vdb", "x"),
        ("vdb=nbd+unix:///?socket=/a,,b,read-only=on", "vdb", ""),
    ],
)
def test_export_of_another_server(text: str, disk: str, export: str) -> None:
    location = parse_location(text)
    assert location.disk == disk
    assert location.remote is not None
    assert location.remote.export == export
    assert location.path.startswith("nbd+unix:///")
    assert not is_block_device(location)


def test_a_token_is_used_and_not_shown() -> None:
    token = "x" * 32
    location = parse_location(f"vda=nbd://h/vda@s:{token}")
    assert location.remote is not None
    assert location.remote.export == f"vda@s:{token}"
    assert token not in location.path
    assert location.path != parse_location(f"vda=nbd://h/vda@s:{'y' * 32}").path
    for wrong in (f"nbd://h/vda@s:{token}", f"vda=nbd://h/vda@s:{token},x", f"nbd://h/x:{token}"):
        with pytest.raises(ConfigError) as refused:
            parse_location(wrong)
        assert token not in str(refused.value)


def test_keys_of_another_server() -> None:
    location = parse_location("vda=nbd://h/x,reconnect-delay=5m,open-timeout=3,format=raw")
    assert (location.reconnect_delay_s, location.open_timeout_s) == (300.0, 3.0)
    assert location.format_given
    assert (parse_location("vda=nbd://h/x").reconnect_delay_s) == 0


@pytest.mark.parametrize(
    "text",
    [
        *("nbd://h", "nbd://h/a@b", "vda=nbd://h/x?y=z", "vda=nbd://h/x,cache=none"),
        *("vda=nbd://h/x,locking=off", "vda=/x,reconnect-delay=3", "vda=nbd://h/x,open-timeout=x"),
    ],
)
def test_mistakes_with_another_server(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_location(text)


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "20240102T030405Z", "20240102T030405Z-2"])
def test_snapshot_names(name: str) -> None:
    check_snapshot_name(name)


@pytest.mark.parametrize(
    "name", ["", "1", ".", "..", "a/b", "a@b", "x" * 65, "20240102T030405Z-", "a\n"]
)
def test_no_snapshot_names(name: str) -> None:
    with pytest.raises(ConfigError):
        check_snapshot_name(name)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"LUKS\xba\xbe", "luks"),
        (b"QED\0", "qed"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
    ],
)
def test_known_image_formats_are_no_raw_disks(tmp_path: Path, start: bytes, name: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(start + bytes(1000))
    with pytest.raises(CommandError, match=f"looks like a {name} image"):
        is_block_device(parse_location(str(image)))
    assert is_block_device(parse_location(f"{image},format=raw")) is False


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LocationNotFound):
        is_block_device(parse_location(str(tmp_path / "none.raw")))
    with pytest.raises(CommandError, match="is a folder"):
        is_block_device(parse_location(f"vda={tmp_path}"))
    with pytest.raises(CommandError):
        is_block_device(parse_location("vda=/dev/null"))
