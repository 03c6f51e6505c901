package rawio_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/rawio"
)

// pair are the two ends of a TCP connection, the first of which is read and written by the package.
func pair(t *testing.T) (net.Conn, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return rawio.New(a), b.(*net.TCPConn)
}

// TestBulk: what does not fit waits, in both directions at once, and the end is io.EOF.
func TestBulk(t *testing.T) {
	a, b := pair(t)
	sent := make([]byte, 10<<20)
	_, _ = rand.Read(sent)
	failed := make(chan error, 3)
	var back []byte
	go func() {
		_, err := io.Copy(b, b) // an echo
		_ = b.CloseWrite()
		failed <- err
	}()
	go func() {
		n, err := a.Write(sent)
		if err == nil && n != len(sent) {
			err = io.ErrShortWrite
		}
		_ = a.(interface{ CloseWrite() error }).CloseWrite()
		failed <- err
	}()
	go func() {
		var err error
		back, err = io.ReadAll(a)
		failed <- err
	}()
	for range 3 {
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(back, sent) {
		t.Errorf("%d bytes came back of %d, or others", len(back), len(sent))
	}
	if n, err := a.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %d, %v", n, err)
	}
}

func TestErrors(t *testing.T) {
	a, b := pair(t)
	buf := make([]byte, 1)
	if n, err := a.Read(nil); n != 0 || err != nil {
		t.Errorf("nothing to read: %d, %v", n, err)
	}
	if n, err := a.Write(nil); n != 0 || err != nil {
		t.Errorf("nothing to write: %d, %v", n, err)
	}
	_ = a.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := a.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a deadline: %v", err)
	}
	_ = a.SetReadDeadline(time.Time{})
	_ = b.SetLinger(0)
	_ = b.Close()
	if _, err := a.Read(buf); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a reset: %v", err)
	}
	if _, err := a.Write(buf); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("written after a reset: %v", err)
	}
	_ = a.Close()
	if _, err := a.Read(buf); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := a.Write(buf); !errors.Is(err, net.ErrClosed) {
		t.Errorf("written when closed: %v", err)
	}
}

// TestClosedWhileWaiting: a connection that is closed ends whoever waits for it.
func TestClosedWhileWaiting(t *testing.T) {
	a, b := pair(t)
	reads, ended := make(chan error), make(chan error, 1)
	go func() {
		_, err := a.Read(make([]byte, 1))
		reads <- err
		_, err = a.Read(make([]byte, 1))
		ended <- err
	}()
	if _, err := b.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := <-reads; err != nil {
		t.Fatal(err)
	}
	_ = a.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it waits on")
	}
}
