package httproute

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/match"
)

// recorder keeps copies.
type recorder struct {
	mu sync.Mutex
	// guarded by mu
	got []string // each request that ended: "whole: " or "cut: " and its bytes
}

type recorded struct {
	r *recorder
	b []byte
}

func (c *recorded) Write(p []byte) { c.b = append(c.b, p...) }

func (c *recorded) End(whole bool) {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.got = append(c.r.got, map[bool]string{true: "whole: ", false: "cut: "}[whole]+string(c.b))
}

// of copies the requests with a header x-copy.
func (r *recorder) of(h match.Head, _ bool) Copy {
	if h.Any("x-copy", func(string) bool { return true }) {
		return &recorded{r: r}
	}
	return nil
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// A copied request of HTTP/1 is the request byte for byte, whoever answers it; a request that breaks off is said to.
func TestCopy(t *testing.T) {
	w := newWorld(t)
	var r recorder
	w.mu.Lock()
	w.copy = r.of
	w.mu.Unlock()
	w.at(App, httpServer(t, "app"))
	w.rule("lou", httpServer(t, "lou"))
	c := w.dial()
	var want []string
	for _, q := range []struct{ id, rest, answer string }{
		{"", "x-copy: 1\r\n\r\n", "app / 0"},
		{"lou", "X-Copy: 2\r\nContent-Length: 300000\r\n\r\n" + strings.Repeat("x", 300000), "lou / 300000"},
		{"", "\r\n", "app / 0"},
		{"", "X-COPY:\t3 \r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nT: 1\r\n\r\n", "app / 6"},
	} {
		text := request("POST", "/", q.id, q.rest)
		c.send(text)
		check(t, c, "POST", q.answer)
		if strings.Contains(strings.ToLower(q.rest), "x-copy") {
			want = append(want, "whole: "+text)
		}
	}
	c.send(request("POST", "/", "", "X-Copy: 4\r\nContent-Length: 10\r\n\r\nhalf"))
	c.Close()
	<-w.ends
	if got := r.all(); len(got) != len(want)+1 || !slices.Equal(got[:len(want)], want) || !strings.HasPrefix(got[len(want)], "cut: ") || !strings.HasSuffix(got[len(want)], "half") {
		t.Errorf("copied %.300q", got)
	}
}

// What HTTP/1.1 says of a request of HTTP/2.
func TestCopyOfHTTP2(t *testing.T) {
	field := func(s string) hpack.HeaderField {
		n := strings.Index(s[1:], ":") + 1
		return hpack.HeaderField{Name: s[:n], Value: s[n+1:]}
	}
	for name, tt := range map[string]struct {
		fields, body, trailers string
		want                   string
	}{
		"without a body":         {fields: ":method:GET :path:/a?b :authority:h x-copy:1 cookie:a=1 cookie:b=2", want: "GET /a?b HTTP/1.1\r\nhost: h\r\ncookie: a=1; b=2\r\nx-copy: 1\r\nconnection: close\r\n\r\n"},
		"with a length":          {fields: ":method:POST :path:/ x-copy:1 content-length:3 host:x", body: "abc", want: "POST / HTTP/1.1\r\nx-copy: 1\r\ncontent-length: 3\r\nhost: x\r\nconnection: close\r\n\r\nabc"},
		"without one":            {fields: ":method:POST :path:/ x-copy:1", body: "abc", trailers: "t:1", want: "POST / HTTP/1.1\r\nx-copy: 1\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nabc\r\n0\r\nt: 1\r\n\r\n"},
		"CONNECT":                {fields: ":method:CONNECT :authority:h x-copy:1"},
		"a path that is no path": {fields: ":method:GET :path:/a\\x20b x-copy:1"},
		"not copied":             {fields: ":method:GET :path:/"},
	} {
		var list, trailers []hpack.HeaderField
		for f := range strings.FieldsSeq(tt.fields) {
			v := field(f)
			v.Value = strings.ReplaceAll(v.Value, "\\x20", " ")
			list = append(list, v)
		}
		for f := range strings.FieldsSeq(tt.trailers) {
			trailers = append(trailers, field(f))
		}
		var r recorder
		st := &stream{copy: newCopy1(list, tt.body == "", r.of)}
		st.copy.body([]byte(tt.body))
		st.copyEnds(trailers)
		if got := strings.TrimPrefix(strings.Join(r.all(), ""), "whole: "); got != tt.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}
