"""Wires: what goes over sockets, as bytes in and values out. No I/O, no clock."""
