# What raftkv uses of grpcio-health-checking, which ships no types.
from typing import ClassVar, NewType

from google.protobuf.message import Message

class HealthCheckRequest(Message):
    service: str
    def __init__(self, *, service: str = ...) -> None: ...

class HealthCheckResponse(Message):
    ServingStatus = NewType("ServingStatus", int)
    UNKNOWN: ClassVar[ServingStatus]
    SERVING: ClassVar[ServingStatus]
    NOT_SERVING: ClassVar[ServingStatus]
    SERVICE_UNKNOWN: ClassVar[ServingStatus]
    status: ServingStatus
    def __init__(self, *, status: ServingStatus = ...) -> None: ...
