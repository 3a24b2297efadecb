"""The options of the handshake, one module each where there is something to read or write.

Each offers functions `answer_...(haggle, option) -> bytes`: they change the haggle and return the
replies, or raise `OptionRefused` (answered, haggling goes on) or `PeerViolation` (the connection is
closed). They are called with the whole option received. The table is in `handshake`.
"""
