package userd

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"github.com/doppel-dev/doppel/internal/rootapi"
)

// fakeRoot is a root daemon that answers everything with a state and its version.
func fakeRoot(t *testing.T, st rootapi.State) *rootapi.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rootd.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, rootapi.MaxPacket)
		for {
			m, _, err := rootapi.Receive(c, buf, false)
			if err != nil {
				return
			}
			reply := rootapi.Message{ID: m.ID, Op: rootapi.OpReply, State: &st}
			if m.Op == rootapi.OpVersion {
				reply.State, reply.Version = nil, &rootapi.Version{Program: "fake", Protocol: rootapi.Protocol}
			}
			if rootapi.Send(c, reply, nil) != nil {
				return
			}
		}
	}()
	root, err := rootapi.Dial(t.Context(), path, rootapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close(); l.Close(); <-done })
	return root
}

// The answer to a request may be looked at after a change that came later; a root daemon that was started again counts anew.
func TestStatesInOrder(t *testing.T) {
	n := newNetwork(&vif{log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err := n.startResolver(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.group.Stop(); n.resolver.Close(); _ = n.group.Wait() })
	want := func(when, mode string) {
		t.Helper()
		if n.mu.Lock(); n.state.DNSMode != mode || !n.applied {
			t.Errorf("%s: %+v, applied %v", when, n.state, n.applied)
		}
		n.mu.Unlock()
	}
	n.inForce(rootapi.State{Seq: 7, DNSMode: rootapi.DNSNftables})
	want("set", rootapi.DNSNftables)
	n.mu.Lock()
	n.applied = false
	n.mu.Unlock()
	n.rootOptions().Changed(rootapi.State{Seq: 9, DNSMode: rootapi.DNSRouted})
	n.inForce(rootapi.State{Seq: 8, DNSMode: rootapi.DNSNone})
	want("a change came first", rootapi.DNSRouted)

	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	n.wanted = rootapi.Network{Name: vifName}
	if err := n.adopt(ctx, fakeRoot(t, rootapi.State{Seq: 1, DNSMode: rootapi.DNSNftables})); err != nil {
		t.Fatal(err)
	}
	want("another root daemon", rootapi.DNSNftables)
}
