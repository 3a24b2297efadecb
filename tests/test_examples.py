"""Every example runs, and proves what it says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.deadline(120)
def test_the_quickstart_proves_its_claim(tmp_path: Path) -> None:
    """README.md begins with it."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROVED: the copy is the disk exactly as it was" in done.stdout


class FakeAgent:
    """A guest agent that was left in the middle of an answer to somebody else."""

    def __init__(self, folder: Path, answer: str) -> None:
        self.path = folder / "agent.sock"
        self.asked: list[dict] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        channel, _ = self._listener.accept()
        with self._listener, channel, channel.makefile("rb") as lines:
            channel.sendall(b'{"return": "of before"}\n{"return": "of be')
            for line in lines:
                request = json.loads(line.rpartition(b"\xff")[2])
                self.asked.append(request)
                if request["execute"] == "guest-sync-delimited":
                    answer = json.dumps({"return": request["arguments"]["id"]})
                    channel.sendall(b"\xff" + answer.encode() + b"\n")
                else:
                    channel.sendall(self._answer.encode() + b"\n")

    def join(self) -> list[str]:
        """Wait until the client is gone; return the commands it gave."""
        self._thread.join()
        return [request["execute"] for request in self.asked]


def guest_agent(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the example; tests/interop/test_qemu_guest.py runs it with a real agent."""
    command = [sys.executable, EXAMPLES / "guest_agent.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_the_guest_agent_is_asked_past_what_it_still_says_to_others(short_tmp: Path) -> None:
    agent = FakeAgent(short_tmp, '{"return": 2}')
    done = guest_agent(agent.path, "freeze")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
    assert agent.join() == ["guest-sync-delimited", "guest-fsfreeze-freeze"]


def test_what_the_guest_agent_refuses_is_one_line(short_tmp: Path) -> None:
    agent = FakeAgent(short_tmp, '{"error": {"class": "GenericError", "desc": "is frozen"}}')
    done = guest_agent(agent.path, "thaw")
    agent.join()
    assert done.returncode == 1
    assert done.stderr == (
        f"guest_agent.py: thaw by way of {agent.path}: the guest agent says: is frozen\n"
    )


def test_no_guest_agent_is_one_line(short_tmp: Path) -> None:
    done = guest_agent(short_tmp / "none", "status")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No such file" in done.stderr
    assert guest_agent(short_tmp / "none", "melt").returncode == 2


def test_every_example_has_a_test() -> None:
    assert [path.name for path in sorted(EXAMPLES.glob("*.py"))] == [
        "guest_agent.py",
        "quickstart.py",
    ]
    backup = sorted(path.name for path in (EXAMPLES / "backup").iterdir())
    assert backup == [  # tests/test_backup_examples.py
        "nbdfleece-backup.service",
        "nbdfleece-backup.timer",
        "restic.sh",
    ]
