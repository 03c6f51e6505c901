package wan

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

// Serve runs the resolver and the web server of the outside, and takes orders on a unix socket, until ctx ends or one of
// them fails. Its resolver and web server are there when the socket is.
func Serve(ctx context.Context, socket string) error {
	// Before the first listener, and whatever SetUp has done by now: Go looks once, by 127.0.0.1, whether its IPv6 sockets serve IPv4 as
	// well. A loopback that is down has that address as long as the namespace has no other, and then not: it would serve IPv4 alone.
	if err := netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo"}}); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	udp, err := net.ListenPacket("udp", ":53")
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp", ":53")
	if err != nil {
		return err
	}
	http80, err := net.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	orders, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	handler := dns.HandlerFunc(answer)
	links := &links{cables: map[int]*cable{}}
	failed := make(chan error, 4)
	go func() { failed <- (&dns.Server{PacketConn: udp, Handler: handler}).ActivateAndServe() }()
	go func() { failed <- (&dns.Server{Listener: tcp, Handler: handler}).ActivateAndServe() }()
	go func() { failed <- newServer(page).Serve(http80) }()
	go func() { failed <- newServer(links.serve).Serve(orders) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve the outside: %w", err)
	case <-ctx.Done():
		return context.Cause(ctx) // the end of this process closes all
	}
}

func newServer(h http.HandlerFunc) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
}

func page(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "outside the cluster: %s %s %s\n", r.Method, r.Host, r.URL.Path)
}

func answer(w dns.ResponseWriter, q *dns.Msg) {
	m := reply(q)
	if w.LocalAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		m.Truncate(size)
	}
	// A client that has gone away is its own business.
	_ = w.WriteMsg(m)
}

// reply answers the names outside the cluster; all other names do not exist.
func reply(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(1232, false)
	}
	if len(q.Question) != 1 {
		return m.SetRcode(q, dns.RcodeFormatError)
	}
	question := q.Question[0]
	name := strings.TrimSuffix(strings.ToLower(question.Name), ".")
	if !slices.Contains(plan.OutsideNames(), name) && !strings.HasSuffix(name, "."+plan.OutsideServer) {
		m.Rcode = dns.RcodeNameError
		m.Ns = []dns.RR{authority()}
		return m
	}
	header := func(t uint16) dns.RR_Header {
		return dns.RR_Header{Name: question.Name, Rrtype: t, Class: dns.ClassINET, Ttl: uint32(plan.OutsideTTL.Seconds())}
	}
	switch question.Qtype {
	case dns.TypeA:
		m.Answer = []dns.RR{&dns.A{Hdr: header(dns.TypeA), A: plan.Outside4.AsSlice()}}
	case dns.TypeAAAA:
		m.Answer = []dns.RR{&dns.AAAA{Hdr: header(dns.TypeAAAA), AAAA: plan.Outside6.AsSlice()}}
	default:
		m.Ns = []dns.RR{authority()}
	}
	return m
}

// authority lets resolvers remember for a second that a name does not exist (RFC 2308, section 3).
func authority() dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 1},
		Ns:  "ns.outside.test.", Mbox: "lab.outside.test.", Serial: 1, Refresh: 60, Retry: 60, Expire: 60, Minttl: 1,
	}
}
