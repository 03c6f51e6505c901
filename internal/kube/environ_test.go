package kube

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEnvironment: a daemon that began in one terminal gets the credentials, and the proxy, as the terminal has them that asks.
func TestEnvironment(t *testing.T) {
	var got string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Get("Authorization")
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"kind":"APIVersions","versions":["v1"]}`))
	}))
	defer srv.Close()
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	write(filepath.Join(bin, "whoami-token"), `#!/bin/sh
echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"'$WHO-$OWN'"}}'
`, 0o700)
	file := write(filepath.Join(dir, "config"), `apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test}}]
clusters: [{name: test, cluster: {server: "`+srv.URL+`", insecure-skip-tls-verify: true}}]
users:
- name: test
  user:
    exec: {apiVersion: client.authentication.k8s.io/v1, command: whoami-token, interactiveMode: Never, env: [{name: OWN, value: kubeconfig}]}
`, 0o600)
	t.Setenv("WHO", "daemon")
	t.Setenv("OWN", "daemon")
	ask := func(env []string) string {
		t.Helper()
		c, err := Load(Options{Kubeconfig: file, Env: env})
		if err != nil {
			t.Fatal(err)
		}
		got = ""
		if err := c.api.Get().AbsPath("/api").Do(context.Background()).Error(); err != nil {
			t.Log(err)
		}
		return got
	}
	path := "PATH=" + bin + string(os.PathListSeparator) + os.Getenv("PATH")
	if got := ask([]string{path, "WHO=caller", "OWN=caller"}); got != "Bearer caller-kubeconfig" {
		t.Errorf("%q", got)
	}
	t.Setenv("PATH", strings.TrimPrefix(path, "PATH="))
	if got := ask(nil); got != "Bearer daemon-kubeconfig" {
		t.Errorf("in the same process: %q", got)
	}
	c, err := Load(Options{Kubeconfig: file})
	if err != nil {
		t.Fatal(err)
	}
	if env := strings.Join(c.Environment(), " "); !strings.Contains(env, "WHO=daemon") {
		t.Errorf("%q", env)
	}

	// Without a program only the proxy matters.
	plain := write(filepath.Join(dir, "plain"), kubeconfigOf(srv.URL), 0o600)
	t.Setenv("HTTPS_PROXY", "http://daemon.example:3128")
	c, err = Load(Options{Kubeconfig: plain})
	if err != nil {
		t.Fatal(err)
	}
	if env := c.Environment(); len(env) != 1 || env[0] != "HTTPS_PROXY=http://daemon.example:3128" {
		t.Errorf("%q", env)
	}
	for want, env := range map[string][]string{"http://caller.example:3128": {"https_proxy=http://caller.example:3128"}, "": {}} {
		c, err := Load(Options{Kubeconfig: plain, Env: env})
		if err != nil {
			t.Fatal(err)
		}
		r, _ := http.NewRequest(http.MethodGet, "https://k8s.example:6443/", nil)
		u, err := proxyOf(c.config)(r)
		if err != nil || u == nil && want != "" || u != nil && u.String() != want {
			t.Errorf("%v: %v, %v", env, u, err)
		}
	}
}

func kubeconfigOf(server string) string {
	return `apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test}}]
clusters: [{name: test, cluster: {server: "` + server + `"}}]
users: [{name: test, user: {token: t}}]
`
}
