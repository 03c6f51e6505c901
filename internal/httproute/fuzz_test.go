package httproute

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// FuzzRequestHead compares what is taken for a plain request with net/http: where it ends must not be a matter of opinion.
func FuzzRequestHead(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\n", "\r\nPOST /x?y HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "GET http://h/p HTTP/1.0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: x\r\nExpect: 100-continue\r\nX:\ty \r\n\r\n", "CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var scan headScanner
		n, err := scan.scan(b)
		// Byte by byte the outcome is the same.
		var slow headScanner
		for i := range b {
			m, serr := slow.scan(b[:i+1])
			if serr != nil {
				if n > 0 && i+1 <= n {
					t.Fatalf("odd after %d bytes, whole at once it is not: %q", i+1, b)
				}
				break
			}
			if m > 0 {
				if m != n || i+1 != n {
					t.Fatalf("%d bytes, whole at once %d (%v): %q", m, n, err, b)
				}
				break
			}
		}
		if n == 0 || err != nil {
			return
		}
		var h requestHead
		if h.parse(b[:n]) != nil {
			return
		}
		for _, s := range [][2]string{{"method", h.Method()}, {"path", h.Path()}} {
			if strings.ContainsAny(s[1], " \r\n") {
				t.Fatalf("%s %q", s[0], s[1])
			}
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(bytes.TrimPrefix(b[:n], []byte("\r\n")))))
		if err != nil {
			return // net/http is stricter in places (targets, values); the app will say so
		}
		chunked := len(r.TransferEncoding) > 0 && r.TransferEncoding[0] == "chunked"
		if r.Method != h.Method() || chunked != h.chunked || !chunked && r.ContentLength != h.length || r.ProtoAtLeast(1, 1) == h.http10 {
			t.Fatalf("net/http: %s %v %d, here: %s %v %d: %q", r.Method, chunked, r.ContentLength, h.Method(), h.chunked, h.length, b[:n])
		}
		for name, vs := range r.Header {
			var here []string
			h.Any(strings.ToLower(name), func(v string) bool {
				here = append(here, v)
				return false
			})
			if !slices.Equal(vs, here) {
				t.Fatalf("header %s: net/http %q, here %q", name, vs, here)
			}
		}
	})
}

// FuzzChunked compares the end of a chunked body with net/http's.
func FuzzChunked(f *testing.F) {
	for _, s := range []string{"0\r\n\r\n", "5\r\nhello\r\n0\r\n\r\nGET", "a;x=\"y\"\r\n0123456789\r\n0\r\nT: v\r\n\r\n", "1 \r\nx\r\n00\r\n\r\n"} {
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		var scan chunkScanner
		n, done, err := scan.scan(b)
		step = 1 + (step&0x7fffffff)%7
		var slow chunkScanner
		total := 0
		for at := 0; at < len(b); at += step {
			k, d, e := slow.scan(b[at:min(len(b), at+step)])
			total += k
			if d || e != nil {
				if d != done || (e == nil) != (err == nil) {
					t.Fatalf("in pieces: %v %v, at once: %v %v", d, e, done, err)
				}
				break
			}
		}
		if total != n {
			t.Fatalf("in pieces %d bytes, at once %d", total, n)
		}
		if !done {
			return
		}
		head := "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
		br := bufio.NewReader(io.MultiReader(strings.NewReader(head), bytes.NewReader(b[:n]), strings.NewReader("!")))
		r, err := http.ReadRequest(br)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return // stricter
		}
		if rest, _ := io.ReadAll(br); string(rest) != "!" {
			t.Fatalf("net/http leaves %q of %q", rest, b[:n])
		}
	})
}

func FuzzResponseHead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), "GET")
	f.Add([]byte("HTTP/1.0 200 OK\n\nok"), "GET")
	f.Add([]byte("HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n"), "GET")
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), "HEAD")
	f.Fuzz(func(t *testing.T, b []byte, method string) {
		h, n, err := parseResponse(b, method)
		if n == 0 || err != nil {
			return
		}
		r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), &http.Request{Method: method})
		if err != nil {
			return
		}
		defer r.Body.Close()
		if r.StatusCode != h.status {
			t.Fatalf("status %d, net/http %d", h.status, r.StatusCode)
		}
		if h.body == sizedBody && r.ContentLength != h.length {
			t.Fatalf("length %d, net/http %d: %q", h.length, r.ContentLength, b)
		}
	})
}

// FuzzFrames compares what is read in place with what http2.Framer makes of the same bytes.
func FuzzFrames(f *testing.F) {
	var b bytes.Buffer
	w, enc := http2.NewFramer(&b, nil), hpack.NewEncoder(&b)
	block := func(list ...string) []byte {
		at := b.Len()
		for i := 0; i < len(list); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: list[i], Value: list[i+1]})
		}
		out := bytes.Clone(b.Bytes()[at:])
		b.Truncate(at)
		return out
	}
	for _, list := range [][]string{
		{":method", "GET", ":path", "/", "x-id", "lou", "cookie", "a=1", "cookie", "b=2"},
		{":status", "200", "trailer", "a, b"},
		{"x", "1", ":path", "/"},
		{":path", "/", ":path", "/"},
		{":path", "", ":path", ""},
		{":path", "/", ":status", "200"},
		{":odd", "1"},
		{"X", "1"},
		{"", "1"},
		{"x", "a\nb"},
		{"é", "1"},
	} {
		bl := block(list...)
		_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: bl, EndHeaders: true, EndStream: true})
		f.Add(bytes.Clone(b.Bytes()))
		_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: bl, EndHeaders: true, PadLength: 3, Priority: http2.PriorityParam{Weight: 1}})
		_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: 5, BlockFragment: bl[:len(bl)/2]})
		_ = w.WriteContinuation(5, true, bl[len(bl)/2:])
		_ = w.WriteData(5, true, []byte("content"))
		_ = w.WriteDataPadded(5, false, []byte("content"), make([]byte, 4))
		_ = w.WritePing(false, [8]byte{1})
		_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: 7, BlockFragment: bl, EndHeaders: true, Priority: http2.PriorityParam{Weight: 1}})
		f.Add(bytes.Clone(b.Bytes()))
		b.Reset()
		enc = hpack.NewEncoder(&b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		here := newFrameReader(bufio.NewReaderSize(bytes.NewReader(b), readAhead))
		framer := newFrameReader(bufio.NewReaderSize(bytes.NewReader(b), readAhead))
		framer.odd = true
		for {
			x, xerr := here.readFrame()
			y, yerr := framer.readFrame()
			if kind(xerr) != kind(yerr) {
				t.Fatalf("%v, the framer: %v", xerr, yerr)
			}
			if xerr != nil {
				if _, ok := streamError(xerr); ok {
					continue
				}
				return
			}
			if x.Type != y.Type || x.Flags != y.Flags || x.Length != y.Length || x.StreamID != y.StreamID || x.truncated != y.truncated ||
				!slices.Equal(x.fields, y.fields) || !bytes.Equal(x.data, y.data) || (x.other == nil) != (y.other == nil) {
				t.Fatalf("%+v, the framer: %+v", x, y)
			}
		}
	})
}

// kind is what a peer is told about an error.
func kind(err error) any {
	var ce http2.ConnectionError
	if se, ok := streamError(err); ok {
		return [2]uint32{se.StreamID, uint32(se.Code)}
	}
	if errors.As(err, &ce) {
		return ce
	}
	return err != nil
}
