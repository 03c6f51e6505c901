// Package nettest owns fresh network namespaces for tests that need real interfaces, routes and nftables.
package nettest

import (
	"context"
	"testing"
	"time"
)

// Poll calls ok until it is true, at most for d; it fails the test otherwise.
func Poll(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not within %v: %s", d, what)
		case <-tick.C:
		}
	}
}
