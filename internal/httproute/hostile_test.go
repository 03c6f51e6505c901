package httproute

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2Conn is a client of HTTP/2 that writes frames by hand.
type h2Conn struct {
	*client
	fr  *http2.Framer
	buf bytes.Buffer
	enc *hpack.Encoder
}

func (w *world) h2Dial() *h2Conn {
	c := &h2Conn{client: w.dial()}
	c.fr = http2.NewFramer(c.TCPConn, c.r)
	c.enc = hpack.NewEncoder(&c.buf)
	c.send(http2.ClientPreface)
	if err := c.fr.WriteSettings(); err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (c *h2Conn) block(fields ...string) []byte {
	c.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		if err := c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			c.t.Fatal(err)
		}
	}
	return bytes.Clone(c.buf.Bytes())
}

// headers sends a head, in as many frames as it takes.
func (c *h2Conn) headers(stream uint32, block []byte) error {
	n := min(len(block), 16<<10)
	err := c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block[:n], EndStream: true, EndHeaders: n == len(block)})
	for block = block[n:]; err == nil && len(block) > 0; block = block[n:] {
		n = min(len(block), 16<<10)
		err = c.fr.WriteContinuation(stream, n == len(block), block[:n])
	}
	return err
}

// until reads until a stream is answered or reset.
func (c *h2Conn) until(stream uint32) string {
	c.t.Helper()
	for {
		f, err := c.fr.ReadFrame()
		if err != nil {
			c.t.Fatal(err)
		}
		if f.Header().StreamID != stream {
			continue
		}
		switch f := f.(type) {
		case *http2.RSTStreamFrame:
			return f.ErrCode.String()
		case *http2.DataFrame:
			if len(f.Data()) > 0 {
				return string(f.Data())
			}
		}
	}
}

// allocated is how many bytes have been, by all.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// TestHTTP2Bomb: a head that is some kilobytes and would be megabytes is not unpacked. It costs its own stream, or its own connection.
func TestHTTP2Bomb(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, _ := h2Server(t, "lou")
	w.at(App, app)
	w.rule("lou", lou)
	bomb := func(c *h2Conn, n int) {
		b := c.block(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "h", "x", strings.Repeat("x", 4000))
		// The last field is the newest of the dynamic table: 62 (RFC 7541, section 2.3.3), in one byte.
		if err := c.headers(1, append(b, bytes.Repeat([]byte{0x80 | 62}, n)...)); err != nil {
			t.Log(err) // cut off while it is sent
		}
	}
	before := allocated()
	c := w.h2Dial()
	bomb(c, 10_000)
	if got := c.until(1); got != http2.ErrCodeEnhanceYourCalm.String() {
		t.Errorf("answered with %s", got)
	}
	far := w.h2Dial()
	bomb(far, 100_000)
	if got, err := io.ReadAll(far.r); bytes.Contains(got, []byte("app /")) {
		t.Errorf("answered with %q, %v", got, err)
	}
	if grown := allocated() - before; grown > 64<<20 {
		t.Errorf("%d MiB for 440 MB of fields", grown>>20)
	}
	for i, id := range []string{"", "lou"} {
		stream := uint32(3 + 2*i)
		if err := c.headers(stream, c.block(":method", "GET", ":scheme", "http", ":path", "/ok", ":authority", "h", "x-id", id)); err != nil {
			t.Fatal(err)
		}
		if got, want := c.until(stream), []string{"app", "lou"}[i]; !strings.HasPrefix(got, want+" /ok") {
			t.Errorf("then: %q, want %s", got, want)
		}
	}
}

// TestHTTP2RapidReset: streams that are opened and reset at once, without end (CVE-2023-44487), leave nothing behind, and others are answered meanwhile.
func TestHTTP2RapidReset(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, _ := h2Server(t, "lou")
	w.at(App, app)
	w.rule("lou", lou)
	other := w.h2Client()
	answered := func() {
		t.Helper()
		if got, _, err := fetch(other, w.req(t.Context(), "GET", "/", "lou", nil)); err != nil || got != "lou / 0" {
			t.Fatalf("another client: %q, %v", got, err)
		}
	}
	answered()
	before := runtime.NumGoroutine()
	c := w.h2Dial()
	ended := make(chan struct{})
	go func() { defer close(ended); _, _ = io.Copy(io.Discard, c.r) }()
	var err error
	for i := uint32(0); i < 20_000 && err == nil; i++ {
		if err = c.headers(1+2*i, c.block(":method", "GET", ":scheme", "http", ":path", "/hang", ":authority", "h", "x-id", []string{"", "lou"}[i%2])); err == nil {
			err = c.fr.WriteRSTStream(1+2*i, http2.ErrCodeCancel)
		}
		if i%2000 == 0 {
			answered()
		}
	}
	var ne net.Error
	if err != nil && (errors.As(err, &ne) && ne.Timeout()) {
		t.Error(err) // it may be cut off, but not held up
	}
	_ = c.Close()
	<-ended
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before+5; {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
		time.Sleep(5 * time.Millisecond) // polling, not synchronisation
	}
}
