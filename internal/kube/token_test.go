package kube

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// A token file that was replaced counts at once when the old token is refused.
func TestTokenFile(t *testing.T) {
	var good string
	var bodies []string
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		bodies = append(bodies, string(b))
		w.Header().Set("Content-Type", "application/json")
		if r.Header.Get("Authorization") != "Bearer "+good {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Unauthorized","code":401}`)
			return
		}
		_, _ = io.WriteString(w, `{"kind":"SelfSubjectReview","apiVersion":"authentication.k8s.io/v1","status":{"userInfo":{"username":"ada"}}}`)
	}))
	defer s.Close()
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	text := strings.Replace(fmt.Sprintf(twoContexts, "prod", s.URL), "token: secret", "tokenFile: "+file, 1)
	text = strings.Replace(text, "cluster: {server", "cluster: {insecure-skip-tls-verify: true, server", 1) // client-go sends no token without TLS
	c, err := Load(Options{Kubeconfig: kubeconfig(t, text)})
	if err != nil {
		t.Fatal(err)
	}
	who := func() error { _, err := c.WhoAmI(t.Context()); return err }
	good = "first"
	if err := who(); err != nil {
		t.Fatal(err)
	}
	good = "second"
	wantError(t, who(), uerr.Denied, "does not accept your credentials", "log in")
	write("second")
	bodies = nil
	if err := who(); err != nil {
		t.Error(err)
	}
	if len(bodies) != 2 || bodies[0] != bodies[1] || bodies[0] == "" {
		t.Errorf("the second try had another body: %q", bodies)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	good = "third"
	wantError(t, who(), uerr.Denied, "does not accept your credentials", "log in")
}
