package manager

import (
	"errors"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/wire"
)

// TestTunnelResumes: a laptop that lost its connection goes on with its tunnel; nobody else does, and nobody is offered a tunnel that
// has no connection.
func TestTunnelResumes(t *testing.T) {
	l, other := newLaptop(t), newLaptop(t)
	mine, hers := session("mine", "ada", l.id.Fingerprint()), session("hers", "eve", other.id.Fingerprint())
	w := newWorld(t, mine, hers)
	hello := wire.Hello{Role: wire.RoleLaptop, Session: "mine"}
	s, err := l.attach(w, hello)
	if err != nil {
		t.Fatal(err)
	}
	w.until("it is registered", func() bool { return w.laptops.tunnel("mine") != nil })
	held := w.laptops.tunnel("mine")
	s.Drop(errors.New("another network"))
	w.until("it is lost", func() bool { return w.laptops.tunnel("mine") == nil })
	_, _, err = w.laptops.open(t.Context(), "mine", wire.InterceptHeader{Intercept: "i", Proto: wire.ProtoTCP, Port: 80})
	var re *mux.RejectError
	if !errors.As(err, &re) || re.Code != wire.CodeGone {
		t.Errorf("a flow for a laptop that is away: %v", err)
	}

	// Another session, with a key of its own, asks for this tunnel.
	link := muxtest.NewLink(muxtest.Config{})
	forged, err := mux.New(link.A, mux.Config{Initiator: true, ID: s.ID(), Resume: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer forged.Close()
	got, err := other.resume(w, wire.Hello{Role: wire.RoleLaptop, Session: "hers"}, forged)
	if err != nil {
		t.Fatal(err)
	}
	if got == forged || got.ID() == s.ID() {
		t.Error("a stranger got the tunnel")
	}

	again, err := l.resume(w, hello, s)
	if err != nil || again != s {
		t.Fatal(again, err)
	}
	w.until("it is back", func() bool { return w.laptops.tunnel("mine") == held })
	if _, err := s.Ping(t.Context()); err != nil {
		t.Error(err)
	}

	// Lost beyond the grace: the session's end ends the tunnel too.
	s.Drop(errors.New("gone"))
	w.until("it is lost", func() bool { return w.laptops.tunnel("mine") == nil })
	w.laptops.drop("mine", wire.CodeNone, "")
	if fresh, err := l.resume(w, hello, s); err != nil || fresh == s {
		t.Error(fresh, err)
	}
	if held.Err() == nil {
		t.Error("the old tunnel lives on")
	}
}
