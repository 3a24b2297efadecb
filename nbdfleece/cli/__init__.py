"""The command line: arguments in, text out. What it does goes through the control socket."""
