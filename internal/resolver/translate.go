package resolver

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/miekg/dns"
)

// Ask carries one DNS message to the cluster's DNS and returns the answer; see Config.Cluster.
type Ask func(ctx context.Context, query []byte) ([]byte, error)

// Translation translates between the addresses that the cluster and this laptop have for the same thing. Both functions return what they do
// not translate as it is.
type Translation struct {
	Here  func(cluster netip.Addr) netip.Addr
	There func(laptop netip.Addr) netip.Addr
}

// Translated has ask answered in the laptop's addresses: A and AAAA records are translated, and a reverse question for one of the laptop's
// addresses becomes the one for the cluster's.
func Translated(ask Ask, t Translation) Ask {
	return func(ctx context.Context, query []byte) ([]byte, error) {
		asked, there, query, err := t.question(query)
		if err != nil {
			return nil, err
		}
		raw, err := ask(ctx, query)
		if err != nil {
			return nil, err
		}
		var msg dns.Msg
		if err := msg.Unpack(raw); err != nil {
			return nil, fmt.Errorf("parse answer: %w", err)
		}
		changed := asked != there
		for _, rrs := range [][]dns.RR{msg.Answer, msg.Extra} {
			for _, rr := range rrs {
				changed = t.record(rr) || changed
			}
		}
		if !changed {
			return raw, nil
		}
		if asked != there {
			for i := range msg.Question {
				msg.Question[i].Name = asked
			}
			renameOwners(msg.Answer, there, asked)
		}
		msg.Compress = true
		return msg.Pack()
	}
}

// question translates the name of a reverse question. It returns the name as asked and as the cluster's DNS is asked, the same for all
// other questions.
func (t Translation) question(query []byte) (asked, there string, out []byte, err error) {
	var msg dns.Msg
	if err := msg.Unpack(query); err != nil {
		return "", "", nil, fmt.Errorf("parse query: %w", err)
	}
	if len(msg.Question) != 1 {
		return "", "", query, nil
	}
	asked = msg.Question[0].Name
	a, ok := reverseAddr(trimDots(asked))
	if !ok || t.There(a) == a {
		return asked, asked, query, nil
	}
	if there, err = dns.ReverseAddr(t.There(a).String()); err != nil {
		return "", "", nil, err
	}
	msg.Question[0].Name = there
	out, err = msg.Pack()
	return asked, there, out, err
}

// record translates an address record and says whether that changed it.
func (t Translation) record(rr dns.RR) bool {
	var ip *net.IP
	switch r := rr.(type) {
	case *dns.A:
		ip = &r.A
	case *dns.AAAA:
		ip = &r.AAAA
	default:
		return false
	}
	a, ok := netip.AddrFromSlice(*ip)
	if !ok {
		return false
	}
	if _, v4 := rr.(*dns.A); v4 {
		a = a.Unmap()
	}
	here := t.Here(a)
	if here == a {
		return false
	}
	*ip = here.AsSlice()
	return true
}
