package agent

import (
	"context"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// question is a DNS message's header and nothing else.
func question(id uint16) []byte {
	return append(binary.BigEndian.AppendUint16(nil, id), 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
}

// A laptop's question goes to the resolvers of the pod: the next one if the first does not answer, and by TCP if the answer is cut.
func TestResolve(t *testing.T) {
	pc, l := nettest.SamePort(t)
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			a := append([]byte{}, buf[:n]...)
			_, _ = pc.WriteTo(question(binary.BigEndian.Uint16(a)+1), from) // an answer to another question
			a[2] |= 0x80
			if a[1] == 2 {
				a[2] |= truncated
			}
			_, _ = pc.WriteTo(append(a, "by UDP"...), from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 2+minDNS)
			if _, err := io.ReadFull(c, b); err == nil {
				a := append(b[2:], "by TCP"...)
				_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
			}
			_ = c.Close()
		}
	}()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("search x\nnameserver 127.0.0.1:1\nnameserver "+pc.LocalAddr().String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := startResolving(t, conf)
	s := w.mgr.up()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	for id, want := range map[uint16]string{1: "by UDP", 2: "by TCP"} {
		a, err := tunnel.Query(ctx, s, question(id))
		if err != nil || string(a[minDNS:]) != want || binary.BigEndian.Uint16(a) != id {
			t.Errorf("%d: %q, %v, want %q", id, a, err, want)
		}
	}
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if a, err := tunnel.Query(ctx, s, question(3)); err == nil {
		t.Errorf("nobody answers: %q", a)
	}
}
