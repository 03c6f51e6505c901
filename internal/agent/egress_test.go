package agent

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// The agent connects for a laptop as long as the manager's table says that it may ask so.
func TestConnectsForALaptop(t *testing.T) {
	w := start(t, false)
	s := w.mgr.up()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	loopback := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), w.app.port())
	open := func(uid string, to netip.AddrPort) (*mux.Stream, wire.Code) {
		t.Helper()
		st, err := tunnel.DialIntercept(ctx, s, wire.InterceptHeader{Intercept: uid, Proto: wire.ProtoTCP, Dst: to})
		var re *mux.RejectError
		if errors.As(err, &re) {
			return nil, re.Code
		} else if err != nil {
			t.Fatal(err)
		}
		return st, wire.CodeNone
	}
	tell := func(table control.Table) {
		t.Helper()
		if err := tunnel.Control(ctx, s, control.ManagerIntercepts, table, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, code := open("out-1", loopback); code != wire.CodeNotFound {
		t.Errorf("without a table: %s", code)
	}
	tell(control.Table{Items: []control.TableEntry{{Intercept: "in-1", Protocol: "TCP", ContainerPort: 1}}, Egress: []string{"out-1"}})
	st, code := open("out-1", loopback)
	if code != wire.CodeNone {
		t.Fatalf("refused: %s", code)
	}
	if got := name(t, st); got != "app" {
		t.Errorf("%s answered", got)
	}
	_ = st.Close()
	if _, code := open("out-1", netip.AddrPortFrom(loopback.Addr(), freePort(t))); code != wire.CodeRefused {
		t.Errorf("a port that nobody listens on: %s", code)
	}
	if _, code := open("in-1", loopback); code != wire.CodeNotFound {
		t.Errorf("an intercept of traffic: %s", code)
	}
	tell(control.Table{Items: []control.TableEntry{}})
	if _, code := open("out-1", loopback); code != wire.CodeNotFound {
		t.Errorf("after its end: %s", code)
	}
}
