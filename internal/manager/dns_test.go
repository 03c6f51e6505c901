package manager

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/nettest"
)

// dnsServer answers over UDP and TCP on one port; over UDP big answers are truncated.
type dnsServer struct {
	addr     string
	udp, tcp atomic.Int32 // questions
}

func newDNSServer(t *testing.T) *dnsServer {
	t.Helper()
	s := &dnsServer{}
	pc, l := nettest.SamePort(t)
	s.addr = l.Addr().String()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		a := new(dns.Msg).SetReply(q)
		_, overTCP := w.RemoteAddr().(*net.TCPAddr)
		if overTCP {
			s.tcp.Add(1)
		} else {
			s.udp.Add(1)
		}
		switch name := q.Question[0].Name; {
		case strings.HasPrefix(name, "big.") && !overTCP:
			a.Truncated = true
		case strings.HasPrefix(name, "big."):
			for i := range 100 {
				rr, _ := dns.NewRR(fmt.Sprintf("%s 30 IN A 10.0.1.%d", name, i))
				a.Answer = append(a.Answer, rr)
			}
		case strings.HasPrefix(name, "no."):
			a.Rcode = dns.RcodeNameError
			rr, _ := dns.NewRR("test. 7 IN SOA ns.test. h.test. 1 2 3 4 5")
			a.Ns = append(a.Ns, rr)
		default:
			rr, _ := dns.NewRR(name + " 17 IN A 10.96.0.5")
			a.Answer = append(a.Answer, rr)
		}
		_ = w.WriteMsg(a)
	})
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: handler}, {Listener: l, Handler: handler}} {
		started, ended := make(chan struct{}), make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(ended); _ = srv.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = srv.Shutdown(); <-ended })
	}
	return s
}

func ask(t *testing.T, f *dnsForwarder, name string, qtype uint16) (*dns.Msg, error) {
	t.Helper()
	q := new(dns.Msg).SetQuestion(name, qtype)
	out, err := f.query(t.Context(), q)
	if err != nil {
		return nil, err
	}
	a := new(dns.Msg)
	if err := a.Unpack(out); err != nil {
		t.Fatal(err)
	}
	if a.Id != q.Id {
		t.Errorf("the answer's id is %d, the question's %d", a.Id, q.Id)
	}
	return a, nil
}

func TestDNSForwarder(t *testing.T) {
	s := newDNSServer(t)
	f := &dnsForwarder{servers: []string{s.addr}}

	a, err := ask(t, f, "web.shop.svc.cluster.test.", dns.TypeA)
	if err != nil || len(a.Answer) != 1 || a.Answer[0].Header().Ttl != 17 {
		t.Errorf("%v, %v", a, err)
	}
	if s.tcp.Load() != 0 {
		t.Error("asked over TCP without need")
	}
	a, err = ask(t, f, "no.such.", dns.TypeAAAA)
	if err != nil || a.Rcode != dns.RcodeNameError || len(a.Ns) != 1 {
		t.Errorf("a negative answer: %v, %v", a, err)
	}
	a, err = ask(t, f, "big.test.", dns.TypeA)
	if err != nil || a.Truncated || len(a.Answer) != 100 || s.tcp.Load() != 1 {
		t.Errorf("a truncated answer: %v, %v", a, err)
	}
	w := newWorld(t)
	w.dns = f
	if _, err := w.answer(t.Context(), "mine", reach{all: true}, []byte("not DNS")); err == nil {
		t.Error("nonsense was forwarded")
	}
}

// The next server is asked when one does not answer; if none does, every reason is told.
func TestDNSForwarderServers(t *testing.T) {
	dead, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := dead.LocalAddr().String()
	_ = dead.Close() // refuses from now on
	s := newDNSServer(t)
	f := &dnsForwarder{servers: []string{addr, s.addr}}
	if a, err := ask(t, f, "web.", dns.TypeA); err != nil || len(a.Answer) != 1 {
		t.Errorf("%v, %v", a, err)
	}
	f.servers = []string{addr, addr}
	if _, err := ask(t, f, "web.", dns.TypeA); err == nil || strings.Count(err.Error(), "refused") != 2 {
		t.Errorf("got %v", err)
	}
}

func TestNewDNSForwarder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(s string) {
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := newDNSForwarder(file); err == nil {
		t.Error("no file")
	}
	write("search x\n")
	if _, err := newDNSForwarder(file); err == nil {
		t.Error("no nameserver")
	}
	write("nameserver 10.96.0.10\nnameserver fd00::10\n")
	f, err := newDNSForwarder(file)
	if err != nil || fmt.Sprint(f.servers) != "[10.96.0.10:53 [fd00::10]:53]" {
		t.Errorf("%v, %v", f, err)
	}
}

// A session with an intercept of pods that have a DNS of their own gets what these would get, and the cluster's answers when they do not answer.
func TestAnswersOfAgents(t *testing.T) {
	w := newWorld(t, webPods()...)
	w.dns = &dnsForwarder{servers: []string{newDNSServer(t).addr}} // which says 10.96.0.5
	answer := func(session types.UID, name string) (a dns.Msg) {
		t.Helper()
		q, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		b, err := w.answer(t.Context(), session, reach{all: true}, q)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Unpack(b); err != nil {
			t.Fatal(err)
		}
		return a
	}
	ask := func(session types.UID) string {
		t.Helper()
		a := answer(session, "db.internal.example.")
		if len(a.Answer) != 1 {
			t.Fatal(&a)
		}
		return a.Answer[0].(*dns.A).A.String()
	}
	keep := func(session types.UID) uint32 { // of a negative answer
		t.Helper()
		a := answer(session, "no.such.")
		if a.Rcode != dns.RcodeNameError || len(a.Ns) != 1 {
			t.Fatal(&a)
		}
		soa := a.Ns[0].(*dns.SOA)
		return max(soa.Hdr.Ttl, soa.Minttl)
	}
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), OwnDNS: true})
	w.engaged.set(engagement{UID: "in-2", Session: "other", Workload: web, Ports: tcp(8080)})
	if got := ask("mine"); got != "10.96.0.5" {
		t.Errorf("without an agent: %s", got)
	}
	if mine, other := keep("mine"), keep("other"); mine != 0 || other == 0 {
		t.Errorf("no such name: kept for %d s without the agent that may know it, and %d s where none is asked", mine, other)
	}
	a := w.agent("web-1")
	w.until("the agent knows", func() bool { return w.agents.serves("web-1", "in-1") })
	a.names(func(q []byte) ([]byte, error) {
		var m dns.Msg
		if err := m.Unpack(q); err != nil {
			return nil, err
		}
		rr, err := dns.NewRR(m.Question[0].Name + " 5 IN A 10.9.9.9")
		if err != nil {
			return nil, err
		}
		a := new(dns.Msg).SetReply(&m)
		a.Answer = append(a.Answer, rr)
		return a.Pack()
	})
	if got := ask("mine"); got != "10.9.9.9" {
		t.Errorf("with an agent: %s", got)
	}
	if got := ask("other"); got != "10.96.0.5" {
		t.Errorf("another session: %s", got)
	}
	a.names(func([]byte) ([]byte, error) { return nil, errors.New("no resolver answers") })
	if got := ask("mine"); got != "10.96.0.5" {
		t.Errorf("an agent that fails: %s", got)
	}
	if got := keep("mine"); got != 0 {
		t.Errorf("no such name: kept for %d s where the agent fails", got)
	}
}

func TestOwnDNS(t *testing.T) {
	servers := &corev1.PodDNSConfig{Nameservers: []string{"10.1.1.1"}}
	for name, tt := range map[string]struct {
		spec corev1.PodSpec
		want bool
	}{
		"as others":         {corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst}, false},
		"options only":      {corev1.PodSpec{DNSConfig: &corev1.PodDNSConfig{Searches: []string{"x"}}}, false},
		"the node's":        {corev1.PodSpec{DNSPolicy: corev1.DNSDefault}, true},
		"none, and its own": {corev1.PodSpec{DNSPolicy: corev1.DNSNone, DNSConfig: servers}, true},
		"more servers":      {corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst, DNSConfig: servers}, true},
	} {
		if got := ownDNS(&tt.spec); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	got := hostsOf(&corev1.PodSpec{HostAliases: []corev1.HostAlias{{IP: "10.1.2.3", Hostnames: []string{"A.example", "b"}}, {IP: "bad", Hostnames: []string{"c"}}}})
	want := []control.Host{{Name: "a.example", Addr: netip.MustParseAddr("10.1.2.3")}, {Name: "b", Addr: netip.MustParseAddr("10.1.2.3")}}
	if !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}
