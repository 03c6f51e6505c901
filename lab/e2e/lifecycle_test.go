package e2e

import (
	"context"
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

const web = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web, namespace: default}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: "local/web:1", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
`

const webService = `apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`

const webService6 = `apiVersion: v1
kind: Service
metadata: {name: web6, namespace: default}
spec: {ipFamilies: [IPv6], selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`

// pod is what the test needs to know of a pod.
type pod struct {
	Metadata struct{ Name string }
	Spec     struct{ NodeName string }
	Status   struct {
		PodIP      string
		PodIPs     []struct{ IP string }
		Conditions []struct{ Type, Status string }
	}
}

// ip6 is the pod's IPv6 address.
func (p pod) ip6() string {
	if len(p.Status.PodIPs) < 2 {
		return "none"
	}
	return p.Status.PodIPs[1].IP
}

func (p pod) ready() bool {
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}

func TestTwoNodesAndALaptop(t *testing.T) {
	p := newProgram(t, "e2e-two")
	p.must("up", "--nodes", "2")
	if _, out, code := p.run("up", "--nodes", "2"); code != 0 || !strings.Contains(out, "already up") {
		t.Errorf("up again: %d %s", code, out)
	}
	if _, out, code := p.run("up"); code == 0 || !strings.Contains(out, "2 nodes") {
		t.Errorf("up with another number of nodes: %d %s", code, out)
	}
	pods := p.deploy()
	t.Run("pods", func(t *testing.T) { testPods(t, p, pods) })
	p.must("laptop", "add", "alice")
	t.Run("laptop", func(t *testing.T) { testLaptop(t, p, pods) })
	t.Run("link", func(t *testing.T) { testLink(t, p) })
	t.Run("kubeconfig", func(t *testing.T) { testKubeconfig(t, p) })
}

// deploy runs the application on every node and returns its pods.
func (p program) deploy() []pod {
	p.t.Helper()
	dir := p.t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "web"), "./web")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		p.t.Fatalf("build the application: %v\n%s", err, out)
	}
	archive := filepath.Join(dir, "web.tar")
	p.must("image", "build", "--binary", filepath.Join(dir, "web"), "--name", "local/web:1", "--user", "65532", "-o", archive)
	p.must("load", archive)
	client, ctx := p.client(), context.Background()
	for path, object := range map[string]string{
		"/apis/apps/v1/namespaces/default/daemonsets/web": web, "/api/v1/namespaces/default/services/web": webService,
		"/api/v1/namespaces/default/services/web6": webService6,
	} {
		if err := client.Apply(ctx, path, []byte(object)); err != nil {
			p.t.Fatal(err)
		}
	}
	var list struct{ Items []pod }
	eventually(p.t, "pods", func(ctx context.Context) error {
		list.Items = nil
		if err := client.Get(ctx, "/api/v1/namespaces/default/pods", &list); err != nil {
			return err
		}
		for _, pod := range list.Items {
			if !pod.ready() {
				return fmt.Errorf("pod %s is not ready", pod.Metadata.Name)
			}
		}
		if want := p.record().Plan.Nodes; len(list.Items) != want {
			return fmt.Errorf("%d pods, want %d", len(list.Items), want)
		}
		return nil
	})
	return list.Items
}

// fetch gets a page from inside a pod.
func (p program) fetch(from pod, page string) (string, error) {
	path := fmt.Sprintf("/api/v1/namespaces/default/pods/http:%s:8080/proxy/fetch?url=%s", from.Metadata.Name, url.QueryEscape(page))
	body, err := p.client().GetRaw(context.Background(), path)
	return string(body), err
}

func testPods(t *testing.T, p program, pods []pod) {
	a, b := pods[0], pods[1]
	if a.Spec.NodeName == b.Spec.NodeName {
		t.Fatalf("both pods are on %s", a.Spec.NodeName)
	}
	for _, c := range []struct {
		from, to pod
	}{{a, b}, {b, a}, {a, a}} {
		if got, err := p.fetch(c.from, "http://"+c.to.Status.PodIP+":8080"); err != nil || got != c.to.Metadata.Name {
			t.Errorf("%s to %s: %q %v", c.from.Spec.NodeName, c.to.Spec.NodeName, got, err)
		}
		if got, err := p.fetch(c.from, "http://["+c.to.ip6()+"]:8080"); err != nil || got != c.to.Metadata.Name {
			t.Errorf("%s to %s by IPv6: %q %v", c.from.Spec.NodeName, c.to.Spec.NodeName, got, err)
		}
	}
	// kube-proxy writes its rules at most once a second: a pod that is ready may be reached by a service a little later.
	seen := map[string]bool{}
	eventually(t, "the service leads to both pods", func(context.Context) error {
		got, err := p.fetch(a, "http://web.default.svc.cluster.local")
		if err != nil {
			return err
		}
		if seen[got] = true; len(seen) < 2 {
			return fmt.Errorf("only %v so far", seen)
		}
		return nil
	})
	eventually(t, "the IPv6 service leads to a pod", func(context.Context) error {
		got, err := p.fetch(a, "http://web6.default.svc.cluster.local")
		if err == nil && got != a.Metadata.Name && got != b.Metadata.Name {
			t.Errorf("IPv6 service: %q", got)
		}
		return err
	})
	if got, err := p.fetch(b, "http://["+plan.Outside6.String()+"]/x"); err != nil || !strings.Contains(got, "/x") {
		t.Errorf("outside by IPv6: %q %v", got, err)
	}
	if got, err := p.fetch(b, "http://example.com/x"); err != nil || !strings.Contains(got, "GET example.com /x") {
		t.Errorf("outside: %q %v", got, err)
	}
}

func testLaptop(t *testing.T, p program, pods []pod) {
	lab := p.record().Plan
	reach := func(addr string, port int) bool {
		_, code := p.laptop("alice", fmt.Sprintf("timeout 2 bash -c ': > /dev/tcp/%s/%d'", addr, port))
		return code == 0
	}
	if !reach(lab.APIServer().Addr().String(), plan.APIPort) {
		t.Error("the API server cannot be reached")
	}
	for _, c := range []struct {
		what, addr string
		port       int
	}{
		{"the first node's kubelet", lab.Node(1).IP.String(), 10250},
		{"the second node's kubelet", lab.Node(2).IP.String(), 10250},
		{"the API server by its service", plan.KubernetesI.String(), 443},
		{"cluster DNS", plan.ClusterDNS.String(), 53},
		{"a pod", pods[0].Status.PodIP, 8080},
		{"another pod", pods[1].Status.PodIP, 8080},
		{"a pod by IPv6", pods[0].ip6(), 8080},
		{"the first node's kubelet by IPv6", lab.Node(1).IP6.String(), 10250},
		{"cluster DNS by IPv6", plan.ClusterDNS6.String(), 53},
		{"the machine", lab.HostIP().String(), 22},
		{"the router's own web server", lab.Gateway().String(), 80},
	} {
		if reach(c.addr, c.port) {
			t.Errorf("%s can be reached", c.what)
		}
	}
	for _, c := range []struct {
		script, want string
		code         int
	}{
		{"hostname; exit 7", "alice\n", 7},
		{"kill -TERM $$", "", 143},
		{"id -u; echo $HOME | grep -o 'home/.*'; echo $XDG_RUNTIME_DIR", "0\nhome/0\n/run/user/0\n", 0},
		{"cat /etc/resolv.conf; test -L /etc/resolv.conf && echo link", "nameserver 10.78.1.1\n", 1},
		{"getent ahosts example.com | grep -c STREAM", "2\n", 0},
		{"getent hosts kubernetes.default.svc.cluster.local", "", 2},
		{"curl -sS http://www.example.com/y", "outside the cluster: GET www.example.com /y\n", 0},
		{"touch /etc/x /run/x && mv /etc/x /etc/resolv.conf.new", "", 0},
		{"ls /sys/class/net | xargs", "eth0 lo\n", 0},
		{"test -n \"$(ls /sys/fs/cgroup)\"", "", 0},
	} {
		if got, code := p.laptop("alice", c.script); got != c.want || code != c.code {
			t.Errorf("%s: %q and %d, want %q and %d", c.script, got, code, c.want, c.code)
		}
	}
	cmd := p.command("laptop", "exec", "--user", "1000", "alice", "--", "sh", "-c", "id -un; touch $HOME/x $XDG_RUNTIME_DIR/x && cat")
	cmd.Stdin = strings.NewReader("from standard input\n")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "dev\nfrom standard input\n" {
		t.Errorf("user 1000: %q %v", out, err)
	}
}

func testLink(t *testing.T, p program) {
	took := func() time.Duration {
		out, code := p.laptop("alice", "curl -sS -o /dev/null -w '%{time_connect}s' http://203.0.113.10/")
		d, err := time.ParseDuration(out)
		if code != 0 || err != nil {
			t.Fatalf("outside: %d %s", code, out)
		}
		return d
	}
	took() // so that the neighbours know each other
	p.must("laptop", "link", "alice", "--delay", "100ms")
	if d := took(); d < 200*time.Millisecond {
		t.Errorf("connected in %s over a line of 2 x 100 ms", d)
	}
	p.must("laptop", "link", "alice", "--delay", "0")
	if d := took(); d >= 200*time.Millisecond {
		t.Errorf("connected in %s over a perfect line", d)
	}
	for _, delay := range []string{"0", "1ms"} {
		p.must("laptop", "link", "alice", "down", "--delay", delay)
		if out, code := p.laptop("alice", "ip -br link show eth0; curl -sS -m 1 http://203.0.113.10/"); code == 0 || !strings.Contains(out, "NO-CARRIER") {
			t.Errorf("delay %s, link down: %d %s", delay, code, out)
		}
		p.must("laptop", "link", "alice", "up")
		took()
	}
	p.must("laptop", "link", "alice", "--delay", "0", "--loss", "100%")
	if out, code := p.laptop("alice", "curl -sS -m 1 http://203.0.113.10/"); code == 0 {
		t.Errorf("all packets are lost: %s", out)
	}
	p.must("laptop", "link", "alice", "--loss", "0")
	took()
}

func testKubeconfig(t *testing.T, p program) {
	const path = "https://%s/api/v1/namespaces/default/pods"
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"kubeconfig"}, "lab-e2e-two"},
		{[]string{"kubeconfig", "--as", "developer"}, `user: "developer"`},
		{[]string{"kubeconfig", "--as-user", "bob", "--as-group", "g"}, `user: "bob"`},
	} {
		if got := p.must(c.args...); !strings.Contains(got, c.want) {
			t.Errorf("%v: %s", c.args, got)
		}
	}
	if _, out, code := p.run("kubeconfig", "--as", "nobody"); code == 0 || !strings.Contains(out, "nobody") {
		t.Errorf("an unknown role: %d %s", code, out)
	}
	curl := "curl -sk -o /dev/null -w '%%{http_code}' --cert <(echo $CRT | base64 -d) --key <(echo $KEY | base64 -d) " + path
	script := `CRT=$(sed -n 's/.*client-certificate-data: //p' $KUBECONFIG) KEY=$(sed -n 's/.*client-key-data: //p' $KUBECONFIG); ` +
		fmt.Sprintf(curl, p.record().Plan.APIServer())
	for role, want := range map[string]string{"admin": "200", "developer": "403"} {
		if got := p.must("laptop", "exec", "--as", role, "alice", "--", "bash", "-c", script); got != want {
			t.Errorf("%s: HTTP %s, want %s", role, got, want)
		}
	}
}
