package colors

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
)

func start(t *testing.T, cfg Config) *httptest.Server {
	t.Helper()
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func fetch(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %s", url, resp.Status, b)
	}
	return strings.TrimSpace(string(b))
}

// TestChain runs the three services against each other and changes the colour while they run.
func TestChain(t *testing.T) {
	store := start(t, Config{Service: "verylargedatastore"})
	proc := start(t, Config{Service: "dataprocessingservice", DataStore: store.URL})
	web := start(t, Config{Service: "verylargejavaservice", DataProcessing: proc.URL})

	if got := fetch(t, proc.URL+"/color"); got != `"green"` {
		t.Errorf("/color = %s, want \"green\"", got)
	}
	resp, err := http.Post(proc.URL+"/color?c=blue", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if got := fetch(t, web.URL+"/color"); got != `"blue"` {
		t.Errorf("/color through the web service = %s, want \"blue\"", got)
	}
	var s state
	if err := json.Unmarshal([]byte(fetch(t, web.URL+"/state")), &s); err != nil {
		t.Fatal(err)
	}
	if s.Color != "blue" || s.Orders != 3127 || len(s.Revenue) != 4 || s.Error != "" {
		t.Errorf("state = %+v", s)
	}
	if html := fetch(t, web.URL); !strings.Contains(html, `<h1 id="color">blue</h1>`) || !strings.Contains(html, "--c: blue") {
		t.Errorf("the page does not show blue:\n%s", html)
	}
}

func TestColorIsChecked(t *testing.T) {
	proc := start(t, Config{Service: "dataprocessingservice"})
	resp, err := http.Post(proc.URL+"/color?c=red;}body{", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a colour that is CSS: %s, want 400", resp.Status)
	}
	if _, err := New(Config{Service: "dataprocessingservice", Color: "</style>"}); err == nil {
		t.Error("a colour that is HTML was taken")
	}
}

func TestPageWithoutDataProcessing(t *testing.T) {
	gone := httptest.NewServer(nil)
	gone.Close()
	web := start(t, Config{Service: "verylargejavaservice", DataProcessing: gone.URL})
	if html := fetch(t, web.URL); !strings.Contains(html, "no answer") || !strings.Contains(html, "refused") {
		t.Errorf("the page does not say that nobody answers:\n%s", html)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("COLORS_TEST", "a=b")
	proc := start(t, Config{Service: "dataprocessingservice"})
	var env map[string]string
	if err := json.Unmarshal([]byte(fetch(t, proc.URL+"/environment")), &env); err != nil {
		t.Fatal(err)
	}
	if env["COLORS_TEST"] != "a=b" {
		t.Errorf("COLORS_TEST = %q", env["COLORS_TEST"])
	}
}

// TestDrain checks that a stopping service is not ready at once, goes on answering, and asks clients to reconnect.
func TestDrain(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + ln.Addr().String()
	h, err := New(Config{Service: "dataprocessingservice"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- serve(ctx, ln, h, Config{Drain: 500 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	}()
	fetch(t, url+"/readyz")
	cancel()
	var notReady, answered bool
	for {
		r, err := http.Get(url + "/readyz")
		if err != nil {
			break // the listener is closed
		}
		_ = r.Body.Close()
		notReady = notReady || r.StatusCode == http.StatusServiceUnavailable
		if !notReady {
			continue
		}
		c, err := http.Get(url + "/color")
		if err != nil {
			break
		}
		_ = c.Body.Close()
		answered = answered || (c.StatusCode == http.StatusOK && c.Close)
	}
	if !notReady || !answered {
		t.Errorf("while stopping: not ready %v, answered with Connection: close %v; want both", notReady, answered)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestUnknownService(t *testing.T) {
	if _, err := New(Config{Service: "smallgoservice"}); err == nil {
		t.Error("an unknown service was taken")
	}
}

// TestManifestImage keeps the manifest's image at the version that the build gives to images.
func TestManifestImage(t *testing.T) {
	b, err := os.ReadFile("k8s.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := "image: ghcr.io/doppel-dev/colors:" + buildinfo.Version
	if n := strings.Count(string(b), want); n != 3 {
		t.Errorf("%q stands %d times in k8s.yaml, want 3", want, n)
	}
}
