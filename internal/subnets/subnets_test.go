package subnets

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/osroute"
)

func pfx(s string) []netip.Prefix {
	var out []netip.Prefix
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}

func addrs(s string) []netip.Addr {
	var out []netip.Addr
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParseAddr(f))
	}
	return out
}

// routes reads "PREFIX@LINK ...".
func routes(s string) []osroute.Existing {
	var out []osroute.Existing
	for _, f := range strings.Fields(s) {
		p, link, _ := strings.Cut(f, "@")
		out = append(out, osroute.Existing{Prefix: netip.MustParsePrefix(p), Link: link})
	}
	return out
}

// show is a plan in one line a subnet.
func show(p Plan) string {
	var b strings.Builder
	for _, s := range p.Subnets {
		fmt.Fprintf(&b, "%s %s %v %s", s.Session, s.Kind, s.Real, s.Way)
		if s.Virtual.IsValid() {
			fmt.Fprintf(&b, " %v", s.Virtual)
		}
		if s.Workload != "" {
			fmt.Fprintf(&b, " via %s", s.Workload)
		}
		if s.Why != "" {
			fmt.Fprintf(&b, ": %s", s.Why)
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "routes %v", p.Routes())
	return b.String()
}

func TestDecide(t *testing.T) {
	base := Cluster{Session: "a", Services: pfx("10.96.0.0/16"), Pods: pfx("10.244.1.0/24")}
	with := func(change func(*Cluster)) []Cluster {
		c := base
		change(&c)
		return []Cluster{c}
	}
	for name, tt := range map[string]struct {
		facts Facts
		want  string
	}{
		"nothing in the way": {
			Facts{Clusters: []Cluster{base}, Others: routes("192.168.1.0/24@wlan0 172.17.0.0/16@docker0 169.254.0.0/16@eth0")},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\nroutes [10.96.0.0/16 10.244.1.0/24]",
		},
		"a VPN has a larger one": {
			Facts{Clusters: []Cluster{base}, Others: routes("10.0.0.0/8@tun0")},
			"a service 10.96.0.0/16 mapped 240.0.0.0/16: overlaps 10.0.0.0/8 of tun0\na pod 10.244.1.0/24 mapped 240.1.0.0/24: overlaps 10.0.0.0/8 of tun0\nroutes [240.0.0.0/16 240.1.0.0/24]",
		},
		"a VPN that takes all": {
			Facts{Clusters: []Cluster{base}, Others: routes("0.0.0.0/1@tun0 128.0.0.0/1@tun0 8.0.0.0/7@tun0 2000::/3@tun0")},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\nroutes [10.96.0.0/16 10.244.1.0/24]",
		},
		"a VPN that takes all and has one of them": {
			Facts{Clusters: []Cluster{base}, Others: routes("0.0.0.0/1@tun0 128.0.0.0/1@tun0 10.96.0.0/16@tun0")},
			"a service 10.96.0.0/16 mapped 240.0.0.0/16: overlaps 10.96.0.0/16 of tun0\na pod 10.244.1.0/24 routed\nroutes [10.244.1.0/24 240.0.0.0/16]",
		},
		"a bridge has the same, a LAN a part": {
			Facts{Clusters: []Cluster{base}, Others: routes("10.244.1.0/24@docker0 10.96.7.0/24@eth0")},
			"a service 10.96.0.0/16 mapped 240.0.0.0/16: overlaps 10.96.7.0/24 of eth0\na pod 10.244.1.0/24 mapped 240.1.0.0/24: overlaps 10.244.1.0/24 of docker0\nroutes [240.0.0.0/16 240.1.0.0/24]",
		},
		"the virtual range is taken": {
			Facts{Clusters: []Cluster{base}, Others: routes("10.96.0.0/16@tun0 240.0.0.0/12@tun0 240.17.0.0/16@tun1")},
			"a service 10.96.0.0/16 mapped 240.16.0.0/16: overlaps 10.96.0.0/16 of tun0\na pod 10.244.1.0/24 routed\nroutes [10.244.1.0/24 240.16.0.0/16]",
		},
		"no virtual range is free": {
			Facts{Clusters: []Cluster{base}, Others: routes("10.96.0.0/16@tun0"), Pools: pfx("198.18.0.0/24 fd00::/8")},
			"a service 10.96.0.0/16 kept out: overlaps 10.96.0.0/16 of tun0, and no virtual range is free for it\na pod 10.244.1.0/24 routed\nroutes [10.244.1.0/24]",
		},
		"conflicts allowed": {
			Facts{Clusters: with(func(c *Cluster) { c.AllowConflicts = pfx("10.96.0.0/12 10.244.1.0/24") }), Others: routes("10.0.0.0/8@tun0 10.244.1.0/24@docker0")},
			"a service 10.96.0.0/16 routed: overlaps 10.0.0.0/8 of tun0, which --allow-conflicting-subnets allows\n" +
				"a pod 10.244.1.0/24 routed: overlaps 10.244.1.0/24 of docker0, which --allow-conflicting-subnets allows\nroutes [10.96.0.0/16 10.244.1.0/25 10.244.1.128/25]",
		},
		"a part of a conflict allowed": {
			Facts{Clusters: with(func(c *Cluster) { c.AllowConflicts = pfx("10.96.7.0/24") }), Others: routes("10.96.7.0/24@docker0 10.96.8.0/24@docker1")},
			"a service 10.96.0.0/16 mapped 240.0.0.0/16: overlaps 10.96.8.0/24 of docker1\na pod 10.244.1.0/24 routed\nroutes [10.244.1.0/24 240.0.0.0/16]",
		},
		"also-proxy and never-proxy": {
			Facts{Clusters: with(func(c *Cluster) {
				c.AlsoProxy, c.NeverProxy = pfx("10.50.0.0/16 10.60.1.0/24 10.244.0.0/16"), pfx("10.50.0.0/17 10.60.0.0/16 10.96.0.0/16")
			})},
			"a service 10.96.0.0/16 kept out: kept out by --never-proxy 10.96.0.0/16\na pod 10.244.1.0/24 routed\na also-proxy 10.50.0.0/16 routed\na also-proxy 10.60.1.0/24 routed\na also-proxy 10.244.0.0/16 routed\n" +
				"routes [10.50.128.0/17 10.60.1.0/24 10.244.0.0/16 10.244.1.0/24]",
		},
		"never-proxy around a node's subnet": {
			Facts{Clusters: with(func(c *Cluster) { c.NeverProxy = pfx("10.244.0.0/16") })},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 kept out: kept out by --never-proxy 10.244.0.0/16\nroutes [10.96.0.0/16]",
		},
		"the API server's addresses": {
			Facts{Clusters: with(func(c *Cluster) {
				c.AlsoProxy, c.Servers = pfx("10.77.0.0/30 10.78.0.1/32"), addrs("10.77.0.1 10.78.0.1")
			})},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\na also-proxy 10.77.0.0/30 routed\na also-proxy 10.78.0.1/32 kept out: the API server's address\n" +
				"routes [10.77.0.0/32 10.77.0.2/31 10.96.0.0/16 10.244.1.0/24]",
		},
		"nodes": {
			Facts{Clusters: with(func(c *Cluster) {
				c.Nodes, c.Servers, c.NeverProxy = addrs("10.77.0.12 10.77.0.13 10.77.1.1 192.168.1.7 10.77.2.1 10.77.3.1"), addrs("10.77.1.1"), pfx("10.77.2.0/24")
			}), Others: routes("192.168.1.0/24@eth0 10.77.3.1/32@tun0")},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\na node 10.77.0.12/31 routed\na node 10.77.1.1/32 kept out: the API server's address\n" +
				"a node 10.77.2.1/32 kept out: kept out by --never-proxy 10.77.2.0/24\na node 10.77.3.1/32 kept out: overlaps 10.77.3.1/32 of tun0\n" +
				"a node 192.168.1.7/32 kept out: overlaps 192.168.1.0/24 of eth0\nroutes [10.77.0.12/31 10.96.0.0/16 10.244.1.0/24]",
		},
		"a node, wanted in spite of all": {
			Facts{Clusters: with(func(c *Cluster) {
				c.Nodes, c.AllowConflicts, c.VNAT = addrs("10.77.0.12 192.168.1.7"), pfx("10.77.0.0/16"), []Selector{{Prefix: netip.MustParsePrefix("192.168.1.7/32")}}
			}), Others: routes("10.77.0.0/16@eth0 192.168.1.0/24@eth1")},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\na node 10.77.0.12/32 routed: overlaps 10.77.0.0/16 of eth0, which --allow-conflicting-subnets allows\n" +
				"a node 192.168.1.7/32 mapped 240.0.0.0/32: asked for by --vnat\nroutes [10.77.0.12/32 10.96.0.0/16 10.244.1.0/24 240.0.0.0/32]",
		},
		"many nodes, two families": {
			Facts{Clusters: []Cluster{{Session: "a", Services: pfx("10.96.0.0/16 fd00:96::/108"), Pods: pfx("10.244.3.0/24 10.244.0.0/24 10.244.1.0/24 10.244.2.0/24 10.244.4.0/24 fd00:244::/64 fd00:244:0:1::/64")}}, Others: routes("fd00::/16@tun0")},
			"a service 10.96.0.0/16 routed\na service fd00:96::/108 mapped fd64:6f70:7065::/108: overlaps fd00::/16 of tun0\na pod 10.244.0.0/22 routed\na pod 10.244.4.0/24 routed\n" +
				"a pod fd00:244::/63 mapped fd64:6f70:7065:2::/63: overlaps fd00::/16 of tun0\nroutes [10.96.0.0/16 10.244.0.0/22 10.244.4.0/24 fd64:6f70:7065::/108 fd64:6f70:7065:2::/63]",
		},
		"inside the network": {
			Facts{Clusters: with(func(c *Cluster) {
				c.Direct, c.Via = []Kind{Pod}, []Via{{Selector{Kinds: []Kind{Service}}, "web"}}
			}), Others: routes("10.244.0.0/16@wg0")},
			"a service 10.96.0.0/16 routed via web\na pod 10.244.1.0/24 direct: this machine reaches it without doppel\nroutes [10.96.0.0/16]",
		},
		"inside, and wanted all the same": {
			Facts{Clusters: with(func(c *Cluster) { c.Direct, c.AlsoProxy = []Kind{Pod}, pfx("10.244.1.0/24") }), Others: routes("10.244.0.0/16@wg0")},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 mapped 240.0.0.0/24: overlaps 10.244.0.0/16 of wg0\nroutes [10.96.0.0/16 240.0.0.0/24]",
		},
		"vnat and proxy-via": {
			Facts{Clusters: with(func(c *Cluster) {
				c.VNAT = []Selector{{Kinds: []Kind{Pod}}, {Prefix: netip.MustParsePrefix("10.96.3.0/24")}}
				c.Via = []Via{{Selector{Prefix: netip.MustParsePrefix("127.0.0.1/32")}, "web"}, {Selector{Prefix: netip.MustParsePrefix("10.0.0.0/8")}, "db"}, {Selector{Kinds: []Kind{Service}}, "web"}}
			})},
			"a service 10.96.0.0/16 routed via db\na pod 10.244.1.0/24 mapped 240.0.0.0/24 via db: asked for by --vnat\na proxy-via 127.0.0.1/32 mapped 240.0.1.0/32 via web: its own addresses cannot be routed\n" +
				"a proxy-via 10.0.0.0/8 routed via db\na service 10.96.3.0/24 mapped 240.0.2.0/24 via db: asked for by --vnat\nroutes [10.0.0.0/8 10.96.0.0/16 240.0.0.0/24 240.0.1.0/32 240.0.2.0/24]",
		},
		"two clusters": {
			Facts{Clusters: []Cluster{base, {Session: "b", Services: pfx("10.96.0.0/16"), Pods: pfx("10.8.0.0/16 10.244.1.0/24")}}, Others: routes("10.8.3.0/24@tun0")},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\nb service 10.96.0.0/16 mapped 240.0.0.0/16: overlaps 10.96.0.0/16 of connection a\n" +
				"b pod 10.8.0.0/16 mapped 240.1.0.0/16: overlaps 10.8.3.0/24 of tun0\nb pod 10.244.1.0/24 mapped 240.2.0.0/24: overlaps 10.244.1.0/24 of connection a\n" +
				"routes [10.96.0.0/16 10.244.1.0/24 240.0.0.0/16 240.1.0.0/16 240.2.0.0/24]",
		},
		"what nobody may route": {
			Facts{Clusters: with(func(c *Cluster) { c.AlsoProxy = pfx("0.0.0.0/0 127.0.0.0/8") })},
			"a service 10.96.0.0/16 routed\na pod 10.244.1.0/24 routed\na also-proxy 0.0.0.0/0 kept out: 0.0.0.0/0 is the default route\nroutes [10.96.0.0/16 10.244.1.0/24]",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, show(Decide(tt.facts))); d != "" {
				t.Error(d)
			}
		})
	}
}

// Virtual addresses are in the hands of applications: they stay while the connection lasts, unless the laptop itself needs them.
// A cluster of thousands of nodes is no more than can be routed.
func TestManyNodes(t *testing.T) {
	c := Cluster{Session: "s", Services: pfx("10.96.0.0/16"), Pods: pfx("10.244.0.0/14")}
	a := netip.MustParseAddr("10.128.0.1")
	for range 3000 {
		c.Nodes = append(c.Nodes, a)
		a = a.Next().Next()
	}
	p := Decide(Facts{Clusters: []Cluster{c}})
	if got := fmt.Sprint(p.Routes()); got != "[10.96.0.0/16 10.244.0.0/14]" {
		t.Errorf("routes %.200s", got)
	}
	if n := p.Subnets[0]; len(p.Subnets) != 3 || n.Kind != Node || n.Way != KeptOut || !strings.Contains(n.Why, "3000") {
		t.Errorf("%d subnets, %+v", len(p.Subnets), n)
	}
	c.Nodes = c.Nodes[:maxNodes]
	if p := Decide(Facts{Clusters: []Cluster{c}}); len(p.Routes()) != 2+maxNodes {
		t.Errorf("%d routes", len(p.Routes()))
	}
}

func TestDecideAgain(t *testing.T) {
	c := Cluster{Session: "a", Services: pfx("10.96.0.0/16"), Pods: pfx("10.244.1.0/24")}
	f := Facts{Clusters: []Cluster{c}, Others: routes("10.244.0.0/16@tun0")}
	f.Before = Decide(f)
	f.Others = append(f.Others, routes("10.96.0.0/12@tun1")...)
	f.Before = Decide(f)
	const both = "a service 10.96.0.0/16 mapped 240.1.0.0/16: overlaps 10.96.0.0/12 of tun1\na pod 10.244.1.0/24 mapped 240.0.0.0/24: overlaps 10.244.0.0/16 of tun0\nroutes [240.0.0.0/24 240.1.0.0/16]"
	if d := cmp.Diff(both, show(f.Before)); d != "" {
		t.Error(d)
	}
	f.Others = nil
	if d := cmp.Diff(both, show(Decide(f))); d != "" {
		t.Errorf("the VPN went away: %s", d)
	}
	f.Others = routes("240.0.0.0/16@tun2")
	if got, want := show(Decide(f)), "a pod 10.244.1.0/24 mapped 240.2.0.0/24"; !strings.Contains(got, want) {
		t.Errorf("a virtual range was taken by somebody: want %q in\n%s", want, got)
	}
	f.Others = nil
	f.Clusters = append(f.Clusters, Cluster{Session: "b", Services: pfx("10.96.0.0/16"), Pods: pfx("10.9.0.0/16"), VNAT: []Selector{{Kinds: []Kind{Pod}}}})
	if got := show(Decide(f)); !strings.HasPrefix(got, strings.Split(both, "routes")[0]) || !strings.Contains(got, "b service 10.96.0.0/16 routed") || !strings.Contains(got, "b pod 10.9.0.0/16 mapped 240.2.0.0/16") {
		t.Errorf("a second cluster: %s", got)
	}
}

// Joined subnets grow and shrink as nodes come and go; the addresses of those that stay do not change.
func TestDecideAgainJoined(t *testing.T) {
	vpn := routes("10.0.0.0/8@tun0")
	for _, tt := range []struct {
		name, before, after string
		others              []osroute.Existing // after
		want                string
	}{
		{
			"grows", "10.244.1.0/24", "10.244.0.0/24 10.244.1.0/24", vpn,
			"a pod 10.244.0.0/23 mapped 240.0.2.0/23: overlaps 10.0.0.0/8 of tun0\na pod 10.244.1.0/24 mapped 240.0.0.0/24: overlaps 10.0.0.0/8 of tun0\nroutes [240.0.0.0/24 240.0.2.0/23]",
		},
		{
			"grows without the conflict", "10.244.1.0/24", "10.244.0.0/22", nil,
			"a pod 10.244.0.0/22 routed\na pod 10.244.1.0/24 mapped 240.0.0.0/24: overlaps 10.0.0.0/8 of tun0\nroutes [10.244.0.0/22 240.0.0.0/24]",
		},
		{
			"shrinks", "10.244.0.0/22", "10.244.1.0/24 10.244.2.0/23", nil,
			"a pod 10.244.1.0/24 mapped 240.0.1.0/24: overlaps 10.0.0.0/8 of tun0\na pod 10.244.2.0/23 mapped 240.0.2.0/23: overlaps 10.0.0.0/8 of tun0\nroutes [240.0.1.0/24 240.0.2.0/23]",
		},
		{
			"shrinks, and somebody took the other part", "10.244.0.0/22", "10.244.1.0/24 10.244.3.0/24", routes("240.0.3.0/24@tun1"),
			"a pod 10.244.1.0/24 mapped 240.0.1.0/24: overlaps 10.0.0.0/8 of tun0\na pod 10.244.3.0/24 mapped 240.0.4.0/24: overlaps 10.0.0.0/8 of tun0\nroutes [240.0.1.0/24 240.0.4.0/24]",
		},
		{
			"another one comes", "10.244.1.0/24", "10.244.1.0/24 10.244.2.0/24", nil,
			"a pod 10.244.1.0/24 mapped 240.0.0.0/24: overlaps 10.0.0.0/8 of tun0\na pod 10.244.2.0/24 routed\nroutes [10.244.2.0/24 240.0.0.0/24]",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := Decide(Facts{Clusters: []Cluster{{Session: "a", Pods: pfx(tt.before)}}, Others: vpn})
			p := Decide(Facts{Clusters: []Cluster{{Session: "a", Pods: pfx(tt.after)}}, Others: tt.others, Before: before})
			if d := cmp.Diff(tt.want, show(p)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestTranslate(t *testing.T) {
	p := Decide(Facts{
		Clusters: []Cluster{
			{Session: "a", Services: pfx("10.96.0.0/12"), Pods: pfx("10.244.1.0/24 fd00:244::/64"), NeverProxy: pfx("10.96.5.0/24"), Servers: addrs("10.96.6.1"), AlsoProxy: pfx("10.0.0.0/8")},
			{Session: "b", Services: pfx("10.96.0.0/12")},
		},
		Others: routes("10.97.0.0/16@tun0 fd00::/16@tun0"),
	})
	for _, tt := range []struct{ session, real, here string }{
		{"a", "10.96.0.10", "240.0.0.10"},
		{"a", "10.111.255.255", "240.15.255.255"},
		{"b", "10.96.0.10", "240.16.0.10"},
		{"a", "fd00:244::7", "fd64:6f70:7065::7"},
		{"a", "10.244.1.9", "10.244.1.9"},
		{"a", "10.1.2.3", "240.0.0.0"},
		{"a", "8.8.8.8", "8.8.8.8"},
		{"a", "10.96.5.1", "10.96.5.1"},
		{"a", "10.96.6.1", "10.96.6.1"},
		{"c", "10.96.0.10", "10.96.0.10"},
	} {
		if tt.real == "10.1.2.3" { // also-proxy overlaps as well; its virtual range is far away
			tt.here = p.Here("a", netip.MustParseAddr(tt.real)).String()
			if !strings.HasSuffix(tt.here, ".1.2.3") || strings.HasPrefix(tt.here, "10.") {
				t.Errorf("also-proxy: %s", tt.here)
			}
		}
		here := p.Here(tt.session, netip.MustParseAddr(tt.real))
		if here.String() != tt.here {
			t.Errorf("%s of %s is %v here, want %s", tt.real, tt.session, here, tt.here)
		}
		if s, back, ok := p.Find(here); ok && here.String() != tt.real && (back.String() != tt.real || s.Session != tt.session) {
			t.Errorf("%v is %v of %s, want %s of %s", here, back, s.Session, tt.real, tt.session)
		}
	}
	if _, _, ok := p.Find(netip.MustParseAddr("192.0.2.1")); ok {
		t.Error("a subnet for an address outside")
	}
}

// sameAddresses says whether one of two mapped subnets is a part of the other, for real and virtual addresses alike.
func sameAddresses(a, b Subnet) bool {
	if a.Real.Bits() < b.Real.Bits() {
		a, b = b, a
	}
	return a.Session == b.Session && b.Way == Mapped && inside(a.Real, b.Real) && translate(a.Real.Addr(), b.Real, b.Virtual) == a.Virtual.Addr()
}

// stayed are addresses of a cluster that were mapped before, are still wanted, and whose virtual subnets nobody else has a part of now.
func stayed(before Plan, f Facts, c Cluster) (out []netip.Addr) {
	taken := slices.Clone(c.NeverProxy)
	for _, e := range f.Others {
		taken = append(taken, e.Prefix)
	}
	for _, o := range f.Clusters {
		taken = slices.Concat(taken, o.Services, o.Pods, o.AlsoProxy, o.NeverProxy, hosts(o.Servers))
	}
	in := func(a netip.Addr, ps []netip.Prefix) bool {
		return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	for _, s := range before.Subnets {
		if s.Session != c.Session || s.Way != Mapped || slices.ContainsFunc(taken, s.Virtual.Overlaps) {
			continue
		}
		for i := range uint32(16) { // spread over the subnet, and aligned like prefixes
			a := s.Real.Addr().As4()
			n := binary.BigEndian.Uint32(a[:]) + i*(uint32(1)<<(32-s.Real.Bits())/16)
			binary.BigEndian.PutUint32(a[:], n)
			addr := netip.AddrFrom4(a)
			was := before.Here(c.Session, addr)
			if !s.Virtual.Contains(was) || slices.Contains(c.Servers, addr) || in(addr, c.NeverProxy) {
				continue // another subnet decided for it, or it is cut out
			}
			if in(addr, slices.Concat(c.Services, c.Pods, c.AlsoProxy)) {
				out = append(out, addr)
			}
		}
	}
	return out
}

// Whatever the facts: no virtual subnet overlaps anything, nothing is routed over a conflict, addresses translate back, and what was mapped and
// is still wanted keeps its addresses.
func TestDecideProperties(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	prefix := func() netip.Prefix {
		bits := 8 + rnd.IntN(20)
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte([]int{10, 10, 172, 240}[rnd.IntN(4)]), byte(rnd.IntN(8)), byte(rnd.IntN(256)), 0}), bits).Masked()
	}
	list := func(n int) (out []netip.Prefix) {
		for range rnd.IntN(n) {
			out = append(out, prefix())
		}
		return out
	}
	var before Plan
	for range 3000 {
		f := Facts{Before: before}
		for i := range 1 + rnd.IntN(3) {
			f.Clusters = append(f.Clusters, Cluster{Session: string(rune('a' + i)), Services: list(3), Pods: list(5), AlsoProxy: list(2), NeverProxy: list(2), AllowConflicts: list(2), Servers: []netip.Addr{prefix().Addr().Next()}})
		}
		for _, p := range list(5) {
			f.Others = append(f.Others, osroute.Existing{Prefix: p, Link: "x"})
		}
		p := Decide(f)
		for i, s := range p.Subnets {
			if s.Way != Mapped {
				continue
			}
			for _, e := range f.Others {
				if e.Prefix.Overlaps(s.Virtual) {
					t.Fatalf("%v overlaps a route: %s", s.Virtual, show(p))
				}
			}
			for j, o := range p.Subnets {
				if i != j && (o.here().Overlaps(s.Virtual) && o.Way != KeptOut) && !sameAddresses(s, o) {
					t.Fatalf("%v overlaps %v: %s", s.Virtual, o.here(), show(p))
				}
			}
			a := s.Real.Addr()
			if got := p.Here(s.Session, a); got != a {
				if o, back, ok := p.Find(got); !ok || back != a || o.Session != s.Session {
					t.Fatalf("%v is %v here, and that is %v: %s", a, got, back, show(p))
				}
			}
		}
		for _, c := range f.Clusters {
			for _, a := range stayed(before, f, c) {
				if was, is := before.Here(c.Session, a), p.Here(c.Session, a); was != is {
					t.Fatalf("%v of %s was %v and is %v:\n%s\nbefore:\n%s", a, c.Session, was, is, show(p), show(before))
				}
			}
			for _, a := range c.Servers {
				for _, s := range p.Subnets {
					for _, r := range s.routes {
						if s.Session == c.Session && s.Way == Routed && r.Contains(a) {
							t.Fatalf("the API server %v is routed by %v: %s", a, r, show(p))
						}
					}
				}
			}
		}
		before = p
	}
}

func TestAggregate(t *testing.T) {
	for in, want := range map[string]string{
		"":                                       "[]",
		"10.0.0.0/24 10.0.1.0/24":                "[10.0.0.0/23]",
		"10.0.1.0/24 10.0.2.0/24":                "[10.0.1.0/24 10.0.2.0/24]",
		"10.0.0.0/25 10.0.0.128/25 10.0.1.0/24":  "[10.0.0.0/23]",
		"10.0.0.0/16 10.0.3.0/24 10.0.3.0/24":    "[10.0.0.0/16]",
		"fd00::/64 fd00:0:0:1::/64 10.0.0.0/24":  "[10.0.0.0/24 fd00::/63]",
		"0.0.0.0/1 128.0.0.0/1 255.255.255.0/24": "[0.0.0.0/0]",
	} {
		if got := fmt.Sprint(aggregate(pfx(in))); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
