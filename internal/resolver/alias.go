package resolver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/miekg/dns"
)

const (
	// maxAliases bounds a chain of mappings: those of a loop end there.
	maxAliases = 8
	// aliasTTL is for how long a mapping may be kept, in seconds: as long as the cluster's own answers by default (CoreDNS: 5).
	aliasTTL = 5
)

var errAliases = errors.New("the mappings of this name go in a circle")

// alias answers q as m says: with its address, or with a CNAME and what its target's answer is. The target is looked for in d.
func (s *Server) alias(ctx context.Context, q *query, m Mapping, d directory, left int) ([]byte, error) {
	if left == 0 {
		return nil, errAliases
	}
	o, err := q.edns()
	switch {
	case err != nil:
		return formErr(q.raw), nil
	case o.version != 0:
		return q.badVersion(o), nil
	}
	asked := q.name + "."
	header := dns.RR_Header{Name: asked, Class: dns.ClassINET, Ttl: aliasTTL}
	if m.Addr.IsValid() {
		return q.reply(o, dns.RcodeSuccess, addressRecords(header, m.Addr.Unmap(), q.qtype))
	}
	target := dns.Fqdn(m.Target)
	var sub dns.Msg
	sub.SetQuestion(target, q.qtype)
	if o.present {
		sub.SetEdns0(ourUDP, o.do)
	}
	raw, err := sub.Pack()
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", m.Name, err)
	}
	tq, err := parseQuery(raw, q.tcp)
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", m.Name, err)
	}
	tq.generation = q.generation
	raw, err = s.answer(ctx, tq, d, left-1)
	if err != nil {
		return nil, err
	}
	var a dns.Msg
	if err := a.Unpack(raw); err != nil {
		return nil, fmt.Errorf("mapping %s: parse answer: %w", m.Name, err)
	}
	header.Rrtype = dns.TypeCNAME
	records := []dns.RR{&dns.CNAME{Hdr: header, Target: target}}
	if q.qtype == dns.TypeCNAME {
		return q.reply(o, dns.RcodeSuccess, records)
	}
	msg, err := q.reply(o, a.Rcode, append(records, a.Answer...), a.Ns...)
	if err == nil && a.Truncated {
		msg[2] |= flagTC // the client asks again by TCP
	}
	return msg, err
}

// addressRecords are the records of a mapping to an address: none of the other family or another type.
func addressRecords(h dns.RR_Header, a netip.Addr, qtype uint16) []dns.RR {
	switch {
	case a.Is4() && (qtype == dns.TypeA || qtype == dns.TypeANY):
		h.Rrtype = dns.TypeA
		return []dns.RR{&dns.A{Hdr: h, A: a.AsSlice()}}
	case a.Is6() && (qtype == dns.TypeAAAA || qtype == dns.TypeANY):
		h.Rrtype = dns.TypeAAAA
		return []dns.RR{&dns.AAAA{Hdr: h, AAAA: a.AsSlice()}}
	}
	return nil
}

// nothing answers q without records.
func (q *query) nothing(rcode int) ([]byte, error) {
	o, err := q.edns()
	switch {
	case err != nil:
		return formErr(q.raw), nil
	case o.version != 0:
		return q.badVersion(o), nil
	}
	return q.replyEDNS(rcode, o, nil), nil
}

// reply builds an answer of our own to q, cut to what the client takes.
func (q *query) reply(o opt, rcode int, records []dns.RR, authority ...dns.RR) ([]byte, error) {
	m := dns.Msg{Answer: records, Ns: authority, Question: []dns.Question{{Name: q.name + ".", Qtype: q.qtype, Qclass: q.qclass}}}
	m.Response, m.RecursionAvailable, m.Compress, m.Rcode = true, true, true, rcode&0xf
	raw, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("pack answer: %w", err)
	}
	if len(raw) < q.questionEnd() {
		return nil, errors.New("pack answer: the question is cut")
	}
	return (&answer{msg: raw}).render(q, o, 0)
}
