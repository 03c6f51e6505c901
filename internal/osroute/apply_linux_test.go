package osroute

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/tundev"
)

// listen counts the changes of links, addresses and routes from now on. The kernel has announced them when it answers who asked for them.
func listen(t *testing.T) func() int {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		t.Fatal(err)
	}
	return func() int {
		buf := make([]byte, 64<<10)
		for n := 0; ; n++ {
			if _, err := unix.Read(fd, buf); errors.Is(err, unix.EAGAIN) {
				return n
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestApply(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	f, name, err := tundev.Open("doppel7", 1500, 4711)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := Find(name)
	if err != nil {
		t.Fatal(err)
	}
	if !l.TUN || l.Owner != 4711 || l.MTU != 1500 {
		t.Errorf("found %+v", l)
	}
	same := cmp.Options{cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
	check := func(mtu int, addrs, routes string) {
		t.Helper()
		if w, err := l.Apply(mtu, prefixes(addrs), prefixes(routes)); err != nil || len(w) > 0 {
			t.Fatalf("%v, %v", w, err)
		}
		got, err := l.routes()
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(prefixes(routes), Tidy(got), same); d != "" {
			t.Errorf("routes: %s", d)
		}
		nl, err := netlink.LinkByIndex(l.Index)
		if err != nil {
			t.Fatal(err)
		}
		as, err := netlink.AddrList(nl, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		var have []netip.Prefix
		for _, a := range as {
			p, _ := prefixOf(a.IPNet)
			have = append(have, p)
		}
		if d := cmp.Diff(prefixes(addrs), Tidy(have), same); d != "" {
			t.Errorf("addresses: %s", d)
		}
		if nl.Attrs().MTU != mtu {
			t.Errorf("mtu %d, want %d", nl.Attrs().MTU, mtu)
		}
	}
	check(1500, "10.77.0.1/32 fd77::1/128", "10.77.0.0/16 10.96.0.0/12 fd77::/64")
	changes := listen(t)
	check(1500, "10.77.0.1/32 fd77::1/128", "10.77.0.0/16 10.96.0.0/12 fd77::/64") // again
	if n := changes(); n > 0 {
		t.Errorf("what is in force already was announced as %d changes: whoever applies after changes would never end", n)
	}
	check(9000, "10.77.0.2/32 fd77::1/128", "10.96.0.0/12 10.200.0.0/16 fd77::/64 fd78::/64")
	check(9000, "", "")

	// A subnet of another interface is neither taken nor removed, and another interface can get one that we have.
	g, other, err := tundev.Open("doppel8", 1500, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	ol, err := Find(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ol.Apply(1500, prefixes("10.8.0.1/32"), prefixes("10.8.0.0/16")); err != nil {
		t.Fatal(err)
	}
	ex, err := l.Others()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]Existing{{netip.MustParsePrefix("10.8.0.0/16"), other}}, ex, same); d != "" {
		t.Error(d)
	}
	if _, err := l.Apply(1500, nil, prefixes("10.9.0.0/16 10.10.0.0/16")); err != nil {
		t.Error(err)
	}
	theirs := func(p string) *netlink.Route {
		return &netlink.Route{LinkIndex: ol.Index, Dst: ipNet(netip.MustParsePrefix(p)), Scope: netlink.SCOPE_LINK}
	}
	if err := netlink.RouteAdd(theirs("10.9.0.0/16")); err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(theirs("10.10.0.0/16")); err != nil {
		t.Fatalf("a VPN cannot have a subnet of ours: %v", err)
	}
	for _, to := range []string{"10.9.1.1", "10.10.1.1"} {
		rs, err := netlink.RouteGet(netip.MustParseAddr(to).AsSlice())
		if err != nil || len(rs) == 0 || rs[0].LinkIndex != ol.Index {
			t.Errorf("%s does not go to the other interface: %v, %v", to, rs, err)
		}
	}
	if all, err := Existings(l.Name); err != nil || !slices.Contains(all, Existing{netip.MustParsePrefix("10.10.0.0/16"), other}) {
		t.Errorf("the other interface's routes: %v, %v", all, err)
	}

	if err := l.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := l.Remove(); err != nil {
		t.Errorf("removing twice: %v", err)
	}
	if _, err := Find(name); err == nil {
		t.Error("still there")
	}
}
