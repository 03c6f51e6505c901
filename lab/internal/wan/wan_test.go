package wan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

func ask(name string, kind uint16) *dns.Msg {
	return reply(new(dns.Msg).SetQuestion(name, kind))
}

func TestReply(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  uint16
		rcode int
		want  string
	}{
		{"example.com.", dns.TypeA, dns.RcodeSuccess, plan.Outside4.String()},
		{"WWW.Example.Com.", dns.TypeAAAA, dns.RcodeSuccess, plan.Outside6.String()},
		{"outside.test.", dns.TypeMX, dns.RcodeSuccess, ""},
		{"kubernetes.default.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, ""},
		{"nothing.example.com.", dns.TypeA, dns.RcodeNameError, ""},
		{".", dns.TypeNS, dns.RcodeNameError, ""},
	} {
		m := ask(c.name, c.kind)
		if m.Rcode != c.rcode {
			t.Errorf("%s: %s, want %s", c.name, dns.RcodeToString[m.Rcode], dns.RcodeToString[c.rcode])
		}
		if c.want == "" {
			if len(m.Answer) > 0 || len(m.Ns) != 1 {
				t.Errorf("%s: an empty answer has %d records and %d authorities", c.name, len(m.Answer), len(m.Ns))
			}
			continue
		}
		if len(m.Answer) != 1 || !strings.HasSuffix(m.Answer[0].String(), "\t"+c.want) || m.Answer[0].Header().Ttl != 30 {
			t.Errorf("%s: %v, want %s", c.name, m.Answer, c.want)
		}
	}
	if m := reply(new(dns.Msg)); m.Rcode != dns.RcodeFormatError {
		t.Errorf("no question: %s", dns.RcodeToString[m.Rcode])
	}
}

// TestRulesParse lets nft check the rules, where it is installed and may be used.
func TestRulesParse(t *testing.T) {
	l := plan.Lab{Name: "lab", Index: 1, Nodes: 2}
	for name, text := range map[string]string{"router": rules(l), "node": masquerade(l)} {
		cmd := exec.Command("unshare", "--net", "nft", "--check", "--file", "-")
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.CombinedOutput()
		if err != nil && strings.Contains(string(out), "syntax error") {
			t.Errorf("%s: %s\n%s", name, out, text)
		} else if err != nil {
			t.Logf("%s: not checked: %v %s", name, err, out)
		}
	}
}

func TestRulesNameTheAPIServerOnly(t *testing.T) {
	got := rules(plan.Lab{Name: "lab", Index: 7, Nodes: 1})
	if !strings.Contains(got, `iifname "laptop*" ip daddr 10.77.7.11 tcp dport { 6443, 30000-32767 } accept`) {
		t.Errorf("the API server is not named:\n%s", got)
	}
	if !strings.Contains(got, "policy drop") {
		t.Errorf("what is not named is not dropped:\n%s", got)
	}
}

// TestServe has the outside served where the router has an address already, and its loopback is still down.
func TestServe(t *testing.T) {
	const child = "DOPPEL_TEST_SERVE"
	if os.Getenv(child) != "" {
		serveBeside(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestServe$", "-test.v")
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func serveBeside(t *testing.T) {
	h, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs(Bridge)}); err != nil {
		t.Fatal(err)
	}
	if err := configure(h, Bridge, netip.MustParsePrefix("10.0.0.1/24")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	socket, ended := filepath.Join(t.TempDir(), "s"), make(chan error, 1)
	go func() { ended <- Serve(ctx, socket) }()
	for range 100 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := configure(h, "lo"); err != nil { // as SetUp does, at a moment of its own
		t.Fatal(err)
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, port := range []int{53, 80} {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(port)), time.Second)
			if err != nil {
				t.Error(err)
				continue
			}
			_ = c.Close()
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
