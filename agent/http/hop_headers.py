"""The headers and the path that gateway and ingress share. No client can send them: `header_filter` strips them, and
the ingress reads them only together with the node's token. Clients see `WAKE_MS` and `QUEUE_MS` in answers.
"""

from __future__ import annotations

PREFIX = b"x-hibernode-"

# Gateway to ingress.
TOKEN = b"x-hibernode-token"  # the node's credential; `authorization` is the client's own and goes through
INSTANCE = b"x-hibernode-instance"  # uid of the instance that the dispatcher chose
ANY_INSTANCE = b"x-hibernode-any-instance"  # another instance of the function on this node may serve, too
STARTED = b"x-hibernode-started"  # asks for 102 Processing once the request has its grant to enter an instance
DEADLINE_MS = b"x-hibernode-deadline-ms"  # the rest of the queue timeout
CONTROL_PATH = b"x-hibernode-control-path"  # becomes `x-fc-control-path`
CLIENT_IP = b"x-hibernode-client-ip"  # becomes `x-fc-client-ip`

# Ingress to gateway.
REFUSED = b"x-hibernode-refused"  # the error reason; no byte of the request reached an instance
WAKE_MS = b"x-hibernode-wake-ms"  # wait of a request that came to a frozen instance
QUEUE_MS = b"x-hibernode-queue-ms"  # wait at the ingress; to clients: the whole wait, wake included

# The scheduler's Wake call: POST to `WAKE_PATH` with `WAKE_HOLD_MS`, answered with `FREE_SLOTS`.
WAKE_PATH = b"/hibernode/wake"
WAKE_HOLD_MS = b"x-hibernode-wake-hold-ms"  # how long the instance stays awake without a request
FREE_SLOTS = b"x-hibernode-free-slots"
