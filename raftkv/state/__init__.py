"""The replicated state machine: an MVCC key space with etcd's semantics.

Deterministic: the same log gives the same state and the same hash on every replica, whatever the hash seed, the locale
or the time zone. Nothing here reads a clock, draws a random number or waits. Storage is a `KeyValueStore` handed in
(LevelDB in a node, memory in the simulator), so that values need not fit into memory.
"""
