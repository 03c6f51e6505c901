package resolver

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func TestMappings(t *testing.T) {
	c := newFakeCluster(t, clusterRecords...)
	u := newFakeUpstream(t, "192.0.2.1")
	s := start(t, c.ask, u.addr)
	n := names
	n.Mappings = []Mapping{
		{Name: "Shop.Example.com.", Target: "web.default"},
		{Name: "db.example.com", Target: "DB.shop.svc"},
		{Name: "out", Target: "www.example.org"},
		{Name: "four", Addr: netip.MustParseAddr("10.1.2.3")},
		{Name: "six", Addr: netip.MustParseAddr("fd00::7")},
		{Name: "first", Target: "shop.example.com"},
		{Name: "a.loop", Target: "b.loop"},
		{Name: "b.loop", Target: "a.loop"},
		{Name: "missing", Target: "gone.default"},
		{Name: "web.shop", Addr: netip.MustParseAddr("10.1.2.4")}, // a name of the cluster's form
	}
	s.SetNames(n)
	for _, tt := range []struct {
		name   string
		qtype  uint16
		rcode  int
		answer []string
	}{
		{"shop.example.com", dns.TypeA, 0, []string{"shop.example.com. 5 IN CNAME web.default.", "web.default. 5 IN A 10.96.0.10"}},
		{"SHOP.example.COM", dns.TypeA, 0, []string{"SHOP.example.COM. 5 IN CNAME web.default.", "web.default. 5 IN A 10.96.0.10"}},
		{"shop.example.com", dns.TypeCNAME, 0, []string{"shop.example.com. 5 IN CNAME web.default."}},
		{"shop.example.com", dns.TypeTXT, 0, []string{"shop.example.com. 5 IN CNAME web.default."}},
		{"db.example.com", dns.TypeA, 0, []string{"db.example.com. 5 IN CNAME db.shop.svc.", "db.shop.svc. 5 IN A 10.244.0.7", "db.shop.svc. 3 IN A 10.244.0.8"}},
		{"out", dns.TypeA, 0, []string{"out. 5 IN CNAME www.example.org.", "www.example.org. 300 IN A 192.0.2.1"}},
		{"four", dns.TypeA, 0, []string{"four. 5 IN A 10.1.2.3"}},
		{"four", dns.TypeAAAA, 0, []string{}},
		{"six", dns.TypeAAAA, 0, []string{"six. 5 IN AAAA fd00::7"}},
		{"first", dns.TypeA, 0, []string{"first. 5 IN CNAME shop.example.com.", "shop.example.com. 5 IN CNAME web.default.", "web.default. 5 IN A 10.96.0.10"}},
		{"a.loop", dns.TypeA, dns.RcodeServerFailure, []string{}},
		{"missing", dns.TypeA, dns.RcodeNameError, []string{"missing. 5 IN CNAME gone.default."}},
		{"web.shop", dns.TypeA, 0, []string{"web.shop. 5 IN A 10.1.2.4"}},
		{"x.shop.example.com", dns.TypeA, 0, []string{"x.shop.example.com. 300 IN A 192.0.2.1"}}, // only the name itself
	} {
		for _, network := range []string{"udp", "tcp"} {
			r := ask(t, s, network, question(tt.name, tt.qtype))
			if d := cmp.Diff(tt.answer, texts(r.Answer)); d != "" || r.Rcode != tt.rcode {
				t.Errorf("%s %s %s: %s %s", network, tt.name, dns.TypeToString[tt.qtype], dns.RcodeToString[r.Rcode], d)
			}
		}
	}
	m := question("shop.example.com", dns.TypeA)
	m.SetEdns0(1232, false)
	if r := ask(t, s, "udp", m); r.IsEdns0() == nil || len(r.Answer) != 2 {
		t.Errorf("with EDNS0: %v", r)
	}
}

// TestSearchDomain: what a resolver that insists on a search domain makes of single labels, and of names that do not exist outside.
func TestSearchDomain(t *testing.T) {
	c := newFakeCluster(t, clusterRecords...)
	s := server(t, c.ask)
	r := exchange(t, s, "udp", question("web."+SearchDomain, dns.TypeA))
	want := []string{"web." + SearchDomain + ". 5 IN CNAME web.default.svc.cluster.local.", "web.default.svc.cluster.local. 5 IN A 10.96.0.10"}
	if d := cmp.Diff(want, texts(r.Answer)); d != "" {
		t.Error(d)
	}
	if r := exchange(t, s, "udp", question("_http._tcp.web."+SearchDomain, dns.TypeSRV)); len(r.Answer) != 2 {
		t.Errorf("SRV: %v", r)
	}
	asked := c.asked.Load()
	for _, name := range []string{"cart", "nothing", "nothing.example.com", "web.default", ""} {
		r := exchange(t, s, "udp", question(strings.TrimPrefix(name+"."+SearchDomain, "."), dns.TypeA))
		if r.Rcode != dns.RcodeNameError {
			t.Errorf("%q: %v", name, r)
		}
	}
	if c.asked.Load() != asked {
		t.Error("the cluster was asked for names that are not its own")
	}
}

func TestMappedNamespaces(t *testing.T) {
	c := newFakeCluster(t, clusterRecords...)
	u := newFakeUpstream(t, "192.0.2.1")
	s := start(t, c.ask, u.addr)
	n := names
	n.MappedNamespaces = []string{"dev"}
	s.SetNames(n)
	outside := "192.0.2.1"
	for name, want := range map[string]string{
		"web":                               "10.96.0.10", // the connected namespace is always mapped
		"web.default":                       "10.96.0.10",
		"db.shop":                           outside,
		"db-0.db.shop":                      outside,
		"db.shop.svc":                       "NXDOMAIN",
		"db.shop.svc.cluster.local":         "NXDOMAIN",
		"10-244-0-7.shop.pod.cluster.local": "NXDOMAIN",
		"web.default.svc.cluster.local":     "10.96.0.10",
		"www.example.com":                   outside,
	} {
		r := ask(t, s, "udp", question(name, dns.TypeA))
		got := dns.RcodeToString[r.Rcode]
		if len(r.Answer) > 0 {
			got = r.Answer[0].(*dns.A).A.String()
		}
		if got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestSuffixesLongestDecides(t *testing.T) {
	n := names
	n.IncludeSuffixes = []string{"corp.example", "x.y.example"}
	n.ExcludeSuffixes = []string{"example", "www.corp.example", "x.y.example"}
	table := compile(n)
	for name, want := range map[string]bool{
		"corp.example": true, "a.corp.example": true, "www.corp.example": false, "a.www.corp.example": false, "other.example": false,
		"x.y.example": true, // included and excluded alike
	} {
		if _, got := table.decide(name); got != want {
			t.Errorf("%s: the cluster's %v, want %v", name, got, want)
		}
	}
}

func TestRouteDomains(t *testing.T) {
	n := names
	n.IncludeSuffixes, n.Mappings = []string{"corp.example", "*.bad"}, []Mapping{{Name: "db.example.com", Target: "db"}}
	n.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/15")}
	want := []string{
		SearchDomain, "~0.1.0.0.0.0.d.f.ip6.arpa", "~244.10.in-addr.arpa", "~96.10.in-addr.arpa", "~97.10.in-addr.arpa", "~api.default", "~big.default",
		"~cart.shop", "~cluster.local", "~corp.example", "~db.default", "~db.example.com", "~db.shop", "~empty.default", "~ext.default", "~golink.dev",
		"~gone.default", "~svc", "~web.default",
	}
	n.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10::/32")}
	want[1] = "~0.1.0.0.0.0.d.f.ip6.arpa"
	got := RouteDomains(n)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got := RouteDomains(Names{}); got != nil {
		t.Errorf("of no names: %v", got)
	}
	many := func(namespaces, services int) Names {
		n := Names{Services: map[string][]string{}}
		for i := range namespaces {
			for j := range services {
				ns := fmt.Sprintf("ns%d", i)
				n.Services[ns] = append(n.Services[ns], fmt.Sprintf("svc%d", j))
			}
		}
		return n
	}
	if got := RouteDomains(many(20, 20)); len(got) != 20+3 || !slices.Contains(got, "~ns7") {
		t.Errorf("many services: %v", got)
	}
	if got := RouteDomains(many(300, 1)); !slices.Equal(got, []string{SearchDomain, "~."}) {
		t.Errorf("many namespaces: %v", got)
	}
}

// TestRouteDomainsCoverDecide: whatever is the cluster's lies under one of the domains, or is a single label.
func TestRouteDomainsCoverDecide(t *testing.T) {
	n := names
	n.IncludeSuffixes = []string{"corp.example"}
	n.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.128.0/17"), netip.MustParsePrefix("10.245.0.0/28"), netip.MustParsePrefix("fd00:1::/66")}
	table, domains := compile(n), RouteDomains(n)
	for _, name := range []string{
		"web.default", "golink.dev", "db-0.db.shop", "_http._tcp.cart.shop", "a.b.svc", "x.cluster.local", "a.corp.example",
		"7.200.244.10.in-addr.arpa", "7.0.245.10.in-addr.arpa", "1.0.96.10.in-addr.arpa", "5.2.111.10.in-addr.arpa",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa",
	} {
		if _, ok := table.decide(name); !ok {
			t.Errorf("%s is not the cluster's", name)
		}
		if !slices.ContainsFunc(domains, func(d string) bool { return d[0] == '~' && under(name, d[1:]) }) {
			t.Errorf("%s is under none of %v", name, domains)
		}
	}
	for _, name := range []string{"www.dev", "google.shop", "example.com", "1.0.0.10.in-addr.arpa"} {
		if slices.ContainsFunc(domains, func(d string) bool { return d[0] == '~' && under(name, d[1:]) }) {
			t.Errorf("%s comes our way", name)
		}
	}
}

func TestSetListeners(t *testing.T) {
	u := newFakeUpstream(t, "192.0.2.1")
	s := start(t, newFakeCluster(t, clusterRecords...).ask, u.addr)
	two, six := netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback()
	first, err := s.SetListeners([]netip.Addr{two, six})
	if err != nil || len(first) != 2 || first[0].Addr() != two || first[1].Addr() != six {
		t.Fatalf("%v, %v", first, err)
	}
	reach := func(addr netip.AddrPort) error {
		for _, network := range []string{"udp", "tcp"} {
			c := dns.Client{Net: network}
			if _, _, err := c.Exchange(question("web", dns.TypeA), addr.String()); err != nil {
				return err
			}
		}
		return nil
	}
	for _, l := range first {
		if err := reach(l); err != nil {
			t.Error(err)
		}
	}
	again, err := s.SetListeners([]netip.Addr{six, netip.MustParseAddr("192.0.2.77")})
	if err == nil || !slices.Equal(again, first[1:]) {
		t.Errorf("%v, %v: want the same port, and the address that is not ours told of", again, err)
	}
	if reach(first[0]) == nil || reach(first[1]) != nil {
		t.Error("want the first gone and the second there")
	}
}
