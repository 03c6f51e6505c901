package muxtest

import (
	"testing"

	"github.com/doppel-dev/doppel/internal/mux"
)

// Pair returns two connected sessions, a being the initiator, and the link between them. They are closed when the test ends.
func Pair(t testing.TB, link Config, a, b mux.Config) (sa, sb *mux.Session, l *Link) {
	t.Helper()
	l = NewLink(link)
	a.Initiator, b.Initiator = true, false
	sa, err := mux.New(l.A, a)
	if err != nil {
		t.Fatal(err)
	}
	sb, err = mux.New(l.B, b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sa.Close(); _ = sb.Close() })
	return sa, sb, l
}

// Stream opens a stream from a to b and returns both ends.
func Stream(t testing.TB, a, b *mux.Session) (sa, sb *mux.Stream) {
	t.Helper()
	accepted := make(chan *mux.Stream, 1)
	go func() {
		r, err := b.Accept(t.Context())
		if err != nil {
			accepted <- nil
			return
		}
		st, _ := r.Accept(nil)
		accepted <- st
	}()
	sa, _, err := a.Open(t.Context(), []byte{0xff})
	if err != nil {
		t.Fatal(err)
	}
	if sb = <-accepted; sb == nil {
		t.Fatal("stream not accepted")
	}
	return sa, sb
}
