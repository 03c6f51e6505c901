package web

import (
	"context"
	"fmt"
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

// One address guesses slowly and keeps nobody else out of the account; many together guess no faster than an account allows.
func TestLoginLimits(t *testing.T) {
	for name, c := range map[string]struct{ addresses, minutes, atLeast, atMost int }{
		"one address":  {1, 60, 180, 10 + 181},
		"a few":        {6, 60, 6 * 180, 6 * (10 + 181)},
		"many":         {500, 10, 200, 20 + 201},
		"many at once": {500, 0, 20, 20},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLimiter(nil, nil)
				l.shared = func(context.Context, string, int, time.Duration) (bool, error) { return true, nil }
				guesses := 0
				for second := range c.minutes*60 + 1 {
					for i := range c.addresses {
						if l.login(t.Context(), fmt.Sprint(i), "ann@example.com") {
							guesses++
						}
					}
					if c.addresses < 7 && second%60 == 59 && !l.login(t.Context(), "home", "ann@example.com") {
						t.Fatalf("kept out of her own account after %d s", second)
					}
					time.Sleep(time.Second)
				}
				if guesses < c.atLeast || guesses > c.atMost {
					t.Errorf("%d guesses, not %d to %d", guesses, c.atLeast, c.atMost)
				}
			})
		})
	}
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
