package rootapi

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// fakeRootd accepts one connection and lets fn answer; fn gets each message.
func fakeRootd(t *testing.T, fn func(c *net.UnixConn, m Message) error) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, MaxPacket)
		for {
			m, _, err := Receive(c, buf, false)
			if err != nil || fn(c, m) != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

func version(c *net.UnixConn, m Message) error {
	return Send(c, Message{ID: m.ID, Op: OpReply, Version: &Version{Program: "fake", Protocol: Protocol}}, nil)
}

// A doppel-rootd that hangs holds up nobody for ever: neither the question who it is, nor the wish that it ends.
func TestHangs(t *testing.T) {
	for name, answer := range map[string]func(*net.UnixConn, Message) error{
		"says nothing": func(*net.UnixConn, Message) error { return nil },
		"does not end": func(c *net.UnixConn, m Message) error {
			if m.Op == OpVersion {
				return version(c, m)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 2*quitTimeout)
			defer cancel()
			_, err := Stop(ctx, fakeRootd(t, answer), false)
			if ue, ok := errors.AsType[*uerr.Error](err); !ok || !strings.Contains(err.Error(), "does not answer") || !strings.HasPrefix(ue.Hint, "end it with: sudo") {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestDialErrors(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := Dial(ctx, filepath.Join(t.TempDir(), "nothing"), Options{}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody there: %v", err)
	}
	path := fakeRootd(t, func(c *net.UnixConn, m Message) error {
		Send(c, Message{Op: OpReply, Error: uerr.New(uerr.Denied, "ask", "you may not")}, nil)
		return errors.New("end")
	})
	_, err := Dial(ctx, path, Options{})
	if ue, ok := errors.AsType[*uerr.Error](err); !ok || ue.Kind != uerr.Denied || ue.Hint != "ask" || !errors.Is(err, ErrClosed) {
		t.Errorf("refused: %v", err)
	}
	path = fakeRootd(t, func(c *net.UnixConn, m Message) error {
		return Send(c, Message{ID: m.ID, Op: OpReply, Version: &Version{Program: "fake", Protocol: Protocol + 1}}, nil)
	})
	if _, err := Dial(ctx, path, Options{}); uerr.From(err).Kind != uerr.Conflict || !strings.Contains(uerr.From(err).Hint, "doppel quit -s") {
		t.Errorf("another protocol: %v", err)
	}
}

// quit -s, which a doppel-rootd of another protocol is said to end with, ends it; a clean-up that cannot ask whether it is idle keeps it.
func TestStopOther(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, ifIdle := range []bool{false, true} {
		var quit atomic.Bool
		path := fakeRootd(t, func(c *net.UnixConn, m Message) error {
			if m.Op == OpQuit {
				quit.Store(true)
				return Send(c, Message{ID: m.ID, Op: OpReply}, nil)
			}
			return Send(c, Message{ID: m.ID, Op: OpReply, Version: &Version{Program: "fake", Protocol: Protocol - 1}}, nil)
		})
		if kept, err := Stop(ctx, path, ifIdle); kept != ifIdle || quit.Load() == ifIdle || err != nil {
			t.Errorf("if idle %v: kept %v, told to quit %v, %v", ifIdle, kept, quit.Load(), err)
		}
	}
}

// TestLateReply cancels a call whose reply then comes with a descriptor: nobody must keep it.
func TestLateReply(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	asked, release := make(chan struct{}), make(chan struct{})
	path := fakeRootd(t, func(c *net.UnixConn, m Message) error {
		if m.Op == OpVersion {
			return version(c, m)
		}
		close(asked)
		<-release
		defer w.Close()
		return Send(c, Message{ID: m.ID, Op: OpReply}, w)
	})
	c, err := Dial(context.Background(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() { _, err := c.MarkedSocket(ctx, UDP4); res <- err }()
	<-asked
	cancel()
	if err := <-res; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled call: %v", err)
	}
	close(release)
	r.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the pipe is still open: %v", err)
	}
}

func TestPingsAndChanges(t *testing.T) {
	var pongs atomic.Int64
	var alive atomic.Bool
	var conn atomic.Pointer[net.UnixConn]
	path := fakeRootd(t, func(c *net.UnixConn, m Message) error {
		if m.Op == OpPong {
			pongs.Add(1)
			return nil
		}
		conn.Store(c)
		return version(c, m)
	})
	told := make(chan State, 1)
	c, err := Dial(context.Background(), path, Options{Alive: alive.Load, Changed: func(st State) { told <- st }})
	if err != nil {
		t.Fatal(err)
	}
	ping := func() {
		if err := Send(conn.Load(), Message{ID: 1, Op: OpPing}, nil); err != nil {
			t.Fatal(err)
		}
	}
	ping()
	if err := Send(conn.Load(), Message{Op: OpChanged, State: &State{DNSMode: DNSNone}}, nil); err != nil {
		t.Fatal(err)
	}
	if st := <-told; st.DNSMode != DNSNone { // after the ping, which is therefore not going to be answered
		t.Errorf("told %+v", st)
	}
	if n := pongs.Load(); n != 0 {
		t.Errorf("%d answers of one that is not alive", n)
	}
	alive.Store(true)
	ping()
	nettest.Poll(t, 5*time.Second, "answered", func() bool { return pongs.Load() == 1 })
	c.Close()
	if _, err := c.Version(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("call after Close: %v", err)
	}
}
