"""Generated from proto/raftkv/v1 by scripts/proto; nothing in here is written by hand.

`from raftkv._pb import kv_pb2, kv_pb2_grpc`. The messages live in package `raftkv.v1`; none is ever registered under
etcd's names, so that an etcd client library can be imported in the same process.
"""
