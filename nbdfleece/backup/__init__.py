"""Backups in a folder: what is there, whether it is whole, how it is pruned and restored.

Needs no daemon. Making a backup does: that is `fleece.backup`, which writes through this room.

::

    DIR/DISK/INSTANT.full.qcow2     all that the disk held at the instant
    DIR/DISK/INSTANT.inc.qcow2      what had changed since the point below; its backing file
    DIR/DISK/manifest.json          which points there are, and what must come out of each file
    DIR/DISK/NAME.partial           unfinished; the next run removes it

Modules: `names`, `manifest`, `chain`, `retention`, `content` are pure; `folder` keeps the crash
rules; `image` reads one file, `layers` several over each other; `prune`, `verify`, `restore` use
them; `hooks` and `guard` run what stands around the instant.
"""
