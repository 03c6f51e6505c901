package rootd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// The test's binary plays three parts: the test, rootd, and an unprivileged user daemon that does what its standard input says.
const (
	envRole  = "DOPPEL_TEST_ROLE"
	envNoNFT = "DOPPEL_TEST_NO_NFT"
	testUID  = 4242
	resolver = "10.5.5.5"
	ifName   = "doppel3"
)

func TestMain(m *testing.M) {
	switch os.Getenv(envRole) {
	case "rootd":
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		cfg := Config{UID: testUID, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))}
		if os.Getenv(envNoNFT) != "" {
			cfg.probe = func(string) error { return errors.New("taken away by the test") }
		}
		srv, err := New(cfg)
		if err == nil {
			err = srv.Run(ctx)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(uerr.From(err).Kind.ExitCode())
		}
		os.Exit(0)
	case "user":
		userDaemon()
		os.Exit(0)
	case "router":
		router()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// command is a line of a user daemon's standard input, result one of its standard output.
type command struct {
	Do      string
	Network rootapi.Network
	Arg     string
}

type result struct {
	State  rootapi.State
	File   bool // a descriptor came
	Answer string
	Kind   uerr.Kind
	Err    string
}

func userDaemon() {
	var mu sync.Mutex
	alive := true
	var told rootapi.State
	var client *rootapi.Client
	var tun *tundev.Device
	in, out := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var c command
		if in.Decode(&c) != nil {
			return
		}
		var r result
		err := func() (err error) {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			switch c.Do {
			case "dial":
				client, err = rootapi.Dial(ctx, rootapi.DefaultSocket, rootapi.Options{
					Alive:   func() bool { mu.Lock(); defer mu.Unlock(); return alive },
					Changed: func(st rootapi.State) { mu.Lock(); defer mu.Unlock(); told = st },
				})
			case "listen":
				r.Answer = serveDNS(c.Arg, "doppel")
			case "set":
				var f *os.File
				r.State, f, err = client.SetNetwork(ctx, c.Network)
				if f != nil && err == nil {
					r.File = true
					tun, err = tundev.New(f) // without privilege
				}
			case "adopt":
				r.State, err = client.AdoptNetwork(ctx, c.Network)
			case "stack":
				err = serveStack(tun, c.Arg)
			case "bypass":
				link, server, _ := strings.Cut(c.Arg, " ")
				r.Answer = askVia(link, server)
			case "read":
				r.Answer, err = readDatagram(tun, c.Arg)
			case "close tun":
				err = tun.Close()
			case "marked":
				var conn net.Conn
				network, server, _ := strings.Cut(c.Arg, " ")
				if conn, err = client.DialMarked(ctx, network, netip.AddrPortFrom(netip.MustParseAddr(server), 53)); err == nil {
					r.Answer = query(conn, "web.shop.")
				}
			case "told":
				mu.Lock()
				r.State = told
				mu.Unlock()
			case "alive":
				mu.Lock()
				alive = c.Arg == "yes"
				mu.Unlock()
			case "wait":
				<-client.Done()
			case "quit":
				err = client.Quit(ctx, c.Arg == "if idle")
			case "close":
				err = client.Close()
			}
			return err
		}()
		if err != nil {
			r.Kind, r.Err = uerr.From(err).Kind, err.Error()
		}
		out.Encode(r)
	}
}

// readDatagram has a datagram sent into the device and reads it there.
func readDatagram(tun *tundev.Device, to string) (string, error) {
	c, err := net.Dial("udp", to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := c.Write([]byte("datagram")); err != nil {
		return "", err
	}
	buf := make([]byte, tundev.MaxPacket)
	for {
		n, _, err := tun.ReadPacket(buf)
		if err != nil || strings.HasSuffix(string(buf[:n]), "datagram") {
			return "datagram", err
		}
	}
}

// serveDNS answers every question about TXT records on addr with who, and every other one with whoAddrs.
func serveDNS(addr, who string) string {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		panic(err)
	}
	at := netip.AddrPortFrom(netip.MustParseAddrPort(addr).Addr(), netip.MustParseAddrPort(l.Addr().String()).Port()).String()
	pc, err := net.ListenPacket("udp", at)
	if err != nil {
		panic(err)
	}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetReply(q)
		name := q.Question[0].Name
		switch q.Question[0].Qtype {
		case dns.TypeTXT:
			r.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{who}}}
		case dns.TypeA:
			r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(whoAddrs[who])}}
		}
		_ = w.WriteMsg(r)
	})
	go dns.ActivateAndServe(l, nil, h)
	go dns.ActivateAndServe(nil, pc, h)
	return at
}

var whoAddrs = map[string]string{"resolver": "192.0.2.1", "doppel": "192.0.2.2"}

// query asks who answers names.
func query(c net.Conn, name string) string {
	defer c.Close()
	dc := &dns.Conn{Conn: c}
	dc.SetDeadline(time.Now().Add(time.Second))
	if err := dc.WriteMsg(new(dns.Msg).SetQuestion(name, dns.TypeTXT)); err != nil {
		return err.Error()
	}
	m, err := dc.ReadMsg()
	switch {
	case err != nil:
		return err.Error()
	case len(m.Answer) == 0:
		return dns.RcodeToString[m.Rcode]
	}
	return strings.Join(m.Answer[0].(*dns.TXT).Txt, "")
}

// ask queries a resolver as any program would.
func ask(network, server string) string { return askName(network, server, "web.shop.") }

func askName(network, server, name string) string {
	c, err := net.DialTimeout(network, net.JoinHostPort(server, "53"), time.Second)
	if err != nil {
		return err.Error()
	}
	return query(c, name)
}

// process is a child in one of the roles.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *json.Decoder
	done chan struct{}
}

func startRole(t *testing.T, role string, uid uint32, env ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command("/proc/self/exe"), done: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), envRole+"="+role), env...)
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: false}}
	if role == "router" { // another machine
		p.cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = json.NewDecoder(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() { p.kill(syscall.SIGKILL) })
	return p
}

// kill sends the signal and waits for the end, except after SIGSTOP and SIGCONT.
func (p *process) kill(sig syscall.Signal) {
	p.cmd.Process.Signal(sig)
	if sig != syscall.SIGSTOP && sig != syscall.SIGCONT {
		<-p.done
	}
}

func startRootd(t *testing.T, env ...string) *process {
	t.Helper()
	p := startRole(t, "rootd", 0, env...)
	nettest.Poll(t, 10*time.Second, "rootd listening", func() bool {
		c, err := net.Dial("unixpacket", rootapi.DefaultSocket)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
	return p
}

// try lets a user daemon do something.
func (p *process) try(c command) result {
	p.t.Helper()
	if err := json.NewEncoder(p.in).Encode(c); err != nil {
		p.t.Fatalf("%s: %v", c.Do, err)
	}
	var r result
	if err := p.out.Decode(&r); err != nil {
		p.t.Fatalf("%s: %v", c.Do, err)
	}
	return r
}

func (p *process) do(c command) result {
	p.t.Helper()
	r := p.try(c)
	if r.Err != "" {
		p.t.Fatalf("%s: %s: %s", c.Do, r.Kind, r.Err)
	}
	return r
}

// startUser starts a user daemon that has dialled and listens for DNS; the network is what it will want.
func startUser(t *testing.T) (*process, rootapi.Network) {
	t.Helper()
	u := startRole(t, "user", testUID)
	u.do(command{Do: "dial"})
	l := u.do(command{Do: "listen", Arg: "127.0.0.1:0"}).Answer
	return u, rootapi.Network{
		Name:   ifName,
		Addrs:  []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32"), netip.MustParsePrefix("fd77::1/128")},
		Routes: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16"), netip.MustParsePrefix("10.88.0.0/31"), netip.MustParsePrefix("fd77::/64")},
		Exclude: []netip.Prefix{
			netip.MustParsePrefix("10.88.0.1/32"),
		},
		DNS: &rootapi.DNS{Listen: netip.MustParseAddrPort(l)},
	}
}

// machine is what this network namespace looks like.
type machine struct {
	link   int // index, 0 without
	routes []string
	table  bool
}

func look(t *testing.T) machine {
	t.Helper()
	var m machine
	if l, err := osroute.Find(ifName); err == nil {
		m.link = l.Index
		rs, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: l.Index}, netlink.RT_FILTER_OIF)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rs {
			if r.Dst != nil && r.Dst.String() != "ff00::/8" {
				m.routes = append(m.routes, r.Dst.String())
			}
		}
		slices.Sort(m.routes)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, tb := range tables {
		m.table = m.table || strings.HasPrefix(tb.Name, "doppel-")
	}
	return m
}

func writeResolvConf(t *testing.T, s string) {
	t.Helper()
	if err := os.WriteFile("/etc/resolv.conf.new", []byte(s), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename("/etc/resolv.conf.new", "/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
}

// setUp prepares the namespaces: an empty /etc and /run, and two resolvers.
func setUp(t *testing.T) {
	t.Helper()
	nettest.Cover(t, "/etc")
	nettest.Cover(t, "/run")
	writeResolvConf(t, "nameserver "+resolver+"\nsearch corp.example\n")
	for _, a := range []string{resolver, "10.5.5.6"} {
		nettest.AddAddr(t, a+"/32")
		serveDNS(a+":53", "resolver")
	}
}

func gone(t *testing.T, what string) {
	t.Helper()
	nettest.Poll(t, 3*time.Second, what+": nothing left", func() bool {
		m := look(t)
		return m.link == 0 && !m.table
	})
	if got := ask("udp", resolver); got != "resolver" {
		t.Errorf("%s: query answered by %q", what, got)
	}
}

func captured(t *testing.T, what, want string) {
	t.Helper()
	for _, network := range []string{"udp", "tcp"} {
		if got := ask(network, resolver); got != want {
			t.Errorf("%s: %s query answered by %q, want %q", what, network, got, want)
		}
	}
}

func TestSetNetwork(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	startRootd(t)
	u, n := startUser(t)
	captured(t, "before", "resolver")
	r := u.do(command{Do: "set", Network: n})
	want := rootapi.State{
		Seq:           r.State.Seq,
		Name:          ifName,
		Routes:        []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16"), netip.MustParsePrefix("10.88.0.0/32"), netip.MustParsePrefix("fd77::/64")},
		DNSMode:       rootapi.DNSNftables,
		DNSReason:     "programs here ask the resolvers of resolv.conf",
		Resolvers:     []netip.AddrPort{netip.MustParseAddrPort(resolver + ":53")},
		SearchDomains: []string{"corp.example"},
	}
	if fmt.Sprint(r.State) != fmt.Sprint(want) || r.State.Seq == 0 || !r.File {
		t.Errorf("got %+v (file %v), want %+v", r.State, r.File, want)
	}
	m := look(t)
	if !m.table || !slices.Equal(m.routes, []string{"10.77.0.0/16", "10.88.0.0/32", "fd77::/64"}) {
		t.Errorf("machine %+v", m)
	}
	captured(t, "set", "doppel")
	works := func(when string) {
		t.Helper()
		for _, to := range []string{"10.77.0.9:7", "[fd77::9]:7"} {
			if got := u.do(command{Do: "read", Arg: to}).Answer; got != "datagram" {
				t.Errorf("%s: datagram to %s: %q", when, to, got)
			}
		}
	}
	works("set")
	for _, network := range []string{"udp", "tcp"} {
		if got := u.do(command{Do: "marked", Arg: network + " " + resolver}).Answer; got != "resolver" {
			t.Errorf("marked %s query answered by %q", network, got)
		}
	}

	t.Run("one owner", func(t *testing.T) {
		u2 := startRole(t, "user", testUID)
		u2.do(command{Do: "dial"})
		for _, c := range []command{{Do: "set", Network: n}, {Do: "set"}, {Do: "adopt", Network: n}} {
			if r := u2.try(c); r.Kind != uerr.Conflict {
				t.Errorf("%s by another: %s %s", c.Do, r.Kind, r.Err)
			}
		}
		u2.do(command{Do: "close"})
	})
	t.Run("refused leaves all", func(t *testing.T) {
		for _, bad := range []string{"0.0.0.0/0", "10.0.0.0/7", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/8", "10.88.0.1/32"} {
			b := n
			b.Routes = []netip.Prefix{netip.MustParsePrefix(bad)}
			if r := u.try(command{Do: "set", Network: b}); r.Kind != uerr.Denied && r.Kind != uerr.Usage && r.Kind != uerr.Conflict {
				t.Errorf("route %s: %q %s", bad, r.Kind, r.Err)
			}
		}
		if got := look(t); fmt.Sprint(got) != fmt.Sprint(m) {
			t.Errorf("machine %+v, want %+v", got, m)
		}
	})
	t.Run("change", func(t *testing.T) {
		c := n
		c.Routes = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}
		if r := u.do(command{Do: "set", Network: c}); r.File {
			t.Error("a second descriptor came")
		} else if r.State.Seq <= want.Seq {
			t.Errorf("state %d after %d", r.State.Seq, want.Seq)
		}
		if got := look(t); got.link != m.link || !slices.Equal(got.routes, []string{"10.99.0.0/16"}) {
			t.Errorf("machine %+v", got)
		}
		u.do(command{Do: "set", Network: n})
	})
	t.Run("new device after its end", func(t *testing.T) {
		u.do(command{Do: "close tun"})
		nettest.Poll(t, 3*time.Second, "device gone with its descriptor: rootd keeps none", func() bool { return look(t).link == 0 })
		if r := u.do(command{Do: "set", Network: n}); !r.File {
			t.Error("no new descriptor")
		}
		if got := look(t); !slices.Equal(got.routes, m.routes) {
			t.Errorf("machine %+v", got)
		}
	})
	t.Run("resolvers change", func(t *testing.T) {
		writeResolvConf(t, "nameserver 10.5.5.6\n")
		nettest.Poll(t, 5*time.Second, "new resolver captured", func() bool { return ask("udp", "10.5.5.6") == "doppel" })
		captured(t, "old resolver", "resolver")
		nettest.Poll(t, 5*time.Second, "owner told", func() bool {
			r := u.do(command{Do: "told"}).State.Resolvers
			return len(r) == 1 && r[0] == netip.MustParseAddrPort("10.5.5.6:53")
		})
		writeResolvConf(t, "nameserver "+resolver+"\nsearch corp.example\n")
		nettest.Poll(t, 5*time.Second, "first resolver captured", func() bool { return ask("udp", resolver) == "doppel" })
	})
	t.Run("zero removes", func(t *testing.T) {
		if r := u.do(command{Do: "set"}); r.State.Name != "" || r.State.DNSMode != rootapi.DNSNone || len(r.State.Resolvers) != 1 {
			t.Errorf("state %+v", r.State)
		}
		gone(t, "zero network")
		u.do(command{Do: "set", Network: n})
		captured(t, "set again", "doppel")
	})
	t.Run("close removes", func(t *testing.T) {
		u.do(command{Do: "close"})
		gone(t, "connection closed")
	})
}

func TestUserDaemonDies(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	startRootd(t)
	for range 3 {
		u, n := startUser(t)
		u.do(command{Do: "set", Network: n})
		captured(t, "set", "doppel")
		u.kill(syscall.SIGKILL)
		gone(t, "user daemon killed")
	}
}

func TestUserDaemonHangs(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	startRootd(t)
	u, n := startUser(t)
	u.do(command{Do: "set", Network: n})
	captured(t, "set", "doppel")
	hang := func(what string, stop, cont func()) {
		t.Helper()
		began := time.Now()
		stop()
		nettest.Poll(t, 6*time.Second, what+": DNS back with the resolver", func() bool { return !look(t).table })
		if took := time.Since(began); took < time.Second || took > 5*time.Second {
			t.Errorf("%s: capture gone after %v, want about 1.5 s", what, took)
		}
		captured(t, what, "resolver")
		if m := look(t); m.link == 0 || len(m.routes) != 3 {
			t.Errorf("%s: %+v: routes must stay", what, m)
		}
		cont()
		nettest.Poll(t, 3*time.Second, what+": captured again", func() bool { return ask("udp", resolver) == "doppel" })
	}
	hang("stopped", func() { u.kill(syscall.SIGSTOP) }, func() { u.kill(syscall.SIGCONT) })
	hang("not alive", func() { u.do(command{Do: "alive", Arg: "no"}) }, func() { u.do(command{Do: "alive", Arg: "yes"}) })
}

// Silence is judged when it has lasted, and not at the next ping.
func TestSilenceBetweenPings(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	srv, err := New(Config{UID: testUID, PingEvery: time.Hour, PingTimeout: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	nettest.Poll(t, 10*time.Second, "rootd listening", func() bool {
		c, err := net.Dial("unixpacket", rootapi.DefaultSocket)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
	u, n := startUser(t)
	u.do(command{Do: "set", Network: n})
	nettest.Poll(t, 20*time.Second, "DNS back with the resolver", func() bool { return !look(t).table })
	captured(t, "silent", "resolver")
}

func TestRootdDies(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	rd := startRootd(t)
	u, n := startUser(t)
	u.do(command{Do: "set", Network: n})
	captured(t, "set", "doppel")
	before := look(t)

	rd.kill(syscall.SIGKILL)
	u.do(command{Do: "wait"})
	if m := look(t); m.table || m.link != before.link || !slices.Equal(m.routes, before.routes) {
		t.Errorf("machine %+v after the end of rootd, %+v before", m, before)
	}
	captured(t, "rootd killed", "resolver")
	u.do(command{Do: "read", Arg: "10.77.0.9:7"}) // the device works on

	rd = startRootd(t) // removes the socket that was left over
	if r := u.try(command{Do: "set", Network: n}); r.Err == "" {
		t.Error("a call on the old connection worked")
	}
	u.do(command{Do: "dial"})
	n.Routes = append(n.Routes, netip.MustParsePrefix("10.66.0.0/16"))
	u.do(command{Do: "adopt", Network: n})
	if m := look(t); !m.table || m.link != before.link || len(m.routes) != len(before.routes)+1 {
		t.Errorf("machine %+v after adopting, %+v before", m, before)
	}
	captured(t, "adopted", "doppel")
	u.do(command{Do: "read", Arg: "10.66.0.9:7"})

	// Ended in order, it leaves the device to its owner too, but no file.
	rd.kill(syscall.SIGTERM)
	if code := rd.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if m := look(t); m.table || m.link != before.link {
		t.Errorf("machine %+v after SIGTERM", m)
	}
	if _, err := os.Lstat("/run/doppel"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}

	// The device of a hung predecessor is replaced; another user's is not adopted.
	startRootd(t)
	u2, n2 := startUser(t)
	n2.Name = ifName
	if r := u2.do(command{Do: "set", Network: n2}); !r.File {
		t.Error("no device")
	}
	if m := look(t); m.link == before.link {
		t.Error("the old device is still there")
	}
}

func TestAdoptRefuses(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	startRootd(t)
	u, n := startUser(t)
	if r := u.try(command{Do: "adopt", Network: n}); r.Kind != uerr.NotFound {
		t.Errorf("adopting nothing: %s %s", r.Kind, r.Err)
	}
	if out, err := exec.Command("ip", "tuntap", "add", "dev", ifName, "mode", "tun", "user", "1").CombinedOutput(); err != nil {
		t.Skipf("no ip tuntap: %s", out)
	}
	for _, do := range []string{"adopt", "set"} {
		if r := u.try(command{Do: do, Network: n}); r.Kind != uerr.Conflict {
			t.Errorf("%s with another user's device: %s %s", do, r.Kind, r.Err)
		}
	}
	if look(t).link == 0 {
		t.Error("another user's device was removed")
	}
}

// A change that fails half-way, for one more cluster say, leaves the device with all that it had: its owner has other clusters' flows in it.
func TestFailedChange(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	rd := startRootd(t)
	u, n := startUser(t)
	dns := n.DNS
	n.DNS = nil
	u.do(command{Do: "set", Network: n})
	before := look(t)
	more := n
	more.DNS, more.Routes = dns, append(slices.Clone(n.Routes), netip.MustParsePrefix("10.66.0.0/16"))
	works := func(when string, routes int) {
		t.Helper()
		if m := look(t); m.link != before.link || len(m.routes) != routes {
			t.Errorf("%s: machine %+v, before %+v", when, m, before)
		}
		if got := u.do(command{Do: "read", Arg: "10.77.0.9:7"}).Answer; got != "datagram" {
			t.Errorf("%s: %q", when, got)
		}
	}
	// Routes come before the DNS capture, whose table is taken.
	take := func(pid int) (free func()) {
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		table := conn.AddTable(&nftables.Table{Name: fmt.Sprintf("doppel-dns-%d", pid), Family: nftables.TableFamilyINet})
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		return func() {
			conn.DelTable(table)
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	free := take(rd.cmd.Process.Pid)
	if r := u.try(command{Do: "set", Network: more}); r.Err == "" || r.File {
		t.Fatalf("set: %+v", r)
	}
	works("failed", len(before.routes))
	free()
	u.do(command{Do: "set", Network: more})
	works("again", len(before.routes)+1)
	captured(t, "again", "doppel")

	// So does an adoption: the user daemon tries again.
	rd.kill(syscall.SIGKILL)
	u.do(command{Do: "wait"})
	rd = startRootd(t)
	u.do(command{Do: "dial"})
	free = take(rd.cmd.Process.Pid)
	if r := u.try(command{Do: "adopt", Network: more}); r.Err == "" {
		t.Fatalf("adopt: %+v", r)
	}
	works("not adopted", len(before.routes)+1)
	free()
	u.do(command{Do: "adopt", Network: more})
	works("adopted", len(before.routes)+1)
	captured(t, "adopted", "doppel")
}

func TestQuit(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	setUp(t)
	rd := startRootd(t)
	second := startRole(t, "rootd", 0)
	<-second.done
	if code := second.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("a second rootd on the socket ended with %d", code)
	}
	stranger := startRole(t, "user", testUID+1)
	if r := stranger.try(command{Do: "dial"}); r.Kind != uerr.Denied {
		t.Errorf("another user: %s %s", r.Kind, r.Err)
	}
	u, n := startUser(t)
	u.do(command{Do: "set", Network: n})
	other, _ := startUser(t) // the clean-up of a connect that failed, say because of this network
	if r := other.try(command{Do: "quit", Arg: "if idle"}); r.Kind != uerr.Conflict {
		t.Errorf("quit if idle: %s %s", r.Kind, r.Err)
	}
	captured(t, "not idle", "doppel")
	u.do(command{Do: "quit"})
	<-rd.done
	if code := rd.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	gone(t, "quit")
	if _, err := os.Lstat("/run/doppel"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	if r := u.try(command{Do: "dial"}); r.Err == "" || !strings.Contains(r.Err, rootapi.ErrNotRunning.Error()) {
		t.Errorf("dial after quit: %s", r.Err)
	}
}
