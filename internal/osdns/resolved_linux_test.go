package osdns

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLinkCalls is what systemd-resolved is told; internal/rootd tells it to the real one.
func TestLinkCalls(t *testing.T) {
	calls := linkCalls(7, LinkDNS{netip.MustParseAddr("198.18.0.2"), []string{"search", "~cluster.local", "~."}})
	got := map[string][]any{}
	for _, c := range calls {
		got[c.method] = c.args
	}
	want := map[string][]any{
		"SetLinkDNS":          {int32(7), []busServer{{2, []byte{198, 18, 0, 2}}}},
		"SetLinkDomains":      {int32(7), []busDomain{{"search", false}, {"cluster.local", true}, {".", true}}},
		"SetLinkDefaultRoute": {int32(7), false},
		"SetLinkLLMNR":        {int32(7), "no"},
		"SetLinkMulticastDNS": {int32(7), "no"},
		"SetLinkDNSSEC":       {int32(7), "no"},
		"SetLinkDNSOverTLS":   {int32(7), "no"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if last := calls[len(calls)-1].method; last != "SetLinkDNS" {
		t.Errorf("%s comes last: until there is a server nothing is asked of it, and then all else must be known", last)
	}
}

func TestEqual(t *testing.T) {
	a := LinkDNS{netip.MustParseAddr("198.18.0.2"), []string{"a", "b"}}
	if !equal(a, LinkDNS{a.Server, []string{"b", "a"}}) {
		t.Error("the order of domains matters")
	}
	if equal(a, LinkDNS{a.Server, []string{"a"}}) || equal(a, LinkDNS{Domains: a.Domains}) {
		t.Error("a difference is not seen")
	}
}
