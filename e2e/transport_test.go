package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// nginxConf is a reverse proxy before the API server: at port 8443 one that passes no upgrade but WebSockets, at 8444 one that
// has no way to services and passes no WebSockets.
const nginxConf = `
daemon off; pid %[1]s/nginx.pid; error_log stderr; worker_processes 1;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  ssl_certificate %[1]s/cert.pem; ssl_certificate_key %[1]s/key.pem;
  proxy_http_version 1.1; proxy_buffering off; proxy_read_timeout 1h; proxy_ssl_verify off;
  map $http_upgrade $websocket { websocket $http_upgrade; }
  map $http_upgrade $spdy { SPDY/3.1 $http_upgrade; }
  map $websocket $websocket_connection { "" ""; default Upgrade; }
  map $spdy $spdy_connection { "" ""; default Upgrade; }
  server {
    listen 127.0.0.1:8443 ssl;
    location / { proxy_pass %[2]s; proxy_set_header Upgrade $websocket; proxy_set_header Connection $websocket_connection; }
  }
  server {
    listen 127.0.0.1:8444 ssl;
    location ~ /services/.*/proxy/ { return 503; }
    location / { proxy_pass %[2]s; proxy_set_header Upgrade $spdy; proxy_set_header Connection $spdy_connection; }
  }
}
`

// TestTransports connects, as somebody with the chart's roles alone, where the service proxy cannot be used.
func TestTransports(t *testing.T) {
	c := theCluster(t)
	nginx := filepath.Join(c.root, "bin/tools/nginx/usr/sbin/nginx")
	if _, err := os.Stat(nginx); err != nil {
		if nginx, err = exec.LookPath("nginx"); err != nil {
			t.Fatalf("make deps: %v", err)
		}
	}
	ns := c.namespace(t, "transports")
	c.sample(t, ns)
	l := newLaptop(t, "behind")
	l.withManager(t)
	l.run(t, "doppel", "helm", "upgrade", "--set", "clientRbac.portForward=true")
	t.Cleanup(func() { l.run(t, "doppel", "helm", "upgrade", "--reset-values") })
	account := c.accountKubeconfig(t, ns, "behind")
	c.bindAccount(t, managerNS, "Role", "doppel-connect", ns, "behind")
	everywhere := ok(c.core.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "transports-"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "doppel-reach"},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: ns, Name: "behind"}},
	}, metav1.CreateOptions{}))(t)
	t.Cleanup(func() {
		_ = c.core.RbacV1().ClusterRoleBindings().Delete(context.Background(), everywhere.Name, metav1.DeleteOptions{})
	})
	const server = "10.244.1.1:7007" // the node's end of the pods' links
	startLines(t, c.onNode, "serve", "0.0.0.0:7007")

	dir := t.TempDir() // the laptop shares it
	l.sh(t, "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=proxy -addext subjectAltName=IP:127.0.0.1 -keyout "+dir+"/key.pem -out "+dir+"/cert.pem 2>/dev/null")
	base := ok(clientcmd.LoadFromFile(account))(t)
	conf := filepath.Join(dir, "nginx.conf")
	kube := base.Clusters[base.Contexts[base.CurrentContext].Cluster]
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, dir, kube.Server), 0o600); err != nil {
		t.Fatal(err)
	}
	l.start(t, nginx, "-c", conf)
	for _, port := range []string{"8443", "8444"} {
		eventually(t, 10*time.Second, func() error { // it listens
			if r := l.try(t, "curl", "-sk", "-m", "5", "-o", "/dev/null", "https://127.0.0.1:"+port+"/"); r.code != 0 {
				return fmt.Errorf("nginx on port %s: %v", port, r)
			}
			return nil
		})
	}
	kube.CertificateAuthorityData = []byte(l.sh(t, "cat "+dir+"/cert.pem"))

	for port, tt := range map[string]struct{ transport, why string }{
		"8443": {"WebSocket port-forward", "does not carry HTTP upgrades: HTTP 426"},
		"8444": {"SPDY port-forward", "HTTP 503"},
	} {
		t.Run(tt.transport, func(t *testing.T) {
			kube.Server = "https://127.0.0.1:" + port
			file := filepath.Join(dir, port)
			if err := clientcmd.WriteToFile(*base, file); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			l.run(t, "doppel", "connect", "--kubeconfig", file, "-n", ns)
			t.Logf("connected in %v", time.Since(began).Round(time.Millisecond))
			defer l.run(t, "doppel", "quit")
			want(t, l.run(t, "doppel", "status"), "Transport  : "+tt.transport, "not by service proxy: ", tt.why)
			var st struct {
				Session struct {
					Transport struct {
						Name   string
						Failed []struct{ Name, Why string }
					}
				}
			}
			out := l.run(t, "doppel", "status", "-o", "json")
			if err := json.Unmarshal([]byte(out), &st); err != nil {
				t.Fatal(err)
			}
			if tr := st.Session.Transport; tr.Name != tt.transport || tr.Failed[0].Name != "service proxy" || !strings.Contains(tr.Failed[0].Why, tt.why) {
				t.Errorf("status: %s", out)
			}
			want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")
			download := startLines(t, l.command, "download", server)
			began = time.Now()
			eventually(t, 30*time.Second, func() error {
				if s := download.last(); s != "complete: EOF" {
					return fmt.Errorf("the download: %s", s)
				}
				return nil
			})
			t.Logf("%d MiB in %v", fetchSize>>20, time.Since(began).Round(time.Millisecond))
			want(t, l.run(t, "doppel", "doctor", "--kubeconfig", file, "-n", ns), "way in", tt.transport+" connects in")
		})
	}
	// The API server is on the node, and so is the pod: what it sends there is dropped, as by a private cluster's firewall. The kubelet reaches the
	// pod from inside.
	t.Run("no way to the pod", func(t *testing.T) {
		pods := ok(c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"}))(t)
		rules := "table ip transports { chain output { type filter hook output priority filter; ip daddr " + pods.Items[0].Status.PodIP + " tcp dport 10250 drop; }; }"
		c.node(t, "nft", rules)
		defer c.node(t, "nft", "delete", "table", "ip", "transports")
		r := l.try(t, "doppel", "helm", "upgrade")
		want(t, r.stderr, "warning: the API server does not reach the injection webhook, so that pods get no agents")
		want(t, r.stdout, "upgrade done")
		began := time.Now()
		l.run(t, "doppel", "connect", "--kubeconfig", account, "-n", ns)
		t.Logf("connected in %v", time.Since(began).Round(time.Millisecond))
		want(t, l.run(t, "doppel", "status"), "Transport  : WebSocket port-forward", "not by service proxy: the API server does not get through")
		want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")
	})
	l.run(t, "doppel", "quit", "-s")
}
