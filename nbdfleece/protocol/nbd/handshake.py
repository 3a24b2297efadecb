"""Server side of the handshake: from the greeting to transmission, or to a closed connection.

Rules that hold for every option
  H1  An option is received to its end before it is answered; data that no well-formed option of its
      kind can have is read and dropped, never kept.
  H2  After an error reply the next option parses. What cannot be answered ends the connection;
      there is no third state.
  H3  Nothing is looked up and nothing kept in proportion to a number from the client before that
      number is within its limit.
  H4  What was agreed on before TLS is gone after it (CVE-2021-3716), and no byte that came in plain
      text is taken for one that came over TLS: what lies behind STARTTLS closes the connection.
  H5  NBD_REP_ERR_TLS_REQD is sent where the spec has it only: to every option of a connection that
      must have TLS, or about an export, and never once TLS is on.

    greeting -> client flags -> option -> reply -> option -> ... -> Transmission
                     |             |                    |--------> Closed (ABORT, violation)
                     '-------------+--------------------|--------> Closed (violation)
                                   |    STARTTLS, ACK   |
                                   '------- TLS <-------'          the caller's; then `tls_begun`

Spec: NBD proto.md "Fixed newstyle negotiation", "TLS support".
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdfleece.base.errors import OptionRefused, PeerViolation
from nbdfleece.base.limits import (
    MAX_META_DATA,
    MAX_OPTION_LENGTH,
    MAX_OPTIONS,
    MAX_OPTIONS_PER_EXPORT,
    MAX_STRING,
)
from nbdfleece.base.units import KiB
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    IHAVEOPT,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP,
)
from nbdfleece.protocol.nbd.haggle import Directory, ExportInfo, Haggle, Option, TlsMode
from nbdfleece.protocol.nbd.names import option_name
from nbdfleece.protocol.nbd.options.export_name import answer_export_name
from nbdfleece.protocol.nbd.options.go import MAX_INFO_DATA, answer_go, answer_info
from nbdfleece.protocol.nbd.options.list import answer_list
from nbdfleece.protocol.nbd.options.meta_context import (
    answer_list_meta_context,
    answer_set_meta_context,
)
from nbdfleece.protocol.nbd.options.simple import (
    answer_abort,
    answer_extended_headers,
    answer_structured_reply,
)
from nbdfleece.protocol.nbd.options.starttls import answer_starttls
from nbdfleece.protocol.nbd.strings import encode
from nbdfleece.protocol.nbd.talk import Conversation, Talk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GREETING: Final = wire.greeting(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

_KNOWN_CLIENT_FLAGS: Final = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES
_DROPPED_AT_ONCE: Final = 64 * KiB


@dataclass(frozen=True, slots=True)
class Closed:
    """The handshake ended without an export; the connection is to be closed.

    Attributes:
        reason: For the log.
        quiet: Nobody did anything wrong: a port probe, a client that only listed, an abort.
    """

    reason: str
    quiet: bool


@dataclass(frozen=True, slots=True)
class Transmission:
    """The handshake chose an export.

    Attributes:
        export: As it was described to the client.
        flags: The transmission flags the client was told.
        structured: Replies come in chunks.
        extended: Requests and replies have extended headers; `structured` holds too.
        contexts: (id, name) of the metadata contexts for BLOCK_STATUS.
        leftover: Bytes of the first requests, received behind the last option.
    """

    export: ExportInfo
    flags: int
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]
    leftover: bytes


Outcome: TypeAlias = Closed | Transmission


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one option is taken.

    Attributes:
        answer: Returns the replies; see `options`.
        kept: Bytes of data that a well-formed option can have; what is beyond is dropped.
        longest: Bytes of data above which the connection is closed without reading them.
    """

    answer: Callable[[Haggle, Option], bytes]
    kept: int
    longest: int = MAX_OPTION_LENGTH


def _answer_unknown(haggle: Haggle, option: Option) -> bytes:
    """Refuse what we do not know; clients fall back on exactly this error."""
    del haggle  # the refusal depends on nothing
    raise OptionRefused(NBD_REP_ERR_UNSUP, f"{option_name(option.number)} is not supported")


# NBD_OPT_PEEK_EXPORT was withdrawn.
_UNKNOWN: Final = _Rule(_answer_unknown, kept=0)
_OPTIONS: Final = {
    NBD_OPT_EXPORT_NAME: _Rule(answer_export_name, kept=MAX_STRING, longest=MAX_STRING),
    NBD_OPT_ABORT: _Rule(answer_abort, kept=0),
    NBD_OPT_LIST: _Rule(answer_list, kept=0),
    NBD_OPT_STARTTLS: _Rule(answer_starttls, kept=0),
    NBD_OPT_INFO: _Rule(answer_info, kept=MAX_INFO_DATA),
    NBD_OPT_GO: _Rule(answer_go, kept=MAX_INFO_DATA),
    NBD_OPT_STRUCTURED_REPLY: _Rule(answer_structured_reply, kept=0),
    NBD_OPT_LIST_META_CONTEXT: _Rule(answer_list_meta_context, kept=MAX_META_DATA),
    NBD_OPT_SET_META_CONTEXT: _Rule(answer_set_meta_context, kept=MAX_META_DATA),
    NBD_OPT_EXTENDED_HEADERS: _Rule(answer_extended_headers, kept=0),
}
_ANSWERED_BEFORE_TLS: Final = frozenset({NBD_OPT_STARTTLS, NBD_OPT_ABORT})  # where TLS is a must
_ABOUT_ONE_EXPORT: Final = frozenset({NBD_OPT_INFO, NBD_OPT_GO})


class Handshake:
    """One handshake, seen from the server.

    Feed it what was received and send what it yields until `outcome` is there. When `wants_tls` is
    set after a feed, do the TLS handshake on the connection, then call `tls_begun` and feed it what
    comes over TLS; if TLS fails, close.

    Args:
        directory: What the client may see before TLS.
        tls: What the connection may do about TLS.
        extended: Offer NBD_OPT_EXTENDED_HEADERS.

    Attributes:
        is_shutting_down: Set from outside: options but ABORT are answered NBD_REP_ERR_SHUTDOWN.
        shutdown_text: Set from outside: the text with that error.
        wants_tls: NBD_OPT_STARTTLS was acknowledged; TLS is next. It is set before the
            acknowledgement is yielded.
    """

    def __init__(
        self, directory: Directory, tls: TlsMode = TlsMode.OFF, extended: bool = True
    ) -> None:
        self.is_shutting_down = False
        self.shutdown_text = "the server shuts down"
        self.wants_tls = False
        self._haggle = Haggle(directory, no_zeroes=False, tls_mode=tls, may_extend=extended)
        self._conversation = Conversation(self._talk())
        self._lost: Closed | None = None
        self._is_inside = False  # something of which the client still owes bytes
        self._options = 0
        self._allowed = MAX_OPTIONS  # of them; more where there are exports, see `_count_option`

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it goes on.

        It is there before the last reply is yielded, so that the caller can hold the chosen export
        before the client hears of it.
        """
        return self._lost or self._conversation.result

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take received bytes (none at first, for the greeting); yield what to send.

        Yields the replies of one option at a time; send each before asking for the next, so that
        a client that pipelines options and reads nothing cannot make us hold all answers.
        """
        assert not self.wants_tls, "TLS comes first"
        return self._conversation.feed(data)

    def tls_begun(self, directory: Directory) -> None:
        """Go on over TLS, which `wants_tls` asked for, with nothing of what was agreed before (H4).

        Args:
            directory: What the client may see, as whom TLS has proved it to be.
        """
        assert self.wants_tls, "nobody asked for TLS"
        self.wants_tls = False
        before = self._haggle
        self._haggle = Haggle(
            directory, before.no_zeroes, before.tls_mode, before.may_extend, tls=True
        )

    def end_of_stream(self) -> Closed:
        """Tell that the client sends no more; return how that ends the handshake.

        A client that leaves between options did nothing wrong: port probes do it.
        """
        is_partial = self._is_inside or bool(self._conversation.leftover)
        where = "in the middle of an option" if is_partial else "during the handshake"
        self._lost = Closed(f"client left {where}", quiet=not is_partial)
        return self._lost

    def _talk(self) -> Talk[Outcome]:
        """Haggle, and turn the client's violations into an outcome."""
        try:
            return (yield from self._run())
        except PeerViolation as violation:
            return Closed(str(violation), quiet=False)

    def _run(self) -> Talk[Outcome]:
        """The handshake from top to bottom."""
        yield GREETING
        (client_flags,) = wire.CLIENT_FLAGS.unpack((yield wire.CLIENT_FLAGS.size))
        if client_flags & ~_KNOWN_CLIENT_FLAGS:
            raise PeerViolation(f"unknown client flags {client_flags:#x}")
        is_fixed = bool(client_flags & NBD_FLAG_C_FIXED_NEWSTYLE)
        if self._haggle.tls_mode is TlsMode.REQUIRE and not is_fixed:
            raise PeerViolation("no TLS without NBD_FLAG_C_FIXED_NEWSTYLE")
        self._haggle.no_zeroes = bool(client_flags & NBD_FLAG_C_NO_ZEROES)
        while True:
            option = yield from self._receive_option(is_fixed=is_fixed)
            haggle = self._haggle  # the one to ask now: TLS begins a new one
            replies = self._answer(haggle, option)
            if option.number != NBD_OPT_INFO:
                haggle.last_info = None
            if haggle.chosen is not None:
                return (yield from self._enter_transmission(haggle, haggle.chosen, replies))
            if haggle.starting_tls:
                self._stop_for_tls()
            yield replies
            if haggle.aborted:
                return Closed("client aborted the handshake", quiet=True)

    def _stop_for_tls(self) -> None:
        """Take nothing more until TLS has begun.

        Raises:
            PeerViolation: More has come in plain text; answered, it would be taken for what the
                client said over TLS.
        """
        behind = len(self._conversation.leftover)
        if behind:
            raise PeerViolation(f"{behind} bytes of plain text behind NBD_OPT_STARTTLS")
        self.wants_tls = True

    def _receive_option(self, *, is_fixed: bool) -> Talk[Option]:
        """Return the next option, received to its end.

        Raises:
            PeerViolation: It is not an option, or beyond what is taken from a client.
        """
        header = yield wire.OPTION_HEADER.size
        magic, number, length = wire.OPTION_HEADER.unpack(header)
        rule = _OPTIONS.get(number, _UNKNOWN)
        if magic != IHAVEOPT:
            raise PeerViolation(f"bad option magic {magic:#x}")
        if not is_fixed and number != NBD_OPT_EXPORT_NAME:
            raise PeerViolation(f"{option_name(number)} without NBD_FLAG_C_FIXED_NEWSTYLE")
        if length > rule.longest:
            raise PeerViolation(f"{option_name(number)} with {length} bytes of data")
        self._count_option()
        self._is_inside = True
        kept = 0 if self._lacks_tls(number) else rule.kept  # what is refused need not be kept
        data = yield min(length, kept)
        missing = length - len(data)
        while missing:
            missing -= len((yield min(missing, _DROPPED_AT_ONCE)))
        self._is_inside = False
        return Option(number, length, data)

    def _count_option(self) -> None:
        """Count one more option of this client.

        Raises:
            PeerViolation: It has sent more than any client needs.
        """
        self._options += 1
        if self._options <= self._allowed:
            return
        exports = 0  # who may not list has no use for options per export
        if not self._lacks_tls(NBD_OPT_LIST):
            with suppress(OptionRefused):
                exports = len(self._haggle.directory.list())
        # Kept: to count the exports for each further option would be work without need.
        self._allowed = MAX_OPTIONS + MAX_OPTIONS_PER_EXPORT * exports
        if self._options > self._allowed:
            raise PeerViolation(f"more than {self._allowed} options")

    def _lacks_tls(self, number: int) -> bool:
        """Tell whether TLS must come before this option."""
        haggle = self._haggle
        is_missing = haggle.tls_mode is TlsMode.REQUIRE and not haggle.tls
        return is_missing and number not in _ANSWERED_BEFORE_TLS

    def _answer(self, haggle: Haggle, option: Option) -> bytes:
        """Return the replies to one option."""
        rule = _OPTIONS.get(option.number, _UNKNOWN)
        number = option.number
        if self._lacks_tls(number):
            if number == NBD_OPT_EXPORT_NAME:
                raise PeerViolation("NBD_OPT_EXPORT_NAME without TLS")
            return _refusal(option, NBD_REP_ERR_TLS_REQD, "TLS comes first")
        if self.is_shutting_down and number != NBD_OPT_ABORT:
            if number == NBD_OPT_EXPORT_NAME:
                raise PeerViolation("NBD_OPT_EXPORT_NAME while the server shuts down")
            return _refusal(option, NBD_REP_ERR_SHUTDOWN, self.shutdown_text)
        try:
            return rule.answer(haggle, option)
        except OptionRefused as refused:
            if refused.reply == NBD_REP_ERR_TLS_REQD and not _may_ask_for_tls(haggle, number):
                return _refusal(option, NBD_REP_ERR_UNKNOWN, "there is no such export")
            return _refusal(option, refused.reply, refused.text)

    def _enter_transmission(
        self, haggle: Haggle, export: ExportInfo, replies: bytes
    ) -> Talk[Outcome]:
        """Send the last replies and return the outcome."""
        flags = haggle.transmission_flags(export)
        contexts = haggle.contexts_for(export)
        # The conversation runs on to the return before it hands out these replies: what it has
        # not taken by then was received behind the option and belongs to transmission.
        yield replies
        leftover = self._conversation.leftover
        return Transmission(export, flags, haggle.structured, haggle.extended, contexts, leftover)


def _may_ask_for_tls(haggle: Haggle, number: int) -> bool:
    """Tell whether NBD_REP_ERR_TLS_REQD from the directory may be sent (H5)."""
    return haggle.tls_mode is TlsMode.ALLOW and not haggle.tls and number in _ABOUT_ONE_EXPORT


def _refusal(option: Option, reply: int, text: str) -> bytes:
    """Return an error reply; the text is within a string's limit."""
    return wire.option_reply(option.number, reply, encode(text))
