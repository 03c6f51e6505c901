package tunnel_test

import (
	"crypto/tls"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

func TestTune(t *testing.T) {
	a, b := tcpPair(t)
	defer a.Close()
	defer b.Close()
	if err := tunnel.Tune(tls.Client(a, &tls.Config{InsecureSkipVerify: true})); err != nil {
		t.Fatal(err)
	}
	rc, err := a.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) {
		for opt, want := range map[int]int{unix.TCP_NODELAY: 1, unix.TCP_NOTSENT_LOWAT: tunnel.NotSentLowat} {
			if got, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, opt); got != want || err != nil {
				t.Errorf("option %d is %d, %v, want %d", opt, got, err, want)
			}
		}
	})
	if err := tunnel.Tune(muxtest.NewLink(muxtest.Config{}).A); err != nil {
		t.Errorf("a connection without socket: %v", err)
	}
}
