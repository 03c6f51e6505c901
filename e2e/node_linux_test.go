package e2e

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// dialer returns a function that connects from a node of the cluster: the connection belongs to this process, so clients can be part of a test.
func (c *cluster) dialer(t *testing.T) dialFunc {
	t.Helper()
	id, err := c.lab("node", "exec", "--", "readlink", "/proc/self/ns/net")
	if err != nil {
		t.Fatalf("%v\n%s", err, id)
	}
	ns := c.openNS(t, strings.TrimSpace(id))
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		var conn net.Conn
		err := inNS(ns, func() (err error) {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return conn, err
	}
}

// openNS opens a network namespace by what /proc calls it, as long as a process is in it.
func (c *cluster) openNS(t *testing.T, id string) int {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if got, _ := os.Readlink(l); got != id {
			continue
		}
		if f, err := os.Open(l); err == nil {
			t.Cleanup(func() { _ = f.Close() })
			return int(f.Fd())
		}
	}
	t.Fatalf("no process is in %s", id)
	return -1
}

// inNS runs fn on a thread of its own in the namespace.
func inNS(ns int, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			result <- err
			return
		}
		result <- fn()
	}()
	return <-result
}
