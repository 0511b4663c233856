"""The per-host daemon's asyncio shell: it feeds events to `core`, performs its effects and never decides itself."""
