// Package wan is what lies outside the cluster: the router between nodes, laptops and the machine, its resolver and a
// web server that stands for the internet.
package wan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// Bridge is the link of the router to which all nodes and the machine are joined.
const Bridge = "nodes"

// Role is the name under which a holder runs Serve.
const Role = "wan"

// Spec is what the router's holder sets up.
func Spec(lab *state.Lab) ns.Spec {
	return ns.Spec{Hostname: lab.Plan.Name + "-router", Role: Role, RoleArg: lab.Path(controlSocket)}
}

// SetUp makes the router's links, addresses and rules and joins the machine to it.
func SetUp(l plan.Lab, router state.Process) error {
	h, err := handle(router)
	if err != nil {
		return err
	}
	defer h.Close()
	bridge := &netlink.Bridge{LinkAttrs: attrs(Bridge)}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	if err := errors.Join(
		configure(h, Bridge, netip.PrefixFrom(l.Gateway(), l.Net().Bits()), netip.PrefixFrom(l.Gateway6(), l.Net6().Bits())),
		configure(h, "lo", netip.PrefixFrom(plan.Outside4, 32), netip.PrefixFrom(plan.Outside6, 128)),
		sysctl(router, "net/ipv4/ip_forward", "1"),
		// Every refused packet is answered, so that nobody waits for a timeout.
		sysctl(router, "net/ipv4/icmp_ratelimit", "0"),
		nft(router, rules(l)),
	); err != nil {
		return err
	}
	return joinMachine(h, l)
}

// rules are the router's nftables rules: a laptop reaches the API server, node ports there, the resolver and the outside, nothing else.
//
// They stand before routing, so that addresses without a route are refused in the same way. TCP is refused by a reset:
// Linux takes an ICMP error that arrives while connect still sends, as it does over veth, for a passing one, and
// tries again after a second.
func rules(l plan.Lab) string {
	api := l.APIServer()
	return fmt.Sprintf(`table inet doppel_lab {
	chain laptops {
		type filter hook prerouting priority filter; policy accept;
		iifname != "laptop*" accept
		ct state established,related accept
		ip daddr %[2]s tcp dport { %[3]d, 30000-32767 } accept
		meta l4proto { icmp, ipv6-icmp } accept
		ip daddr 10.78.0.0/16 meta l4proto { tcp, udp } th dport 53 accept
		ip6 daddr fd78::/32 meta l4proto { tcp, udp } th dport 53 accept
		ip daddr %[4]s tcp dport { 80, 443 } accept
		ip6 daddr %[5]s tcp dport { 80, 443 } accept
		meta l4proto tcp reject with tcp reset
		reject with icmpx host-unreachable
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		iifname %[1]q oifname %[1]q accept
		iifname "laptop*" ip daddr %[2]s tcp dport { %[3]d, 30000-32767 } accept
	}
}
`, Bridge, api.Addr(), api.Port(), plan.Outside4, plan.Outside6)
}

func joinMachine(h *netlink.Handle, l plan.Lab) error {
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	if err := pair(h, "machine", l.HostLink(), netlink.NsFd(here), Bridge); err != nil {
		return fmt.Errorf("join the machine to the router: %w", err)
	}
	local, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer local.Close()
	return configure(local, l.HostLink(), netip.PrefixFrom(l.HostIP(), l.Net().Bits()))
}

// JoinNode joins a node to the router and routes it to the pods of all other nodes.
func JoinNode(l plan.Lab, router, holder state.Process, node plan.Node) error {
	h, err := handle(router)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := pair(h, node.Short, "eth0", netlink.NsPid(holder.PID), Bridge); err != nil {
		return fmt.Errorf("join %s to the router: %w", node.Name, err)
	}
	inner, err := handle(holder)
	if err != nil {
		return err
	}
	defer inner.Close()
	if err := errors.Join(
		configure(inner, "lo"),
		configure(inner, "eth0", netip.PrefixFrom(node.IP, l.Net().Bits()), netip.PrefixFrom(node.IP6, l.Net6().Bits())),
		route(inner, "eth0", netip.PrefixFrom(netip.IPv4Unspecified(), 0), l.Gateway()),
		route(inner, "eth0", netip.PrefixFrom(netip.IPv6Unspecified(), 0), l.Gateway6()),
		sysctl(holder, "net/ipv4/ip_forward", "1"),
		sysctl(holder, "net/ipv6/conf/all/forwarding", "1"),
		// Of the links to pods, which are made later; see the pods' own in package node.
		sysctl(holder, noDAD, "0"),
		sysctl(holder, "net/ipv4/conf/all/send_redirects", "0"),
		sysctl(holder, "net/ipv4/conf/default/send_redirects", "0"),
		nft(holder, masquerade(l)),
	); err != nil {
		return fmt.Errorf("network of %s: %w", node.Name, err)
	}
	for _, other := range l.AllNodes() {
		if other != node {
			if err := errors.Join(route(inner, "eth0", other.PodCIDR, other.IP), route(inner, "eth0", other.PodCIDR6, other.IP6)); err != nil {
				return fmt.Errorf("network of %s: %w", node.Name, err)
			}
		}
	}
	return nil
}

// masquerade gives pods the node's address on their way out, but not on their way to nodes and other pods.
func masquerade(l plan.Lab) string {
	var nodes, nodes6 string
	for _, n := range l.AllNodes() {
		nodes += ", " + n.IP.String()
		nodes6 += ", " + n.IP6.String()
	}
	return fmt.Sprintf(`table inet doppel_lab {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		ip saddr %[1]s ip daddr != { %[1]s%[2]s } oifname "eth0" masquerade
		ip6 saddr %[3]s ip6 daddr != { %[3]s%[4]s } oifname "eth0" masquerade
	}
}
`, plan.PodCIDR, nodes, plan.PodCIDR6, nodes6)
}

func handle(p state.Process) (*netlink.Handle, error) {
	fd, err := netns.GetFromPid(p.PID)
	if err != nil {
		return nil, fmt.Errorf("network namespace of process %d: %w", p.PID, err)
	}
	defer fd.Close()
	return netlink.NewHandleAt(fd)
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// pair adds a pair of links, one here and one in another namespace, and puts ours into the bridge if one is named.
func pair(h *netlink.Handle, name, peer string, peerNS any, bridge string) error {
	veth := &netlink.Veth{LinkAttrs: attrs(name), PeerName: peer, PeerNamespace: peerNS}
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("add link %s: %w", name, err)
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if bridge != "" {
		master, err := h.LinkByName(bridge)
		if err != nil {
			return err
		}
		if err := h.LinkSetMaster(link, master); err != nil {
			return fmt.Errorf("join link %s to %s: %w", name, bridge, err)
		}
	}
	return h.LinkSetUp(link)
}

// configure sets a link up with the given addresses.
func configure(h *netlink.Handle, name string, addrs ...netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			// No duplicate address detection: the address is usable at once.
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s of link %s: %w", a, name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("link %s up: %w", name, err)
	}
	return nil
}

func route(h *netlink.Handle, name string, to netip.Prefix, via netip.Addr) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to), Gw: net.IP(via.AsSlice())}
	if err := h.RouteReplace(r); err != nil {
		return fmt.Errorf("route to %s: %w", to, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: net.IP(p.Addr().AsSlice()), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func sysctl(holder state.Process, name, value string) error {
	return ns.Do(holder, ns.Net, func() error {
		return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
	})
}

func nft(holder state.Process, ruleset string) error {
	return ns.Do(holder, ns.Net, func() error { return runNFT(ruleset) })
}
