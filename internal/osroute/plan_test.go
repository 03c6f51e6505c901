package osroute

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func prefixes(s string) []netip.Prefix {
	var out []netip.Prefix
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}

func addrs(s string) []netip.Addr {
	var out []netip.Addr
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParseAddr(f))
	}
	return out
}

func TestCheck(t *testing.T) {
	for _, s := range strings.Fields("10.0.0.0/8 10.96.0.0/12 192.168.1.7/32 100.64.0.0/10 fd00::/16 fd12:3456::/48 2001:db8::1/128 64:ff9b::/96") {
		if err := Check(netip.MustParsePrefix(s)); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range strings.Fields("0.0.0.0/0 ::/0 0.0.0.0/1 128.0.0.0/1 10.0.0.0/7 127.0.0.0/8 127.0.0.1/32 169.254.0.0/16 169.254.169.254/32 224.0.0.0/8 " +
		"239.1.1.1/32 255.255.255.255/32 240.0.0.0/4 0.0.0.0/8 ::1/128 ::/16 ::ffff:10.0.0.0/104 fe80::/16 fe80::1/128 ff02::1/128 fc00::/7 2000::/3 10.0.0.1/8") {
		if err := Check(netip.MustParsePrefix(s)); err == nil {
			t.Errorf("%s: not refused", s)
		}
	}
	if Check(netip.Prefix{}) == nil {
		t.Error("zero prefix: not refused")
	}
}

func TestMake(t *testing.T) {
	for _, tc := range []struct {
		name      string
		routes    string
		exclude   string
		resolvers string
		existing  string // prefixes on eth0
		want      string
		warnings  []string
	}{
		{name: "nothing"},
		{name: "sorted, once", routes: "10.96.0.0/12 10.0.0.0/16 10.96.0.0/12 fd00:1::/64", want: "10.0.0.0/16 10.96.0.0/12 fd00:1::/64"},
		{name: "API server inside", routes: "10.0.0.0/29", exclude: "10.0.0.5/32", want: "10.0.0.0/30 10.0.0.4/32 10.0.0.6/31"},
		{name: "API server apart", routes: "10.0.0.0/29", exclude: "10.0.0.9/32", want: "10.0.0.0/29"},
		{name: "two excluded", routes: "10.0.0.0/29", exclude: "10.0.0.5/32 10.0.0.0/31", want: "10.0.0.2/31 10.0.0.4/32 10.0.0.6/31"},
		{
			name: "excluded subnet around", routes: "10.1.0.0/16 10.2.0.0/16", exclude: "10.1.0.0/12 10.2.3.0/8", want: "",
			warnings: []string{"10.1.0.0/16 is not routed to the cluster: it is kept out (never-proxy, API server or resolver)", "10.2.0.0/16 is not routed to the cluster: it is kept out (never-proxy, API server or resolver)"},
		},
		{name: "other family", routes: "10.0.0.0/29", exclude: "fd00::1/128", want: "10.0.0.0/29"},
		{name: "IPv6", routes: "fd00::/125", exclude: "fd00::/126", want: "fd00::4/126"},
		{name: "resolver inside", routes: "10.0.0.0/31", resolvers: "10.0.0.1", want: "10.0.0.0/32"},
		{
			name: "resolver equal", routes: "10.0.0.1/32", resolvers: "10.0.0.1 fe80::1%eth0", want: "",
			warnings: []string{"10.0.0.1/32 is not routed to the cluster: it is kept out (never-proxy, API server or resolver)"},
		},
		{
			name: "same subnet elsewhere", routes: "10.0.0.0/24 10.1.0.0/24", existing: "10.0.0.0/24", want: "10.1.0.0/24",
			warnings: []string{"10.0.0.0/24 is not routed to the cluster: it is routed to eth0 already"},
		},
		{
			name: "smaller subnet elsewhere", routes: "10.0.0.0/16", existing: "10.0.7.0/24", want: "10.0.0.0/16",
			warnings: []string{"10.0.7.0/24 inside 10.0.0.0/16 stays with eth0"},
		},
		{name: "larger subnet elsewhere", routes: "10.0.0.0/16", existing: "10.0.0.0/8", want: "10.0.0.0/16"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var ex []Existing
			for _, p := range prefixes(tc.existing) {
				ex = append(ex, Existing{Prefix: p, Link: "eth0"})
			}
			var masked []netip.Prefix
			for _, p := range prefixes(tc.exclude) {
				masked = append(masked, p.Masked())
			}
			got, err := Make(Want{Routes: prefixes(tc.routes), Exclude: masked, Resolvers: addrs(tc.resolvers)}, ex)
			if err != nil {
				t.Fatal(err)
			}
			want := Plan{Routes: prefixes(tc.want), Warnings: tc.warnings}
			if d := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestMakeRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, routes, exclude string
		kind                  uerr.Kind
	}{
		{"default", "0.0.0.0/0", "", uerr.Denied},
		{"one of several", "10.0.0.0/16 127.0.0.0/8", "", uerr.Denied},
		{"API server itself", "192.168.1.7/32", "192.168.1.7/32", uerr.Conflict},
		{
			"too many pieces", "fd00::/16 fd01::/16 fd02::/16 fd03::/16 fd04::/16 fd05::/16 fd06::/16 fd07::/16 fd08::/16 fd09::/16",
			"fd00::1/128 fd01::1/128 fd02::1/128 fd03::1/128 fd04::1/128 fd05::1/128 fd06::1/128 fd07::1/128 fd08::1/128 fd09::1/128", uerr.Usage,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Make(Want{Routes: prefixes(tc.routes), Exclude: prefixes(tc.exclude)}, nil)
			if ue, ok := errors.AsType[*uerr.Error](err); !ok || ue.Kind != tc.kind {
				t.Errorf("got %v, want kind %s", err, tc.kind)
			}
		})
	}
}

// TestSubtractKeepsAllElse checks against the definition: an address is routed exactly if it is in the route and in nothing cut out.
func TestSubtractKeepsAllElse(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	random := func(min int) netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, 0, 0, byte(rnd.Uint32())})
		return netip.PrefixFrom(a, min+rnd.IntN(33-min)).Masked()
	}
	for range 500 {
		r := random(24)
		cut := []netip.Prefix{random(25), random(25), random(25)}
		got := Subtract([]netip.Prefix{r}, cut)
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			want := r.Contains(a)
			for _, c := range cut {
				want = want && !c.Contains(a)
			}
			n := 0
			for _, g := range got {
				if g.Contains(a) {
					n++
				}
			}
			if want && n != 1 || !want && n != 0 {
				t.Fatalf("%v without %v is %v: %v is in %d of them", r, cut, got, a, n)
			}
		}
	}
}
