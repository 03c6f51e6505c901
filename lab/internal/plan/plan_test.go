package plan

import (
	"net/netip"
	"testing"
)

func TestAddresses(t *testing.T) {
	l := Lab{Name: "demo", Index: 3, Nodes: 2}
	for _, c := range []struct{ what, got, want string }{
		{"network", l.Net().String(), "10.77.3.0/24"},
		{"gateway", l.Gateway().String(), "10.77.3.1"},
		{"machine", l.HostIP().String(), "10.77.3.254"},
		{"machine's link", l.HostLink(), "doppel-lab3"},
		{"API server", l.APIServerURL(), "https://10.77.3.11:6443"},
		{"first node", l.Node(1).Name, "demo-node1"},
		{"second node", l.Node(2).IP.String(), "10.77.3.12"},
		{"second node's pods", l.Node(2).PodCIDR.String(), "10.244.2.0/24"},
		{"IPv6 network", l.Net6().String(), "fd77:0:0:3::/64"},
		{"second node's IPv6", l.Node(2).IP6.String(), "fd77:0:0:3::c"},
		{"second node's IPv6 pods", l.Node(2).PodCIDR6.String(), "fd10:244:0:2::/64"},
		{"laptop", LaptopNet(4).IP.String(), "10.78.4.2"},
		{"laptop's gateway", LaptopNet(4).Gateway.String(), "10.78.4.1"},
		{"laptop's IPv6", LaptopNet(4).IP6.String(), "fd78:0:0:4::2"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %s, want %s", c.what, c.got, c.want)
		}
	}
}

// TestNoOverlap checks that everything of a lab of the greatest size is in its place.
func TestNoOverlap(t *testing.T) {
	seen := map[netip.Addr]string{}
	take := func(a netip.Addr, in netip.Prefix, what string) {
		if !in.Contains(a) {
			t.Errorf("%s has %s, outside %s", what, a, in)
		}
		if other, ok := seen[a]; ok {
			t.Errorf("%s and %s both have %s", what, other, a)
		}
		seen[a] = what
	}
	for _, index := range []int{0, MaxIndex} {
		l := Lab{Name: "x", Index: index, Nodes: MaxNodes}
		take(l.Gateway(), l.Net(), "gateway")
		take(l.Gateway6(), l.Net6(), "gateway")
		take(l.HostIP(), l.Net(), "machine")
		for _, n := range l.AllNodes() {
			take(n.IP, l.Net(), n.Name)
			take(n.IP6, l.Net6(), n.Name)
			if !PodCIDR.Overlaps(n.PodCIDR) || !PodCIDR6.Overlaps(n.PodCIDR6) {
				t.Errorf("%s has pods in %s and %s", n.Name, n.PodCIDR, n.PodCIDR6)
			}
		}
		if len(l.HostLink()) > 15 {
			t.Errorf("link name %s is longer than the kernel allows", l.HostLink())
		}
	}
	for i := 1; i <= MaxLaptops; i++ {
		n := LaptopNet(i)
		take(n.IP, n.Net, "laptop")
		take(n.Gateway, n.Net, "laptop's gateway")
		take(n.IP6, n.Net6, "laptop")
		take(n.Gateway6, n.Net6, "laptop's gateway")
		if len(n.WanLink)+1 > 15 {
			t.Errorf("link name %sr is longer than the kernel allows", n.WanLink)
		}
	}
}

func TestValidate(t *testing.T) {
	for _, l := range []Lab{
		{Name: "", Nodes: 1},
		{Name: "Up", Nodes: 1},
		{Name: "../x", Nodes: 1},
		{Name: "-x", Nodes: 1},
		{Name: "a-name-that-is-too-long", Nodes: 1},
		{Name: "x"},
		{Name: "x", Nodes: MaxNodes + 1},
		{Name: "x", Nodes: 1, Index: -1},
		{Name: "x", Nodes: 1, Index: MaxIndex + 1},
	} {
		if l.Validate() == nil {
			t.Errorf("%+v is accepted", l)
		}
	}
	if err := (Lab{Name: "lab-2", Nodes: 2}).Validate(); err != nil {
		t.Error(err)
	}
}
