"""Wire translates: protobuf <-> core, errors <-> gRPC status, tokens, the gRPC server and its clients.

gRPC's fork handlers are switched off before it is imported: the daemons start processes by exec only, and with the
handlers on every start would write a warning about threads "currently calling into gRPC".
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
