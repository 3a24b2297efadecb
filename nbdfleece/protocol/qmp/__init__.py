"""QMP on the wire: framing, messages, and the schema of arguments. Sans-I/O."""
