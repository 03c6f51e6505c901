package userd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// testAddresses are the subnets of a session on a laptop with the routes that others returns; the manager answers behind those links that
// reach it.
func testAddresses(t *testing.T, o localapi.NetworkOptions, others func() []osroute.Existing, reach ...string) (*addresses, *[]string) {
	t.Helper()
	a, err := newAddresses(o, []netip.Addr{netip.MustParseAddr("10.77.0.11")}, "key", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	var probed []string
	a.existing = func() ([]osroute.Existing, error) { return others(), nil }
	a.probe = func(_ context.Context, link string, to netip.AddrPort, key string) error {
		probed = append(probed, fmt.Sprintf("%s %v %s", link, to, key))
		if slices.Contains(reach, link) {
			return nil
		}
		return errors.New("no answer")
	}
	return a, &probed
}

var testInfo = control.Cluster{
	ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
	ManagerService: netip.MustParseAddrPort("10.96.0.99:80"), ManagerPod: netip.MustParseAddrPort("10.244.1.5:10250"),
}

func ways(a *addresses) string {
	var out []string
	for _, s := range a.list() {
		out = append(out, fmt.Sprintf("%v %s", s.Real, s.Way))
	}
	return strings.Join(out, ", ")
}

// A VPN comes up and goes away: what it has is its own, and virtual addresses stay with those who have them.
func TestAddressesFollowRoutes(t *testing.T) {
	var others []osroute.Existing
	a, probed := testAddresses(t, localapi.NetworkOptions{}, func() []osroute.Existing { return others })
	if !a.learn(t.Context(), testInfo) || ways(a) != "10.96.0.0/16 routed, 10.244.1.0/24 routed" || len(*probed) != 0 {
		t.Fatalf("%s, probed %q", ways(a), *probed)
	}
	if a.look(t.Context()) {
		t.Error("a change without one")
	}
	others = []osroute.Existing{{Prefix: netip.MustParsePrefix("10.96.0.0/12"), Link: "tun0"}}
	if !a.look(t.Context()) || ways(a) != "10.96.0.0/16 mapped, 10.244.1.0/24 routed" || strings.Join(*probed, ", ") != "tun0 10.96.0.99:80 key" {
		t.Fatalf("%s, probed %q", ways(a), *probed)
	}
	dst := netip.AddrPortFrom(a.list()[0].Virtual.Addr().Next(), 443)
	if _, real, ok := a.real(dst); !ok || real.String() != "10.96.0.1:443" {
		t.Errorf("%v is %v, %v", dst, real, ok)
	}
	if _, _, ok := a.real(netip.MustParseAddrPort("10.96.0.1:443")); ok {
		t.Error("the VPN's address is the cluster's still")
	}
	if got := fmt.Sprint(a.here(testInfo).ServiceCIDRs); got != "[240.0.0.0/16]" {
		t.Errorf("reverse names of %s", got)
	}
	others = nil
	if a.look(t.Context()) || len(*probed) != 1 {
		t.Errorf("the VPN went: %s, probed %q", ways(a), *probed)
	}
}

// Where a route of the laptop leads into the cluster's network, it is left alone; when it goes, the VIF takes over.
func TestAddressesInside(t *testing.T) {
	others := []osroute.Existing{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Link: "lan0"}, {Prefix: netip.MustParsePrefix("10.244.0.0/16"), Link: "wg0"}}
	a, probed := testAddresses(t, localapi.NetworkOptions{}, func() []osroute.Existing { return others }, "wg0")
	a.learn(t.Context(), testInfo)
	if ways(a) != "10.96.0.0/16 mapped, 10.244.1.0/24 direct" || len(*probed) != 2 {
		t.Fatalf("%s, probed %q", ways(a), *probed)
	}
	if got := fmt.Sprint(a.current().Routes()); got != "[240.0.0.0/16]" {
		t.Errorf("routes %s", got)
	}
	others = nil
	if !a.look(t.Context()) || ways(a) != "10.96.0.0/16 mapped, 10.244.1.0/24 routed" {
		t.Errorf("outside: %s", ways(a))
	}
}

// A node of the cluster has a route for each pod and none for services, which it reaches all the same.
func TestAddressesOnNode(t *testing.T) {
	others := []osroute.Existing{{Prefix: netip.MustParsePrefix("10.244.1.5/32"), Link: "veth1"}}
	a, probed := testAddresses(t, localapi.NetworkOptions{}, func() []osroute.Existing { return others }, "veth1", "")
	a.learn(t.Context(), testInfo)
	if ways(a) != "10.96.0.0/16 direct, 10.244.1.0/24 direct" || len(*probed) != 2 || len(a.current().Routes()) != 0 {
		t.Fatalf("%s, probed %q, routes %v", ways(a), *probed, a.current().Routes())
	}
	others = append(others, osroute.Existing{Prefix: netip.MustParsePrefix("10.244.1.6/32"), Link: "veth2"})
	if a.look(t.Context()) || len(*probed) != 3 {
		t.Errorf("another pod: %s, probed %q", ways(a), *probed)
	}
}

func TestNetworkOptions(t *testing.T) {
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	for name, o := range map[string]localapi.NetworkOptions{
		"no subnet":          {NeverProxy: p("10.1.2.3/16")},
		"everything":         {AlsoProxy: p("0.0.0.0/0")},
		"both":               {AlsoProxy: p("10.1.0.0/16"), NeverProxy: p("10.1.0.0/16")},
		"vnat without sense": {VNAT: []string{"everything"}},
		"via nothing":        {ProxyVia: []string{"10.1.0.0/16"}},
		"nothing via":        {ProxyVia: []string{"=web"}},
	} {
		var ue *uerr.Error
		if _, err := newAddresses(o, nil, "", slog.New(slog.DiscardHandler)); !errors.As(err, &ue) || ue.Kind != uerr.Usage || ue.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	others := func() []osroute.Existing { return nil }
	v, _ := testAddresses(t, localapi.NetworkOptions{ProxyVia: []string{"127.0.0.1/32=web", "10.3.0.0/16=db", "10.4.0.0/16=web"}}, others)
	v.learn(t.Context(), testInfo)
	if got := fmt.Sprint(v.current().Routes(), v.workloads()); got != "[10.3.0.0/16 10.4.0.0/16 10.96.0.0/16 10.244.1.0/24 240.0.0.0/32] [web db]" {
		t.Errorf("proxy-via: %s", got)
	}
	if workload, real, ok := v.real(netip.MustParseAddrPort("240.0.0.0:8080")); !ok || workload != "web" || real.String() != "127.0.0.1:8080" {
		t.Errorf("the pod's loopback: %v of %q, %v", real, workload, ok)
	}
	a, _ := testAddresses(t, localapi.NetworkOptions{VNAT: []string{"all"}, VirtualSubnet: netip.MustParsePrefix("198.19.0.0/16"), AlsoProxy: p("192.0.2.0/24")}, others)
	a.learn(t.Context(), testInfo)
	if got := fmt.Sprint(a.current().Routes()); got != "[198.19.0.0/16 240.0.0.0/24 240.0.1.0/24]" {
		t.Errorf("routes %s", got)
	}
}

// The manager is known by its key, not by something that answers at its address.
func TestProbeManager(t *testing.T) {
	id, err := tunnel.NewIdentity("traffic-manager")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/attach", tunnel.UpgradeHandler(func(c net.Conn) {
		_, _, _ = tunnel.Server(context.Background(), c, tunnel.ServerConfig{Identity: id, Authorize: func(context.Context, wire.Hello, string) (wire.HelloReply, error) {
			return wire.HelloReply{}, errors.New("a session was asked for")
		}})
	}))
	srv := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	to := netip.MustParseAddrPort(l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if err := probeManager(ctx, "lo", to, id.Fingerprint()); err != nil {
		t.Error(err)
	}
	if err := probeManager(ctx, "lo", to, "another key"); err == nil {
		t.Error("another manager was taken for ours")
	}
	if err := probeManager(ctx, "no-such-link", to, id.Fingerprint()); err == nil {
		t.Error("an interface that is not there")
	}
}
