package manager

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
)

// dnsServer answers over UDP and TCP on one port; over UDP big answers are truncated.
type dnsServer struct {
	addr     string
	udp, tcp atomic.Int32 // questions
}

func newDNSServer(t *testing.T) *dnsServer {
	t.Helper()
	s := &dnsServer{}
	var pc net.PacketConn
	var l net.Listener
	for range 20 { // the number that UDP got has to be free for TCP too
		var err error
		if pc, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if l, err = net.Listen("tcp", pc.LocalAddr().String()); err == nil {
			break
		}
		_ = pc.Close()
	}
	if l == nil {
		t.Fatal("no port")
	}
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
	if _, err := w.answer(t.Context(), reach{all: true}, []byte("not DNS")); err == nil {
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
