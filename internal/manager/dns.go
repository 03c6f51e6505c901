package manager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/miekg/dns"
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

// answer is query for one session: names out of its reach do not exist.
func (m *Manager) answer(ctx context.Context, r reach, msg []byte) ([]byte, error) {
	var q dns.Msg
	if err := q.Unpack(msg); err != nil {
		return nil, fmt.Errorf("DNS question: %w", err)
	}
	if ok, err := r.question(ctx, m.ctrl.GetClient(), m.cluster.domain, &q); err != nil {
		return nil, err
	} else if !ok {
		return unknown(&q)
	}
	return m.dns.query(ctx, &q)
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
