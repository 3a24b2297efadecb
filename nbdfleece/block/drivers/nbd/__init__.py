"""Driver `nbd`: a node that is an export of another NBD server.

::

    driver   the verbs: what the server offers, and what stands in for what it does not
    links    the connections to the server: which takes a request; lost ones are made anew
    connection  one connection in transmission: many requests in flight, replies by cookie
    dial     from an address to a connection in transmission: socket, TLS, handshake
    target   which server, which export, with which credentials

The protocol itself is in `protocol.nbd`: client.py and client_replies.py.
"""
