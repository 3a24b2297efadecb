"""Who is at the other end of a socket: what the kernel says, and what TLS adds to it."""

from __future__ import annotations

import dataclasses
import socket
import struct
from typing import Final

from nbdfleece.server.identity import Identity, PeerCertificate, peer_address

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


def identify(sock: socket.socket) -> Identity:
    """Return what the kernel knows of a peer; nothing of one that is gone already."""
    try:
        if sock.family == socket.AF_UNIX:
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, gid = _CREDENTIALS.unpack(packed)
            return Identity(uid=uid, gid=gid, pid=pid)
        name = sock.getpeername()
        if sock.family == socket.AF_VSOCK:
            return Identity(cid=name[0])
        if sock.family in _INTERNET:
            return Identity(address=peer_address(name[0]))
    except (OSError, ValueError):
        pass
    return Identity()


def describe_peer(sock: socket.socket) -> str:
    """Return where a peer is, for people."""
    found = identify(sock)
    if found.uid is not None:
        return f"unix, uid {found.uid}, pid {found.pid}"
    try:
        port = sock.getpeername()[1]
    except (OSError, IndexError):
        return "already gone"
    if found.cid is not None:
        return f"vsock, cid {found.cid}, port {port}"
    return f"{found.address}, port {port}"


def proved(plain: Identity, certificate: bytes | None, psk: str | None) -> Identity:
    """Return who a client is after its TLS handshake.

    Args:
        plain: What was known before.
        certificate: Its certificate, in DER, if its chain was verified.
        psk: The name of the pre-shared key that it has proved to have.

    Raises:
        PeerViolation: The certificate cannot be understood.
    """
    names = None if certificate is None else PeerCertificate.from_der(certificate)
    return dataclasses.replace(plain, tls=True, certificate=names, psk=psk)


def identity_name(identity: Identity) -> str:
    """Return as whom a client acts, for logs and counts; "" for one that has shown nothing."""
    found = identity.name()
    if found:
        return found
    if identity.uid is not None:
        return f"uid {identity.uid}"
    if identity.cid is not None:
        return f"cid {identity.cid}"
    return ""


def counted_address(sock: socket.socket) -> str:
    """Return by what connections are counted per address; "" for peers that have none."""
    found = identify(sock)
    if found.cid is not None:
        return f"vsock cid {found.cid}"
    return "" if found.address is None else f"address {found.address}"
