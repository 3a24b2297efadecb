"""`nbdfleece storage-daemon`: the options of qemu-storage-daemon, read as it reads them."""

from __future__ import annotations

import getopt
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.cli import logs
from nbdfleece.cli.arguments import UsageError
from nbdfleece.cli.exits import complain

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME: Final = "storage-daemon"

_MAKING: Final = ("blockdev", "chardev", "export", "monitor", "nbd-server", "object")
_LONG: Final = (
    *(f"{name}=" for name in (*_MAKING, "pidfile", "trace")),
    *("daemonize", "help", "version"),
)

_HELP: Final = """\
usage: nbdfleece storage-daemon [OPTION]...

Serve what qemu-storage-daemon's options say. They are carried out in the order in which they stand.

  --blockdev [driver=]DRIVER,node-name=NAME[,KEY=VALUE...]
                         make a node
  --object [qom-type=]TYPE,id=ID[,KEY=VALUE...]
                         make credentials, an authorization object, an iothread
  --nbd-server addr.type=unix,addr.path=PATH[,tls-creds=ID][,tls-authz=ID][,max-connections=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
                         let NBD clients connect
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off][,KEY=VALUE...]
                         offer a node to them
  --chardev socket,id=ID,path=PATH,server=on,wait=off
  --monitor [chardev=]ID answer QMP there
  --pidfile PATH         write the process id to a file
  --daemonize            go into the background when all is ready
  -T, --trace WHAT       ignored
  -h, --help             this text
  -V, --version          the version

What stands for KEY=VALUE,... may also be a JSON object. A comma in a value is doubled.

example: nbdfleece storage-daemon --blockdev driver=file,node-name=disk,filename=disk.raw \\
    --nbd-server addr.type=unix,addr.path=nbd.sock --export type=nbd,id=disk,node-name=disk
"""


def run(words: Sequence[str]) -> int:
    """Run the daemon that the options describe; return the exit code.

    Raises:
        UsageError: An option is not known, or lacks its value.
        NbdfleeceError: The daemon cannot start.
    """
    from nbdfleece import storage_daemon  # the other commands do not need the whole program

    try:
        options, rest = getopt.getopt(list(words), "hT:V", list(_LONG))
    except getopt.GetoptError as error:
        raise UsageError(NAME, str(error)) from error
    if rest:
        raise UsageError(NAME, f"{rest[0]}: Unexpected argument")
    given = {name for name, _ in options}
    if given & {"-h", "--help"}:
        print(_HELP, end="")
        return 0
    if given & {"-V", "--version"}:
        print(f"nbdfleece storage-daemon version {__version__}")
        return 0
    for name, value in options:
        if name in ("-T", "--trace"):
            complain(NAME, f"{name} {value}: warning: there is no tracing here; ignored")
    pid_files = [value for name, value in options if name == "--pidfile"]
    logs.start(verbose=False, quiet=True)
    return storage_daemon.serve(
        storage_daemon.Settings(
            options=tuple(
                (name, value) for name, value in options if name.removeprefix("--") in _MAKING
            ),
            pid_file=Path(pid_files[-1]) if pid_files else None,
            daemonize="--daemonize" in given,
        )
    )
