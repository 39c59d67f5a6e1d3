"""The deterministic simulator: many nodes in one thread, and one seed that decides everything.

It drives the very `raftkv.replica` that a node runs, with fake time, disks and network where `raftkv.server` has real
ones. Start reading at `run.run_seed`; `python -m raftkv.sim --seed N --trace` replays a seed.
"""
