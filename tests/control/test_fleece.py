"""Commands about disks: what they take, and what they do not show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon_process import make_disk
from tests.support.live import ask, client, serving

pytestmark = pytest.mark.slow


async def test_a_disk_of_another_server_by_a_token_that_nobody_is_shown(short_tmp: Path) -> None:
    folders = [short_tmp / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    disks = [make_disk(folder / "vda.raw", 1 << 20) for folder in folders]
    with serving(folders[0], disks[0]) as upstream, serving(folders[1], disks[1]) as daemon:
        (made,) = await ask(upstream, "fleece-snapshot-create", {"disks": ["vda"], "token": 600})
        (uri,) = (uri for uri in made["token-uris"] if uri.startswith("nbd+unix:"))
        token = made["token-export"].rpartition(":")[2]
        assert token in uri
        asked = {
            "disk": "copy",
            "location": uri,
            "read-only": True,
            "format": "raw",
            "reconnect-delay": "5s",
            "open-timeout": "3s",
        }
        await ask(daemon, "fleece-disk-add", asked)
        async with client(daemon, "copy") as reader:
            assert await reader.read(0, 4096) == b"\1" * 4096
        _, facts = await ask(daemon, "query-fleece-disks")
        assert facts["location"].startswith("nbd+unix:///vda@")
        assert token not in facts["location"]
        kept = [path for path in folders[1].rglob("*") if path.is_file()]
        assert any(path.name == "disk.json" for path in kept)
        assert not [path for path in kept if token.encode() in path.read_bytes()]
        assert daemon.stop() == 0
        assert token not in daemon.errors()
