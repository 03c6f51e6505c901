package userd

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/subnets"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func named(t *testing.T, name, context, namespace string) *session {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: %[1]s, clusters: [{name: c, cluster: {server: "https://%[1]s"}}],
users: [{name: u, user: {token: t}}], contexts: [{name: %[1]s, context: {cluster: c, user: u, namespace: %[2]s}}]}`, context, namespace)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := kube.Load(kube.Options{Kubeconfig: file})
	if err != nil {
		t.Fatal(err)
	}
	return &session{cfg: sessionConfig{name: name, managerNS: "doppel"}, cluster: c}
}

func TestChoose(t *testing.T) {
	prod, stage, eu := named(t, "prod", "prod", "shop"), named(t, "stage", "stage", "shop"), named(t, "prod-eu", "eu", "shop")
	for _, tt := range []struct {
		all  []*session
		want string
		s    *session
		kind uerr.Kind
		msg  string
	}{
		{nil, "", nil, uerr.NotConnected, "not connected"},
		{nil, "prod", nil, uerr.NotConnected, "not connected"},
		{[]*session{prod}, "", prod, "", ""},
		{[]*session{prod, stage}, "", nil, uerr.Usage, "there are several connections: prod, stage"},
		{[]*session{prod, stage}, "stage", stage, "", ""},
		{[]*session{prod, stage}, "^s", stage, "", ""},
		{[]*session{eu, prod}, "prod", prod, "", ""}, // the name goes before the expression
		{[]*session{prod, eu, stage}, "pro.*", nil, uerr.Usage, "there are several connections: prod, prod-eu"},
		{[]*session{prod, stage}, "nope", nil, uerr.NotFound, `no connection "nope"`},
		{[]*session{prod}, "(", nil, uerr.Usage, "--use"},
	} {
		s, err := choose(tt.all, tt.want)
		if tt.kind != "" {
			wantError(t, err, tt.kind, tt.msg, "")
		} else if err != nil || s != tt.s {
			t.Errorf("%q: %v, %v", tt.want, s, err)
		}
	}
}

// A connect is about a session that is there, unless it has a name of its own.
func TestMeant(t *testing.T) {
	prod, stage := named(t, "prod", "prod", "shop"), named(t, "second", "stage", "shop")
	d := &Daemon{sessions: []*session{prod, stage}}
	other := named(t, "", "other", "shop").cluster
	for _, tt := range []struct {
		name string
		c    *kube.Cluster
		s    *session
		msg  string
	}{
		{"", prod.cluster, prod, ""},
		{"", stage.cluster, stage, ""},
		{"second", stage.cluster, stage, ""},
		{"", other, prod, "connected already to context prod, namespace shop"},
		{"second", other, stage, "connection second is to context stage, namespace shop"},
		{"third", other, nil, ""},
		{"third", stage.cluster, nil, ""}, // the same cluster again, if that is wished
	} {
		s := d.meant(tt.name, tt.c, "doppel")
		if s != tt.s {
			t.Errorf("%q to %s: %v", tt.name, tt.c.Context, s)
			continue
		}
		if s == nil {
			continue
		}
		err := s.wanted(localapi.ConnectRequest{Name: tt.name, ManagerNamespace: "doppel"}, tt.c)
		if tt.msg != "" {
			wantError(t, err, uerr.Conflict, tt.msg, "doppel quit")
		} else if err != nil {
			t.Errorf("%q to %s: %v", tt.name, tt.c.Context, err)
		}
	}
}

// A connect that says what becomes of declared intercepts is not told that all is well by a session that does otherwise.
func TestMeantOtherwise(t *testing.T) {
	s := named(t, "prod", "prod", "shop")
	for _, tt := range []struct {
		accepts        bool
		accept, refuse bool
		msg            string
	}{
		{false, false, false, ""},
		{true, false, false, ""},
		{true, true, false, ""},
		{false, false, true, ""},
		{false, true, false, "without --accept-intercepts"},
		{true, false, true, "with --accept-intercepts"},
	} {
		s.cfg.accept = tt.accepts
		err := s.wanted(localapi.ConnectRequest{ManagerNamespace: "doppel", AcceptIntercepts: tt.accept, RefuseIntercepts: tt.refuse}, s.cluster)
		if tt.msg != "" {
			wantError(t, err, uerr.Conflict, tt.msg, "doppel quit")
		} else if err != nil {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

// The API server of one cluster may be a node of another: it is reached without either.
func TestServerIsANode(t *testing.T) {
	n := newNetwork(&vif{})
	for name, nodes := range map[string][]netip.Addr{"hosted": nil, "host": {netip.MustParseAddr("10.77.0.11"), netip.MustParseAddr("10.77.0.21")}} {
		s := &session{cfg: sessionConfig{name: name}}
		s.addrs, _ = testAddresses(t, localapi.NetworkOptions{}, func() []osroute.Existing { return nil })
		s.addrs.around = func() ([]subnets.Cluster, []subnets.Subnet) { return nil, nil }
		if nodes != nil {
			s.addrs.cluster.Servers = []netip.Addr{netip.MustParseAddr("10.77.0.31")}
		}
		s.addrs.learn(t.Context(), control.Cluster{Nodes: nodes})
		n.sessions = append(n.sessions, s)
	}
	routes, kept := n.routesLocked()
	if got := fmt.Sprint(routes); got != "[10.77.0.21/32]" {
		t.Errorf("routes %s", got)
	}
	if _, err := osroute.Make(osroute.Want{Routes: routes, Exclude: kept}, nil); err != nil {
		t.Error(err)
	}
}

// Later sessions yield to earlier ones, and keep what they have when those change or go.
func TestSeveralAddresses(t *testing.T) {
	n := newNetwork(&vif{})
	add := func(name string, info control.Cluster) *session {
		t.Helper()
		s := &session{cfg: sessionConfig{name: name}}
		s.addrs, _ = testAddresses(t, localapi.NetworkOptions{}, func() []osroute.Existing { return nil })
		s.addrs.cluster.Session = name
		s.addrs.around = func() ([]subnets.Cluster, []subnets.Subnet) { return n.around(s) }
		s.addrs.learn(t.Context(), info)
		n.sessions = append(n.sessions, s)
		return s
	}
	all := func() string {
		var out []string
		for _, s := range n.members() {
			for _, sn := range s.addrs.list() {
				here := sn.Real
				if sn.Virtual.IsValid() {
					here = sn.Virtual
				}
				out = append(out, fmt.Sprintf("%s: %v at %v", s.cfg.name, sn.Real, here))
			}
		}
		return strings.Join(out, "\n")
	}
	check := func(want ...string) {
		t.Helper()
		if got := all(); got != strings.Join(want, "\n") {
			t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
		}
	}
	elsewhere := testInfo
	elsewhere.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.200.0.0/16")}
	a, b, c := add("a", testInfo), add("b", elsewhere), add("c", testInfo)
	check("a: 10.96.0.0/16 at 10.96.0.0/16", "a: 10.244.1.0/24 at 10.244.1.0/24",
		"b: 10.96.0.0/16 at 240.0.0.0/16", "b: 10.200.0.0/16 at 10.200.0.0/16",
		"c: 10.96.0.0/16 at 240.1.0.0/16", "c: 10.244.1.0/24 at 240.2.0.0/24")
	for addr, want := range map[string]string{"10.96.0.1": "a 10.96.0.1", "240.0.0.1": "b 10.96.0.1", "240.1.0.1": "c 10.96.0.1", "10.200.3.4": "b 10.200.3.4", "240.2.0.9": "c 10.244.1.9"} {
		s, _, real := n.owner(netip.AddrPortFrom(netip.MustParseAddr(addr), 80))
		if s == nil || s.cfg.name+" "+real.Addr().String() != want {
			t.Errorf("%s is %v of %v", addr, real, s)
		}
	}
	if s, _, _ := n.owner(netip.MustParseAddrPort("192.0.2.1:80")); s != nil {
		t.Errorf("192.0.2.1 is %s's", s.cfg.name)
	}

	// The first cluster grows into what the second has.
	grown := testInfo
	grown.PodCIDRs = append(grown.PodCIDRs, netip.MustParsePrefix("10.200.0.0/16"))
	a.addrs.learn(t.Context(), grown)
	b.addrs.look(t.Context())
	c.addrs.look(t.Context())
	check("a: 10.96.0.0/16 at 10.96.0.0/16", "a: 10.200.0.0/16 at 10.200.0.0/16", "a: 10.244.1.0/24 at 10.244.1.0/24",
		"b: 10.96.0.0/16 at 240.0.0.0/16", "b: 10.200.0.0/16 at 240.3.0.0/16",
		"c: 10.96.0.0/16 at 240.1.0.0/16", "c: 10.244.1.0/24 at 240.2.0.0/24")

	// It goes: what is mapped stays where applications know it.
	n.sessions = n.sessions[1:]
	b.addrs.look(t.Context())
	c.addrs.look(t.Context())
	check("b: 10.96.0.0/16 at 240.0.0.0/16", "b: 10.200.0.0/16 at 240.3.0.0/16",
		"c: 10.96.0.0/16 at 240.1.0.0/16", "c: 10.244.1.0/24 at 240.2.0.0/24")
}
