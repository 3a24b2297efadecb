"""A small certificate authority in a folder, for TLS between a server and its clients.

::

    DIR/ca-cert.pem ca-key.pem              the authority
    DIR/ca-crl.pem                          whom it has revoked
    DIR/server-cert.pem server-key.pem      the server; with the two above: QEMU's tls-creds-x509
    DIR/clients/NAME/ca-cert.pem client-cert.pem client-key.pem
    DIR/issued/NAME.SERIAL.pem              every client's certificate, kept when its folder is gone

Modules: `hosts` (names and addresses), `certificates` (what is in a certificate), `files` (how a
file gets to the disk), `authority` (init, client, revoke), `listing` (what is there).

They load `cryptography`: import them where they are used.
"""
