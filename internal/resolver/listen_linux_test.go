package resolver

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// lines are what was logged.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// TestOutOfDescriptors: who comes over TCP while the process may open nothing is answered once it may, and the listener does not spin meanwhile.
func TestOutOfDescriptors(t *testing.T) {
	log := make(lines, 100)
	s, err := New(Config{Cluster: newFakeCluster(t, "web.default.svc.cluster.local. 30 IN A 10.96.0.5").ask, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	s.SetNames(names)
	c, err := net.Dial("tcp", s.Addr().String()) // the kernel takes it, and keeps it until it is accepted
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := writeTCP(c, pack(t, question("web.default.svc.cluster.local", dns.TypeA))); err != nil {
		t.Fatal(err)
	}

	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}
	defer restore()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	begin := time.Now()
	go func() { done <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	select {
	case line := <-log: // at the tenth failure
		if !strings.Contains(line, "dns listener fails") || !strings.Contains(line, syscall.EMFILE.Error()) {
			t.Errorf("logged: %s", line)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nothing fails")
	}
	if d := time.Since(begin); d < 511*time.Millisecond { // 1 + 2 + 4 … + 256
		t.Errorf("ten tries within %v", d)
	}
	restore()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := readTCP(c)
	if err != nil {
		t.Fatal(err)
	}
	if r := unpack(t, b); len(r.Answer) != 1 {
		t.Errorf("answered: %v", r)
	}
}
