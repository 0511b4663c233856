"""Translation between protobuf and core, errors and gRPC status; tokens, the gRPC server and its clients.

gRPC's fork handlers are disabled before its import: the daemons start processes only by exec, and the handlers would
log a warning about threads "currently calling into gRPC" at each start.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
