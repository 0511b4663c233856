"""Which instance serves which request, and which frozen one is woken."""
