package sandbox

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "become" {
		if err := Become(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(125)
	}
	goleak.VerifyTestMain(m)
}

const deadline = 10 * time.Second

// startBox makes a box whose command has its output in the returned buffer.
func startBox(t *testing.T, resolvConf string, argv ...string) (*Box, *bytes.Buffer) {
	t.Helper()
	out := new(bytes.Buffer)
	b, err := Start(Config{Argv: argv, Env: os.Environ(), Helper: []string{"become"}, Stdout: out, Stderr: out, ResolvConf: resolvConf})
	if err != nil {
		if e := uerr.From(err); e.Kind == uerr.Denied || strings.Contains(e.Hint, "modprobe tun") {
			t.Skipf("this machine has no user namespaces or /dev/net/tun for us: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b, out
}

func wanted(dns netip.AddrPort) rootapi.Network {
	return rootapi.Network{
		Name: "doppel0", Addrs: []netip.Prefix{netip.MustParsePrefix("198.18.0.1/32"), netip.MustParsePrefix("fd00:d0:9e1::1/128")},
		Routes: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}, Exclude: []netip.Prefix{netip.MustParsePrefix("10.96.7.0/24")},
		DNS: &rootapi.DNS{Listen: dns},
	}
}

// echoes listens on 127.0.0.1 and answers with what it is asked.
func echoes(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _, _ = io.Copy(c, c); c.Close() })
		}
	})
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// TestBox runs a command in a box whose device ends in a stack, with an echo service in the cluster's place.
func TestBox(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 192.0.2.1\nnameserver fe80::1%lo\nsearch corp.example.\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	echo := echoes(t)
	script := fmt.Sprintf(`cat /etc/resolv.conf | grep -v '^#'; tail -n 1 /etc/hosts; id -u; grep CapEff /proc/self/status
		ask() { echo "$1" | timeout 5 bash -c "exec 3<>/dev/tcp/$2/$3; cat >&3; timeout 5 head -n 1 <&3"; }
		ask cluster 10.96.0.1 80; ask machine host.doppel.internal %d; ask nowhere 198.18.0.5 1; ask local 127.0.0.1 %d; exit 42`, echo.Port(), echo.Port())
	b, out := startBox(t, conf, "bash", "-c", script)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	changed := make(chan rootapi.State, 1)
	root, err := b.Root(ctx, rootapi.Options{Changed: func(st rootapi.State) { changed <- st }})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	st, tun, err := root.SetNetwork(ctx, wanted(echo))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%v %v %s", st.Resolvers, st.SearchDomains, st.DNSMode); got != "[192.0.2.1:53 [fe80::1%lo]:53] [corp.example] namespace" {
		t.Errorf("state: %s", got)
	}
	dev, err := tundev.New(tun)
	if err != nil {
		t.Fatal(err)
	}
	stack, err := netstack.New(netstack.Config{
		Device: dev,
		DialTCP: func(ctx context.Context, _, dst netip.AddrPort) (flow.Stream, error) {
			if s, ok, err := b.DialTCP(ctx, dst); ok {
				return s, err
			}
			c, err := net.Dial("tcp", echo.String())
			if err != nil {
				return nil, err
			}
			return flow.FromTCP(c.(*net.TCPConn)), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	sctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- stack.Run(sctx) }()
	defer func() { stop(); <-ended }()
	if err := b.Go(); err != nil {
		t.Fatal(err)
	}
	if err := b.Cmd().Wait(); err == nil || err.Error() != "exit status 42" {
		t.Errorf("the command ended with %v", err)
	}
	want := fmt.Sprintf("nameserver 198.18.0.2\nsearch corp.example\n198.18.0.3 host.doppel.internal\n%d\nCapEff:", os.Getuid())
	if !strings.HasPrefix(out.String(), want) {
		t.Errorf("inside:\n%s\nwant\n%s", out, want)
	}
	for _, s := range []string{"\ncluster\n", "\nmachine\n", "198.18.0.5/1: No route to host", "127.0.0.1/" + fmt.Sprint(echo.Port()) + ": Connection refused"} {
		if !strings.Contains(out.String(), s) {
			t.Errorf("%q is missing in\n%s", s, out)
		}
	}

	// Subnets and resolvers change while it runs; the device stays.
	n := wanted(echo)
	n.Routes = append(n.Routes, netip.MustParsePrefix("10.244.0.0/16"))
	st, again, err := root.SetNetwork(ctx, n)
	if err != nil || again != nil || !strings.Contains(fmt.Sprint(st.Routes), "10.244.0.0/16") {
		t.Errorf("changed: %+v, %v, %v", st, again, err)
	}
	if _, ok := b.own.place(netip.MustParseAddrPort("10.244.3.3:80")); ok {
		t.Error("a new subnet of the cluster is dialled on the machine")
	}
	if to, ok := b.own.place(netip.MustParseAddrPort("10.96.7.7:80")); !ok || to.String() != "10.96.7.7:80" {
		t.Errorf("an excluded address leads to %v, %v", to, ok)
	}
	if err := os.WriteFile(conf, []byte("nameserver 192.0.2.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	select {
	case st := <-changed:
		if len(st.Resolvers) != 1 || st.Resolvers[0].String() != "192.0.2.2:53" {
			t.Errorf("told of %v", st.Resolvers)
		}
	case <-ctx.Done():
		t.Error("not told of new resolvers")
	}
	c, err := root.DialMarked(ctx, "udp", netip.MustParseAddrPort("127.0.0.1:9"))
	if err != nil {
		t.Errorf("a socket of the machine: %v", err)
	} else {
		c.Close()
	}
	if err := root.Quit(ctx, false); uerr.From(err).Kind != uerr.Usage {
		t.Errorf("quit: %v", err)
	}
}

// A command that never begins is gone with its box.
func TestBoxClosed(t *testing.T) {
	b, out := startBox(t, "", "echo", "begun")
	pid := b.Cmd().Process.Pid
	b.Close()
	if err := syscall.Kill(pid, 0); err == nil || out.Len() > 0 {
		t.Errorf("process %d: %v, %q", pid, err, out)
	}
	if _, err := Start(Config{Argv: []string{"/no/such/program"}}); uerr.From(err).Kind != uerr.Usage {
		t.Errorf("no such program: %v", err)
	}
}
