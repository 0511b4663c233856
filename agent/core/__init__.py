"""Pure decisions: dataclasses in, dataclasses out. No clock, no I/O, no asyncio (a test enforces it)."""
