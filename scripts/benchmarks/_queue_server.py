"""Backend of `scripts/bench dispatch`: a server with one queue and requests of a given duration.

    GET /?us=20000   -> 200 after 20,000 microseconds; requests that arrive meanwhile wait, first come first served

Listens on $FC_CUSTOM_LISTEN_PORT. A single-threaded epoll loop: it reads nothing while it works, so that the kernel's
ready list is its queue.
"""

from __future__ import annotations

import os
import re
import select
import socket
import time

_DURATION = re.compile(rb"[?&]us=(\d{1,9})")
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"


def main() -> None:
    """Serves until killed."""
    listener = socket.create_server(("127.0.0.1", int(os.environ["FC_CUSTOM_LISTEN_PORT"])), backlog=512)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    while True:
        for descriptor, _ in poll.poll(maxevents=1):
            if descriptor == listener.fileno():
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[connection.fileno()] = connection
                poll.register(connection, select.EPOLLIN)
                continue
            connection = connections[descriptor]
            try:
                request = connection.recv(65536)  # the proxy sends a request in one write
                if request:
                    duration = _DURATION.search(request)
                    time.sleep(int(duration[1]) / 1e6 if duration else 0)
                    connection.sendall(_ANSWER)
            except OSError:
                request = b""
            if not request:
                poll.unregister(connection)
                del connections[descriptor]
                connection.close()


if __name__ == "__main__":
    main()
