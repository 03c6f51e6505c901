// Package plan derives every name and address of a lab from its name and its index.
package plan

import (
	"fmt"
	"net/netip"
	"regexp"
	"time"
)

// What is the same in every lab: these addresses exist only inside a lab's own namespaces.
var (
	ServiceCIDR  = netip.MustParsePrefix("10.96.0.0/16")
	ServiceCIDR6 = netip.MustParsePrefix("fd10:96::/108")
	PodCIDR      = netip.MustParsePrefix("10.244.0.0/16")
	PodCIDR6     = netip.MustParsePrefix("fd10:244::/56")
	ClusterDNS   = netip.MustParseAddr("10.96.0.10")
	ClusterDNS6  = netip.MustParseAddr("fd10:96::a")
	KubernetesI  = netip.MustParseAddr("10.96.0.1")
	// Outside4 and Outside6 stand for the rest of the internet: a web server of the lab answers there.
	Outside4 = netip.MustParseAddr("203.0.113.10")
	Outside6 = netip.MustParseAddr("2001:db8:77::10")
)

const (
	// ClusterDomain is the DNS domain of every lab's cluster.
	ClusterDomain = "cluster.local"
	// APIPort is the port of the API server on the first node.
	APIPort = 6443
	// MaxIndex is the greatest index a lab can have: it is one octet of the lab's addresses.
	MaxIndex = 250
	// MaxNodes and MaxLaptops keep every address inside its subnet.
	MaxNodes   = 50
	MaxLaptops = 200
	// OutsideTTL is the time to live of the names outside the cluster.
	OutsideTTL = 30 * time.Second
)

// OutsideNames are the names that the lab's resolver answers; all others do not exist.
func OutsideNames() []string {
	return []string{"example.com", "www.example.com", "outside.test", "something.dev", OutsideServer}
}

// OutsideServer is a name outside the cluster with all names below it, where whatever is run by "lab outside exec" answers on port 443.
const OutsideServer = "relay.test"

// Lab is what every name and address follows from.
type Lab struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	Nodes int    `json:"nodes"`
}

var nameRE = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$`)

// CheckName says whether name can be a lab's or a laptop's.
func CheckName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("the name %q is not 1 to 20 of a-z, 0-9 and -, starting with a letter", name)
	}
	return nil
}

// Validate says what of l is out of range.
func (l Lab) Validate() error {
	if err := CheckName(l.Name); err != nil {
		return err
	}
	if l.Index < 0 || l.Index > MaxIndex {
		return fmt.Errorf("index %d is not within 0 and %d", l.Index, MaxIndex)
	}
	if l.Nodes < 1 || l.Nodes > MaxNodes {
		return fmt.Errorf("%d nodes are not within 1 and %d", l.Nodes, MaxNodes)
	}
	return nil
}

// Net is the network on which the lab's nodes, its router and the machine itself meet.
func (l Lab) Net() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(l.Index), 0}), 24)
}

// Net6 is Net's IPv6 subnet. The machine itself has no address there.
func (l Lab) Net6() netip.Prefix { return netip.PrefixFrom(l.host6(0), 64) }

// Gateway is the router's address on Net; the lab's resolver listens there too.
func (l Lab) Gateway() netip.Addr { return l.host(1) }

// Gateway6 is the router's address on Net6.
func (l Lab) Gateway6() netip.Addr { return l.host6(1) }

// HostIP is the machine's own address on Net.
func (l Lab) HostIP() netip.Addr { return l.host(254) }

// HostLink is the machine's end of the wire to Net.
func (l Lab) HostLink() string { return fmt.Sprintf("doppel-lab%d", l.Index) }

func (l Lab) host(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 77, byte(l.Index), byte(n)})
}

func (l Lab) host6(n int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x77, 7: byte(l.Index), 15: byte(n)})
}

// Node is one node of the cluster, counted from 1.
type Node struct {
	Name              string
	Short             string
	IP, IP6           netip.Addr
	PodCIDR, PodCIDR6 netip.Prefix
}

// Node returns the k-th node, counted from 1.
func (l Lab) Node(k int) Node {
	short := fmt.Sprintf("node%d", k)
	return Node{
		Name:  l.Name + "-" + short,
		Short: short,
		IP:    l.host(10 + k), IP6: l.host6(10 + k),
		PodCIDR:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(k), 0}), 24),
		PodCIDR6: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x10, 2: 0x02, 3: 0x44, 7: byte(k)}), 64),
	}
}

// AllNodes returns the lab's nodes in their order.
func (l Lab) AllNodes() []Node {
	nodes := make([]Node, l.Nodes)
	for i := range nodes {
		nodes[i] = l.Node(i + 1)
	}
	return nodes
}

// APIServer is the address of the API server, on the first node.
func (l Lab) APIServer() netip.AddrPort {
	return netip.AddrPortFrom(l.Node(1).IP, APIPort)
}

// APIServerURL is what kubeconfigs name.
func (l Lab) APIServerURL() string { return "https://" + l.APIServer().String() }

// Cgroup is the lab's directory in each cgroup hierarchy.
func (l Lab) Cgroup() string { return "doppel-lab-" + l.Name }

// Laptop holds the addresses of one laptop's link.
type Laptop struct {
	Net       netip.Prefix
	IP        netip.Addr
	Gateway   netip.Addr
	Net6      netip.Prefix
	IP6       netip.Addr
	Gateway6  netip.Addr
	WanLink   string
	InnerLink string
}

// LaptopNet returns the addresses of the laptop with the given index, counted from 1.
func LaptopNet(index int) Laptop {
	v4 := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 78, byte(index), n}) }
	v6 := func(n byte) netip.Addr {
		return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x78, 7: byte(index), 15: n})
	}
	return Laptop{
		Net: netip.PrefixFrom(v4(0), 24), IP: v4(2), Gateway: v4(1),
		Net6: netip.PrefixFrom(v6(0), 64), IP6: v6(2), Gateway6: v6(1),
		WanLink: fmt.Sprintf("laptop%d", index), InnerLink: "eth0",
	}
}
