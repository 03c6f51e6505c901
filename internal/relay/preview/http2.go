package preview

import (
	"context"
	"errors"
	"io"
	"math"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// settingsTimeout bounds how long an ingress may take to say that it speaks HTTP/2 where nobody has agreed on that with it.
const settingsTimeout = 5 * time.Second

// errHTTP1 says that HTTP/1.1 is spoken with an ingress.
var errHTTP1 = errors.New("the ingress speaks HTTP/1.1")

// errNotHTTP2 says that an ingress does not answer in HTTP/2.
var errNotHTTP2 = errors.New("the ingress does not speak HTTP/2 without TLS")

// transport sends requests to a cluster's ingress by HTTP/1.1, and by HTTP/2 those that lose something otherwise. Which ingresses speak HTTP/2 is for TLS
// to agree on; one without TLS is asked for it by calls of gRPC alone, which is nothing without.
type transport struct {
	http1, http2 http.RoundTripper
}

func (h *Handler) newTransport() *transport {
	t := func(dial func(context.Context, string, string) (net.Conn, error)) *http.Transport {
		return &http.Transport{
			DialContext: dial, MaxIdleConnsPerHost: 16, MaxIdleConns: 1024, IdleConnTimeout: time.Minute,
			DisableCompression: true, MaxResponseHeaderBytes: 256 << 10,
		}
	}
	http2 := t(h.dialHTTP2)
	http2.Protocols = new(http.Protocols)
	http2.Protocols.SetUnencryptedHTTP2(true) // TLS is the traffic-manager's
	return &transport{t(h.dial), http2}
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.ProtoMajor != 2 || !isGRPC(r.Header) && len(r.Trailer) == 0 {
		return t.http1.RoundTrip(r)
	}
	first := r.WithContext(r.Context())
	if r.Body != nil {
		first.Body = &untouched{ReadCloser: r.Body}
	}
	resp, err := t.http2.RoundTrip(first)
	if errors.Is(err, errHTTP1) { // no connection was made, and nothing of the request is used up
		return t.http1.RoundTrip(r)
	}
	if q := of(r.Context()); err != nil && q != nil {
		if u := q.dialled.Load(); u != nil && u.refused.Load() { // the transport may say no more than that the connection is closed
			err = errNotHTTP2
		}
	}
	return resp, err
}

// isGRPC says that a request or answer is one of gRPC's own protocol; gRPC-web is another, for HTTP of any version.
func isGRPC(h http.Header) bool {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	return err == nil && (t == "application/grpc" || strings.HasPrefix(t, "application/grpc+"))
}

// untouched is a body that is closed only after it was read from: a transport that has no connection closes it, too.
type untouched struct {
	io.ReadCloser
	read atomic.Bool
}

func (u *untouched) Read(p []byte) (int, error) {
	u.read.Store(true)
	return u.ReadCloser.Read(p)
}

func (u *untouched) Close() error {
	if !u.read.Load() {
		return nil
	}
	return u.ReadCloser.Close()
}

// dialHTTP2 opens a connection for the preview of a request, to speak HTTP/2 on.
func (h *Handler) dialHTTP2(ctx context.Context, _, addr string) (net.Conn, error) {
	c, proto, err := h.reach(ctx, addr, true)
	switch q := of(ctx); {
	case err != nil:
		return nil, err
	case proto == "h2":
		return c, nil
	case proto == "" && q != nil && q.grpc:
		u := newUnproven(c)
		q.dialled.Store(u)
		return u, nil
	}
	_ = c.Close()
	return nil, errHTTP1
}

// unproven is a connection on which HTTP/2 is spoken though nobody has agreed to. What the other end says first is its SETTINGS, if it speaks it
// (RFC 9113, section 3.4).
type unproven struct {
	net.Conn
	first  []byte // what was read of the first frame's head, and is still to be handed on
	proven atomic.Bool
	// refused is set once an error said that the other end does not speak it.
	refused atomic.Bool
}

// The head of a frame (RFC 9113, section 4.1), where its type is, and that of SETTINGS.
const (
	frameHead    = 9
	frameType    = 3
	typeSettings = 4
)

func newUnproven(c net.Conn) *unproven {
	_ = c.SetReadDeadline(time.Now().Add(settingsTimeout)) // a connection that has ended says so when it is read
	return &unproven{Conn: c}
}

func (u *unproven) Read(p []byte) (int, error) {
	if !u.proven.Load() {
		head := make([]byte, frameHead)
		if _, err := io.ReadFull(u.Conn, head); err != nil || head[frameType] != typeSettings {
			u.refused.Store(true)
			return 0, errNotHTTP2
		}
		u.first = head
		u.proven.Store(true)
		if err := u.SetReadDeadline(time.Time{}); err != nil {
			return 0, err
		}
	}
	if len(u.first) > 0 {
		n := copy(p, u.first)
		u.first = u.first[n:]
		return n, nil
	}
	return u.Conn.Read(p)
}

// Write fails on a connection that was closed for what came on it, before the answer is read.
func (u *unproven) Write(p []byte) (int, error) {
	n, err := u.Conn.Write(p)
	if err != nil && !u.proven.Load() {
		u.refused.Store(true)
		err = errNotHTTP2
	}
	return n, err
}

// failGRPC answers a call of gRPC that has failed on its way, in an answer of trailers only
// (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md). Servers reset calls whose time is over, which the client may hear from us before
// its own clock says so.
func failGRPC(w http.ResponseWriter, deadline time.Time, text string) {
	code := "14" // UNAVAILABLE
	if !deadline.IsZero() && !time.Now().Before(deadline) {
		code, text = "4", "The call's time was over." // DEADLINE_EXCEEDED
	}
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", code)
	w.Header().Set("Grpc-Message", text)
	w.WriteHeader(http.StatusOK)
}

// deadlineOf is when the time of a call that begins now is over; zero: it says none.
func deadlineOf(h http.Header) time.Time {
	t := h.Get("Grpc-Timeout")
	if t == "" {
		return time.Time{}
	}
	unit := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': 1}[t[len(t)-1]]
	n, err := strconv.ParseUint(t[:len(t)-1], 10, 27) // of at most eight digits
	if unit == 0 || err != nil || n > uint64(math.MaxInt64/unit) {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(n) * unit)
}
