package httproute

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
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
			i := 0
			for v := range h.Values(strings.ToLower(name)) {
				if i >= len(vs) || v != vs[i] {
					t.Fatalf("header %s: net/http %q, here value %d is %q", name, vs, i, v)
				}
				i++
			}
			if i != len(vs) {
				t.Fatalf("header %s: net/http %q, here %d values", name, vs, i)
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
