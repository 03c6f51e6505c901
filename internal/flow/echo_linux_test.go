package flow_test

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/wire"
)

func allowEcho(t *testing.T, groups string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte(groups), 0); err != nil {
		t.Fatal(err)
	}
}

func TestDialEcho(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	allowEcho(t, "1 0") // nobody, the kernel's default
	if err := flow.EchoAllowed(); !errors.Is(err, syscall.EACCES) {
		t.Errorf("not allowed: %v", err)
	}
	allowEcho(t, "0 0")
	if err := flow.EchoAllowed(); err != nil {
		t.Errorf("allowed: %v", err)
	}
	got := make([]byte, 1<<16)
	for _, dst := range []string{"127.0.0.1", "::1"} {
		p, err := flow.DialEcho(netip.MustParseAddr(dst))
		if err != nil {
			t.Fatal(err)
		}
		for seq, n := range []int{0, 56, 2000, 60_000} {
			want := wire.AppendEchoMessage(nil, uint16(seq), bytes.Repeat([]byte{byte(n)}, n))
			if err := p.WritePacket(want); err != nil {
				t.Fatal(err)
			}
			if m, err := p.ReadPacket(got); err != nil || !bytes.Equal(got[:m], want) {
				t.Errorf("%s, %d bytes: %d came back, %v", dst, n, m, err)
			}
		}
		if err := p.WritePacket(nil); !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("no sequence number: %v", err)
		}
		_ = p.Close()
		if _, err := p.ReadPacket(got); err == nil {
			t.Error("read after close")
		}
	}
	dead := &net.IPNet{IP: net.IPv4(10, 9, 9, 0), Mask: net.CIDRMask(24, 32)}
	if err := netlink.RouteAdd(&netlink.Route{Dst: dead, Type: syscall.RTN_UNREACHABLE}); err != nil {
		t.Fatal(err)
	}
	if _, err := flow.DialEcho(netip.MustParseAddr("10.9.9.9")); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("no route: %v", err)
	}
}
