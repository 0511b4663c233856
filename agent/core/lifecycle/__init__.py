"""The life of one instance: a pure state machine and its concurrency limit."""
