"""A node's disk: the Raft log, the state, snapshots. The only package that imports LevelDB.

data-dir/
  log/             LevelDB: identity, hard state, entries; written with sync      LogStore
  log.watermark    how far the log was known to be durable                        Watermark
  state-<n>/       LevelDB: the state machine; synced now and then                StateStore
  snapshots/       snapshots made here, to be sent to others                      SnapshotSpool
  incoming/        snapshots on their way to here, resumable                      IncomingSnapshot
"""
