package main

import (
	"fmt"
	"net/http"
	"path/filepath"
	"time"
)

// serveTLS answers every request over TLS, in HTTP/1.1 or HTTP/2, with its name and the protocol.
func serveTLS(name, addr, dir string) error {
	srv := &http.Server{
		Addr: addr, ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, name, r.Proto) }),
	}
	return srv.ListenAndServeTLS(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
}
