package relay

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

// A relay that ends waits for what it is answering, and not for browsers that keep a connection.
func TestEnd(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	began, answer := make(chan struct{}), make(chan struct{})
	l := ann.login()
	p := l.preview(l.cluster("prod", func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(began)
			<-answer
		}
		_, _ = io.WriteString(rw, "answered")
	}), "web")
	l.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	idle := w.browser()
	idle.Transport.(*http.Transport).ForceAttemptHTTP2 = true
	if got := idle.visit(p.URL); got.status != http.StatusOK {
		t.Fatalf("%v", got)
	}
	body := make(chan string, 1)
	go func() {
		resp, err := w.browser().Get(p.URL + "slow")
		if err != nil {
			body <- err.Error()
			return
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			b = []byte(err.Error())
		}
		body <- string(b)
	}()
	<-began
	stopped := make(chan struct{})
	go func() { w.stop(); close(stopped) }()
	select {
	case <-stopped:
		t.Error("it did not wait for a request")
	case <-time.After(4 * endQuiet):
	}
	start := time.Now()
	close(answer)
	if got := <-body; !strings.Contains(got, "answered") {
		t.Errorf("cut: %s", got)
	}
	<-stopped
	if d := time.Since(start); d > 500*time.Millisecond {
		t.Errorf("it ended %v after the last answer", d)
	}
}
