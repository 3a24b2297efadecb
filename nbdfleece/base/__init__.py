"""Foundation: values and rules that know no outside world (no I/O, no asyncio)."""
