package httproute

import (
	"fmt"
	"strings"

	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/match"
)

// copy1 writes a request of HTTP/2 as one of HTTP/1.1 (RFC 9113, section 8.3.1), which ends its connection.
type copy1 struct {
	Copy
	chunked bool
}

// newCopy1 writes the head. It returns nil if nobody gets a copy, or if the request cannot be said in HTTP/1.1.
func newCopy1(list []hpack.HeaderField, end bool, who func(match.Head, bool) Copy) *copy1 {
	l := fields(list)
	method, path := l.get(":method"), l.get(":path")
	if method == "CONNECT" || path == "" || strings.ContainsAny(method+path, " \t") {
		return nil
	}
	to := who(l, true)
	if to == nil {
		return nil
	}
	c := &copy1{to, !end && l.get("content-length") == ""}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", method, path)
	if a := l.get(":authority"); a != "" {
		fmt.Fprintf(&b, "host: %s\r\n", a)
	}
	if v, ok := l.cookie(); ok {
		fmt.Fprintf(&b, "cookie: %s\r\n", v)
	}
	c.fields(&b, list)
	if c.chunked {
		b.WriteString("transfer-encoding: chunked\r\n")
	}
	b.WriteString("connection: close\r\n\r\n")
	c.Write([]byte(b.String()))
	return c
}

// fields writes what HTTP/1.1 has as fields too, but for cookies, which are one.
func (c *copy1) fields(b *strings.Builder, list []hpack.HeaderField) {
	authority := fields(list).get(":authority") != ""
	for _, f := range list {
		if !f.IsPseudo() && f.Name != "cookie" && (f.Name != "host" || !authority) {
			fmt.Fprintf(b, "%s: %s\r\n", f.Name, f.Value)
		}
	}
}

func (c *copy1) body(p []byte) {
	switch {
	case c == nil || len(p) == 0:
	case c.chunked:
		c.Write(fmt.Appendf(nil, "%x\r\n", len(p)))
		c.Write(p)
		c.Write([]byte("\r\n"))
	default:
		c.Write(p)
	}
}

// copyEnds ends the copy with the request.
func (st *stream) copyEnds(trailers []hpack.HeaderField) {
	c := st.copy
	if c == nil {
		return
	}
	st.copy = nil
	if c.chunked {
		var b strings.Builder
		b.WriteString("0\r\n")
		c.fields(&b, trailers)
		b.WriteString("\r\n")
		c.Write([]byte(b.String()))
	}
	c.End(true)
}
