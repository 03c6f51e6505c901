// Command stubmanager stands in for the traffic-manager where only the chart is tested. DOPPEL_LOG_LEVEL chooses what it does:
// error ends it at once, warn never becomes ready, anything else is ready.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	level := os.Getenv("DOPPEL_LOG_LEVEL")
	if level == "error" {
		fmt.Fprintln(os.Stderr, "traffic-manager: error: the stub was told to end")
		os.Exit(3)
	}
	fmt.Fprintln(os.Stderr, "the stub was told", level)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	srv := &http.Server{Addr: ":8081", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/readyz" && level == "warn" {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
		}
	})}
	go func() { <-ctx.Done(); _ = srv.Close() }()
	_ = srv.ListenAndServe()
}
