package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// socket opens a WebSocket.
func (r *requests) socket(t *testing.T, user string) *websocket.Conn {
	t.Helper()
	d := websocket.Dialer{NetDialContext: r.dial, HandshakeTimeout: 5 * time.Second}
	c, resp, err := d.DialContext(t.Context(), "ws://"+r.web+"/ws", http.Header{"X-User": {user}})
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	t.Cleanup(func() { c.Close() })
	if got := resp.Header.Get("X-Name"); got != nameOf(user) {
		t.Fatalf("a WebSocket of %q was answered by %q", user, got)
	}
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	return c
}

// back sends a message and wants it back.
func back(c *websocket.Conn, kind int, msg []byte) error {
	if err := c.WriteMessage(kind, msg); err != nil {
		return err
	}
	got, b, err := c.ReadMessage()
	if err == nil && (got != kind || !bytes.Equal(b, msg)) {
		err = fmt.Errorf("%d bytes of kind %d came back as %d of kind %d", len(msg), kind, len(b), got)
	}
	return err
}

// webSocket has frames go both ways, and the end come from either.
func (r *requests) webSocket(t *testing.T) {
	for _, u := range []string{other, "lou"} {
		for _, server := range []bool{false, true} {
			c := r.socket(t, u)
			for n := range 20 {
				if err := errors.Join(back(c, websocket.TextMessage, fmt.Append(nil, "message ", n)), back(c, websocket.BinaryMessage, bytes.Repeat([]byte{byte(n)}, n*n*1000))); err != nil {
					t.Fatal(err)
				}
			}
			code, text := websocket.CloseGoingAway, ""
			if server {
				code, text = 4000, nameOf(u)
				_ = c.WriteMessage(websocket.TextMessage, []byte("close"))
			} else {
				_ = c.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, text), time.Now().Add(time.Second))
			}
			_, _, err := c.ReadMessage()
			var ce *websocket.CloseError
			if !errors.As(err, &ce) || ce.Code != code || ce.Text != text {
				t.Errorf("the end of %q: %v", u, err)
			}
		}
	}
}

// events has server-sent events come one by one, each before the next is sent.
func (r *requests) events(t *testing.T) {
	for version := 1; version <= 2; version++ {
		for _, u := range []string{other, "lou"} {
			c, says := r.client(t, version), r.client(t, version)
			resp, err := c.begin(t.Context(), u, http.MethodGet, "/events/sse", nil)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 20 {
				event := fmt.Sprintf("data: event %d of %s\n\n", i, u)
				if err := says.say(t.Context(), u, "sse", strings.TrimSpace(strings.TrimPrefix(event, "data: "))); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, len(event))
				if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != event {
					t.Fatalf("got %q, %v", b, err)
				}
			}
			_ = resp.Body.Close()
		}
	}
}

// say publishes a text at a user's server, when somebody takes it.
func (c *client) say(ctx context.Context, user, topic, text string) error {
	_, err := c.ask(ctx, user, http.MethodPost, "/say/"+topic, strings.NewReader(text))
	return err
}

// longPoll has answers wait while other requests come and go, with HTTP/2 on the same connection.
func (r *requests) longPoll(t *testing.T) {
	for version := 1; version <= 2; version++ {
		waits, others := r.client(t, version), r.client(t, version)
		if version == 2 {
			others = waits
		}
		for _, u := range []string{other, "lou"} {
			got := make(chan string, 1)
			go func() {
				s, err := waits.ask(t.Context(), u, http.MethodGet, "/wait/poll", nil)
				got <- fmt.Sprint(s, err)
			}()
			for range 10 {
				others.who(t, "lou", other, "")
			}
			if err := others.say(t.Context(), u, "poll", "now"); err != nil {
				t.Fatal(err)
			}
			if s := <-got; s != "now<nil>" {
				t.Errorf("%q got %s", u, s)
			}
		}
		if n := others.dials.Load(); n != 1 {
			t.Errorf("HTTP/%d: %d connections", version, n)
		}
	}
}

// browser has a page in Chromium open a WebSocket that goes to the laptop.
func (r *requests) browser(t *testing.T) {
	r.l.try(t, "doppel", "leave", "web") // that one and this may both be meant by a request
	r.l.start(t, r.bin, "web", "lou", "127.0.0.1:3002", "127.0.0.1:3003")
	want(t, r.l.run(t, "doppel", "intercept", "browser", "-w", "web", "-p", "3002:http", "--http-match=cookie=.*who=lou.*"), "ACTIVE")
	defer r.l.run(t, "doppel", "leave", "browser")
	// Its helpers may still write when it has ended, which removing the directory has to outlast.
	line := "d=$(mktemp -d); chromium --headless=new --no-sandbox --disable-gpu --user-data-dir=$d http://" + r.web + "/browser >&2 & read _; kill $!; wait $!; " +
		"for i in 1 2 3 4 5; do rm -rf $d 2>/dev/null && break; sleep 1; done; [ ! -e $d ]"
	cmd := exec.CommandContext(t.Context(), r.c.bin("lab"), "--name", labName, "node", "exec", "--", "sh", "-c", line)
	end, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if said := r.l.try(t, "curl", "-s", "-m", "30", "127.0.0.1:3002/wait/browser"); said.stdout != "hello 4000 lou" {
		t.Errorf("the page saw %v", said)
	}
	_ = end.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("its directory stays: %v", err)
	}
	if t.Failed() {
		t.Logf("Chromium printed:\n%s", said.String())
	}
}
