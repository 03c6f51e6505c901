package manager

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// A laptop's flow leaves from an agent of the workload that its own session has an Egress intercept on, and from no other.
func TestEgress(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, append(webPods(), session("mine", "ada", l.id.Fingerprint()))...)
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	db := netip.MustParseAddrPort("10.3.0.7:5432")
	open := func(uid string, to netip.AddrPort) (*mux.Stream, wire.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		st, err := tunnel.DialIntercept(ctx, s, wire.InterceptHeader{Intercept: uid, Proto: wire.ProtoTCP, Dst: to})
		var re *mux.RejectError
		if errors.As(err, &re) {
			return nil, re.Code
		} else if err != nil {
			t.Fatal(err)
		}
		return st, wire.CodeNone
	}
	egress := engagement{UID: "out-1", Session: "mine", Workload: web, Ports: tcp(8080), Mode: v1alpha1.ModeEgress}
	theirs := egress
	theirs.UID, theirs.Session = "out-2", "theirs"
	plain := engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole}
	forward := plain
	forward.UID, forward.ToPod = "in-2", []v1alpha1.PodPort{{Port: 9000}, {Port: 9001, Protocol: "UDP"}}
	for _, g := range []engagement{egress, theirs, plain, forward} {
		w.engaged.set(g)
	}
	if _, code := open("out-1", db); code != wire.CodeUnreachable {
		t.Errorf("no agent: %s", code)
	}
	a := w.agent("web-1")
	w.until("the agent knows", func() bool { return w.agents.serves("web-1", "out-1") })
	if got := a.table(); strings.Join(slices.Sorted(slices.Values(got)), " ") != "in-1 in-2" {
		t.Errorf("traffic is taken for %v", got)
	}
	a.connect(func(r *mux.Request, h wire.InterceptHeader) {
		if h.Intercept != "out-1" || h.Dst != db {
			_ = r.Reject(wire.CodeRefused, "connection refused")
			return
		}
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		b, _ := io.ReadAll(st)
		_, _ = st.Write(append([]byte("the pod sent "), b...))
		_ = st.Close()
	})
	st, code := open("out-1", db)
	if code != wire.CodeNone {
		t.Fatalf("refused: %s", code)
	}
	_, _ = io.WriteString(st, "hello")
	_ = st.CloseWrite()
	if b, err := io.ReadAll(st); err != nil || string(b) != "the pod sent hello" {
		t.Errorf("%q, %v", b, err)
	}
	_ = st.Close()
	for name, tt := range map[string]struct {
		uid, to string
		want    wire.Code
	}{
		"what the pod refuses":         {"out-1", "10.3.0.7:1", wire.CodeRefused},
		"the pod's loopback":           {"out-1", "127.0.0.1:1", wire.CodeRefused}, // asked
		"cloud metadata":               {"out-1", "169.254.169.254:80", wire.CodeUnreachable},
		"another session's":            {"out-2", "10.3.0.7:5432", wire.CodeNotFound},
		"a port of --to-pod":           {"in-2", "127.0.0.1:9000", wire.CodeRefused}, // asked
		"not a port of --to-pod":       {"in-2", "127.0.0.1:9002", wire.CodeUnreachable},
		"a port of --to-pod for UDP":   {"in-2", "127.0.0.1:9001", wire.CodeUnreachable}, // not for TCP
		"beyond the pod":               {"in-2", "10.3.0.7:9000", wire.CodeUnreachable},
		"an intercept of traffic":      {"in-1", "10.3.0.7:5432", wire.CodeNotFound},
		"an intercept that is unknown": {"out-9", "10.3.0.7:5432", wire.CodeNotFound},
	} {
		if _, code := open(tt.uid, netip.MustParseAddrPort(tt.to)); code != tt.want {
			t.Errorf("%s: %s, want %s", name, code, tt.want)
		}
	}
	if _, code := a.flow(t, "out-1"); code != wire.CodeNotFound {
		t.Errorf("an agent sent traffic to a laptop that asked for none: %s", code)
	}
	w.engaged.remove("out-1")
	if _, code := open("out-1", db); code != wire.CodeNotFound {
		t.Errorf("after its end: %s", code)
	}
}
