package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"testing/iotest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux/muxtest"
)

// What is read is what was sent, whatever the sizes, and a quiet connection gives the large buffer back.
func TestAhead(t *testing.T) {
	sent := make([]byte, 3<<20)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	for name, from := range map[string]io.Reader{
		"all at once":    bytes.NewReader(sent),
		"half of it":     iotest.HalfReader(bytes.NewReader(sent)),
		"and its end":    iotest.DataErrReader(bytes.NewReader(sent)),
		"a byte":         iotest.OneByteReader(bytes.NewReader(sent[:10_000])),
		"much, then few": io.MultiReader(bytes.NewReader(sent[:200_000]), iotest.OneByteReader(bytes.NewReader(sent[200_000:201_000]))),
	} {
		a := newAhead(from)
		largest := 0
		var got []byte
		for p := make([]byte, 1500); ; {
			n, err := a.Read(p[:1+rand.IntN(len(p))])
			got, largest = append(got, p[:n]...), max(largest, len(a.buf))
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if !bytes.Equal(got, sent[:len(got)]) || len(got) < 10_000 && name != "a byte" {
			t.Errorf("%s: %d bytes, not the same", name, len(got))
		}
		switch name {
		case "a byte":
			if largest != readLittle {
				t.Errorf("%s: a buffer of %d bytes", name, largest)
			}
		case "much, then few":
			if largest != readAhead || len(a.buf) != readLittle {
				t.Errorf("%s: a buffer of %d bytes, at last %d", name, largest, len(a.buf))
			}
		case "all at once":
			if largest != readAhead || len(got) != len(sent) {
				t.Errorf("%s: a buffer of %d bytes, %d read", name, largest, len(got))
			}
		}
	}
}

// endless is a connection on which a write waits as long as it takes.
type endless struct{ net.Conn }

func (endless) SetWriteDeadline(time.Time) error { return nil }

// TestCloseStalled: what was written by way of the API server, and does not leave, does not hold up the end.
func TestCloseStalled(t *testing.T) {
	link := muxtest.NewLink(muxtest.Config{Buffer: 64 << 10})
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	server := tls.Server(link.B, serverTLS(id))
	defer link.B.Close()
	shaken := make(chan error)
	go func() { shaken <- server.Handshake() }()
	s := NewSocket(endless{link.A})
	client := tls.Client(s, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{alpn}, InsecureSkipVerify: true}) //nolint:gosec // nobody is asked who he is
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	_, cancel := context.WithCancelCause(t.Context())
	c := s.Over(&upgradedConn{ReadWriteCloser: client, cancel: cancel})
	link.Stall(true)
	before, _ := link.Bytes()
	ended := make(chan struct{}, 2)
	go func() {
		for err := error(nil); err == nil; {
			_, err = c.Write(make([]byte, 64<<10))
		}
		ended <- struct{}{}
	}()
	for still, last := 0, before; still < 20; time.Sleep(time.Millisecond) { // until it is stuck
		now, _ := link.Bytes()
		if still++; now != last || now == before {
			still, last = 0, now
		}
	}
	go func() { _ = c.Close(); ended <- struct{}{} }()
	for range 2 {
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			t.Fatal("it goes on")
		}
	}
}
