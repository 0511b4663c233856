"""HTTP/1.1 streaming engine, shared by the node's ingress and the scheduler's gateway.

| room | idea |
|---|---|
| `limits.py` | every bound and timeout of the engine, in one place |
| `message.py` | what a head is: `RequestHead`, `ResponseHead` |
| `grammar.py` | strict parsing of heads; whatever could be read in two ways is refused |
| `framing.py` | where a body ends: by length, by chunks, by close |
| `headers.py` | what may travel from one hop to the next (Function Compute's rules) |
| `errors.py` | JSON error answers, request ids |
| `sweep.py` | one timer for many deadlines |
| `exchange.py` | one request and its answer, as a handler sees them |
| `connection.py` | a client's connection: parsing, keep-alive, back-pressure |
| `server.py` | listening, and closing without cutting requests |
| `upstream.py` | a connection to an instance or an ingress |
| `client.py` | a pool of those, and small whole-body calls |
| `forward.py` | one exchange streamed both ways between the two |

The engine never logs and never reads a clock but the loop's; what goes wrong is returned to its owner.
`Upgrade` is not built: such a request is served as a plain one, as RFC 9110 section 7.8 allows.
"""
