// Package flow owns what a flow is (one TCP connection or one UDP conversation) and the relay between two of them.
package flow

import "io"

// Stream is one end of a TCP-like flow.
type Stream interface {
	io.ReadWriteCloser
	// CloseWrite sends the end of this direction (FIN); the other direction stays open.
	CloseWrite() error
	// Reset aborts both directions (RST); the peer sees ECONNRESET.
	Reset()
}

// Packets is one end of a UDP-like flow; every call moves exactly one datagram.
type Packets interface {
	ReadPacket(p []byte) (int, error)
	WritePacket(p []byte) error
	Close() error
}

// PacketSource is Packets that bring their own memory, so that a flow holds none while it waits.
type PacketSource interface {
	// NextPacket waits for a datagram and calls fn with it, which must not keep it.
	NextPacket(fn func(p []byte) error) error
}

// Aborter is Packets whose other end can be told why they end.
type Aborter interface {
	// Abort closes because of err.
	Abort(err error)
}
