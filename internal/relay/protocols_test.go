package relay

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

// reply is an answer that the test's end closes.
type reply struct{ *http.Response }

// Whatever browsers and apps say to each other goes through as it is, and when it is said.
func TestProtocols(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	heard := make(chan struct{})
	p := ann.preview(ann.cluster("prod", func(rw http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(rw)
		switch r.URL.Path {
		case "/events":
			rw.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(rw, "data: 1\n\n")
			_ = c.Flush()
			<-heard // the first was seen before the second is sent
			fmt.Fprint(rw, "data: 2\n\n")
		case "/grpc": // gRPC-web sends its trailers in the body, gRPC in HTTP's
			rw.Header().Set("Trailer", "Grpc-Status")
			rw.Header().Set("Content-Type", "application/grpc-web+proto")
			b, _ := io.ReadAll(r.Body)
			_, _ = rw.Write(b)
			rw.Header().Set("Grpc-Status", "0")
		case "/upload": // counts while it comes
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprint(rw, n, err)
		case "/download":
			_, _ = io.CopyN(rw, zeros{}, 8<<20)
		case "/none":
			rw.WriteHeader(http.StatusNoContent)
		case "/early":
			rw.Header().Set("Link", "</style.css>; rel=preload")
			rw.WriteHeader(http.StatusEarlyHints)
			fmt.Fprint(rw, "late")
		default:
			fmt.Fprintf(rw, "%s %s %s", r.Method, r.Proto, strings.Join(r.TransferEncoding, ","))
		}
	}), "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("HTTP2=%v", h2), func(t *testing.T) {
			tr := &http.Transport{DialContext: w.dial, TLSClientConfig: &tls.Config{RootCAs: w.roots}, ForceAttemptHTTP2: h2, DisableCompression: true}
			t.Cleanup(tr.CloseIdleConnections)
			client := &http.Client{Transport: tr, Timeout: 20 * time.Second}
			do := func(method, path string, body io.Reader) reply {
				t.Helper()
				req, err := http.NewRequestWithContext(t.Context(), method, p.URL+path, body)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { resp.Body.Close() })
				if (resp.ProtoMajor == 2) != h2 {
					t.Fatalf("%s", resp.Proto)
				}
				return reply{resp}
			}
			text := func(resp reply) string {
				t.Helper()
				b, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatal(err)
				}
				return string(b)
			}

			events := bufio.NewReader(do(http.MethodGet, "events", nil).Body)
			if line, err := events.ReadString('\n'); line != "data: 1\n" {
				t.Fatalf("%q %v", line, err)
			}
			heard <- struct{}{}
			if rest, err := io.ReadAll(events); string(rest) != "\ndata: 2\n\n" {
				t.Errorf("%q %v", rest, err)
			}
			g := do(http.MethodPost, "grpc", strings.NewReader("\x00\x00\x00\x00\x00"))
			if got := text(g); got != "\x00\x00\x00\x00\x00" || g.Trailer.Get("Grpc-Status") != "0" {
				t.Errorf("%q %v", got, g.Trailer)
			}
			if got := text(do(http.MethodPost, "upload", io.LimitReader(zeros{}, 64<<20))); got != "67108864 <nil>" {
				t.Errorf("upload: %s", got)
			}
			if resp := do(http.MethodHead, "x", nil); resp.StatusCode != http.StatusOK || text(resp) != "" {
				t.Errorf("HEAD: %v", resp)
			}
			if resp := do(http.MethodGet, "none", nil); resp.StatusCode != http.StatusNoContent {
				t.Errorf("204: %v", resp)
			}
			if got := text(do(http.MethodGet, "early", nil)); got != "late" {
				t.Errorf("early: %q", got)
			}
			if got := text(do(http.MethodOptions, "x", nil)); !strings.HasPrefix(got, "OPTIONS HTTP/1.1") {
				t.Errorf("OPTIONS: %q", got)
			}

			// Somebody who takes their time with a download holds up nobody.
			slow := do(http.MethodGet, "download", nil)
			if _, err := io.ReadFull(slow.Body, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			for range 20 {
				text(do(http.MethodGet, "x", nil))
			}
			t.Logf("20 requests beside a slow download: %v", time.Since(start))
			if n, err := io.Copy(io.Discard, slow.Body); n != 8<<20-1 || err != nil {
				t.Errorf("download: %d %v", n, err)
			}
		})
	}
	w.until("each of them is listed", func() bool {
		all, err := w.relay.store.Visits(t.Context(), p.ID, 100)
		if err != nil {
			t.Fatal(err)
		}
		return len(all) == 56
	})
}
