// Command app is an application of the end-to-end tests that shows what it has: its environment and its files.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

func main() {
	err := fmt.Errorf("usage: app serve ADDRESS... | environ | whoami")
	switch args := os.Args[1:]; {
	case filepath.Base(os.Args[0]) == "cat": // the image has no other
		err = cat(args)
	case len(args) >= 2 && args[0] == "serve": // GET /environ, and GET and PUT of files
		err = serve(args[1:])
	case len(args) == 1 && args[0] == "environ": // the process's own, as JSON
		err = json.NewEncoder(os.Stdout).Encode(environ())
	case len(args) == 1 && args[0] == "whoami": // as whom the API server knows it
		err = whoami()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func environ() map[string]string {
	out := map[string]string{}
	for _, kv := range os.Environ() {
		name, value, _ := strings.Cut(kv, "=")
		out[name] = value
	}
	return out
}

func cat(names []string) error {
	for _, name := range names {
		f, err := os.Open(name)
		if err == nil {
			_, err = io.Copy(os.Stdout, f)
			_ = f.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func serve(addrs []string) error {
	http.HandleFunc("GET /environ", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(environ()) })
	http.HandleFunc("GET /file/", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(strings.TrimPrefix(r.URL.Path, "/file"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(b)
	})
	http.HandleFunc("PUT /file/", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = os.WriteFile(strings.TrimPrefix(r.URL.Path, "/file"), b, 0o644)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	failed := make(chan error)
	for _, addr := range addrs {
		srv := &http.Server{Addr: addr, ReadHeaderTimeout: time.Minute}
		go func() { failed <- srv.ListenAndServe() }()
	}
	return <-failed
}

// whoami asks as programs in a pod do: where the API server is stands in the environment, and the credentials in files at a known path.
func whoami() error {
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	cs, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	me, err := cs.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, me.Status.UserInfo.Username)
	return nil
}
