"""Consensus, pure: messages, ticks and proposals go in, one `Ready` of what must happen comes out.

No clock, no thread, no socket, no disk, standard library only. Start reading at `core.Raft`; where it leaves
the Raft dissertation ("Ongaro"), `docs/divergence.md` says how and why.
"""
