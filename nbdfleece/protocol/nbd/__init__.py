"""NBD: the wire protocol, sans I/O: bytes in, values out, and back.

In the order of a connection's life: `handshake` (server side; one module per option under
`options`), `request` (is it legal?), `errno_map` (what to answer when it failed), `wire` (layouts
of everything). `client` and `client_replies` are the other end.

Spec: doc/proto.md of the NBD project; tests and comments cite its headings.
"""
