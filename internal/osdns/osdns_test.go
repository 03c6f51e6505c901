package osdns

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var comparers = cmp.Options{
	cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

func addrs(s string) []netip.Addr {
	var out []netip.Addr
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParseAddr(f))
	}
	return out
}

func TestParseResolvConf(t *testing.T) {
	for _, tc := range []struct{ name, in, resolvers, search string }{
		{"empty means the local host", "", "127.0.0.1", ""},
		{"usual", "# by hand\nnameserver 10.0.0.2\nnameserver fd00::53\nsearch corp.example. example\noptions ndots:5\n", "10.0.0.2 fd00::53", "corp.example example"},
		{"stub", "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n", "127.0.0.53", ""},
		{"link-local", "nameserver fe80::1%eth0\n", "fe80::1%eth0", ""},
		{"any is the local host", "nameserver 0.0.0.0\nnameserver ::\n", "127.0.0.1 ::1", ""},
		{"twice", "nameserver 10.0.0.2\nnameserver 10.0.0.2\nnameserver ::ffff:10.0.0.2\n", "10.0.0.2", ""},
		{"last search wins", "search a b\ndomain c\n", "127.0.0.1", "c"},
		{"nonsense", "nameserver\nnameserver ten\nnameserver 10.0.0.300\n;nameserver 1.1.1.1\n\x00\nnameserver 10.0.0.4 # comment\n", "10.0.0.4", ""},
		{"windows line ends", "nameserver 10.0.0.2\r\nsearch a\r\n", "10.0.0.2", "a"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := ResolvConf{Resolvers: addrs(tc.resolvers), Search: strings.Fields(tc.search)}
			if d := cmp.Diff(want, ParseResolvConf([]byte(tc.in)), comparers); d != "" {
				t.Error(d)
			}
		})
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 10.0.0.2\nsearch a b\n"))
	f.Add([]byte("nameserver fe80::1%eth0\r\ndomain x."))
	f.Fuzz(func(t *testing.T, data []byte) {
		rc := ParseResolvConf(data)
		if len(rc.Resolvers) == 0 || len(rc.Resolvers) > maxResolvers || len(rc.Search) > maxSearch {
			t.Errorf("%d resolvers, %d search domains", len(rc.Resolvers), len(rc.Search))
		}
		for _, a := range rc.Resolvers {
			if !a.IsValid() || a.IsUnspecified() {
				t.Errorf("resolver %v", a)
			}
		}
	})
}

func TestChoose(t *testing.T) {
	l4, l6 := netip.MustParseAddrPort("127.0.0.1:5300"), netip.MustParseAddrPort("[::1]:5300")
	redir := func(a string, to netip.AddrPort) Redirect { return Redirect{netip.MustParseAddr(a), to} }
	for _, tc := range []struct {
		name string
		give Facts
		want Plan
	}{
		{"not wanted", Facts{NFT: true, Resolvers: addrs("10.0.0.2")}, Plan{Mode: None}},
		{"one", Facts{NFT: true, Resolvers: addrs("10.0.0.2"), Listen: l4}, Plan{Mode: NFTables, Redirects: []Redirect{redir("10.0.0.2", l4)}}},
		{
			"loopback and others",
			Facts{NFT: true, Resolvers: addrs("127.0.0.53 10.0.0.2 fd00::53"), Listen: l4, Listen6: l6},
			Plan{Mode: NFTables, Redirects: []Redirect{redir("127.0.0.53", l4), redir("10.0.0.2", l4), redir("fd00::53", l6)}},
		},
		{
			"no listener for IPv6",
			Facts{NFT: true, Resolvers: addrs("10.0.0.2 fd00::53"), Listen: l4},
			Plan{Mode: NFTables, Redirects: []Redirect{redir("10.0.0.2", l4)}, Warnings: []string{"queries to resolver fd00::53 are not captured: no listener of its address family"}},
		},
		{
			"only link-local",
			Facts{NFT: true, Resolvers: addrs("fe80::1%eth0"), Listen: l4, Listen6: l6},
			Plan{Mode: None, Warnings: []string{"queries to resolver fe80::1%eth0 are not captured: it has a link-local address"}},
		},
		{
			"no nftables",
			Facts{NFTError: errors.New("no such protocol"), Resolvers: addrs("10.0.0.2"), Listen: l4},
			Plan{Mode: None, Warnings: []string{"cluster names do not resolve: nftables is not usable here (no such protocol)"}},
		},
		{
			"rp_filter and resolved are recorded only",
			Facts{NFT: true, ResolvedActive: true, RPFilter: 1, Resolvers: addrs("10.0.0.2"), Listen: l4},
			Plan{Mode: NFTables, Redirects: []Redirect{redir("10.0.0.2", l4)}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if d := cmp.Diff(tc.want, Choose(tc.give), comparers); d != "" {
				t.Error(d)
			}
		})
	}
}
