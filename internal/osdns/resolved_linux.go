package osdns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	busSocket = "/run/dbus/system_bus_socket"
	// callTimeout bounds each call: a bus that hangs must not hold up a connect.
	callTimeout = time.Second
	// knownTimeout is how long systemd-resolved may take to learn from the kernel of a device that was just made.
	knownTimeout = time.Second
	knownPause   = 10 * time.Millisecond

	resolvedName    = "org.freedesktop.resolve1"
	resolvedManager = resolvedName + ".Manager"
	resolvedPath    = dbus.ObjectPath("/org/freedesktop/resolve1")
)

// ResolvedLink is what systemd-resolved knows of a device (org.freedesktop.resolve1(5)). It forgets it with the device.
type ResolvedLink struct {
	index int // 0 while nothing is set
}

// Set makes want what systemd-resolved knows of the device with this index; a zero one takes it back.
func (r *ResolvedLink) Set(index int, want LinkDNS) error {
	if !want.Server.IsValid() {
		return r.revert()
	}
	bus, err := dialBus()
	if err != nil {
		return err
	}
	defer bus.Close()
	if now, err := known(bus, index); err != nil {
		return err
	} else if r.index == index && equal(now, want) {
		return nil // setting it again would have it write its files again, and us look again
	}
	r.index = index
	for _, c := range linkCalls(index, want) {
		err := call(bus, c.method, nil, c.args...)
		if err != nil && (!c.optional || !isError(err, "org.freedesktop.DBus.Error.UnknownMethod")) {
			return errors.Join(fmt.Errorf("systemd-resolved: %s: %w", c.method, err), r.revert())
		}
	}
	return nil
}

func (r *ResolvedLink) revert() error {
	if r.index == 0 {
		return nil
	}
	bus, err := dialBus()
	if err != nil {
		return err
	}
	defer bus.Close()
	err = call(bus, "RevertLink", nil, int32(r.index))
	if err != nil && !isError(err, resolvedName+".NoSuchLink") { // the device is gone, and its settings with it
		return fmt.Errorf("systemd-resolved: RevertLink: %w", err)
	}
	r.index = 0
	return nil
}

// probeResolved says why systemd-resolved cannot be talked to, or nil. It does not start it.
func probeResolved() error {
	bus, err := dialBus()
	if err != nil {
		return err
	}
	defer bus.Close()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var has bool
	if err := bus.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, resolvedName).Store(&has); err != nil {
		return fmt.Errorf("D-Bus: %w", err)
	}
	if !has {
		return errors.New("it does not run")
	}
	return nil
}

// dialBus connects to the system's bus within callTimeout.
func dialBus() (*dbus.Conn, error) {
	c, err := net.DialTimeout("unix", busSocket, callTimeout)
	if err != nil {
		return nil, fmt.Errorf("D-Bus: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	bus, err := dbus.ConnectUnix(c.(*net.UnixConn))
	if err != nil {
		return nil, fmt.Errorf("D-Bus: %w", errors.Join(err, c.Close()))
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, errors.Join(err, bus.Close())
	}
	return bus, nil
}

func call(bus *dbus.Conn, method string, result any, args ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	c := bus.Object(resolvedName, resolvedPath).CallWithContext(ctx, resolvedManager+"."+method, dbus.FlagNoAutoStart, args...)
	if c.Err != nil || result == nil {
		return c.Err
	}
	return c.Store(result)
}

func isError(err error, name string) bool {
	de, ok := errors.AsType[dbus.Error](err)
	return ok && de.Name == name
}

// linkCall is one method of the manager object.
type linkCall struct {
	method   string
	args     []any
	optional bool // not in old versions, or harmless to be without
}

// Types of the bus: (iay) and (sb).
type (
	busServer struct {
		Family  int32
		Address []byte
	}
	busDomain struct {
		Name  string
		Route bool
	}
)

// linkCalls are the calls that make want known. Nothing but DNS is answered behind the device, and the cluster signs nothing.
func linkCalls(index int, want LinkDNS) []linkCall {
	i := int32(index)
	return []linkCall{
		{"SetLinkDNSSEC", []any{i, "no"}, true},
		{"SetLinkDNSOverTLS", []any{i, "no"}, true},
		{"SetLinkLLMNR", []any{i, "no"}, true},
		{"SetLinkMulticastDNS", []any{i, "no"}, true},
		{"SetLinkDefaultRoute", []any{i, false}, true},
		{"SetLinkDomains", []any{i, busDomains(want.Domains)}, false},
		{"SetLinkDNS", []any{i, []busServer{{family(want.Server), want.Server.AsSlice()}}}, false},
	}
}

func busDomains(domains []string) []busDomain {
	out := make([]busDomain, 0, len(domains))
	for _, d := range domains {
		name, routeOnly := strings.CutPrefix(d, "~")
		out = append(out, busDomain{name, routeOnly})
	}
	return out
}

func family(a netip.Addr) int32 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// known reads what is known of a device, waiting for it to be known at all.
func known(bus *dbus.Conn, index int) (LinkDNS, error) {
	var path dbus.ObjectPath
	for deadline := time.Now().Add(knownTimeout); ; time.Sleep(knownPause) {
		err := call(bus, "GetLink", &path, int32(index))
		if err == nil {
			break
		}
		if !isError(err, resolvedName+".NoSuchLink") || time.Now().After(deadline) {
			return LinkDNS{}, fmt.Errorf("systemd-resolved: GetLink: %w", err)
		}
	}
	var servers []busServer
	var domains []busDomain
	if err := errors.Join(property(bus, path, "DNS", &servers), property(bus, path, "Domains", &domains)); err != nil {
		return LinkDNS{}, err
	}
	var out LinkDNS
	if len(servers) == 1 {
		out.Server, _ = netip.AddrFromSlice(servers[0].Address)
	}
	for _, d := range domains {
		name := d.Name
		if d.Route {
			name = "~" + name
		}
		out.Domains = append(out.Domains, name)
	}
	return out, nil
}

func property(bus *dbus.Conn, path dbus.ObjectPath, name string, result any) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var v dbus.Variant
	get := bus.Object(resolvedName, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", dbus.FlagNoAutoStart, resolvedName+".Link", name)
	if err := get.Store(&v); err != nil {
		return fmt.Errorf("systemd-resolved: %s: %w", name, err)
	}
	return dbus.Store([]any{v.Value()}, result)
}

func equal(a, b LinkDNS) bool {
	sorted := func(d []string) []string {
		d = slices.Clone(d)
		slices.Sort(d)
		return d
	}
	return a.Server == b.Server && slices.Equal(sorted(a.Domains), sorted(b.Domains))
}
