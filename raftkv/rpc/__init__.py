"""gRPC, spoken on the loop itself: calls over HTTP/2 connections, without a thread.

    dial ──► Connection ──open──► Call ══messages══► Call ◄──accept── Connection ◄── Server
                                   └──── status, metadata ◄────┘

On the wire it is gRPC, and any gRPC stack may be at the other end; h2 keeps the state of the protocol. What is not
here is a thread: in grpc.aio a message passes three on each side, and on a machine that nodes and clients share, these
switches were most of what a lone write cost (docs/adr/0017, 0020, 0023).

    call        one call, as either side sees it
    connection  one HTTP/2 connection and the calls on it
    frames      what of it h2 is not asked about
    limits      what the two sides allow each other
    server      an address, connections, a task for each call
    methods     what grpc's generated code registers, served by such calls
"""
