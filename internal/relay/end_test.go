package relay

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
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

// What is open when a relay ends is listed as well.
func TestEndLists(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	w.browser().webSocket(p.URL + "open")
	w.stop()
	s, err := store.Open(t.Context(), w.relay.cfg.Database)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if all, err := s.Visits(t.Context(), p.ID, 10); err != nil || len(all) != 1 || all[0].Path != "/open" {
		t.Errorf("%+v %v", all, err)
	}
}

// hanging is a way to a PostgreSQL that says nothing any more while it is held, and loses nothing.
func hanging(t *testing.T, db string) (source string, hold *sync.RWMutex) {
	t.Helper()
	u, err := url.Parse(db)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	socket := filepath.Join(q.Get("host"), ".s.PGSQL.5432")
	dir, err := os.MkdirTemp("", "pg") // short: the socket's path has to be
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	hold = &sync.RWMutex{}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait(); os.RemoveAll(dir) })
	pass := func(to, from net.Conn) {
		defer to.Close()
		defer from.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			hold.RLock()
			_, err = to.Write(buf[:n])
			hold.RUnlock()
			if err != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", socket)
			if err != nil {
				conn.Close()
				continue
			}
			wg.Go(func() { pass(to, conn) })
			wg.Go(func() { pass(conn, to) })
		}
	})
	q.Set("host", dir)
	u.RawQuery = q.Encode()
	return u.String(), hold
}

// A database that hangs is as bad as one that fails, and no worse: what it does not vouch for is cut, and the relay ends when it is to.
func TestDatabaseHangs(t *testing.T) {
	source, hold := hanging(t, storetest.Postgres(t))
	w := newWorld(t, func(c *Config) { c.Database, c.PeerAddr = source, "any" })
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	for range 2 {
		w.browser().webSocket(p.URL)
	}
	hold.Lock()
	release := sync.OnceFunc(hold.Unlock)
	defer release()
	w.until("the visitors' end", func() bool { return w.relay.previews.Open() == 0 })
	ended := make(chan struct{})
	go func() { defer close(ended); w.stop() }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("it does not end")
		release()
		<-ended
	}
}
