package userd

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// Requests without TLS reach a local process that speaks it, in the version of HTTP that they come in.
func TestLocalTLS(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto, " ", r.TLS != nil) }))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	for _, h2 := range []bool{false, true} {
		tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, network, srv.Listener.Addr().String())
			if err != nil {
				return nil, err
			}
			return newLocalTLS(c.(*net.TCPConn)), nil
		}}
		tr.Protocols.SetHTTP1(!h2)
		tr.Protocols.SetUnencryptedHTTP2(h2)
		r, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("http://web/")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		if want := map[bool]string{false: "HTTP/1.1 true", true: "HTTP/2.0 true"}[h2]; err != nil || string(b) != want {
			t.Errorf("got %q, %v, want %q", b, err, want)
		}
		_ = r.Body.Close()
		tr.CloseIdleConnections()
	}
}

// A process that speaks no TLS is told from one that answers by the end of the connection, on both sides.
func TestLocalTLSFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, _ = io.WriteString(c, "220 this is not TLS\r\n")
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	local := newLocalTLS(c.(*net.TCPConn))
	defer local.Close()
	read := make(chan error, 1)
	go func() { _, err := local.Read(make([]byte, 1)); read <- err }()
	if _, err := local.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err == nil {
		t.Error("written")
	}
	if err := <-read; err == nil {
		t.Error("read")
	}
}
