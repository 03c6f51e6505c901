package httproute

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/flow"
)

// narrow is a client that takes n bytes of each answer until it says otherwise.
func (w *world) narrow(n uint32) *h2Conn {
	c := w.h2Dial()
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := c.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: n}); err != nil {
		w.t.Fatal(err)
	}
	return c
}

// request sends the head of one for lou, whose body is left open.
func (c *h2Conn) request(id uint32, method string) {
	writeRequest(c.fr, c.enc, &c.buf, id, method)
}

// next reads until a frame is wanted.
func (c *h2Conn) next(what string, want func(http2.Frame) bool) http2.Frame {
	c.t.Helper()
	for {
		f, err := c.fr.ReadFrame()
		if err != nil {
			c.t.Fatalf("%s: %v", what, err)
		}
		if want(f) {
			return f
		}
	}
}

// end reads a stream to its end: its bytes, and how it ended.
func (c *h2Conn) end(id uint32) (n int, how string) {
	c.t.Helper()
	c.next("the end of a stream", func(f http2.Frame) bool {
		if f.Header().StreamID != id {
			return false
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			if n += len(f.Data()); f.StreamEnded() {
				how = "content"
			}
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				how = "trailers"
			}
		case *http2.RSTStreamFrame:
			how = f.ErrCode.String()
		}
		return how != ""
	})
	return n, how
}

// listOf encodes a header list without a table.
func listOf(fields ...string) []byte {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1], Sensitive: true})
	}
	return b.Bytes()
}

// told is a stream that tells of its Close.
type told struct {
	flow.Stream
	closed func()
}

// Close implements flow.Stream.
func (s told) Close() error {
	defer s.closed()
	return s.Stream.Close()
}

// TestHTTP2AnswerOfLostOrigin has an origin end after complete answers that the client has not taken yet: it gets all of them.
func TestHTTP2AnswerOfLostOrigin(t *testing.T) {
	const size = 10_000
	for _, trailers := range []bool{false, true} {
		for _, method := range []string{"GET", "POST"} {
			for _, to := range []string{App, "lou"} {
				t.Run(fmt.Sprintf("%s of %q, trailers %v", method, to, trailers), func(t *testing.T) {
					w := newWorld(t)
					app, _ := h2Server(t, "app")
					w.at(App, app)
					lost := make(chan struct{})
					ends := sync.OnceFunc(func() { close(lost) })
					w.wrap = func(s flow.Stream) flow.Stream { return told{s, ends} }
					origin := rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
						fr := http2.NewFramer(c, r)
						if readRequest(fr, r) != nil {
							return
						}
						fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: listOf(":status", "200"), EndHeaders: true})
						fr.WriteData(1, !trailers, make([]byte, size))
						if trailers {
							fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: listOf("grpc-status", "0"), EndHeaders: true, EndStream: true})
						}
						fr.WriteGoAway(1, http2.ErrCodeNo, nil)
						c.CloseWrite()
						for { // until its end has been seen
							if _, err := fr.ReadFrame(); err != nil {
								return
							}
						}
					})
					if to == App {
						w.at(App, origin)
					} else {
						w.rule("lou", origin)
					}
					c := w.narrow(10)
					c.request(1, method)
					got := 0
					for got < 10 {
						f := c.next("the answer", func(f http2.Frame) bool { return f.Header().Type == http2.FrameData })
						got += len(f.(*http2.DataFrame).Data())
					}
					<-lost
					c.fr.WriteWindowUpdate(1, 1<<20)
					n, how := c.end(1)
					want := "content"
					if trailers {
						want = "trailers"
					}
					if got += n; got != size || how != want {
						t.Errorf("%d bytes of %d, ended by %s", got, size, how)
					}
					if method == "POST" {
						if _, how := c.end(1); how != http2.ErrCodeNo.String() {
							t.Errorf("then %s", how)
						}
					}
				})
			}
		}
	}
}

// TestHTTP2EarlyAnswer has an origin answer in full and want no more of the request, while the client has not taken the answer: it may go on sending, and
// all its connection's streams live.
func TestHTTP2EarlyAnswer(t *testing.T) {
	const size = 10_000
	for _, trailers := range []bool{false, true} {
		t.Run(fmt.Sprintf("trailers %v", trailers), func(t *testing.T) {
			w := newWorld(t)
			app, _ := h2Server(t, "app")
			w.at(App, app)
			w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
				fr := http2.NewFramer(c, r)
				if readRequest(fr, r) != nil {
					return
				}
				fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: listOf(":status", "413"), EndHeaders: true})
				fr.WriteData(1, false, make([]byte, 10))
				fr.WriteData(1, true, make([]byte, size-10))
				fr.WriteRSTStream(1, http2.ErrCodeNo)
				fr.WriteGoAway(1, http2.ErrCodeNo, nil) // its stream is kept
				c.CloseWrite()
				io.Copy(io.Discard, r)
			}))
			lost := make(chan struct{})
			ends := sync.OnceFunc(func() { close(lost) })
			w.wrap = func(s flow.Stream) flow.Stream { return told{s, ends} }
			c := w.narrow(10)
			c.request(1, "POST")
			<-lost
			before := 0
			c.fr.WriteData(1, false, make([]byte, 1000))
			if trailers {
				c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.block("x-t", "tr"), EndHeaders: true, EndStream: true})
			} else {
				c.fr.WriteData(1, true, make([]byte, 1000))
			}
			if err := c.headers(3, c.block(":method", "GET", ":scheme", "http", ":path", "/ok", ":authority", "h")); err != nil {
				t.Fatal(err)
			}
			c.fr.WriteWindowUpdate(3, 1<<20)
			c.next("another stream's answer", func(f http2.Frame) bool {
				if d, ok := f.(*http2.DataFrame); ok && d.StreamID == 1 {
					before += len(d.Data())
				}
				return f.Header().StreamID == 3 && f.Header().Flags.Has(http2.FlagDataEndStream)
			})
			c.fr.WriteWindowUpdate(1, 1<<20)
			if n, how := c.end(1); n+before != size || how != "content" {
				t.Errorf("%d bytes of %d, ended by %s", n+before, size, how)
			}
		})
	}
}

// TestHTTP2RequestUnderWay has the app go while no stream is open: a request that the client has sent before it knew is answered, and then it is told
// which one was the last.
func TestHTTP2RequestUnderWay(t *testing.T) {
	for _, last := range []string{"GOAWAY", "end"} {
		t.Run(last, func(t *testing.T) {
			w := newWorld(t)
			next, _ := h2Server(t, "next")
			w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
				if _, err := io.ReadFull(r, make([]byte, len(http2.ClientPreface))); err != nil {
					return
				}
				w.at(App, next)
				fr := http2.NewFramer(c, r)
				fr.WriteSettings()
				if last == "GOAWAY" {
					fr.WriteGoAway(0, http2.ErrCodeNo, nil)
				}
				c.CloseWrite()
				io.Copy(io.Discard, r)
			}))
			c := w.h2Dial()
			away := func(f http2.Frame) bool { return f.Header().Type == http2.FrameGoAway }
			if f := c.next("the app goes", away).(*http2.GoAwayFrame); f.LastStreamID != 1<<31-1 {
				t.Errorf("%v", f)
			}
			if err := c.headers(1, c.block(":method", "GET", ":scheme", "http", ":path", "/ok", ":authority", "h")); err != nil {
				t.Fatal(err)
			}
			if got := c.until(1); got != "next /ok 0" {
				t.Errorf("%q", got)
			}
			if f := c.next("then", away).(*http2.GoAwayFrame); f.LastStreamID != 1 || f.ErrCode != http2.ErrCodeNo {
				t.Errorf("%v", f)
			}
			if _, err := c.fr.ReadFrame(); !errors.Is(err, io.EOF) {
				t.Error(err)
			}
		})
	}
}

// TestHTTP2MalformedAnswer has a laptop say what is no answer: that costs its own stream, and no other of the client's or of the laptop's.
func TestHTTP2MalformedAnswer(t *testing.T) {
	head := func(fr *http2.Framer, end bool, fields ...string) {
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: listOf(fields...), EndHeaders: true, EndStream: end})
	}
	for _, row := range []struct {
		name string
		say  func(fr *http2.Framer)
		ok   bool
	}{
		{"an answer", func(fr *http2.Framer) { head(fr, false, ":status", "103"); head(fr, true, ":status", "204") }, true},
		{"DATA first", func(fr *http2.Framer) { fr.WriteData(1, true, []byte("hello")) }, false},
		{"DATA after a provisional head", func(fr *http2.Framer) { head(fr, false, ":status", "103"); fr.WriteData(1, true, nil) }, false},
		{"a provisional head alone", func(fr *http2.Framer) { head(fr, true, ":status", "103") }, false},
		{"no status", func(fr *http2.Framer) { head(fr, true, "x", "y") }, false},
		{"no field", func(fr *http2.Framer) { head(fr, true) }, false},
		{"a request", func(fr *http2.Framer) { head(fr, true, ":method", "GET", ":path", "/") }, false},
		{"a short status", func(fr *http2.Framer) { head(fr, true, ":status", "20") }, false},
		{"a long status", func(fr *http2.Framer) { head(fr, true, ":status", "2000") }, false},
		{"a word", func(fr *http2.Framer) { head(fr, true, ":status", "2OK") }, false},
		{"a status below all", func(fr *http2.Framer) { head(fr, true, ":status", "099") }, false},
		{"a status in the trailers", func(fr *http2.Framer) { head(fr, false, ":status", "200"); head(fr, true, ":status", "200") }, false},
		{"two final heads", func(fr *http2.Framer) { head(fr, false, ":status", "200"); head(fr, false, ":status", "200") }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld(t)
			app, _ := h2Server(t, "app")
			w.at(App, app)
			w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
				fr := http2.NewFramer(c, r)
				if readRequest(fr, r) != nil {
					return
				}
				row.say(fr)
				for {
					f, err := fr.ReadFrame()
					if err != nil {
						return
					}
					if h, ok := f.(*http2.HeadersFrame); ok {
						fr.WriteHeaders(http2.HeadersFrameParam{StreamID: h.StreamID, BlockFragment: listOf(":status", "200"), EndHeaders: true})
						fr.WriteData(h.StreamID, true, []byte("lou's second"))
					}
				}
			}))
			c := w.narrow(1 << 20)
			c.request(1, "GET")
			want := http2.ErrCodeProtocol.String()
			if row.ok {
				want = "trailers"
			}
			if _, how := c.end(1); how != want {
				t.Errorf("it ends by %s, want %s", how, want)
			}
			c.request(3, "GET")
			if got := c.until(3); got != "lou's second" {
				t.Errorf("the laptop's next: %q", got)
			}
			if err := c.headers(5, c.block(":method", "GET", ":scheme", "http", ":path", "/ok", ":authority", "h")); err != nil {
				t.Fatal(err)
			}
			if got := c.until(5); got != "app /ok 0" {
				t.Errorf("the app's: %q", got)
			}
		})
	}
}

// TestHTTP2StreamLimit tells the client the app's limit, and none that would hold it up where the app names none.
func TestHTTP2StreamLimit(t *testing.T) {
	for _, row := range []struct {
		app  []http2.Setting
		want uint32
	}{
		{nil, maxStreams},
		{[]http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 4000}}, 4000},
		{[]http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 7}}, 7},
	} {
		t.Run(fmt.Sprint(row.app), func(t *testing.T) {
			w := newWorld(t)
			w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) { _ = readRequest(http2.NewFramer(c, r), r, row.app...) }))
			c := w.h2Dial()
			f := c.next("the settings", func(f http2.Frame) bool { return f.Header().Type == http2.FrameSettings })
			if got, ok := f.(*http2.SettingsFrame).Value(http2.SettingMaxConcurrentStreams); !ok || got != row.want {
				t.Errorf("%d streams, want %d", got, row.want)
			}
		})
	}
}

// TestHTTP2ManyStreams has more streams open than an app is used to that names no limit: each of them is answered.
func TestHTTP2ManyStreams(t *testing.T) {
	const streams = 3000
	w := newWorld(t)
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		fr := http2.NewFramer(c, r)
		if readRequest(fr, r) != nil {
			return
		}
		for n := 1; n < streams; { // before it answers one
			f, err := fr.ReadFrame()
			if err != nil {
				return
			}
			if f.Header().Type == http2.FrameHeaders {
				n++
			}
		}
		for i := range uint32(streams) {
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: listOf(":status", "204"), EndHeaders: true, EndStream: true})
		}
		io.Copy(io.Discard, r)
	}))
	c := w.narrow(1 << 16)
	for i := range uint32(streams) {
		c.request(2*i+1, "GET")
	}
	for n := 0; n < streams; {
		f := c.next("an answer", func(f http2.Frame) bool { return f.Header().StreamID != 0 })
		if n++; f.Header().Type != http2.FrameHeaders {
			t.Fatalf("%v", f)
		}
	}
}

// TestHTTP2WaitingHeads: heads that no origin takes are bounded; what is beyond is the client's to send again.
func TestHTTP2WaitingHeads(t *testing.T) {
	w := newWorld(t)
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		if readRequest(http2.NewFramer(c, r), r, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1}) == nil {
			io.Copy(io.Discard, r)
		}
	}))
	c := w.narrow(1 << 16)
	block := c.block(":method", "GET", ":scheme", "http", ":path", "/ok", ":authority", "h")
	for range 50 {
		block = append(block, listOf("x", strings.Repeat("x", 4<<10))...)
	}
	size := 50 * 4 << 10
	for i := range uint32(maxWaiting/size + 3) {
		if err := c.headers(2*i+1, block); err != nil {
			t.Fatal(err)
		}
	}
	f := c.next("a refusal", func(f http2.Frame) bool { return f.Header().StreamID != 0 })
	if r, ok := f.(*http2.RSTStreamFrame); !ok || r.ErrCode != http2.ErrCodeRefusedStream || r.StreamID < uint32(2*maxWaiting/size-2) {
		t.Errorf("%v", f)
	}
}
