package userd

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/resolver"
	"github.com/doppel-dev/doppel/internal/rootapi"
)

// What the pods of an intercept have in their hosts file has a name here too; what the user has said of a name goes before.
func TestHosts(t *testing.T) {
	addr := netip.MustParseAddr
	states := map[string]control.Intercept{
		"b": {Hosts: []control.Host{{Name: "legacy.example", Addr: addr("10.1.2.3")}, {Name: "both.example", Addr: addr("10.1.2.4")}}},
		"a": {OwnDNS: true}, "c": {OwnDNS: true}, "d": {},
	}
	n := names(control.Cluster{}, "shop", localapi.DNSOptions{Mappings: []localapi.DNSMapping{{Name: "both.example", AliasFor: "10.9.9.9"}}}, hostsOf(states))
	want := []resolver.Mapping{
		{Name: probeName, Addr: vifDNS},
		{Name: "legacy.example", Addr: addr("10.1.2.3")},
		{Name: "both.example", Addr: addr("10.1.2.4")},
		{Name: "both.example", Addr: addr("10.9.9.9")}, // the last one counts
	}
	if !slices.Equal(n.Mappings, want) {
		t.Errorf("%+v", n.Mappings)
	}
	left := podHosts([]control.Host{{Name: "api.example.com"}, {Name: "kube.corp.example"}, {Name: "legacy.example"}}, []string{"API.example.com", ".corp.example", ""})
	if len(left) != 1 || left[0].Name != "legacy.example" {
		t.Errorf("the API server's name and what the user has excluded are pods' to tell: %+v", left)
	}
	if got := resolvingOf(states); got != "a c" {
		t.Errorf("resolved by %q", got)
	}
}

// systemd-resolved that did not ask is given up for as long as programs ask it, and not for ever.
func TestTryAgain(t *testing.T) {
	stub, other := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.54:53")}, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}
	for _, c := range []struct {
		fails     bool
		resolvers []netip.AddrPort
		want      bool
	}{{true, stub, false}, {true, other, true}, {false, other, false}, {false, stub, false}} {
		if got := (dnsState{resolvedFails: c.fails, gaveUp: stub}).tryAgain(rootapi.State{Resolvers: c.resolvers}); got != c.want {
			t.Errorf("given up %v, resolvers %v: %v", c.fails, c.resolvers, got)
		}
	}
}
