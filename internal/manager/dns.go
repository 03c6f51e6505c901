package manager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// dnsTimeout bounds one question to one server; the laptop gives up after 2.8 s, and a second server must have its chance before.
const dnsTimeout = 1200 * time.Millisecond

// dnsForwarder passes a laptop's questions to the cluster's DNS as they are, so that every type, TTL and negative answer is the real one.
type dnsForwarder struct {
	servers []string
}

func newDNSForwarder(resolvConf string) (*dnsForwarder, error) {
	cc, err := dns.ClientConfigFromFile(resolvConf)
	if err != nil {
		return nil, fmt.Errorf("find the cluster's DNS: %w", err)
	}
	f := &dnsForwarder{}
	for _, s := range cc.Servers {
		f.servers = append(f.servers, net.JoinHostPort(s, cc.Port))
	}
	if len(f.servers) == 0 {
		return nil, fmt.Errorf("find the cluster's DNS: no nameserver in %s", resolvConf)
	}
	return f, nil
}

// answer is query for one session: names out of its reach do not exist. A session with an intercept of pods that have a DNS of their own gets
// what these would get.
func (m *Manager) answer(ctx context.Context, session types.UID, r reach, msg []byte) ([]byte, error) {
	var q dns.Msg
	if err := q.Unpack(msg); err != nil {
		return nil, fmt.Errorf("DNS question: %w", err)
	}
	if ok, err := r.question(ctx, m.addresses, m.cluster.domain, &q); err != nil {
		return nil, err
	} else if !ok {
		return unknown(&q)
	}
	a, own := m.agents.resolving(session)
	if a != nil {
		qctx, cancel := context.WithTimeout(ctx, agentDNSTimeout)
		out, err := tunnel.Query(qctx, a.mux, msg)
		cancel()
		if err == nil {
			return out, nil
		}
	}
	out, err := m.dns.query(ctx, &q)
	if err == nil && own {
		return fleeting(out)
	}
	return out, err
}

// fleeting has the laptop keep no negative answer: it is of the cluster's DNS, and the pods' own may know the name as soon as it can be asked.
func fleeting(msg []byte) ([]byte, error) {
	var m dns.Msg
	if err := m.Unpack(msg); err != nil {
		return nil, err
	}
	for _, rr := range m.Ns {
		if s, ok := rr.(*dns.SOA); ok {
			s.Hdr.Ttl, s.Minttl = 0, 0 // RFC 2308, section 5
		}
	}
	m.Compress = true
	return m.Pack()
}

// agentDNSTimeout is how long an agent has to answer before the cluster's DNS is asked.
const agentDNSTimeout = time.Second

// resolving is an agent that resolves names for a session as its pod does: one of the oldest of its intercepts of pods whose DNS is not the
// cluster's. Nil: there is none, and the manager resolves as any pod; own says whether there should be one.
func (a *agents) resolving(session types.UID) (_ *agentConn, own bool) {
	for _, g := range a.m.engaged.where(func(g engagement) bool { return g.Session == session && g.OwnDNS }) {
		own = true
		if c := a.serving(g, nil); c != nil {
			return c, true
		}
	}
	return nil, own
}

// hostsOf are the names that the kubelet writes into the pods' hosts file for their owner (hostAliases).
func hostsOf(spec *corev1.PodSpec) []control.Host {
	var out []control.Host
	for _, h := range spec.HostAliases {
		addr, err := netip.ParseAddr(h.IP)
		if err != nil {
			continue
		}
		for _, name := range h.Hostnames {
			out = append(out, control.Host{Name: strings.ToLower(name), Addr: addr})
		}
	}
	return out
}

// ownDNS says that pods do not ask the cluster's DNS, or not it alone.
func ownDNS(spec *corev1.PodSpec) bool {
	cluster := spec.DNSPolicy == "" || spec.DNSPolicy == corev1.DNSClusterFirst || spec.DNSPolicy == corev1.DNSClusterFirstWithHostNet
	return !cluster || spec.DNSConfig != nil && len(spec.DNSConfig.Nameservers) > 0
}

// query asks over UDP and, if the answer was truncated, again over TCP: the tunnel has room for it.
func (f *dnsForwarder) query(ctx context.Context, q *dns.Msg) ([]byte, error) {
	var errs []error
	for _, s := range f.servers {
		for _, network := range []string{"udp", "tcp"} {
			c := dns.Client{Net: network, Timeout: dnsTimeout}
			a, _, err := c.ExchangeContext(ctx, q, s)
			if err != nil {
				errs = append(errs, err)
				break
			}
			if !a.Truncated || network == "tcp" {
				a.Compress = true
				return a.Pack()
			}
		}
	}
	return nil, errors.Join(errs...)
}
