package wan

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// gateways are the router's addresses on a laptop's link.
func gateways(net plan.Laptop) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(net.Gateway, net.Net.Bits()), netip.PrefixFrom(net.Gateway6, net.Net6.Bits())}
}

// noDAD is the sysctl that turns duplicate address detection (RFC 4862) off for links to come.
const noDAD = "net/ipv6/conf/default/accept_dad"

// JoinLaptop joins a laptop's namespaces to the router.
func JoinLaptop(router, holder state.Process, net plan.Laptop) error {
	h, err := handle(router)
	if err != nil {
		return err
	}
	defer h.Close()
	// The link's own addresses are usable at once too: two seconds of routes that change are nobody's subject.
	if err := errors.Join(sysctl(router, noDAD, "0"), sysctl(holder, noDAD, "0")); err != nil {
		return err
	}
	if err := pair(h, net.WanLink, net.InnerLink, netlink.NsPid(holder.PID), ""); err != nil {
		return fmt.Errorf("join the laptop to the router: %w", err)
	}
	inner, err := handle(holder)
	if err != nil {
		return err
	}
	defer inner.Close()
	return errors.Join(
		configure(h, net.WanLink, gateways(net)...),
		configure(inner, "lo"),
		configure(inner, net.InnerLink, netip.PrefixFrom(net.IP, 24), netip.PrefixFrom(net.IP6, 64)),
		route(inner, net.InnerLink, netip.PrefixFrom(netip.IPv4Unspecified(), 0), net.Gateway),
		route(inner, net.InnerLink, netip.PrefixFrom(netip.IPv6Unspecified(), 0), net.Gateway6),
	)
}

// RemoveLaptop removes the router's end of a laptop's link; the other end is gone with the laptop.
func RemoveLaptop(router state.Process, net plan.Laptop) error {
	if !ns.Alive(router) {
		return nil
	}
	h, err := handle(router)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(net.WanLink)
	if err == nil {
		err = h.LinkDel(link)
	}
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// SetLink makes the laptop's link be as wanted: the router takes its end down or puts a relay in between.
func SetLink(ctx context.Context, lab *state.Lab, l state.Laptop) error {
	if err := l.Link.Line().Validate(); err != nil {
		return err
	}
	body, err := json.Marshal(linkRequest{Index: l.Index, Link: l.Link})
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", lab.Path(controlSocket))
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://router/link", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the router: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var b bytes.Buffer
		_, _ = b.ReadFrom(resp.Body) // the status alone says that it failed
		return fmt.Errorf("the router could not set the link: %s", bytes.TrimSpace(b.Bytes()))
	}
	return setSegments(l)
}

// setSegments keeps the laptop from sending packets larger than the line would carry while a relay is in between, so
// that loss hits single packets.
func setSegments(l state.Laptop) error {
	h, err := handle(l.Holder)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(plan.LaptopNet(l.Index).InnerLink)
	if err != nil {
		return err
	}
	segments := 65535 // GSO_MAX_SEGS, the kernel's default
	if l.Link.Relayed() {
		segments = 1
	}
	if err := h.LinkSetGSOMaxSegs(link, segments); err != nil {
		return fmt.Errorf("segments of the laptop's link: %w", err)
	}
	return nil
}
