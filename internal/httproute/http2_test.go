package httproute

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/flow"
)

// h2Server answers HTTP/2 without TLS: with its name, the target, the number of bytes and their hash; as a stream that echoes; never; or with
// so many bytes.
func h2Server(t testing.TB, name string) (string, *http.Server) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			return
		}
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprintf(w, "%s %s %d", name, r.URL.RequestURI(), n)
		w.Header().Set("X-Sum", fmt.Sprintf("%x %s", h.Sum(nil), r.Trailer.Get("X-T")))
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		b := make([]byte, 1000)
		for {
			n, err := r.Body.Read(b)
			w.Write(append([]byte(name+":"), b[:n]...))
			w.(http.Flusher).Flush()
			if err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/hang", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		w.Header().Set("X-Gone", "1")
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</x>")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, name)
	})
	mux.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) {
		b := make([]byte, 64<<10)
		for range 128 {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/abort", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	srv := &http.Server{Handler: mux, Protocols: new(http.Protocols)}
	srv.Protocols.SetUnencryptedHTTP2(true)
	l := listen(t)
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return l.Addr().String(), srv
}

func (w *world) h2Client() *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 30 * time.Second}
}

func (w *world) url(path string) string { return "http://" + w.front.Addr().String() + path }

func (w *world) req(ctx context.Context, method, path, id string, body io.Reader) *http.Request {
	r, err := http.NewRequestWithContext(ctx, method, w.url(path), body)
	if err != nil {
		w.t.Fatal(err)
	}
	if id != "" {
		r.Header.Set("X-Id", id)
	}
	return r
}

// fetch returns the answer's body and trailers, or the error.
func fetch(c *http.Client, r *http.Request) (string, http.Header, error) {
	resp, err := c.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), resp.Trailer, err
}

// TestHTTP2PerRequest sends streams for three places over one connection at once, with bodies larger than any window, and trailers.
func TestHTTP2PerRequest(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, _ := h2Server(t, "lou")
	may, _ := h2Server(t, "may")
	w.at(App, app)
	w.rule("lou", lou)
	w.rule("may", may)
	c := w.h2Client()
	var wg sync.WaitGroup
	for i := range 60 {
		id := []string{"", "lou", "may", "nobody"}[i%4]
		name := map[string]string{"": "app", "nobody": "app"}[id] + map[string]string{"lou": "lou", "may": "may"}[id]
		size := []int{0, 1, 1000, 70000, 1 << 20}[i%5]
		body := make([]byte, size)
		r := rand.New(rand.NewPCG(uint64(i), 0))
		for k := range body {
			body[k] = byte(r.Int())
		}
		wg.Go(func() {
			req := w.req(t.Context(), "POST", fmt.Sprintf("/%d?q", i), id, io.MultiReader(bytes.NewReader(body)))
			req.Trailer = http.Header{"X-T": {"tr"}}
			got, trailer, err := fetch(c, req)
			want := fmt.Sprintf("%s /%d?q %d", name, i, size)
			if err != nil || got != want {
				t.Errorf("%q %v, want %q", got, err, want)
				return
			}
			if sum := trailer.Get("X-Sum"); sum != fmt.Sprintf("%x tr", sha256.Sum256(body)) {
				t.Errorf("trailer %q", sum)
			}
		})
	}
	wg.Wait()
	for _, to := range []string{App, "lou", "may"} {
		if n := w.opened(to); n != 1 {
			t.Errorf("%d connections to %q", n, to)
		}
	}
}

// TestHTTP2Streams talks both ways on streams to both places at once, and sees provisional answers.
func TestHTTP2Streams(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, _ := h2Server(t, "lou")
	w.at(App, app)
	w.rule("lou", lou)
	c := w.h2Client()
	for _, id := range []string{"lou", ""} {
		name := id
		if id == "" {
			name = "app"
		}
		pr, pw := io.Pipe()
		resp, err := c.Do(w.req(t.Context(), "POST", "/echo", id, pr))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		br := bufio.NewReader(resp.Body)
		for i := range 20 {
			fmt.Fprintf(pw, "%d\n", i)
			line, err := br.ReadString('\n')
			if want := fmt.Sprintf("%s:%d\n", name, i); err != nil || line != want {
				t.Fatalf("%q %v, want %q", line, err, want)
			}
		}
		pw.Close()
		if b, err := io.ReadAll(br); err != nil || string(b) != name+":" {
			t.Fatalf("%q %v", b, err)
		}
		hints := 0
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(int, textproto.MIMEHeader) error { hints++; return nil }})
		if got, _, err := fetch(c, w.req(ctx, "GET", "/hints", id, nil)); err != nil || got != name || hints != 1 {
			t.Fatalf("%q %v, %d hints", got, err, hints)
		}
	}
}

// TestHTTP2NotTaken gives the app what a laptop does not take: refused, or no HTTP/2 there.
func TestHTTP2NotTaken(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	w.at(App, app)
	w.rule("lou", "")
	w.rule("may", httpServer(t, "may"))
	c := w.h2Client()
	for _, id := range []string{"lou", "may", "lou"} {
		if got, _, err := fetch(c, w.req(t.Context(), "POST", "/x", id, strings.NewReader("hello"))); err != nil || got != "app /x 5" {
			t.Errorf("%s: %q %v", id, got, err)
		}
	}
}

// TestHTTP2AppIsHTTP1 gives the client what an app says that does not know HTTP/2.
func TestHTTP2AppIsHTTP1(t *testing.T) {
	w := newWorld(t)
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		io.WriteString(c, "HTTP/1.1 505 No\r\nConnection: close\r\n\r\n")
		io.Copy(io.Discard, r)
	}))
	c := w.dial()
	c.send(http2.ClientPreface)
	if s, _ := c.r.ReadString('\n'); s != "HTTP/1.1 505 No\r\n" {
		t.Errorf("%q", s)
	}
}

// TestHTTP2Preface has our settings come before any other frame, whatever the client has sent by then.
func TestHTTP2Preface(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	sent := make(chan struct{})
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		<-sent // the app is slow, the client is not
		up, err := net.Dial("tcp", app)
		if err != nil {
			return
		}
		flow.Relay(flow.FromTCP(up.(*net.TCPConn)), &readAheadStream{r, flow.FromTCP(c)})
	}))
	c := w.dial()
	c.send(http2.ClientPreface)
	fr := http2.NewFramer(c.TCPConn, c.r)
	fr.WriteSettings()
	fr.WritePing(false, [8]byte{1})
	fr.WriteSettings()
	close(sent)
	var types []http2.FrameType
	for range 4 {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		types = append(types, f.Header().Type)
		if s, ok := f.(*http2.SettingsFrame); len(types) == 1 && (!ok || s.IsAck()) {
			t.Errorf("the first frame is %v", f)
		}
	}
}

// readAheadStream is a stream whose beginning was read ahead.
type readAheadStream struct {
	r *bufio.Reader
	flow.Stream
}

func (b *readAheadStream) Read(p []byte) (int, error) { return b.r.Read(p) }

// TestHTTP2Cancel passes resets on, in both directions.
func TestHTTP2Cancel(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, _ := h2Server(t, "lou")
	w.at(App, app)
	w.rule("lou", lou)
	c := w.h2Client()
	for _, id := range []string{"lou", ""} {
		ctx, cancel := context.WithCancel(t.Context())
		resp, err := c.Do(w.req(ctx, "GET", "/hang", id, nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		cancel()
		if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		_, _, err = fetch(c, w.req(t.Context(), "GET", "/abort", id, nil))
		if se := (http2.StreamError{}); err == nil || !strings.Contains(err.Error(), "INTERNAL_ERROR") {
			t.Errorf("aborted by the server: %v %v", err, se)
		}
		if _, _, err := fetch(c, w.req(t.Context(), "GET", "/ok", id, nil)); err != nil {
			t.Errorf("after that: %v", err)
		}
	}
}

// TestHTTP2Shutdown has the app go away in order while streams run.
func TestHTTP2Shutdown(t *testing.T) {
	w := newWorld(t)
	app, srv := h2Server(t, "app")
	w.at(App, app)
	c := w.h2Client()
	pr, pw := io.Pipe()
	resp, err := c.Do(w.req(t.Context(), "POST", "/echo", "", pr))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	down := make(chan error, 1)
	go func() { down <- srv.Shutdown(t.Context()) }()
	next, _ := h2Server(t, "next")
	w.at(App, next)
	deadline := time.Now().Add(10 * time.Second)
	for {
		got, _, err := fetch(c, w.req(t.Context(), "GET", "/", "", nil))
		if err != nil {
			t.Fatal(err)
		}
		if got == "next / 0" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %q", got)
		}
	}
	fmt.Fprint(pw, "on")
	pw.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "app:onapp:" {
		t.Errorf("the stream that ran: %q %v", b, err)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
}

// readRequest is a server up to the head of the first request.
func readRequest(fr *http2.Framer, r io.Reader, settings ...http2.Setting) error {
	if _, err := io.ReadFull(r, make([]byte, len(http2.ClientPreface))); err != nil {
		return err
	}
	if err := fr.WriteSettings(settings...); err != nil {
		return err
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil || f.Header().Type == http2.FrameHeaders {
			return err
		}
	}
}

// writeRequest sends the head of a request for the laptop of lou.
func writeRequest(fr *http2.Framer, enc *hpack.Encoder, head *bytes.Buffer, id uint32, method string) {
	head.Reset()
	for _, f := range [][2]string{{":method", method}, {":scheme", "http"}, {":path", "/"}, {":authority", "h"}, {"x-id", "lou"}} {
		enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head.Bytes(), EndStream: method == "GET", EndHeaders: true})
}

// TestHTTP2GoAwayWithWaiting has a laptop's process go that takes one stream at a time and serves none: those that wait go to its next connection.
func TestHTTP2GoAwayWithWaiting(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	w.at(App, app)
	next, _ := h2Server(t, "next")
	wait, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		fr := http2.NewFramer(c, r)
		if readRequest(fr, r, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1}) != nil {
			return
		}
		<-wait
		fr.WriteGoAway(0, http2.ErrCodeNo, nil)
		<-end // the connection stays
	}))
	c := w.dial()
	c.send(http2.ClientPreface)
	fr := http2.NewFramer(c.TCPConn, c.r)
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	fr.WriteSettings()
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	const streams = 20
	for i := range uint32(streams) {
		writeRequest(fr, enc, &head, 2*i+1, "GET")
	}
	fr.WritePing(false, [8]byte{1})
	refused, answered := 0, 0
	for refused+answered < streams {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("%v after %d refused, %d answered", err, refused, answered)
		}
		switch f := f.(type) {
		case *http2.PingFrame: // all has been read
			w.mu.Lock()
			w.addrs["lou"] = next
			w.mu.Unlock()
			close(wait)
		case *http2.RSTStreamFrame:
			refused++
			if f.StreamID != 1 || f.ErrCode != http2.ErrCodeRefusedStream {
				t.Errorf("%v", f)
			}
		case *http2.DataFrame:
			if string(f.Data()) == "next / 0" {
				answered++
			}
		}
	}
}

// TestHTTP2LostUploads loses laptops amid uploads: the client may send as much to others as before.
func TestHTTP2LostUploads(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	w.at(App, app)
	sent := make(chan struct{})
	w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		if readRequest(http2.NewFramer(c, r), r, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) != nil {
			return
		}
		<-sent
		c.SetLinger(0)
	}))
	c := w.dial()
	c.send(http2.ClientPreface)
	fr := http2.NewFramer(c.TCPConn, c.r)
	fr.WriteSettings()
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	const rounds, frames = 12, 10
	granted := 0
	for i := range uint32(rounds) {
		writeRequest(fr, enc, &head, 2*i+1, "POST")
		for range frames {
			fr.WriteData(2*i+1, false, make([]byte, 16<<10))
		}
		fr.WritePing(false, [8]byte{1})
		for lost := false; !lost; {
			f, err := fr.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			switch f := f.(type) {
			case *http2.PingFrame:
				sent <- struct{}{}
			case *http2.RSTStreamFrame:
				lost = true
			case *http2.WindowUpdateFrame:
				if f.StreamID == 0 {
					granted += int(f.Increment)
				}
			}
		}
	}
	if again := granted - (ownWindow - defaultWindow); again < connWindow/16 {
		t.Errorf("%d bytes were sent, and %d granted again", rounds*frames*16<<10, again)
	}
}

// TestHTTP2LaptopLost ends the streams that it had and gives the app the next ones.
func TestHTTP2LaptopLost(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, srv := h2Server(t, "lou")
	w.at(App, app)
	w.rule("lou", lou)
	c := w.h2Client()
	other, err := c.Do(w.req(t.Context(), "GET", "/hang", "", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Body.Close()
	resp, err := c.Do(w.req(t.Context(), "GET", "/hang", "lou", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	w.rule("lou", "")
	srv.Close()
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("the laptop's stream ended in order")
	}
	if got, _, err := fetch(c, w.req(t.Context(), "GET", "/", "lou", nil)); err != nil || got != "app / 0" {
		t.Errorf("%q %v", got, err)
	}
	if w.opened(App) != 1 {
		t.Errorf("%d connections to the app", w.opened(App))
	}
}

// TestHTTP2StuckStream has a client that does not read one answer: the others go on.
func TestHTTP2StuckStream(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	lou, _ := h2Server(t, "lou")
	w.at(App, app)
	w.rule("lou", lou)
	c := w.h2Client()
	for range 3 {
		resp, err := c.Do(w.req(t.Context(), "GET", "/big", "lou", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
	}
	for range 20 {
		for _, id := range []string{"", "lou"} {
			if _, _, err := fetch(c, w.req(t.Context(), "POST", "/x", id, strings.NewReader("hello"))); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, _, err := fetch(c, w.req(t.Context(), "GET", "/big", "", nil))
	if err != nil || len(got) != 8<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestHTTP2Whole has an intercept of the whole port beside one with a match.
func TestHTTP2Whole(t *testing.T) {
	w := newWorld(t)
	app, _ := h2Server(t, "app")
	all, _ := h2Server(t, "all")
	lou, _ := h2Server(t, "lou")
	w.at(App, app)
	w.at("all", all)
	w.rest = "all"
	w.rule("lou", lou)
	c := w.h2Client()
	for id, want := range map[string]string{"": "all / 0", "lou": "lou / 0"} {
		if got, _, err := fetch(c, w.req(t.Context(), "GET", "/", id, nil)); err != nil || got != want {
			t.Errorf("%q %v, want %q", got, err, want)
		}
	}
	w.at("all", "") // its laptop is gone
	c = w.h2Client()
	if got, _, err := fetch(c, w.req(t.Context(), "GET", "/", "", nil)); err != nil || got != "app / 0" {
		t.Errorf("%q %v", got, err)
	}
}

// FuzzHTTP2Client sends what a hostile client may: the connection ends, and nothing hangs or panics.
func FuzzHTTP2Client(f *testing.F) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	fr.WriteSettings()
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82, 0x84, 0x86, 0x41, 0x01, 'h'}, EndHeaders: true})
	fr.WriteData(1, true, []byte("hello"))
	fr.WriteRSTStream(1, http2.ErrCodeCancel)
	fr.WriteWindowUpdate(0, 5)
	f.Add(b.Bytes())
	f.Add([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		w := newWorld(t)
		app, srv := h2Server(t, "app")
		w.at(App, app)
		c := w.dial()
		io.WriteString(c.TCPConn, http2.ClientPreface)
		c.TCPConn.Write(b)
		c.CloseWrite()
		io.Copy(io.Discard, c.r)
		c.Close()
		select {
		case <-w.ends:
		case <-time.After(10 * time.Second):
			t.Fatal("the connection does not end")
		}
		srv.Close()
	})
}
