// Package colors is the sample application: three small services that talk to each other.
//
//	verylargejavaservice (8080, a web page) → dataprocessingservice (3000) → verylargedatastore (8080)
//
// The page shows the colour that dataprocessingservice answers: green in the cluster. Run dataprocessingservice on the laptop with another
// colour, intercept it, and the page in the cluster takes that colour.
package colors

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// Config says which service to run and how. The zero value of each field but Service means its default.
type Config struct {
	// Service is verylargejavaservice, dataprocessingservice or verylargedatastore.
	Service string
	// Addr is where to listen; the default is the service's own port on all addresses.
	Addr string
	// Color is the first colour of dataprocessingservice; green by default.
	Color string
	// DataProcessing and DataStore are the URLs of the other services; by default their names in the cluster.
	DataProcessing, DataStore string
	// Drain is how long the service goes on serving, not ready, after it was told to stop; see Run.
	Drain time.Duration
	Log   *slog.Logger
}

// ports are the services and where they listen.
var ports = map[string]string{
	"verylargejavaservice":  ":8080",
	"dataprocessingservice": ":3000",
	"verylargedatastore":    ":8080",
}

// client keeps no connections: an intercept is decided when a connection opens, and the page shall show it at once.
var client = &http.Client{
	Timeout:   3 * time.Second,
	Transport: &http.Transport{DisableKeepAlives: true},
}

// New returns the handler of the service that cfg names.
func New(cfg Config) (http.Handler, error) {
	mux := http.NewServeMux()
	switch cfg.Service {
	case "verylargejavaservice":
		web := &web{dataProcessing: or(cfg.DataProcessing, "http://dataprocessingservice:3000")}
		mux.HandleFunc("GET /{$}", web.page)
		mux.HandleFunc("GET /state", web.state)
		mux.HandleFunc("GET /color", web.color)
	case "dataprocessingservice":
		p := &processing{dataStore: or(cfg.DataStore, "http://verylargedatastore:8080")}
		if err := p.setColor(or(cfg.Color, "green")); err != nil {
			return nil, err
		}
		mux.HandleFunc("GET /color", p.getColor)
		mux.HandleFunc("POST /color", p.postColor)
		mux.HandleFunc("GET /environment", environment)
		mux.HandleFunc("GET /summary", p.summary)
	case "verylargedatastore":
		mux.HandleFunc("GET /records", records)
	default:
		return nil, fmt.Errorf("service %q: want verylargejavaservice, dataprocessingservice or verylargedatastore", cfg.Service)
	}
	return mux, nil
}

// Run serves until ctx ends and then leaves without dropping a request: for cfg.Drain it says that it is not ready and
// goes on serving, because kube-proxy on every node takes a moment to hear that the pod is going; it closes each kept connection
// after its next answer; then it waits for what is under way.
func Run(ctx context.Context, cfg Config) error {
	h, err := New(cfg)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", or(cfg.Addr, ports[cfg.Service]))
	if err != nil {
		return err
	}
	return serve(ctx, ln, h, cfg)
}

func serve(ctx context.Context, ln net.Listener, h http.Handler, cfg Config) error {
	var stopping atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if stopping.Load() {
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if stopping.Load() {
			w.Header().Set("Connection", "close")
		}
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), passedKey{}, r.Header)))
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true) // as gRPC does inside a cluster

	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	cfg.Log.Info("serving", "service", cfg.Service, "addr", ln.Addr().String())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stopping.Store(true)
	cfg.Log.Info("stopping", "service", cfg.Service, "drain", cfg.Drain)
	time.Sleep(cfg.Drain)
	last, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Shutdown(last); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// passedOn are the headers that a service sends on with what it asks others for a request, as apps with tracing do: so a request that came through
// a preview is known as such wherever it leads.
var passedOn = []string{"X-Doppel-Intercept-Id", "Traceparent", "Tracestate", "Baggage"}

// passedKey is the context key of the headers of the request that is being answered.
type passedKey struct{}

// get fetches url into v (JSON).
func get(ctx context.Context, url string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if from, ok := ctx.Value(passedKey{}).(http.Header); ok {
		for _, name := range passedOn {
			if v := from.Values(name); len(v) > 0 {
				req.Header[name] = v
			}
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return json.Unmarshal(body, v)
}

// answer writes v as indented JSON; nothing may keep a copy of it.
func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v)
}

// environment answers the process's environment.
func environment(w http.ResponseWriter, _ *http.Request) {
	env := map[string]string{}
	for _, kv := range os.Environ() {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	answer(w, env)
}

// host names the machine or pod that answers.
func host() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}
