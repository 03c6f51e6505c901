package resolver

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestDecide(t *testing.T) {
	const (
		no   = "-"
		asIs = ""
	)
	n := names
	n.IncludeSuffixes = []string{".internal.corp.example."}
	n.ExcludeSuffixes = []string{"secret.svc.cluster.local", "hidden.internal.corp.example"}
	tests := []struct{ name, suffix string }{
		{"", no},
		{"web", "default.svc.cluster.local"},
		{"cart", no}, // a service of another namespace
		{"localhost", no},
		{"default", no}, // a namespace is no name
		{"cart.shop", "svc.cluster.local"},
		{"web.default", "svc.cluster.local"},
		{"web.shop", no},
		{"web.dev", no}, // the real top-level domain
		{"golink.dev", "svc.cluster.local"},
		{"x.golink.dev", no}, // golink is not headless
		{"db-0.db.shop", "svc.cluster.local"},
		{"db-0.db.default", no}, // db is not headless there
		{"a.db-0.db.shop", no},
		{"db-0.db", no},
		{"web.svc", no}, // no namespace named svc
		{"web.default.svc", "cluster.local"},
		{"nothing.nowhere.svc", "cluster.local"},
		{"db-0.db.shop.svc", "cluster.local"},
		{"web.default.svc.cluster.local", asIs},
		{"nothing.nowhere.svc.cluster.local", asIs},
		{"10-244-0-7.default.pod.cluster.local", asIs},
		{"cluster.local", asIs},
		{"printer.local", no},
		{"xcluster.local", no},
		{"cluster.local.example.com", no},
		// as a resolver library expands them
		{"web.default.default.svc.cluster.local", asIs},
		{"google.com.default.svc.cluster.local", asIs},
		{"web.default.corp.example", no},
		{"web.corp.example", no},
		// SRV
		{"_http._tcp.web", "default.svc.cluster.local"},
		{"_http._tcp.cart.shop", "svc.cluster.local"},
		{"_mysql._tcp.db-0.db.shop", "svc.cluster.local"},
		{"_http._tcp.web.default.svc", "cluster.local"},
		{"_ldap._tcp.corp.example", no},
		{"_http._tcp", no},
		{"_http.web", no},
		{"_dmarc.example.com", no},
		// reverse
		{"7.0.244.10.in-addr.arpa", asIs},
		{"1.0.96.10.in-addr.arpa", asIs},
		{"1.0.0.10.in-addr.arpa", no},
		{"244.10.in-addr.arpa", no},
		{"1.2.0.244.10.in-addr.arpa", no},
		{"07.0.244.10.in-addr.arpa", no},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.4.2.0.0.1.0.0.0.0.d.f.ip6.arpa", asIs},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.5.4.2.0.0.1.0.0.0.0.d.f.ip6.arpa", no},
		{"d.f.ip6.arpa", no},
		// by configuration
		{"internal.corp.example", asIs},
		{"a.b.internal.corp.example", asIs},
		{"x.hidden.internal.corp.example", no},
		{"vault.secret.svc.cluster.local", no},
		// odd bytes arrive escaped and never look like a dot
		{`cart\046shop`, no},
		{`x\046svc\046cluster\046local`, no},
	}
	table := compile(n)
	for _, tt := range tests {
		suffix, ok := table.decide(tt.name)
		if !ok {
			suffix = no
		}
		if suffix != tt.suffix {
			t.Errorf("decide(%q) = %q, want %q", tt.name, suffix, tt.suffix)
		}
	}
}

func TestDecideZero(t *testing.T) {
	table := compile(Names{})
	for _, name := range []string{"web", "web.default.svc.cluster.local", "1.0.0.10.in-addr.arpa"} {
		if _, ok := table.decide(name); ok {
			t.Errorf("without names %q is the cluster's", name)
		}
	}
}

func TestDecideNormalises(t *testing.T) {
	table := compile(Names{ClusterDomain: ".K8s.Example.", Namespace: "Default", Services: map[string][]string{"DEFAULT": {"Web"}}})
	for name, want := range map[string]string{"web": "default.svc.k8s.example", "x.k8s.example": ""} {
		if suffix, ok := table.decide(name); !ok || suffix != want {
			t.Errorf("decide(%q) = %q, %v, want %q", name, suffix, ok, want)
		}
	}
	if _, ok := table.decide("web.default.svc.cluster.local"); ok {
		t.Error("the default domain counts beside the given one")
	}
}

func TestServiceOf(t *testing.T) {
	table := compile(names)
	for fqdn, want := range map[string]string{
		"web.default.svc.cluster.local":            "web.default",
		"_http._tcp.web.default.svc.cluster.local": "web.default",
		"db-0.db.shop.svc.cluster.local":           "db.shop",
		"default.svc.cluster.local":                "",
		"svc.cluster.local":                        "",
		"1.0.96.10.in-addr.arpa":                   "",
	} {
		if got := table.serviceOf(fqdn); got != want {
			t.Errorf("serviceOf(%q) = %q, want %q", fqdn, got, want)
		}
	}
}

func TestReverseAddr(t *testing.T) {
	for _, s := range []string{"10.0.0.1", "255.255.255.255", "2001:db8::1", "fd00:10:96::a"} {
		addr := netip.MustParseAddr(s)
		name := reverseName(addr)
		if got, ok := reverseAddr(name); !ok || got != addr {
			t.Errorf("reverseAddr(%q) = %v, %v, want %v", name, got, ok, addr)
		}
	}
}

// reverseName is written the other way round than reverseAddr, digit by digit.
func reverseName(addr netip.Addr) string {
	digits, zone := strings.Split(addr.String(), "."), "in-addr.arpa"
	if addr.Is6() {
		digits, zone = strings.Split(strings.ReplaceAll(addr.StringExpanded(), ":", ""), ""), "ip6.arpa"
	}
	name := zone
	for _, d := range digits {
		name = d + "." + name
	}
	return name
}

// FuzzDecide holds the rules that keep outside names outside, whatever the name.
func FuzzDecide(f *testing.F) {
	for _, s := range []string{
		"web", "web.default", "x.dev", "a.b.svc", "db-0.db.shop", "_a._b.web", "1.0.96.10.in-addr.arpa", "www.example.com", "..svc", ".", "svc",
	} {
		f.Add(s)
	}
	table := compile(names)
	f.Fuzz(func(t *testing.T, name string) {
		name = strings.ToLower(name)
		suffix, ok := table.decide(name)
		if !ok {
			if suffix != "" {
				t.Errorf("decide(%q): suffix %q for an outside name", name, suffix)
			}
			return
		}
		labels := strings.Split(trimSRV(name), ".")
		tld := labels[len(labels)-1]
		full := name
		if suffix != "" {
			full += "." + suffix
		}
		switch {
		case under(full, "cluster.local"), strings.HasSuffix(full, ".arpa"):
		default:
			t.Errorf("decide(%q) leads to %q, which the cluster cannot know", name, full)
		}
		if suffix == "" || tld == "svc" {
			return
		}
		_, single := table.services["default"][name]
		if _, isNamespace := table.services[tld]; !single && !isNamespace && len(labels) > 1 {
			t.Errorf("decide(%q) swallowed a name of .%s", name, tld)
		}
	})
}

// With two clusters a name is the one's in which it exists; what is a cluster's by its form alone is the first one's.
func TestSeveralClusters(t *testing.T) {
	d := compileAll([]Names{
		{Session: "a", Namespace: "shop", Services: map[string][]string{"shop": {"web", "api"}, "empty": nil}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}},
		{}, // owns nothing
		{
			Session: "b", ClusterDomain: "b.example", Namespace: "data", Services: map[string][]string{"shop": {"web", "cart"}, "data": {"db"}}, Headless: map[string][]string{"data": {"peers"}},
			ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("240.0.0.0/16")}, IncludeSuffixes: []string{"corp.example"}, Mappings: []Mapping{{Name: "there", Target: "web.shop"}},
		},
	})
	for name, want := range map[string]string{
		"web":                         "a web.shop.svc.cluster.local",
		"db":                          "b db.data.svc.b.example",
		"web.shop":                    "a web.shop.svc.cluster.local", // of two, the first
		"cart.shop":                   "b cart.shop.svc.b.example",
		"cart.shop.svc":               "b cart.shop.svc.b.example",
		"x.cart.shop.svc":             "b x.cart.shop.svc.b.example",
		"pod-0.peers.data":            "b pod-0.peers.data.svc.b.example",
		"nothing.shop.svc":            "a nothing.shop.svc.cluster.local",
		"web.shop.svc.cluster.local":  "a web.shop.svc.cluster.local",
		"web.shop.svc.b.example":      "b web.shop.svc.b.example",
		"10-1-2-3.data.pod.b.example": "b 10-1-2-3.data.pod.b.example",
		"cluster.local":               "a cluster.local",
		"b.example":                   "b b.example",
		"1.0.0.240.in-addr.arpa":      "b 1.0.0.240.in-addr.arpa",
		"1.0.96.10.in-addr.arpa":      "a 1.0.96.10.in-addr.arpa",
		"git.corp.example":            "b git.corp.example",
		"there":                       "b mapping",
		"db.search.doppel.internal":   "b mapping",
		"no.search.doppel.internal":   "a nowhere",
		"example.com":                 "upstream",
		"cart":                        "upstream",
	} {
		got := "upstream"
		switch tb, to, suffix, _ := d.find(name); to {
		case toCluster:
			got = tb.session + " " + strings.TrimSuffix(name+"."+suffix, ".")
		case toMapping:
			got = tb.session + " mapping"
		case toNowhere:
			got = tb.session + " nowhere"
		case toUpstream:
		}
		if got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// Each cluster is asked for its own names, and its answers are kept apart and dropped by themselves.
func TestSeveralClustersAsked(t *testing.T) {
	asked := map[string]int{}
	ask := func(session string) Ask {
		return func(_ context.Context, query []byte) ([]byte, error) {
			asked[session]++
			var m dns.Msg
			if err := m.Unpack(query); err != nil {
				return nil, err
			}
			a, err := dns.NewRR(m.Question[0].Name + " 30 IN A 192.0.2." + session)
			if err != nil {
				return nil, err
			}
			m.Response, m.Answer, m.Extra = true, []dns.RR{a}, nil
			return m.Pack()
		}
	}
	s := newServer(Config{Cluster: ask("9"), Log: slog.New(slog.DiscardHandler)})
	defer s.Close()
	one := Names{Session: "1", Ask: ask("1"), Services: map[string][]string{"shop": {"web"}}}
	two := Names{Session: "2", Ask: ask("2"), Services: map[string][]string{"shop": {"web", "cart"}}}
	get := func(name string) string {
		t.Helper()
		var q, m dns.Msg
		raw, err := q.SetQuestion(name+".", dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Unpack(s.Exchange(t.Context(), "udp", raw)); err != nil || len(m.Answer) != 1 {
			t.Fatalf("%s: %v, %v", name, m.Answer, err)
		}
		return m.Answer[0].(*dns.A).A.String()
	}
	s.SetNames(one, two)
	for range 2 {
		if a, b := get("web.shop"), get("cart.shop"); a != "192.0.2.1" || b != "192.0.2.2" {
			t.Errorf("%s, %s", a, b)
		}
	}
	if asked["1"] != 1 || asked["2"] != 1 {
		t.Errorf("asked %v", asked)
	}
	two.Services = map[string][]string{"shop": {"web", "cart", "new"}}
	s.SetNames(one, two)
	get("web.shop")
	if asked["1"] != 1 {
		t.Error("a change of one cluster dropped the other's answers")
	}
	s.SetNames(two)
	if got := get("web.shop"); got != "192.0.2.2" {
		t.Errorf("after the first has gone: %s", got)
	}
}
