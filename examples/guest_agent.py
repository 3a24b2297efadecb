#!/usr/bin/env python3
r"""Freezes or thaws the file systems of a qemu guest, through the guest agent in it.

    guest_agent.py SOCKET freeze|thaw|status

SOCKET is the unix socket of the agent's channel: of a machine started with

    -device virtio-serial -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0
    -chardev socket,path=SOCKET,server=on,wait=off,id=qga0

so that a hook can be

    nbdfleece snapshot create vda --pre 'guest_agent.py SOCKET freeze' \
        --post 'guest_agent.py SOCKET thaw'

Under libvirt, which holds that socket itself, `virsh domfsfreeze` and `virsh domfsthaw` do it. A
snapshot taken between freeze and thaw needs no journal replay. Prints what the agent said; exit
code 1 and one line when it does not answer within a minute or refuses. Needs Python 3.11 and
nothing else.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
from typing import Any

TIMEOUT_S = 60.0  # the guest writes out its memory first; a hook has a limit of its own
COMMANDS = {word: f"guest-fsfreeze-{word}" for word in ("freeze", "thaw", "status")}


def read_line(channel: socket.socket) -> bytes:
    """Return one line without its end; bytes of old answers may stand before it."""
    line = b""
    while (byte := channel.recv(1)) != b"\n":
        if not byte:
            raise OSError("the guest agent's channel was closed")
        line += byte
    return line


def synchronize(channel: socket.socket) -> None:
    """Skip what the agent still has to say to whoever asked before us."""
    number = secrets.randbelow(1 << 31)
    ask = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    channel.sendall(b"\xff" + json.dumps(ask).encode() + b"\n")
    while True:
        _, delimiter, rest = read_line(channel).rpartition(b"\xff")
        if delimiter and json.loads(rest).get("return") == number:
            return


def execute(channel: socket.socket, command: str) -> Any:
    """Run a command of the agent; return its answer."""
    channel.sendall(json.dumps({"execute": command}).encode() + b"\n")
    answer = json.loads(read_line(channel))
    if "error" in answer:
        raise OSError(f"the guest agent says: {answer['error'].get('desc')}")
    return answer["return"]


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    if len(arguments) != 2 or arguments[1] not in COMMANDS:
        print("usage: guest_agent.py SOCKET freeze|thaw|status", file=sys.stderr)
        return 2
    path, word = arguments
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(TIMEOUT_S)
            channel.connect(path)
            synchronize(channel)
            print(execute(channel, COMMANDS[word]))
    except (OSError, ValueError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error
        print(f"guest_agent.py: {word} by way of {path}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
