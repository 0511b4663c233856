"""The central scheduler: knows the fleet, queues and dispatches requests, and keeps each function at its target."""
