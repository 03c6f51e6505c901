package redirect

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/nettest"
)

func TestRules(t *testing.T) {
	cfg := &agentcfg.Config{Ports: []agentcfg.Port{
		{Protocol: "TCP", ContainerPort: 8080, AgentPort: 9901, Way: agentcfg.ByName},
		{Protocol: "TCP", ContainerPort: 3000, AgentPort: 9902, ProbePort: 9903, Way: agentcfg.ByRedirect},
		{Protocol: "UDP", ContainerPort: 53, AgentPort: 9904, Way: agentcfg.ByRedirect},
	}}
	want := []Rule{{"TCP", 3000, 9902}, {"UDP", 53, 9904}}
	if d := cmp.Diff(want, Rules(cfg)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if got := Rules(&agentcfg.Config{}); got != nil {
		t.Errorf("no ports: %v", got)
	}
}

// client is a thread in a network namespace of its own.
type client struct {
	tid  int
	jobs chan func()
}

func newClient(t *testing.T) *client {
	t.Helper()
	c := &client{jobs: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		c.tid = unix.Gettid()
		ready <- err
		for job := range c.jobs {
			job()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(c.jobs) })
	return c
}

func (c *client) do(job func()) {
	done := make(chan struct{})
	c.jobs <- func() { defer close(done); job() }
	<-done
}

// connect makes the one cable between the pod (our namespace) and the client.
func connect(t *testing.T, c *client) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}))
	peer, err := netlink.LinkByName("peer")
	must(err)
	ns, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", c.tid))
	must(err)
	defer ns.Close()
	must(netlink.LinkSetNsFd(peer, int(ns.Fd())))
	up := func(name string, addrs ...string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(l, addr); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	}
	must(up("eth0", "10.1.0.2/24", "fd01::2/64"))
	c.do(func() { err = up("peer", "10.1.0.1/24", "fd01::1/64") })
	must(err)
}

// serve says its name to everybody, over TCP at once and over UDP when asked.
func serve(t *testing.T, port int, name string) {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); _ = pc.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, name)
			_ = c.Close()
		}
	}()
	go func() {
		for b := make([]byte, 64); ; {
			_, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo([]byte(name), from)
		}
	}()
}

// ask says who answers.
func ask(network, addr string) string {
	c, err := net.DialTimeout(network, addr, 5*time.Second)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if network == "udp" {
		_, _ = io.WriteString(c, "?")
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	if err != nil {
		return err.Error()
	}
	return string(b[:n])
}

// What arrives from outside goes to the agent, what the pod's own processes send goes to the app; setting the rules again changes
// nothing, setting none takes them away.
func TestApply(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	c := newClient(t)
	connect(t, c)
	for port, name := range map[int]string{3000: "app", 3001: "other", 9901: "agent", 5353: "dns", 9902: "dns agent"} {
		serve(t, port, name)
	}
	check := func(step, network, port, want string) {
		t.Helper()
		for _, host := range []string{"10.1.0.2", "fd01::2"} {
			addr := net.JoinHostPort(host, port)
			var got string
			c.do(func() { got = ask(network, addr) })
			if got != want {
				t.Errorf("%s: from outside %s %s: %s, want %s", step, network, addr, got, want)
			}
		}
	}
	local := func(step, addr, want string) {
		t.Helper()
		if got := ask("tcp", addr); got != want {
			t.Errorf("%s: from inside %s: %s, want %s", step, addr, got, want)
		}
	}
	nettest.Poll(t, 5*time.Second, "the cable carries", func() bool {
		var got string
		c.do(func() { got = ask("tcp", "[fd01::2]:3000") })
		return got == "app"
	})
	rules := []Rule{{"TCP", 3000, 9901}, {"UDP", 5353, 9902}}
	for _, step := range []string{"first", "again"} {
		if err := Apply(rules); err != nil {
			t.Fatal(err)
		}
		check(step, "tcp", "3000", "agent")
		check(step, "udp", "3000", "app") // another protocol of the number
		check(step, "udp", "5353", "dns agent")
		check(step, "tcp", "5353", "dns")
		check(step, "tcp", "3001", "other")
		local(step, "127.0.0.1:3000", "app")
		local(step, "10.1.0.2:3000", "app")
		local(step, "[fd01::2]:3000", "app")
	}
	if n := chains(t); n != 1 {
		t.Errorf("%d chains", n)
	}
	if err := Apply(rules[1:]); err != nil { // fewer
		t.Fatal(err)
	}
	check("fewer", "tcp", "3000", "app")
	check("fewer", "udp", "5353", "dns agent")
	for range 2 {
		if err := Apply(nil); err != nil {
			t.Fatal(err)
		}
		check("none", "udp", "5353", "dns")
		if n := chains(t); n != 0 {
			t.Errorf("%d chains are left", n)
		}
	}
}

func chains(t *testing.T) int {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	list, err := conn.ListChains()
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
