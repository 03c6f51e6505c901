package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// proxyHelper is an HTTP proxy that knows CONNECT; it prints a line for each connection.
func proxyHelper(addr string) int {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("listening")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = l.Close()
	}()
	_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		up, err := net.Dial("tcp", r.Host)
		if r.Method != http.MethodConnect || err != nil {
			http.Error(w, fmt.Sprint(r.Method, err), http.StatusBadGateway)
			return
		}
		fmt.Println("CONNECT", r.Host)
		c, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(up, buf); _ = up.Close() }()
		_, _ = io.Copy(c, up)
		_ = c.Close()
	}))
	return 0
}

// TestCredentials connects in every way in which a kubeconfig says who somebody is and how the API server is reached.
func TestCredentials(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "credentials")
	c.sample(t, ns)
	l := newLaptop(t, "guest")
	l.run(t, "doppel", "connect", "-n", ns, "--", "true") // installs the manager
	dir := t.TempDir()                                    // the laptop shares it
	base, err := clientcmd.LoadFromFile(c.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	token := c.userToken(t, ns)
	c.bindAccount(t, ns, "ClusterRole", "doppel-reach", ns, "guest")
	server := base.Clusters[base.Contexts[base.CurrentContext].Cluster]

	// file writes a kubeconfig with one context.
	file := func(t *testing.T, context string, user clientcmdapi.AuthInfo, change func(*clientcmdapi.Cluster)) string {
		t.Helper()
		cl := *server
		if change != nil {
			change(&cl)
		}
		cfg := clientcmdapi.NewConfig()
		cfg.Clusters["c"], cfg.AuthInfos["u"] = &cl, &user
		cfg.Contexts[context] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u", Namespace: ns}
		f := filepath.Join(dir, base64.RawURLEncoding.EncodeToString([]byte(t.Name())))
		if err := clientcmd.WriteToFile(*cfg, f); err != nil {
			t.Fatal(err)
		}
		return f
	}
	// works connects, as whom, and uses the connection.
	works := func(t *testing.T, user string, connect ...string) {
		t.Helper()
		out := l.run(t, append(connect, "--", "sh", "-c", "doppel status && curl -s -m 5 dataprocessingservice:3000/color")...)
		want(t, out, user, "Tunnel     : up", "green")
	}
	connect := func(f, context string, more ...string) []string {
		return append([]string{"doppel", "connect", "--kubeconfig", f, "--context", context}, more...)
	}
	plugin := func(t *testing.T, lifetime time.Duration) (clientcmdapi.AuthInfo, string) {
		t.Helper()
		calls, prog := filepath.Join(dir, "calls"), filepath.Join(dir, "plugin")
		script := fmt.Sprintf(`#!/bin/sh
echo called >> %s
cat <<END
{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"%s","expirationTimestamp":"$(date -u -d '+%d seconds' +%%Y-%%m-%%dT%%H:%%M:%%SZ)"}}
END
`, calls, token, int(lifetime.Seconds()))
		if err := errors.Join(os.WriteFile(prog, []byte(script), 0o755), os.RemoveAll(calls)); err != nil {
			t.Fatal(err)
		}
		return clientcmdapi.AuthInfo{Exec: &clientcmdapi.ExecConfig{
			APIVersion: "client.authentication.k8s.io/v1", Command: prog, InteractiveMode: clientcmdapi.NeverExecInteractiveMode,
		}}, calls
	}
	sa := "system:serviceaccount:" + ns + ":guest"

	t.Run("token, odd context", func(t *testing.T) {
		const odd = "guest@my cluster/eu:\"1\" 'x' äö"
		works(t, sa, connect(file(t, odd, clientcmdapi.AuthInfo{Token: token}, nil), odd)...)
	})
	t.Run("token file", func(t *testing.T) {
		f := filepath.Join(dir, "token")
		if err := os.WriteFile(f, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		works(t, sa, connect(file(t, "x", clientcmdapi.AuthInfo{TokenFile: f}, nil), "x")...)
	})
	t.Run("token file, rotated", func(t *testing.T) {
		f := filepath.Join(dir, "rotated")
		replace := func(name string) (token string, revoke func()) { // as a kubelet replaces a projected token
			secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}}
			ok(c.core.CoreV1().Secrets(ns).Create(t.Context(), secret, metav1.CreateOptions{}))(t)
			tr := ok(c.core.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), "guest", &authenticationv1.TokenRequest{
				Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: name}},
			}, metav1.CreateOptions{}))(t)
			if err := errors.Join(os.WriteFile(f+".new", []byte(tr.Status.Token), 0o600), os.Rename(f+".new", f)); err != nil {
				t.Fatal(err)
			}
			return tr.Status.Token, func() {
				if err := c.core.CoreV1().Secrets(ns).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		old, revoke := replace("token-1")
		l.run(t, connect(file(t, "x", clientcmdapi.AuthInfo{TokenFile: f}, nil), "x")...)
		defer l.run(t, "doppel", "quit")
		revoke()
		eventually(t, 40*time.Second, func() error { // the API server knows a good token for 10 s
			tr, err := c.core.AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: old}}, metav1.CreateOptions{})
			if err == nil && tr.Status.Authenticated {
				err = errors.New("the old token is good")
			}
			return err
		})
		if r := l.try(t, "doppel", "list"); !strings.Contains(r.stderr, "does not accept your credentials") {
			t.Errorf("with the expired token: %v", r)
		}
		replace("token-2")
		eventually(t, 20*time.Second, func() error {
			if r := l.try(t, "doppel", "list"); strings.Contains(r.stderr, "does not accept your credentials") {
				return fmt.Errorf("with the new token: %v", r)
			}
			return nil
		})
		l.link(t, "down") // the tunnel needs another connection, and so a token
		l.link(t, "up")
		eventually(t, 20*time.Second, func() error {
			if r := l.try(t, "curl", "-s", "-m", "3", "dataprocessingservice:3000/color"); !strings.Contains(r.stdout, "green") {
				return fmt.Errorf("%v", r)
			}
			return nil
		})
	})
	t.Run("exec plugin, renewed", func(t *testing.T) {
		user, calls := plugin(t, 2*time.Second)
		l.run(t, connect(file(t, "x", user, nil), "x")...)
		defer l.run(t, "doppel", "quit")
		count := func() int { b, _ := os.ReadFile(calls); return strings.Count(string(b), "called") }
		before := count()
		eventually(t, 20*time.Second, func() error { // each request needs a token that is still valid
			l.try(t, "doppel", "list") // whether the guest may is another question
			if n := count(); n == before {
				return fmt.Errorf("the plugin was called %d times", n)
			}
			return nil
		})
	})
	t.Run("impersonation", func(t *testing.T) {
		admin := *base.AuthInfos[base.Contexts[base.CurrentContext].AuthInfo]
		works(t, "someone-else", connect(file(t, "x", admin, nil), "x", "--as", "someone-else", "--as-group", "system:masters")...)
		admin.Impersonate, admin.ImpersonateGroups = "yet-another", []string{"system:masters"}
		works(t, "yet-another", connect(file(t, "y", admin, nil), "y")...)
	})
	t.Run("proxies", func(t *testing.T) {
		proxy := startLines(t, l.command, "proxy", "127.0.0.1:3128")
		used := func() int { return len(proxy.get()) }
		n := used()
		works(t, sa, connect(file(t, "x", clientcmdapi.AuthInfo{Token: token}, func(c *clientcmdapi.Cluster) { c.ProxyURL = "http://127.0.0.1:3128" }), "x")...)
		if used() == n {
			t.Error("proxy-url was not used")
		}
		l.run(t, "doppel", "quit", "-s") // the daemon's environment is that of the command which starts it
		n = used()
		works(t, sa, append([]string{"env", "HTTPS_PROXY=http://127.0.0.1:3128"}, connect(file(t, "y", clientcmdapi.AuthInfo{Token: token}, nil), "y")...)...)
		if used() == n {
			t.Error("HTTPS_PROXY was not used")
		}
	})
	l.run(t, "doppel", "quit", "-s")
}

// userToken makes a service account that may use doppel and returns a token of it.
func (c *cluster) userToken(t *testing.T, ns string) string {
	t.Helper()
	meta := metav1.ObjectMeta{Name: "guest", Namespace: ns}
	_, err := c.core.CoreV1().ServiceAccounts(ns).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	b := &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "guest-", Namespace: managerNS},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Name: "guest", Namespace: ns}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "doppel-connect"},
	}
	if _, err := c.core.RbacV1().RoleBindings(managerNS).Create(t.Context(), b, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	hour := int64(3600)
	tr, err := c.core.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), "guest", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &hour},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return tr.Status.Token
}
