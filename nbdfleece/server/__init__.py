"""The NBD door: sockets, sessions, and what is offered to whom.

`addresses` says where to listen, `listener` does it, `server` owns the sessions, `session` is one
client connection from greeting to close. `export` is a node under a name, `exports` are all.
"""
