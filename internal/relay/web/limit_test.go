package web

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// What is kept of those who try is small, whatever they send, and forgotten when it says nothing any more.
func TestLimiterForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(nil, nil)
		if !l.local(strings.Repeat("x", 1<<16), 1, time.Minute) || l.local(strings.Repeat("x", 1<<16), 1, time.Minute) {
			t.Error("not one alone")
		}
		for key := range l.byKey {
			if len(key) > 64 {
				t.Errorf("a key of %d bytes is kept", len(key))
			}
		}
		time.Sleep(30 * time.Second)
		if l.local("y", 2, time.Minute); len(l.byKey) != 2 {
			t.Errorf("%d are kept", len(l.byKey))
		}
		time.Sleep(31 * time.Second)
		if l.local("y", 2, time.Minute); len(l.byKey) != 1 {
			t.Errorf("%d are kept", len(l.byKey))
		}
	})
}

func TestNetworkOf(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7:1234": "192.0.2.7", "[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::", "[2001:db8:1:2::9]:1": "2001:db8:1:2::", "[fe80::1%eth0]:1": "fe80::", "odd": "odd",
	} {
		if got := networkOf(&http.Request{RemoteAddr: addr}); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}
