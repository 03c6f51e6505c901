// Package acmetest owns a certificate authority that speaks ACME, and the DNS server that it asks, both of this process.
package acmetest

import (
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
)

// Authority is one, with a DNS server beside it.
type Authority struct {
	URL       string         // of its directory
	RootsFile string         // by which its own certificate is verified
	Roots     *x509.CertPool // by which those that it signs are
	DNS       *DNS
	Orders    atomic.Int64 // that it has got
	Down      atomic.Bool  // it answers nobody
}

// New starts an authority, Pebble by Let's Encrypt, whose certificates live for so long, and a DNS server for a zone.
func New(t testing.TB, zone string, life time.Duration) *Authority {
	t.Helper()
	// Pebble makes trouble of its own accord, and takes its time: that is about other clients than ours.
	for k, v := range map[string]string{"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"} {
		if err := os.Setenv(k, v); err != nil {
			t.Fatal(err)
		}
	}
	a := &Authority{DNS: newDNS(t, zone), Roots: x509.NewCertPool()}
	quiet := log.New(io.Discard, "", 0)
	store := db.NewMemoryStore()
	signer := ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {ValidityPeriod: uint64(life / time.Second)}})
	front := wfe.New(quiet, store, va.New(quiet, 1, 1, false, a.DNS.Addr, store), signer, []string{"ca.test"}, false, false, 1, 1)
	handler := front.Handler()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.Down.Load() {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		if strings.Contains(r.URL.Path, "order-plz") {
			a.Orders.Add(1)
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	a.URL = srv.URL + wfe.DirectoryPath
	a.RootsFile = filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(a.RootsFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	a.Roots.AddCert(signer.GetRootCert(0).Cert)
	return a
}

// DNS is a server for one zone that takes signed updates of it.
type DNS struct {
	Addr    string // TCP and UDP
	KeyFile string // of the key that signs updates
	Refuse  atomic.Bool

	zone string

	mu sync.Mutex
	// guarded by mu
	txt map[string][]string
}

const (
	keyName   = "relay."
	keySecret = "c2VjcmV0IG9mIHRoZSByZWxheSdzIHRlc3RzLCAzMiBieXRlcw=="
)

func newDNS(t testing.TB, zone string) *DNS {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &DNS{Addr: l.Addr().String(), KeyFile: filepath.Join(t.TempDir(), "key"), zone: dns.Fqdn(zone), txt: map[string][]string{}}
	pc, err := net.ListenPacket("udp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	key := "key \"relay\" {\n\talgorithm hmac-sha256;\n\tsecret \"" + keySecret + "\";\n};\n"
	if err := os.WriteFile(d.KeyFile, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
	accept := func(h dns.Header) dns.MsgAcceptAction { // its default takes no updates
		if int(h.Bits>>11)&0xf == dns.OpcodeUpdate {
			return dns.MsgAccept
		}
		return dns.DefaultMsgAcceptFunc(h)
	}
	for _, s := range []*dns.Server{{Listener: l}, {PacketConn: pc}} {
		s.Handler, s.TsigSecret, s.MsgAcceptFunc = d, map[string]string{keyName: keySecret}, accept
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan struct{})
		go func() { defer close(done); _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	return d
}

// Records are the values of a name's TXT records.
func (d *DNS) Records(name string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.txt[dns.CanonicalName(name)]...)
}

// Set adds a TXT record, or removes it.
func (d *DNS) Set(name, value string, there bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = dns.CanonicalName(name)
	var left []string
	for _, v := range d.txt[name] {
		if v != value {
			left = append(left, v)
		}
	}
	if there {
		left = append(left, value)
	}
	d.txt[name] = left
}

// ServeDNS answers.
func (d *DNS) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	switch {
	case d.Refuse.Load() || len(q.Question) != 1:
		m.Rcode = dns.RcodeRefused
	case q.Opcode == dns.OpcodeUpdate:
		m.Rcode = d.update(w, q)
	default:
		d.answer(m, q.Question[0])
	}
	if t := q.IsTsig(); t != nil && w.TsigStatus() == nil {
		m.SetTsig(t.Hdr.Name, t.Algorithm, 300, time.Now().Unix())
	}
	_ = w.WriteMsg(m)
}

func (d *DNS) update(w dns.ResponseWriter, q *dns.Msg) int {
	if q.IsTsig() == nil || w.TsigStatus() != nil {
		return dns.RcodeRefused
	}
	if dns.CanonicalName(q.Question[0].Name) != d.zone {
		return dns.RcodeNotZone
	}
	for _, rr := range q.Ns {
		if txt, ok := rr.(*dns.TXT); ok {
			d.Set(txt.Hdr.Name, strings.Join(txt.Txt, ""), txt.Hdr.Class == dns.ClassINET)
		}
	}
	return dns.RcodeSuccess
}

func (d *DNS) answer(m *dns.Msg, q dns.Question) {
	m.Authoritative = true
	name := dns.CanonicalName(q.Name)
	hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 0}
	switch {
	case name == d.zone && q.Qtype == dns.TypeSOA:
		m.Answer = append(m.Answer, &dns.SOA{Hdr: hdr, Ns: "ns." + d.zone, Mbox: "x." + d.zone, Serial: 1, Refresh: 1, Retry: 1, Expire: 1, Minttl: 1})
	case q.Qtype == dns.TypeTXT:
		for _, v := range d.Records(name) {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: hdr, Txt: []string{v}})
		}
	}
}
