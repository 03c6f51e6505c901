package agent

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

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

// resolver answers each question as say tells, in its time; nil: not at all.
func resolver(t *testing.T, say func(question []byte) []byte) (addr string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pc.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			if a := say(buf[:n]); a != nil {
				_, _ = pc.WriteTo(a, from)
			}
		}
	}()
	return pc.LocalAddr().String()
}

// A resolver that is late or does not help has the next one asked, as in the pod's own programs, and in time for the manager.
func TestResolveServers(t *testing.T) {
	const some = 16 // more than a code: an address
	say := func(code byte) func([]byte) []byte {
		return func(q []byte) []byte {
			a := append([]byte{}, q...)
			a[2] |= 0x80
			if a[3] = code & 0xf; code == some {
				a[7] = 1
			}
			return append(a, code)
		}
	}
	silent := func([]byte) []byte { return nil }
	for name, tt := range map[string]struct {
		servers []func([]byte) []byte
		want    int // -1: an error
	}{
		"the first":                           {[]func([]byte) []byte{say(some), say(2)}, some},
		"silence":                             {[]func([]byte) []byte{silent, say(some)}, some},
		"two are silent":                      {[]func([]byte) []byte{silent, silent, say(some)}, some},
		"SERVFAIL":                            {[]func([]byte) []byte{say(2), say(some)}, some},
		"NOTIMP, REFUSED":                     {[]func([]byte) []byte{say(4), say(5), say(some)}, some},
		"nobody helps":                        {[]func([]byte) []byte{say(5), say(2)}, 5},
		"no such name":                        {[]func([]byte) []byte{say(3), say(some)}, 3},
		"nothing of this type":                {[]func([]byte) []byte{say(0), say(some)}, 0},
		"silence, and no such name":           {[]func([]byte) []byte{silent, say(3)}, 3},
		"SERVFAIL, and no such name":          {[]func([]byte) []byte{say(2), say(3), say(some)}, 3},
		"only silence":                        {[]func([]byte) []byte{silent, silent, silent}, -1},
		"no such name before the first's own": {nil, some},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if tt.servers == nil {
				second := make(chan struct{})
				tt.servers = []func([]byte) []byte{
					func(q []byte) []byte { <-second; time.Sleep(20 * time.Millisecond); return say(some)(q) }, // that one's comes first
					func(q []byte) []byte { close(second); return say(3)(q) },
				}
			}
			var servers []string
			for _, s := range tt.servers {
				servers = append(servers, resolver(t, s))
			}
			timeout := time.Minute // where something is to come of it
			if name == "silence, and no such name" || tt.want < 0 {
				timeout = time.Second
			}
			a, err := askServers(t.Context(), servers, question(7), timeout, 50*time.Millisecond)
			got := -1
			if err == nil {
				got = int(a[minDNS])
			}
			if got != tt.want {
				t.Errorf("%d, %v, want %d", got, err, tt.want)
			}
		})
	}
}
