"""gRPC without its fork handlers, if we are the first to import it in this process.

The handlers are meant for the synchronous stack. With grpc.aio at work they are skipped half-way, and then one forked
child in three dies of a segmentation fault before it runs a line of its own (measured, grpcio 1.85.1: 7 of 20
children; without the handlers 0 of about 50). A child of a raftkv client is told clearly that it cannot use the client
(`Pool.enter`); for that it has to live. It concerns `multiprocessing` with `fork` just as much, in children that
never touch raftkv.

gRPC reads the variable once, when it is imported. Whoever sets it has the say, and it is taken back at once, so that
programs started from this process do not inherit it.
"""

from __future__ import annotations

import os
import sys
from typing import Final

VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"

if "grpc" not in sys.modules and VARIABLE not in os.environ:
    os.environ[VARIABLE] = "0"
    try:
        import grpc  # noqa: F401 - imported for what it reads from the environment
    finally:
        del os.environ[VARIABLE]
