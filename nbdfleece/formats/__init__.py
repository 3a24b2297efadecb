"""Layouts of disk images: bytes in, values out, and back. No I/O."""
