package resolver

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// shift maps 10.96.0.0/16 to 240.0.0.0/16 and fd00:96::/112 to fd64::/112.
var shift = Translation{
	Here: func(a netip.Addr) netip.Addr {
		return swap(a, netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("240.0.0.0/16"), netip.MustParsePrefix("fd00:96::/112"), netip.MustParsePrefix("fd64::/112"))
	},
	There: func(a netip.Addr) netip.Addr {
		return swap(a, netip.MustParsePrefix("240.0.0.0/16"), netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd64::/112"), netip.MustParsePrefix("fd00:96::/112"))
	},
}

func swap(a netip.Addr, from4, to4, from6, to6 netip.Prefix) netip.Addr {
	b, n := a.AsSlice(), 0
	switch {
	case from4.Contains(a):
		n = copy(b, to4.Addr().AsSlice()[:2])
	case from6.Contains(a):
		n = copy(b, to6.Addr().AsSlice()[:14])
	}
	if n == 0 {
		return a
	}
	out, _ := netip.AddrFromSlice(b)
	return out
}

func TestTranslated(t *testing.T) {
	for name, tt := range map[string]struct {
		name        string
		qtype       uint16
		wantAsked   string // by the cluster's DNS
		answer      string // its records
		wantAnswer  string // ours
		extra, want string // the same of the additional section
	}{
		"A":                   {"web.shop.svc.cluster.local.", dns.TypeA, "", "web.shop.svc.cluster.local. 5 IN A 10.96.3.4", "web.shop.svc.cluster.local. 5 IN A 240.0.3.4", "", ""},
		"AAAA":                {"web.shop.svc.cluster.local.", dns.TypeAAAA, "", "web.shop.svc.cluster.local. 5 IN AAAA fd00:96::9", "web.shop.svc.cluster.local. 5 IN AAAA fd64::9", "", ""},
		"an address outside":  {"ext.shop.svc.cluster.local.", dns.TypeA, "", "ext.shop.svc.cluster.local. 5 IN A 8.8.8.8", "ext.shop.svc.cluster.local. 5 IN A 8.8.8.8", "", ""},
		"PTR":                 {"4.3.0.240.in-addr.arpa.", dns.TypePTR, "4.3.96.10.in-addr.arpa.", "4.3.96.10.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local.", "4.3.0.240.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local.", "", ""},
		"PTR of the same":     {"4.3.244.10.in-addr.arpa.", dns.TypePTR, "", "4.3.244.10.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local.", "4.3.244.10.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local.", "", ""},
		"SRV with an address": {"_http._tcp.web.shop.svc.cluster.local.", dns.TypeSRV, "", "_http._tcp.web.shop.svc.cluster.local. 5 IN SRV 0 100 80 web.shop.svc.cluster.local.", "_http._tcp.web.shop.svc.cluster.local. 5 IN SRV 0 100 80 web.shop.svc.cluster.local.", "web.shop.svc.cluster.local. 5 IN A 10.96.3.4", "web.shop.svc.cluster.local. 5 IN A 240.0.3.4"},
		"no records":          {"no.shop.svc.cluster.local.", dns.TypeA, "", "", "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			q := new(dns.Msg).SetQuestion(tt.name, tt.qtype)
			raw, err := q.Pack()
			if err != nil {
				t.Fatal(err)
			}
			out, err := Translated(func(_ context.Context, query []byte) ([]byte, error) {
				var got dns.Msg
				if err := got.Unpack(query); err != nil {
					return nil, err
				}
				if want := tt.wantAsked; want != "" && got.Question[0].Name != want || want == "" && got.Question[0].Name != tt.name {
					t.Errorf("the cluster was asked for %s", got.Question[0].Name)
				}
				r := new(dns.Msg).SetReply(&got)
				for _, p := range []struct {
					text string
					to   *[]dns.RR
				}{{tt.answer, &r.Answer}, {tt.extra, &r.Extra}} {
					if rr, _ := dns.NewRR(p.text); rr != nil {
						*p.to = append(*p.to, rr)
					}
				}
				return r.Pack()
			}, shift)(t.Context(), raw)
			var m dns.Msg
			if err := errors.Join(err, m.Unpack(out)); err != nil {
				t.Fatal(err)
			}
			if m.Id != q.Id || m.Question[0].Name != tt.name || rrTexts(m.Answer) != tt.wantAnswer || rrTexts(m.Extra) != tt.want {
				t.Errorf("got %v", &m)
			}
		})
	}
	if _, err := Translated(func(context.Context, []byte) ([]byte, error) { return []byte{1}, nil }, shift)(t.Context(), []byte("short")); err == nil {
		t.Error("what is no DNS message was answered")
	}
}

func rrTexts(rrs []dns.RR) string {
	var out []string
	for _, rr := range rrs {
		out = append(out, strings.Join(strings.Fields(rr.String()), " "))
	}
	return strings.Join(out, "; ")
}
