"""`nbdfleece serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import ConfigError
from nbdfleece.cli import logs
from nbdfleece.cli.config import ConfigFile, ServeOptions

if TYPE_CHECKING:
    import argparse

    from nbdfleece import daemon

_NOT_SETTINGS = ("command", "config", "check_config", "verbose", "quiet")


def run(args: argparse.Namespace) -> int:
    """Run the daemon, or check its configuration; return the exit code.

    Raises:
        NbdfleeceError: It cannot start.
    """
    from nbdfleece import daemon  # the other commands do not need the whole program

    file = ConfigFile(args.config)
    given = {
        name.replace("_", "-"): value
        for name, value in vars(args).items()
        if name not in _NOT_SETTINGS
    }
    options = ServeOptions(given, file)
    settings = daemon.Settings(
        disks=options.texts("disks"),
        listen=options.texts("listen"),
        default_listen=options.default_listen,
        control=options.control,
        state_dir=options.state_dir,
        temp_dir=options.path("temp-dir"),
        pid_file=options.path("pid-file"),
        print_uri=options.is_on("print-uri"),
        allow_insecure=options.is_on("allow-insecure"),
        tls_creds=options.path("tls-creds"),
        tls_verify_peer=options.text("tls-verify-peer") != "off",
        policy=options.path("policy"),
        extended_headers=options.text("extended-headers") != "off",
        limits=options.limits,
        drain_timeout_s=options.drain_timeout_s,
    )
    if not args.check_config:
        logs.start(verbose=args.verbose, quiet=args.quiet)
        return daemon.serve(settings)
    _check(settings, file)
    if not args.quiet:
        print("the configuration is good")
    return 0


def _check(settings: daemon.Settings, file: ConfigFile) -> None:
    """Check the settings one by one, so that what is wrong can be found in the file."""
    from nbdfleece import daemon

    for disk in settings.disks:
        try:
            daemon.check_disk(disk)
        except ConfigError as error:
            raise ConfigError(f"{file.place_of(disk)}{error}") from error
    for address in settings.listen:
        try:
            daemon.check_listen(address)
        except ConfigError as error:
            raise ConfigError(f"{file.place_of(address)}{error}") from error
    for path, check in (
        (settings.tls_creds, daemon.check_credentials),
        (settings.policy, daemon.check_policy),
    ):
        try:
            check(settings)
        except ConfigError as error:
            raise ConfigError(f"{file.place_of(str(path))}{error}") from error
    daemon.check(settings)
