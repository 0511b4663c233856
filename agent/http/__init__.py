"""HTTP/1.1 streaming engine, shared by the node's ingress and the scheduler's gateway.

A `server` accepts connections, an `exchange` is one request as its handler sees it, and `forward` streams it through a
connection of a `pool`. The engine does not log and reads no clock but the loop's; it reports failures to its caller.
`Upgrade` is not supported: such a request is served as a plain one, as RFC 9110 section 7.8 allows.
"""
