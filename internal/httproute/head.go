package httproute

import (
	"bytes"
	"errors"
	"strings"
)

// MaxHead is the longest head of an HTTP/1 request that is looked at. A longer one, with all that follows, goes to the app untouched.
const MaxHead = 64 << 10

// errOdd says that bytes are not HTTP/1 as RFC 9112 has it, or may be read in two ways. Whoever is not sure where a request ends must not decide
// who gets the next one.
var errOdd = errors.New("not plain HTTP/1")

// span is a part of a head's bytes.
type span struct{ from, to int }

// field is one field line.
type field struct{ name, value span }

// requestHead is a parsed head of an HTTP/1 request. It implements match.Head. Its bytes are the reader's and valid until that reads on.
type requestHead struct {
	raw    []byte // as received, with the empty line
	method string
	target span
	http10 bool
	fields []field

	length   int64 // of the body; 0 also where there is none
	chunked  bool
	switches bool // asks for another protocol: what follows depends on the answer
	offers   bool // to go on in HTTP/2
	expect   bool // waits for 100 Continue
	closes   bool // is the last one of its connection
}

// Method implements match.Head.
func (h *requestHead) Method() string { return h.method }

// Path implements match.Head: the path of an origin-form or absolute-form target (RFC 9112, section 3.2), else the target.
func (h *requestHead) Path() string {
	t := string(h.raw[h.target.from:h.target.to])
	if i := strings.Index(t, "://"); i > 0 && !strings.HasPrefix(t, "/") {
		t = t[i+3:]
		j := strings.IndexByte(t, '/')
		if j < 0 {
			return "/"
		}
		t = t[j:]
	}
	t, _, _ = strings.Cut(t, "?")
	return t
}

// Any implements match.Head.
func (h *requestHead) Any(name string, is func(string) bool) bool {
	for i := range h.fields {
		if h.named(i, name) && is(string(h.bytes(h.fields[i].value))) {
			return true
		}
	}
	return false
}

func (h *requestHead) bytes(s span) []byte { return h.raw[s.from:s.to] }

func (h *requestHead) named(i int, lower string) bool {
	n := h.bytes(h.fields[i].name)
	return len(n) == len(lower) && strings.EqualFold(string(n), lower)
}

// headScanner finds the end of a head in bytes that come piece by piece, and refuses early what is no request. The zero value is ready.
type headScanner struct {
	line  int // where the line begins that is not complete yet
	first bool
}

// scan looks at all bytes so far. It returns the head's length, 0 if it is not complete, or errOdd.
func (s *headScanner) scan(b []byte) (int, error) {
	for {
		i := bytes.IndexByte(b[s.line:], '\n')
		if i < 0 {
			break
		}
		end := s.line + i
		if end == s.line || b[end-1] != '\r' {
			return 0, errOdd // a bare line feed is a line end to some (RFC 9112, section 2.2), not to all
		}
		line := b[s.line : end-1]
		s.line = end + 1
		switch {
		case s.first && len(line) == 0:
			return s.line, oddIf(s.line > MaxHead)
		case len(line) == 0 && end > 1:
			return 0, errOdd // one empty line may come before a request (RFC 9112, section 2.2)
		case len(line) == 0:
		case !s.first:
			if plausible(line, true) != nil {
				return 0, errOdd
			}
			s.first = true
		}
	}
	if len(b) > MaxHead {
		return 0, errOdd
	}
	if !s.first {
		rest := b[s.line:]
		emptyLine := s.line == 0 && string(rest) == "\r" // may become one
		if len(rest) > 0 && !emptyLine {
			return 0, plausible(rest, false)
		}
	}
	return 0, nil
}

// BeginsRequest says whether b begins with a whole head of an HTTP/1 request.
func BeginsRequest(b []byte) bool {
	var s headScanner
	var h requestHead
	n, err := s.scan(b)
	return n > 0 && err == nil && h.parse(b[:n]) == nil
}

// maxMethod is longer than any method that is registered.
const maxMethod = 32

// plausible checks the beginning of a request line, or a whole one: method SP target SP HTTP/1.x (RFC 9112, section 3).
func plausible(b []byte, whole bool) error {
	const version = "HTTP/1."
	i := 0
	for i < len(b) && isTchar(b[i]) {
		i++
	}
	if i > maxMethod || i == 0 || i < len(b) && b[i] != ' ' {
		return errOdd
	}
	if i >= len(b)-1 {
		return oddIf(whole)
	}
	t := i + 1
	j := t
	for j < len(b) && b[j] > ' ' && b[j] != 0x7f {
		j++
	}
	if j == t || j < len(b) && b[j] != ' ' { // without a version it is HTTP/0.9
		return errOdd
	}
	if j >= len(b)-1 {
		return oddIf(whole)
	}
	v := b[j+1:]
	if n := min(len(v), len(version)); string(v[:n]) != version[:n] {
		return errOdd
	}
	if whole && (len(v) != len(version)+1 || v[7] != '0' && v[7] != '1') {
		return errOdd
	}
	return nil
}

func oddIf(odd bool) error {
	if odd {
		return errOdd
	}
	return nil
}

// parse fills h from a whole head that a headScanner has found.
func (h *requestHead) parse(raw []byte) error {
	*h = requestHead{raw: raw, fields: h.fields[:0]}
	at := 0
	if raw[0] == '\r' {
		at = 2
	}
	end := at + bytes.IndexByte(raw[at:], '\r')
	line := raw[at:end]
	sp := bytes.IndexByte(line, ' ')
	h.method = methodName(line[:sp])
	h.target = span{at + sp + 1, at + bytes.LastIndexByte(line, ' ')}
	h.http10 = line[len(line)-1] == '0'
	for at = end + 2; ; {
		n := bytes.IndexByte(raw[at:], '\n') - 1
		if n == 0 {
			break
		}
		f, err := fieldLine(raw, at, at+n)
		if err != nil {
			return err
		}
		h.fields = append(h.fields, f)
		at += n + 2
	}
	return h.frame()
}

// methodName spares the common methods an allocation.
func methodName(b []byte) string {
	switch string(b) {
	case "GET":
		return "GET"
	case "POST":
		return "POST"
	case "PUT":
		return "PUT"
	case "HEAD":
		return "HEAD"
	case "DELETE":
		return "DELETE"
	case "PATCH":
		return "PATCH"
	case "OPTIONS":
		return "OPTIONS"
	}
	return string(b)
}

// fieldLine parses one field line (RFC 9112, section 5): no blanks around the name, no folding, no control characters.
func fieldLine(raw []byte, from, to int) (field, error) {
	c := from
	for c < to && isTchar(raw[c]) {
		c++
	}
	if c == from || c == to || raw[c] != ':' {
		return field{}, errOdd
	}
	v, w := c+1, to
	for _, b := range raw[v:w] {
		if b < ' ' && b != '\t' || b == 0x7f {
			return field{}, errOdd
		}
	}
	for v < w && isBlank(raw[v]) {
		v++
	}
	for w > v && isBlank(raw[w-1]) {
		w--
	}
	return field{span{from, c}, span{v, w}}, nil
}

// frame finds out where the request ends (RFC 9112, section 6.3). What two readers might see differently is odd.
func (h *requestHead) frame() error {
	lengths, codings, hosts, kept := 0, 0, 0, !h.http10
	for i := range h.fields {
		v := h.bytes(h.fields[i].value)
		switch n := h.bytes(h.fields[i].name); len(n) {
		case 4:
			if h.named(i, "host") {
				hosts++
			}
		case 6:
			if h.named(i, "expect") {
				h.expect = true
			}
		case 7:
			if h.named(i, "upgrade") {
				others := withoutH2C(v)
				h.switches = h.switches || len(others) > 0
				h.offers = h.offers || len(others) < len(v)
			}
		case 10:
			if h.named(i, "connection") {
				kept = keeps(v, kept)
			}
		case 14:
			if h.named(i, "content-length") {
				lengths++
				n, ok := decimal(v)
				if !ok {
					return errOdd
				}
				h.length = n
			}
		case 17:
			if h.named(i, "transfer-encoding") {
				codings++
				if !strings.EqualFold(string(v), "chunked") {
					return errOdd
				}
				h.chunked = true
			}
		}
	}
	if lengths+codings > 1 || hosts > 1 || h.chunked && h.http10 {
		return errOdd
	}
	h.switches = h.switches || h.method == "CONNECT"
	h.closes = !kept
	return nil
}

// withoutH2C takes "h2c" out of an Upgrade field's value.
func withoutH2C(v []byte) []byte {
	var others [][]byte
	for p := range bytes.SplitSeq(v, []byte(",")) {
		if !strings.EqualFold(string(bytes.TrimSpace(p)), "h2c") {
			others = append(others, p)
		}
	}
	return bytes.TrimSpace(bytes.Join(others, []byte(",")))
}

// unoffered is the head without its offer to go on in HTTP/2 (RFC 7540, section 3.2). An app that took it would leave HTTP/1 with its connection, and
// whoever got the first request would get all of them. A server may ignore the offer (RFC 9110, section 7.8), and RFC 9113 has none.
func (h *requestHead) unoffered() []byte {
	out, at := make([]byte, 0, len(h.raw)), 0
	for i, f := range h.fields {
		if !h.named(i, "upgrade") && !h.named(i, "http2-settings") {
			continue
		}
		out = append(out, h.raw[at:f.name.from]...)
		at = f.value.to + bytes.IndexByte(h.raw[f.value.to:], '\n') + 1
		if others := withoutH2C(h.bytes(f.value)); h.named(i, "upgrade") && len(others) > 0 {
			out = append(append(append(out, "Upgrade: "...), others...), "\r\n"...)
		}
	}
	return append(out, h.raw[at:]...)
}

// keeps says whether a connection outlasts a message with that Connection field (RFC 9112, section 9.3). kept is what is known without it.
func keeps(v []byte, kept bool) bool {
	for option := range bytes.SplitSeq(v, []byte(",")) {
		switch o := string(bytes.TrimSpace(option)); {
		case strings.EqualFold(o, "close"):
			return false
		case strings.EqualFold(o, "keep-alive"):
			kept = true
		}
	}
	return kept
}

// decimal reads a Content-Length: digits only, of a size that nobody overflows.
func decimal(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

var tchars = func() (t [256]bool) {
	for c := '0'; c <= '9'; c++ {
		t[c] = true
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c], t[c-'a'+'A'] = true, true
	}
	for _, c := range "!#$%&'*+-.^_`|~" {
		t[c] = true
	}
	return t
}()

// isTchar is of RFC 9110, section 5.6.2.
func isTchar(c byte) bool { return tchars[c] }

// body is how a message's content is delimited.
type body int

const (
	noBody     body = iota
	sizedBody       // so many bytes
	chunkBody       // the chunked coding
	untilClose      // to the end of the connection
)

// responseHead is what has to be known of a response to find its end.
type responseHead struct {
	status int
	body   body
	length int64
	closes bool // is the last one of its connection
}

// parseResponse looks for a whole head of a response at the beginning of b. It returns its length, or 0 if there is more to come. It is
// lenient, as clients are: it only has to find the end. errOdd means that the end can not be known.
func parseResponse(b []byte, method string) (responseHead, int, error) {
	const version = "HTTP/1."
	if k := min(len(b), len(version)); string(b[:k]) != version[:k] {
		return responseHead{}, 0, errOdd
	}
	h := responseHead{body: untilClose}
	sized, chunked, coded, kept := false, false, false, false
	at := 0
	for first := true; ; first = false {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			if len(b) > MaxHead {
				return h, 0, errOdd
			}
			return h, 0, nil
		}
		line := bytes.TrimSuffix(b[at:at+i], []byte("\r"))
		at += i + 1
		if first {
			if len(line) < 12 || line[8] != ' ' {
				return h, 0, errOdd
			}
			n, ok := decimal(line[9:12])
			if !ok || n < 100 || len(line) > 12 && line[12] != ' ' {
				return h, 0, errOdd
			}
			h.status = int(n)
			kept = line[len(version)] != '0'
			continue
		}
		if len(line) == 0 {
			break
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		value = bytes.TrimSpace(value)
		switch {
		case len(name) == 14 && strings.EqualFold(string(name), "content-length"):
			n, ok := decimal(value)
			if !ok || sized && n != h.length {
				return h, 0, errOdd
			}
			sized, h.length = true, n
		case len(name) == 17 && strings.EqualFold(string(name), "transfer-encoding"):
			coded = true
			last := value[bytes.LastIndexByte(value, ',')+1:]
			chunked = strings.EqualFold(string(bytes.TrimSpace(last)), "chunked")
		case len(name) == 10 && strings.EqualFold(string(name), "connection"):
			kept = keeps(value, kept)
		}
	}
	h.closes = !kept
	switch { // RFC 9112, section 6.3
	case h.status < 200, h.status == 204, h.status == 304, method == "HEAD":
		h.body = noBody
	case method == "CONNECT" && h.status < 300:
		h.body = noBody
	case chunked:
		h.body = chunkBody
	case coded:
	case sized:
		h.body = sizedBody
	}
	if h.body != sizedBody {
		h.length = 0
	}
	return h, at, nil
}
