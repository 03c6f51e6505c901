package main

import (
	"fmt"
	"net/http"
	"time"
)

// serveFront is an application that asks another for each request, as one with tracing does: what the request has in some headers goes on with it, and
// nothing else. It says who has answered.
func serveFront(addr, next string, passedOn []string) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	srv := &http.Server{Addr: addr, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, next, nil)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for _, name := range passedOn {
			req.Header[http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
		resp, err := client.Do(req)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		_ = resp.Body.Close()
		fmt.Fprintf(w, "answered by %s", resp.Header.Get("X-Name"))
	})}
	return srv.ListenAndServe()
}
