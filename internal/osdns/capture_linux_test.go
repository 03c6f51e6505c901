package osdns

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/nettest"
)

// answer serves UDP and TCP on addr: every query gets who as its answer.
func answer(t *testing.T, addr, who string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(netip.MustParseAddrPort(addr).Addr(), netip.MustParseAddrPort(l.Addr().String()).Port())
	pc, err := net.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); pc.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, who)
			c.Close()
		}
	}()
	go func() {
		b := make([]byte, 512)
		for {
			_, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo([]byte(who), from)
		}
	}()
	return at
}

// ask queries resolver and returns who answered.
func ask(t *testing.T, network, resolver string, marked bool) string {
	t.Helper()
	d := net.Dialer{Timeout: 2 * time.Second}
	if marked {
		d.Control = func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, Mark) })
		}
	}
	c, err := d.Dial(network, net.JoinHostPort(resolver, "53"))
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	return askOn(c)
}

func askOn(c net.Conn) string {
	c.SetDeadline(time.Now().Add(2 * time.Second))
	c.Write([]byte("?"))
	b := make([]byte, 64)
	n, err := c.Read(b)
	if err != nil {
		return err.Error()
	}
	return string(b[:n])
}

func TestCapture(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	for _, a := range []string{"10.5.5.5/32", "fd55::5/128"} {
		nettest.AddAddr(t, a)
	}
	for _, a := range []string{"10.5.5.5:53", "[fd55::5]:53", "127.0.0.53:53"} {
		answer(t, a, "resolver")
	}
	l4, l6 := answer(t, "127.0.0.1:0", "doppel"), answer(t, "[::1]:0", "doppel")
	redirects := Choose(Facts{Resolvers: resolvers("10.5.5.5 fd55::5 127.0.0.53")}, Want{Listen: l4, Listen6: l6}).Redirects

	if err := Probe("doppel-probe"); err != nil {
		t.Fatalf("nftables does not work here: %v", err)
	}
	c := NewCapture("doppel-test")
	check := func(when, want string, resolvers ...string) {
		t.Helper()
		for _, r := range resolvers {
			for _, network := range []string{"udp", "tcp"} {
				if got := ask(t, network, r, false); got != want {
					t.Errorf("%s: %s query to %s: %q, want %q", when, network, r, got, want)
				}
				if got := ask(t, network, r, true); got != "resolver" {
					t.Errorf("%s: marked %s query to %s: %q", when, network, r, got)
				}
			}
		}
	}
	all := []string{"10.5.5.5", "fd55::5", "127.0.0.53"}
	check("before", "resolver", all...)
	kept, err := net.Dial("udp", "10.5.5.5:53") // a program that keeps its socket
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if got := askOn(kept); got != "resolver" {
		t.Fatal(got)
	}
	if err := c.Set(redirects); err != nil {
		t.Fatal(err)
	}
	check("captured", "doppel", all...)
	if got := askOn(kept); got != "doppel" {
		t.Errorf("socket from before the capture: %q", got)
	}
	if n := readBack(t, "doppel-test"); n != 1+2*3 {
		t.Errorf("%d rules in the kernel", n)
	}
	if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
		t.Logf("nft flush ruleset: %v %s", err, out)
	}
	check("after another program's flush", "doppel", all...)
	if err := c.Set(redirects[:1]); err != nil {
		t.Fatal(err)
	}
	check("fewer", "doppel", "10.5.5.5")
	check("fewer", "resolver", "fd55::5", "127.0.0.53")
	if err := c.Set(nil); err != nil {
		t.Fatal(err)
	}
	check("removed", "resolver", all...)
	if got := askOn(kept); got != "resolver" {
		t.Errorf("socket from before, after the capture: %q", got)
	}
	if n := readBack(t, "doppel-test"); n != -1 {
		t.Errorf("table still there with %d rules", n)
	}
	if err := c.Set(redirects); err != nil {
		t.Fatalf("again: %v", err)
	}
	check("captured again", "doppel", all...)
	c.Set(nil)
}

// readBack counts the rules of a table, checking that it is owned and what the first rule is; -1 when there is no such table.
func readBack(t *testing.T, name string) int {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		t.Fatal(err)
	}
	for _, tb := range tables {
		if tb.Name != name {
			continue
		}
		// Flags are big-endian on the wire and the library reads them in the host's order.
		if tb.Flags != 0x02000000 && tb.Flags != tableFlagOwner {
			t.Errorf("table flags %#x: not owned", tb.Flags)
		}
		rs, err := conn.GetRules(tb, &nftables.Chain{Name: chainName, Table: tb})
		if err != nil {
			t.Fatal(err)
		}
		if v, ok := rs[0].Exprs[2].(*expr.Verdict); !ok || v.Kind != expr.VerdictAccept {
			t.Errorf("first rule %+v", rs[0].Exprs)
		}
		return len(rs)
	}
	return -1
}

// TestOwnedTableDiesWithItsProcess re-runs itself as a child that is killed.
func TestOwnedTableDiesWithItsProcess(t *testing.T) {
	if os.Getenv("DOPPEL_TEST_HOLD") != "" {
		c := NewCapture("doppel-held")
		if err := c.Set([]Redirect{{Resolver: netip.MustParseAddr("10.5.5.5"), To: netip.MustParseAddrPort("127.0.0.1:99")}}); err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("ready\n")
		io.Copy(io.Discard, os.Stdin) // until killed
		return
	}
	if !nettest.Inside(t) {
		return
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestOwnedTableDiesWithItsProcess$")
	cmd.Env = append(os.Environ(), "DOPPEL_TEST_HOLD=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var line string
	fmt.Fscanln(out, &line)
	if line != "ready" || readBack(t, "doppel-held") != 3 {
		t.Fatalf("child says %q", line)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if n := readBack(t, "doppel-held"); n != -1 {
		t.Errorf("table survived its process with %d rules", n)
	}
}

// TestLinkLocalResolver has two links with a router of the same address on each, as routers have.
func TestLinkLocalResolver(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	out, err := exec.Command("sh", "-ec", `
		ip link add v0 type veth peer name v1
		ip link add w0 type veth peer name w1
		for l in v0 v1 w0 w1; do ip link set $l up; done
		ip addr add fe80::7/64 dev v0 nodad; ip addr add fe80::8/64 dev w0 nodad`).CombinedOutput()
	if err != nil {
		t.Fatalf("no veth: %s", out)
	}
	own, err := linkLocal()
	if err != nil {
		t.Fatal(err)
	}
	w := Want{Listen: netip.MustParseAddrPort("127.0.0.1:5300"), Scoped: []netip.AddrPort{answer(t, "[fe80::7%v0]:0", "first"), answer(t, "[fe80::8%w0]:0", "second")}}
	p := Choose(Facts{LinkLocal: own, Resolvers: resolvers("fe80::1%v0 fe80::1%w0")}, w)
	c := NewCapture("doppel-ll")
	defer c.Set(nil)
	if err := c.Set(p.Redirects); err != nil || len(p.Warnings) > 0 {
		t.Fatal(err, p.Warnings)
	}
	for link, want := range map[string]string{"v0": "first", "w0": "second"} {
		for _, network := range []string{"udp", "tcp"} {
			if got := ask(t, network, "fe80::1%"+link, false); got != want {
				t.Errorf("%s query on %s: %q, want %q", network, link, got, want)
			}
		}
		pc, err := net.ListenPacket("udp6", "[::]:0") // a program that does not connect its socket
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		to := &net.UDPAddr{IP: net.ParseIP("fe80::1"), Zone: link, Port: Port}
		if _, err := pc.WriteTo([]byte("?"), to); err != nil {
			t.Fatal(err)
		}
		pc.SetDeadline(time.Now().Add(2 * time.Second))
		b := make([]byte, 64)
		if n, from, err := pc.ReadFrom(b); err != nil || string(b[:n]) != want || from.String() != to.String() {
			t.Errorf("unconnected on %s: %q from %v, %v", link, b[:n], from, err)
		}
	}
}

func TestWay(t *testing.T) {
	prefix := netip.MustParsePrefix
	routes := []route{
		{prefix("0.0.0.0/0"), netip.MustParseAddr("10.0.0.1"), "eth0", 100},
		{prefix("0.0.0.0/0"), netip.MustParseAddr("10.1.0.1"), "wlan0", 600},
		{prefix("10.0.0.0/24"), netip.Addr{}, "eth0", 0},
		{prefix("10.8.0.53/32"), netip.Addr{}, "vpn", 0},
	}
	for addr, want := range map[string]Resolver{
		"10.0.0.1":  {Link: "eth0", Gateway: true},
		"10.0.0.2":  {Link: "eth0"},
		"10.1.0.1":  {Link: "eth0", Gateway: true},
		"9.9.9.9":   {Link: "eth0"},
		"10.8.0.53": {Link: "vpn", Host: true},
		"fd00::1":   {},
	} {
		want.Addr = netip.MustParseAddr(addr)
		if got := way(want.Addr, routes); got != want {
			t.Errorf("%s: %+v, want %+v", addr, got, want)
		}
	}
}

func TestMarkedSocket(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: SO_MARK")
	}
	for _, network := range []string{"udp4", "udp6", "tcp4", "tcp6"} {
		f, err := MarkedSocket(network)
		if err != nil {
			t.Fatal(err)
		}
		rc, _ := f.SyscallConn()
		rc.Control(func(fd uintptr) {
			if m, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK); err != nil || m != Mark {
				t.Errorf("%s: mark %#x, %v", network, m, err)
			}
		})
		f.Close()
	}
	if _, err := MarkedSocket("ip4"); err == nil {
		t.Error("raw socket not refused")
	}
}

func TestWatch(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	etc, run := filepath.Join(dir, "etc"), filepath.Join(dir, "run")
	for _, d := range []string{etc, run} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file, target := filepath.Join(etc, "resolv.conf"), filepath.Join(run, "stub.conf")
	write := func(path, s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(file, "nameserver 1.1.1.1\n")

	ctx, cancel := context.WithCancel(context.Background())
	var n atomic.Int64
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, func() { n.Add(1) }, file, filepath.Join(dir, "none", "resolv.conf")) }()
	expect := func(what string, do func()) {
		t.Helper()
		before := n.Load()
		do()
		nettest.Poll(t, 5*time.Second, "told of: "+what, func() bool { return n.Load() > before })
	}
	// Until the watch stands, changes go unseen: write until one is seen.
	nettest.Poll(t, 5*time.Second, "watching", func() bool { write(file, "nameserver 1.1.1.1\n"); return n.Load() > 0 })
	quiet := func() {
		last, since := n.Load(), time.Now()
		nettest.Poll(t, 5*time.Second, "quiet", func() bool {
			if now := n.Load(); now != last {
				last, since = now, time.Now()
			}
			return time.Since(since) > 3*settle
		})
	}
	quiet()
	expect("a write", func() { write(file, "nameserver 2.2.2.2\n") })
	quiet()
	expect("a rename over it", func() {
		write(file+".new", "nameserver 3.3.3.3\n")
		os.Rename(file+".new", file)
	})
	quiet()
	expect("a link in its place", func() {
		write(target, "nameserver 4.4.4.4\n")
		os.Symlink("../run/stub.conf", file+".new")
		os.Rename(file+".new", file)
	})
	quiet()
	expect("a write to the link's target", func() { write(target, "nameserver 5.5.5.5\n") })
	quiet()
	expect("a rename over the link's target", func() {
		write(target+".new", "nameserver 6.6.6.6\n")
		os.Rename(target+".new", target)
	})
	quiet()
	expect("a new address", func() { nettest.AddAddr(t, "10.6.6.6/32") })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := strings.Join(hops(file), " "); !strings.HasPrefix(got, etc) || !strings.HasSuffix(got, target) {
		t.Errorf("hops %s", got)
	}
}
