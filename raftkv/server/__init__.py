"""A node: carries out what a replica decides, with real time, disk and network, and serves clients over gRPC."""
