"""The HTTP side of the scheduler: routes, the dispatch loop, wake calls, connection pools per node."""
