# What raftkv uses of grpcio-health-checking, which ships no types.
import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

class HealthServicer: ...

class HealthStub:
    Check: grpc.aio.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse]
    Watch: grpc.aio.UnaryStreamMultiCallable[HealthCheckRequest, HealthCheckResponse]
    def __init__(self, channel: grpc.aio.Channel) -> None: ...

def add_HealthServicer_to_server(servicer: HealthServicer, server: grpc.aio.Server) -> None: ...
