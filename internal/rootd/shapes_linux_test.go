package rootd

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/tundev"
)

// inCluster is a resolver of the laptop that lies in one of the cluster's subnets.
const inCluster = "10.96.0.10"

// vifDNS is where the user daemon of these tests answers DNS behind the device.
const vifDNS = "198.18.0.2"

// serveStack runs the real stack behind the device: all TCP and UDP ends at the DNS server on addr.
func serveStack(tun *tundev.Device, addr string) error {
	st, err := netstack.New(netstack.Config{
		Device: tun,
		DialTCP: func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Stream, error) {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return nil, err
			}
			return flow.FromTCP(c.(*net.TCPConn)), nil
		},
		DialUDP: func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Packets, error) {
			c, err := net.Dial("udp", addr)
			if err != nil {
				return nil, err
			}
			return flow.FromUDP(c.(*net.UDPConn)), nil
		},
	})
	if err != nil {
		return err
	}
	go st.Run(context.Background())
	return nil
}

// askVia queries a server through a socket that is bound to a link.
func askVia(link, server string) string {
	d := net.Dialer{Timeout: time.Second, Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), link) })
		return err
	}}
	c, err := d.Dial("udp", net.JoinHostPort(server, "53"))
	if err != nil {
		return err.Error()
	}
	return query(c, "web.shop.")
}

// router is the network around the laptop: it waits for its ends of the cables, takes addresses and answers DNS on them.
func router() {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var c command
		if in.Decode(&c) != nil {
			return
		}
		var r result
		b, err := exec.Command("sh", "-ec", `
			ip link set lo up; ip link set r0 up; ip link set r1 up
			ip addr add 10.1.0.1/24 dev r0; ip addr add fd01::1/64 dev r0 nodad; ip addr add fe80::1/64 dev r0 nodad
			ip addr add 10.2.0.1/24 dev r1; ip addr add fe80::1/64 dev r1 nodad
			ip addr add 10.9.9.9/32 dev lo; ip addr add 10.9.9.10/32 dev lo; ip addr add 10.96.0.10/32 dev lo; ip addr add fd09::9/128 dev lo nodad`).CombinedOutput()
		if err != nil {
			r.Err = fmt.Sprintf("%v: %s", err, b)
		} else {
			for _, a := range []string{"10.1.0.1", "fd01::1", "fe80::1%r0", "10.2.0.1", "fe80::1%r1", "10.9.9.9", "10.9.9.10", inCluster, "fd09::9"} {
				serveDNS(net.JoinHostPort(a, "53"), "resolver")
			}
		}
		out.Encode(r)
	}
}

// joinRouter makes the laptop's two links and the network behind them, whose gateway is 10.1.0.1.
func joinRouter(t *testing.T, rpFilter string) {
	t.Helper()
	r := startRole(t, "router", 0)
	out, err := exec.Command("sh", "-ec", fmt.Sprintf(`
		ip link add eth0 type veth peer name r0 netns %[1]d; ip link add eth1 type veth peer name r1 netns %[1]d
		for l in all default eth0 eth1; do echo %[2]s >/proc/sys/net/ipv4/conf/$l/rp_filter; done
		ip link set eth0 up; ip addr add 10.1.0.2/24 dev eth0; ip addr add fd01::2/64 dev eth0 nodad; ip addr add fe80::a/64 dev eth0 nodad
		ip link set eth1 up; ip addr add 10.2.0.2/24 dev eth1; ip addr add fe80::b/64 dev eth1 nodad
		ip route add default via 10.1.0.1; ip -6 route add default via fd01::1`, r.cmd.Process.Pid, rpFilter)).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r.do(command{})
}

// shape is what a laptop's network may look like.
type shape struct {
	name      string
	rpFilter  string
	resolvers []string // of resolv.conf
	noNFT     bool
	mode      string
	captured  []string // of the resolvers; nil: all
}

var shapes = []shape{
	{name: "gateway", rpFilter: "1", resolvers: []string{"10.1.0.1"}, mode: rootapi.DNSNftables},
	{name: "remote", rpFilter: "2", resolvers: []string{"10.9.9.9"}, mode: rootapi.DNSNftables},
	{name: "loopback", rpFilter: "0", resolvers: []string{"127.0.0.1"}, mode: rootapi.DNSNftables},
	{name: "link-local", rpFilter: "1", resolvers: []string{"fe80::1%eth0"}, mode: rootapi.DNSNftables},
	{name: "IPv6", rpFilter: "1", resolvers: []string{"fd09::9", "fd01::1"}, mode: rootapi.DNSNftables},
	{name: "inside a cluster subnet", rpFilter: "1", resolvers: []string{inCluster}, mode: rootapi.DNSNftables},
	{name: "three on two links", rpFilter: "1", resolvers: []string{"10.1.0.1", "10.2.0.1", "fe80::1%eth1"}, mode: rootapi.DNSNftables},
	{name: "routed, no filter", rpFilter: "0", resolvers: []string{"10.9.9.9"}, noNFT: true, mode: rootapi.DNSRouted},
	{name: "routed, loose filter", rpFilter: "2", resolvers: []string{"10.9.9.9"}, noNFT: true, mode: rootapi.DNSRouted},
	{name: "routed, IPv6", rpFilter: "1", resolvers: []string{"fd09::9"}, noNFT: true, mode: rootapi.DNSRouted},
	{name: "routed, inside a cluster subnet", rpFilter: "0", resolvers: []string{inCluster}, noNFT: true, mode: rootapi.DNSRouted},
	{name: "routed but the gateway", rpFilter: "0", resolvers: []string{"10.9.9.9", "10.1.0.1"}, noNFT: true, mode: rootapi.DNSRouted, captured: []string{"10.9.9.9"}},
	{name: "not routed, strict filter", rpFilter: "1", resolvers: []string{"10.9.9.9"}, noNFT: true, mode: rootapi.DNSNone, captured: []string{}},
	{name: "not routed, loopback", rpFilter: "0", resolvers: []string{"127.0.0.1"}, noNFT: true, mode: rootapi.DNSNone, captured: []string{}},
}

// TestShapes tries each laptop in namespaces: captured, resolvers changed by DHCP, a user daemon that hangs, and both daemons killed.
func TestShapes(t *testing.T) {
	for _, s := range shapes {
		t.Run(strings.NewReplacer(" ", "_", ",", "").Replace(s.name), func(t *testing.T) {
			t.Parallel()
			if nettest.Inside(t) {
				tryShape(t, s)
			}
		})
	}
}

func tryShape(t *testing.T, s shape) {
	nettest.Cover(t, "/etc")
	nettest.Cover(t, "/run")
	joinRouter(t, s.rpFilter)
	serveDNS("127.0.0.1:53", "resolver")
	resolvConf := "nameserver " + strings.Join(s.resolvers, "\nnameserver ") + "\n"
	writeResolvConf(t, resolvConf)
	if s.captured == nil {
		s.captured = s.resolvers
	}
	expect := func(when, want string, servers []string) {
		t.Helper()
		for _, server := range servers {
			for _, network := range []string{"udp", "tcp"} {
				if got := ask(network, server); got != want {
					t.Errorf("%s: %s query to %s answered by %q, want %q", when, network, server, got, want)
				}
			}
		}
	}
	for _, server := range s.resolvers { // the first question for a neighbour may be lost while the links come up
		nettest.Poll(t, 10*time.Second, "the router answers at "+server, func() bool { return ask("udp", server) == "resolver" })
	}
	expect("before", "resolver", s.resolvers)

	var env []string
	if s.noNFT {
		env = append(env, envNoNFT+"=1")
	}
	rd := startRootd(t, env...)
	u, n := startUser(t)
	n.Routes = append(n.Routes, netip.MustParsePrefix("10.96.0.0/16"))
	addListener := func(at string) netip.AddrPort {
		return netip.MustParseAddrPort(u.do(command{Do: "listen", Arg: at}).Answer)
	}
	n.DNS.Listen6 = addListener("[::1]:0")
	n.DNS.Scoped = []netip.AddrPort{addListener("[fe80::a%eth0]:0"), addListener("[fe80::b%eth1]:0")}
	n.DNS.Server = netip.MustParseAddr(vifDNS)
	st := u.do(command{Do: "set", Network: n}).State
	if st.DNSMode != s.mode || st.DNSReason == "" || len(st.Resolvers) != len(s.resolvers) {
		t.Errorf("state %+v", st)
	}
	u.do(command{Do: "stack", Arg: n.DNS.Listen.String()})
	expect("captured", "doppel", s.captured)
	for _, server := range s.resolvers { // what the user daemon passes on gets out
		got := ""
		if link := bypass(st, server); link != "" {
			got = u.do(command{Do: "bypass", Arg: link + " " + server}).Answer
		} else {
			got = u.do(command{Do: "marked", Arg: "udp " + server}).Answer
		}
		if got != "resolver" {
			t.Errorf("query passed on to %s answered by %q", server, got)
		}
	}

	began := time.Now()
	u.kill(syscall.SIGSTOP)
	nettest.Poll(t, 10*time.Second, "names outside resolve while the user daemon hangs", func() bool { return ask("udp", s.resolvers[0]) == "resolver" })
	t.Logf("user daemon stopped: outside names work again after %v", time.Since(began).Round(10*time.Millisecond))
	expect("stopped", "resolver", s.resolvers)
	u.kill(syscall.SIGCONT)
	if len(s.captured) > 0 {
		nettest.Poll(t, 5*time.Second, "captured again", func() bool { return ask("udp", s.captured[0]) == "doppel" })
	}

	if s.mode == rootapi.DNSNftables { // DHCP: another resolver, then the old ones
		writeResolvConf(t, "nameserver 10.9.9.10\n")
		nettest.Poll(t, 5*time.Second, "new resolver captured", func() bool { return ask("udp", "10.9.9.10") == "doppel" })
		if s.resolvers[0] != inCluster { // which is an address of the cluster then, like any other
			expect("old resolver", "resolver", s.resolvers)
		}
		writeResolvConf(t, resolvConf)
		nettest.Poll(t, 5*time.Second, "old resolver captured again", func() bool { return ask("udp", s.resolvers[0]) == "doppel" })
	}

	rd.kill(syscall.SIGKILL)
	u.kill(syscall.SIGKILL)
	nettest.Poll(t, 3*time.Second, "nothing left", func() bool {
		m := look(t)
		return m.link == 0 && !m.table
	})
	expect("killed", "resolver", s.resolvers)
	if got, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(got) != resolvConf {
		t.Errorf("resolv.conf was edited: %q, %v", got, err)
	}
}

func bypass(st rootapi.State, server string) string {
	for _, b := range st.Bypass {
		if b.Resolver.String() == server {
			return b.Link
		}
	}
	return ""
}
