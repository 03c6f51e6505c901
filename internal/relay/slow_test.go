package relay

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

var sent atomic.Int64 // bytes of all floods

// flood sends without end what nobody may read, WebSockets too, and reads what is sent to it.
func flood(w http.ResponseWriter, r *http.Request) {
	to := io.Writer(w)
	switch {
	case r.Method == http.MethodPost:
		_, _ = io.Copy(io.Discard, r.Body)
		return
	case r.Header.Get("Upgrade") != "":
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		to = conn
	}
	_, _ = io.Copy(to, io.TeeReader(zeros{}, writerFunc(func(p []byte) (int, error) { sent.Add(int64(len(p))); return len(p), nil })))
}

// A visitor who hangs in the middle of something holds nothing when their right has ended.
func TestRevokedWhileSlow(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", flood), "web")
	host := p.Host + "." + domain
	for name, head := range map[string]string{
		"an answer":    "GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n",
		"a WebSocket":  "GET / HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"an upload":    "POST / HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: 1000\r\n\r\nthe beginning",
		"HTTP/2":       "",
		"HTTP/2, sent": "",
	} {
		t.Run(name, func(t *testing.T) {
			ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
			if head == "" {
				b := w.browser()
				b.Transport.(*http.Transport).ForceAttemptHTTP2 = true
				method, body := http.MethodGet, io.Reader(nil)
				if strings.Contains(name, "sent") {
					r, pw := io.Pipe()
					defer pw.Close()
					method, body = http.MethodPost, r
				}
				req, err := http.NewRequestWithContext(t.Context(), method, p.URL, body)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					if resp, err := b.Transport.RoundTrip(req); err == nil {
						t.Cleanup(func() { resp.Body.Close() })
					}
				}()
			} else {
				conn, err := tls.Dial("tcp", w.addr, &tls.Config{RootCAs: w.roots, ServerName: domain})
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, head); err != nil {
					t.Fatal(err)
				}
				if strings.HasPrefix(head, "GET") {
					if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil { //nolint:bodyclose // it is not read
						t.Fatal(resp, err)
					}
				}
			}
			w.until("the request", func() bool { return w.relay.previews.Open() == 1 })
			last, looks := int64(-1), 0
			w.until("full buffers", func() bool { // the app has sent nothing for a while
				if now := sent.Load(); now != last {
					last, looks = now, 0
				}
				looks++
				return looks > 40
			})
			ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host}, nil)
			w.until("its end", func() bool { return w.relay.previews.Open() == 0 })
		})
	}
}
