// Package plan is what a test tells the hostile program to try.
package plan

import "github.com/doppel-dev/doppel/internal/wire"

// Plan is one connection, or many silent ones.
type Plan struct {
	Addr string
	Path string // of the upgrade; "": the protocol begins at once
	Peer string // the fingerprint that the other end has to have
	Key  string // own key, PEM; "": none
	wire.Hello

	Attempts []Attempt // over the tunnel, if it is accepted
	Secret   string    // what it must not be told on it

	Call   bool   // instead: call the agent at Addr as if the manager did
	Silent int    // instead: hold so many connections
	Begin  string // what half of them say
}

// Attempt is a stream to open.
type Attempt struct {
	Name string
	Open []byte
}
