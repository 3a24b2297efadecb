"""The QMP door: the control socket, its monitors, the dispatch of commands, events."""
