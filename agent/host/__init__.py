"""The agent's asyncio side: it feeds events to `core` and performs the effects; the decisions are made in `core`."""
