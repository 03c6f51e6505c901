package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// client is an HTTP client in the cluster.
type client struct {
	*http.Client
	base  string
	taken string // the user whose requests the laptop answers
	dials atomic.Int32
}

func (r *requests) client(t *testing.T, version int) *client {
	c := &client{base: "http://" + r.web, taken: "lou"}
	tr := &http.Transport{Protocols: new(http.Protocols), MaxConnsPerHost: 1, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c.dials.Add(1)
		return r.dial(ctx, network, addr)
	}}
	tr.Protocols.SetHTTP1(version == 1)
	tr.Protocols.SetUnencryptedHTTP2(version == 2)
	c.Client = &http.Client{Transport: tr, Timeout: 30 * time.Second}
	t.Cleanup(tr.CloseIdleConnections)
	return c
}

// begin sends a request of a user and returns its answer when that begins.
func (c *client) begin(ctx context.Context, user, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, err
	}
	if user != "" {
		req.Header.Set("X-User", user)
	}
	if body != nil {
		req.Trailer = http.Header{"X-Sent": {user}}
		req.ContentLength = -1
	}
	expect := "app"
	if user == c.taken {
		expect = "lou"
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	if got := resp.Header.Get("X-Name"); got != expect {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%s %s of %q was answered by %q: %s", method, path, user, got, resp.Status)
	}
	return resp, nil
}

// ask sends a request and returns the content of its answer.
func (c *client) ask(ctx context.Context, user, method, path string, body io.Reader) (string, error) {
	resp, err := c.begin(ctx, user, method, path, body)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if path == "/stream" && err == nil && resp.Trailer.Get("X-Seen") != user {
		err = fmt.Errorf("trailers %v", resp.Trailer)
	}
	return string(b), err
}

// who asks for nothing but the name, which ask compares.
func (c *client) who(t *testing.T, users ...string) {
	t.Helper()
	for _, u := range users {
		if _, err := c.ask(t.Context(), u, http.MethodGet, "/", nil); err != nil {
			t.Error(err)
		}
	}
}

// http2 shares one connection between the streams of two users.
func (r *requests) http2(t *testing.T) {
	t.Run("streams", r.http2Streams)
	t.Run("reset", r.http2Reset)
	t.Run("goaway", r.http2GoAway)
	t.Run("upgrade", r.http2Upgrade)
}

// http2Streams has many streams at once that carry some megabytes both ways, many times what their windows hold, with trailers.
func (r *requests) http2Streams(t *testing.T) {
	c := r.client(t, 2)
	c.who(t, "")
	data := make([]byte, 3<<20)
	_, _ = rand.Read(data)
	var wg sync.WaitGroup
	for i := range 60 {
		u := []string{other, "lou", ""}[i%3]
		body := data[i:]
		if i >= 12 {
			body = data[i : i+i*1000]
		}
		wg.Go(func() {
			got, err := c.ask(t.Context(), u, http.MethodPost, "/stream", struct{ io.Reader }{bytes.NewReader(body)})
			if err != nil || got != string(body) {
				t.Errorf("stream %d of %q: %d of %d bytes, %v", i, u, len(got), len(body), err)
			}
		})
	}
	wg.Wait()
	if n := c.dials.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// http2Reset ends streams from both ends while others go on.
func (r *requests) http2Reset(t *testing.T) {
	c := r.client(t, 2)
	for _, u := range []string{other, "lou"} {
		ctx, cancel := context.WithCancel(t.Context())
		ended, err := c.begin(ctx, u, http.MethodGet, "/events/reset", nil)
		if err != nil {
			t.Fatal(err)
		}
		goesOn, err := c.begin(t.Context(), u, http.MethodGet, "/events/reset", nil)
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := io.ReadAll(ended.Body); !errors.Is(err, context.Canceled) {
			t.Errorf("%q cancelled: %v", u, err)
		}
		_ = ended.Body.Close()
		aborted, err := c.begin(t.Context(), u, http.MethodGet, "/abort", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = io.ReadAll(aborted.Body); err == nil || !strings.Contains(err.Error(), "INTERNAL_ERROR") {
			t.Errorf("%q aborted by the server: %v", u, err)
		}
		_ = aborted.Body.Close()
		// Nobody but the one that goes on hears what is said now, however often.
		for i := range 5 {
			text := fmt.Sprint("event ", i)
			if err := c.say(t.Context(), u, "reset", text); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, len("data: \n\n")+len(text))
			if _, err := io.ReadFull(goesOn.Body, b); err != nil || string(b) != "data: "+text+"\n\n" {
				t.Fatalf("%q %v", b, err)
			}
		}
		_ = goesOn.Body.Close()
	}
	if n := c.dials.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// http2GoAway has servers go: what runs ends in order, and what comes finds a new connection. Only the app's concerns the client.
func (r *requests) http2GoAway(t *testing.T) {
	c := r.client(t, 2)
	for i, u := range []string{"lou", other} {
		pr, pw := io.Pipe()
		runs := make(chan error, 2)
		for _, v := range []string{"lou", other} {
			in := io.Reader(pr)
			if v != u {
				in = strings.NewReader("short")
			}
			go func() {
				got, err := c.ask(t.Context(), v, http.MethodPost, "/stream", struct{ io.Reader }{in})
				if err == nil && !strings.HasPrefix(got, "s") {
					err = fmt.Errorf("got %q", got)
				}
				runs <- err
			}()
		}
		if _, err := io.WriteString(pw, "so"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ask(t.Context(), u, http.MethodGet, "/goaway", nil); err != nil {
			t.Fatal(err)
		}
		c.who(t, "lou", other, "")
		_, _ = io.WriteString(pw, " it ends")
		_ = pw.Close()
		for range 2 {
			if err := <-runs; err != nil {
				t.Errorf("a stream that ran when %q said GOAWAY: %v", u, err)
			}
		}
		if n := c.dials.Load(); int(n) != 1+i {
			t.Errorf("%d connections after GOAWAY to %q", n, u)
		}
	}
}

// http2Upgrade offers to go on in HTTP/2 to an app that takes it. The agent does not let it know, since requests would not be told apart any more.
func (r *requests) http2Upgrade(t *testing.T) {
	const ask = "GET /h2c HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
	const takes = "HTTP/1.1 101 Switching Protocols\r\n"
	direct := r.connect(t, r.app)
	direct.send(fmt.Sprintf(ask, other))
	if got := direct.exactly(takes); got != takes {
		t.Fatalf("the app says %q", got)
	}
	w := r.connect(t, r.web)
	for _, u := range []string{other, "lou", "", "lou"} {
		w.send(fmt.Sprintf(ask, u))
		if got := w.answer("an offer", http.MethodGet); !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") || !strings.Contains(got, "X-Name: "+nameOf(u)) {
			t.Errorf("%q got %q", u, got)
		}
	}
	url := "http://" + r.web + "/h2c"
	out, err := r.c.lab("node", "exec", "--", "curl", "-sS", "--http2", "-H", "X-User: lou", "-w", " %header{x-name} %{num_connects};", url, url, "--next", "-sS", "--http2", "-w", " %header{x-name} %{num_connects};", url)
	if err != nil || out != "HTTP/1.1 lou 1;HTTP/1.1 lou 0;HTTP/1.1 app 0;" {
		t.Errorf("curl got %q, %v", out, err)
	}
}
