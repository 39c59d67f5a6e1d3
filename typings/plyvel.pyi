# The calls that raftkv.storage uses, and no others.
from collections.abc import Iterator as _Iterator
from typing import Protocol

class Error(Exception): ...
class IOError(Error, OSError): ...
class CorruptionError(Error): ...

class WriteBatch:
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def write(self) -> None: ...

class _Readable(Protocol):
    def get(
        self, key: bytes, default: bytes | None = None, verify_checksums: bool = False, fill_cache: bool = True
    ) -> bytes | None: ...
    def iterator(
        self,
        reverse: bool = False,
        start: bytes | None = None,
        stop: bytes | None = None,
        include_start: bool = True,
        include_stop: bool = False,
        prefix: bytes | None = None,
        include_key: bool = True,
        include_value: bool = True,
        verify_checksums: bool = False,
        fill_cache: bool = True,
    ) -> _Iterator[tuple[bytes, bytes]]: ...
    def close(self) -> None: ...

class Snapshot(_Readable): ...

class DB(_Readable):
    closed: bool
    name: str
    def __init__(
        self,
        name: str,
        *,
        create_if_missing: bool = True,
        error_if_exists: bool = False,
        paranoid_checks: bool | None = None,
        write_buffer_size: int | None = None,
        max_open_files: int | None = None,
        lru_cache_size: int | None = None,
        block_size: int | None = None,
        block_restart_interval: int | None = None,
        max_file_size: int | None = None,
        compression: str | None = "snappy",
        bloom_filter_bits: int = 0,
    ) -> None: ...
    def write_batch(self, transaction: bool = False, sync: bool = False) -> WriteBatch: ...
    def snapshot(self) -> Snapshot: ...
    def compact_range(self, start: bytes | None = None, stop: bytes | None = None) -> None: ...
    def get_property(self, name: bytes) -> bytes | None: ...
