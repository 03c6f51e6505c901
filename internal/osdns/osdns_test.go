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

func resolvers(s string) []Resolver {
	var out []Resolver
	for _, a := range addrs(s) {
		out = append(out, Resolver{Addr: a, Link: "eth0"})
	}
	return out
}

// TestChoose is the table of laptop shapes; internal/rootd tries them in namespaces.
func TestChoose(t *testing.T) {
	l4, l6 := netip.MustParseAddrPort("127.0.0.1:5300"), netip.MustParseAddrPort("[::1]:5300")
	own := netip.MustParseAddr("fe80::7%eth0")
	all := Want{Listen: l4, Listen6: l6, Scoped: []netip.AddrPort{netip.AddrPortFrom(own, 5301)}, Server: netip.MustParseAddr("198.18.0.2"), Domains: []string{"search", "~cluster.local"}}
	noNFT, noBus := errors.New("no such protocol"), errors.New("no bus")
	routable := Resolver{Addr: netip.MustParseAddr("10.0.0.2"), Link: "eth0"}
	with := func(change func(*Resolver)) []Resolver {
		r := routable
		change(&r)
		return []Resolver{r}
	}
	for _, tc := range []struct {
		name     string
		give     Facts
		want     Want
		mode     Mode
		reason   string // part of it
		captured string // what is redirected, or routed
		warning  string // part of the first one; "" for none
	}{
		{"not wanted", Facts{Resolvers: resolvers("10.0.0.2")}, Want{}, None, "not asked for", "", ""},
		{"stub", Facts{Stub: true, Resolvers: resolvers("127.0.0.53")}, all, Resolved, "ask systemd-resolved", "", ""},
		{"stub, no bus", Facts{Stub: true, ResolvedError: noBus, Resolvers: resolvers("127.0.0.53")}, all, NFTables, "no bus", "127.0.0.53>127.0.0.1:5300", "nss-resolve"},
		{"stub, no server", Facts{Stub: true, Resolvers: resolvers("127.0.0.53")}, Want{Listen: l4}, NFTables, "systemd-resolved", "127.0.0.53>127.0.0.1:5300", "nss-resolve"},
		{"one", Facts{Resolvers: resolvers("10.0.0.2")}, all, NFTables, "resolv.conf", "10.0.0.2>127.0.0.1:5300", ""},
		{
			"loopback and others",
			Facts{Resolvers: resolvers("127.0.0.1 10.0.0.2 fd00::53")},
			all, NFTables, "",
			"127.0.0.1>127.0.0.1:5300 10.0.0.2>127.0.0.1:5300 fd00::53>[::1]:5300", "",
		},
		{"no listener for IPv6", Facts{Resolvers: resolvers("10.0.0.2 fd00::53")}, Want{Listen: l4}, NFTables, "", "10.0.0.2>127.0.0.1:5300", "fd00::53 are not captured"},
		{"link-local", Facts{LinkLocal: []netip.Addr{own}, Resolvers: resolvers("fe80::1%eth0")}, all, NFTables, "", "fe80::1%eth0>[fe80::7]:5301", ""},
		{"link-local, another link", Facts{LinkLocal: []netip.Addr{own}, Resolvers: resolvers("fe80::1%eth1")}, all, None, "", "", "fe80::1%eth1 are not captured"},
		{"link-local, listener not ours", Facts{Resolvers: resolvers("fe80::1%eth0")}, all, None, "", "", "fe80::1%eth0 are not captured"},
		{"no nftables", Facts{NFTError: noNFT, Resolvers: []Resolver{routable}}, all, Routed, "no such protocol", "10.0.0.2", ""},
		{"no nftables, loose filter", Facts{NFTError: noNFT, Resolvers: with(func(r *Resolver) { r.RPFilter = 2 })}, all, Routed, "", "10.0.0.2", ""},
		{"no nftables, strict filter", Facts{NFTError: noNFT, Resolvers: with(func(r *Resolver) { r.RPFilter = 1 })}, all, None, "", "", "rp_filter 1"},
		{"no nftables, gateway", Facts{NFTError: noNFT, Resolvers: with(func(r *Resolver) { r.Gateway = true })}, all, None, "", "", "gateway"},
		{"no nftables, host route", Facts{NFTError: noNFT, Resolvers: with(func(r *Resolver) { r.Host = true })}, all, None, "", "", "a route to it alone"},
		{"no nftables, no way", Facts{NFTError: noNFT, Resolvers: with(func(r *Resolver) { r.Link = "" })}, all, None, "", "", "no route"},
		{"no nftables, loopback", Facts{NFTError: noNFT, Resolvers: resolvers("127.0.0.1")}, all, None, "", "", "on this machine"},
		{"no nftables, link-local", Facts{NFTError: noNFT, Resolvers: resolvers("fe80::1%eth0")}, all, None, "", "", "link-local"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := Choose(tc.give, tc.want)
			var captured []string
			for _, r := range p.Redirects {
				captured = append(captured, r.Resolver.WithZone(r.Link).String()+">"+r.To.String())
			}
			for _, r := range p.Routes() {
				captured = append(captured, r.Addr().String())
			}
			if got := strings.Join(captured, " "); p.Mode != tc.mode || got != tc.captured || !strings.Contains(p.Reason, tc.reason) || p.Reason == "" {
				t.Errorf("mode %s (%s), captured %q", p.Mode, p.Reason, got)
			}
			if (tc.warning == "") != (len(p.Warnings) == 0) || tc.warning != "" && !strings.Contains(p.Warnings[0], tc.warning) {
				t.Errorf("warnings %q", p.Warnings)
			}
			if (p.Link.Server == all.Server) != (tc.mode == Resolved) {
				t.Errorf("link %+v", p.Link)
			}
		})
	}
}
