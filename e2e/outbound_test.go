package e2e

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// probeImage is the server that the checks of the data path talk to; package probe is both ends.
const probeImage = "doppel.lab/probe:e2e"

const probeServer = `apiVersion: apps/v1
kind: Deployment
metadata: {name: probe}
spec:
  replicas: 2
  selector: {matchLabels: {app: probe}}
  template:
    metadata: {labels: {app: probe}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: probe
        image: ` + probeImage + `
        imagePullPolicy: Never
        args: [serve]
        readinessProbe: {tcpSocket: {port: 7000}, periodSeconds: 1}
`

const probeService = `apiVersion: v1
kind: Service
metadata: {name: probe}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: probe}
  ports:
  - {name: tcp, port: 7000}
  - {name: udp, port: 7000, protocol: UDP}
`

// probe builds the probe and loads its image; it returns the program, which runs on laptops and nodes too.
func (c *cluster) probe(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "doppel-probe") // not the test's own, which others may not read
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "probe")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "./e2e/probe")
	build.Dir, build.Env = c.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	archive := filepath.Join(dir, "probe.tar")
	for _, args := range [][]string{{"image", "build", "--binary", bin, "--name", probeImage, "--user", "65532", "-o", archive}, {"load", archive}} {
		if out, err := c.lab(args...); err != nil {
			t.Fatalf("lab %v: %v\n%s", args, err, out)
		}
	}
	return bin
}

// TestOutbound: the laptop is in the cluster's network. What an application sees there it sees here.
func TestOutbound(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "outbound")
	bin := c.probe(t)
	c.apply(t, ns, []byte(probeServer))
	c.apply(t, ns, []byte(probeService))
	c.available(t, ns, "probe")
	a, b := c.dualStackPods(t, ns)
	svc, err := c.core.CoreV1().Services(ns).Get(t.Context(), "probe", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ip := range svc.Spec.ClusterIPs {
		c.answers(t, net.JoinHostPort(ip, "7000"))
	}
	l := newLaptop(t, "outbound")
	l.run(t, "doppel", "connect", "-n", ns)

	// The same checks against one pod by IPv4 and another by IPv6.
	t.Run("protocols", func(t *testing.T) {
		for family, addr := range map[string]string{"IPv4": a.v4, "IPv6": b.v6} {
			t.Run(family, func(t *testing.T) {
				t.Parallel()
				if r := l.try(t, bin, "check", addr); r.code != 0 {
					t.Errorf("from the laptop: %v", r)
				} else {
					t.Log(r.stdout)
				}
			})
		}
		t.Run("services", func(t *testing.T) {
			t.Parallel()
			for _, ip := range svc.Spec.ClusterIPs {
				want(t, l.run(t, bin, "dial", net.JoinHostPort(ip, "7000")), "connected")
			}
			want(t, l.run(t, bin, "dial", "probe:7000"), "connected")
			want(t, l.run(t, "getent", "ahostsv6", "probe."+ns), svc.Spec.ClusterIPs[1])
		})
		// What is closed, dead or unreachable looks to the laptop as it looks to a pod of the cluster.
		t.Run("closed", func(t *testing.T) {
			t.Parallel()
			for _, hostport := range []string{
				net.JoinHostPort(a.v4, "7999"), net.JoinHostPort(a.v6, "7999"), net.JoinHostPort(svc.Spec.ClusterIPs[0], "7999"),
				net.JoinHostPort(dead(a.v4), "7000"), net.JoinHostPort(dead(a.v6), "7000"),
				net.JoinHostPort(c.unreachable(t, a.v4), "7000"), net.JoinHostPort(c.unreachable(t, a.v6), "7000"),
			} {
				t.Run(hostport, func(t *testing.T) {
					t.Parallel()
					there := strings.TrimSpace(c.pod(t, bin, "dial", hostport))
					if here := strings.TrimSpace(l.run(t, bin, "dial", hostport)); here != there {
						t.Errorf("%s on the laptop, %s in a pod", here, there)
					}
					t.Log(there)
				})
			}
		})
		t.Run("ping", func(t *testing.T) {
			t.Parallel()
			testPing(t, c, l, a)
		})
	})
	t.Run("10,000 connections", func(t *testing.T) { testManyConnections(t, c, l, bin, net.JoinHostPort(a.v4, "7000")) })
	l.run(t, "doppel", "quit", "-s")
}

// dualStackPod is a pod's addresses.
type dualStackPod struct{ v4, v6 string }

func (c *cluster) dualStackPods(t *testing.T, ns string) (a, b dualStackPod) {
	t.Helper()
	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=probe"})
	if err != nil {
		t.Fatal(err)
	}
	var out []dualStackPod
	for _, p := range pods.Items {
		if len(p.Status.PodIPs) == 2 && p.Status.Phase == corev1.PodRunning {
			out = append(out, dualStackPod{v4: p.Status.PodIPs[0].IP, v6: p.Status.PodIPs[1].IP})
		}
	}
	if len(out) != 2 {
		t.Fatalf("%d pods with two addresses", len(out))
	}
	return out[0], out[1]
}

// dead is an address of the same subnet that no pod has: the pods of the tests never come that far.
func dead(addr string) string { return sibling(addr, "250", "dead") }

// nodeOf is the address of the pod's node in the pods' subnet: the first one.
func nodeOf(pod string) string { return sibling(pod, "1", "1") }

// sibling is addr with another last part.
func sibling(addr, last4, last6 string) string {
	if i := strings.LastIndex(addr, ":"); i >= 0 {
		return addr[:i+1] + last6
	}
	return addr[:strings.LastIndex(addr, ".")+1] + last4
}

// unreachable is an address of the same subnet of which the node says that it cannot be reached.
func (c *cluster) unreachable(t *testing.T, addr string) string {
	t.Helper()
	out := sibling(addr, "251", "beef")
	c.node(t, "ip", "route", "replace", "unreachable", out)
	return out
}

// pod runs a command in the network of a probe's pod and returns its standard output.
func (c *cluster) pod(t *testing.T, args ...string) string {
	t.Helper()
	return c.node(t, append([]string{"sh", "-c", `exec nsenter -t $(pgrep -of '[p]robe serve') -n "$@"`, "sh"}, args...)...)
}

// onNode prepares a command on a node.
func (c *cluster) onNode(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.bin("lab"), append([]string{"--name", labName, "node", "exec", "--"}, args...)...)
}

// node runs a command on a node and returns its standard output.
func (c *cluster) node(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.onNode(context.Background(), args...).Output() // also from a Cleanup
	if err != nil {
		t.Fatalf("on a node: %v: %v %s", args, err, out)
	}
	return string(out)
}

// testPing pings pods and their node by both families, small and in fragments, and what does not exist.
func testPing(t *testing.T, c *cluster, l *laptop, pod dualStackPod) {
	want(t, l.run(t, "ping", "-c", "3", "-i", "0.2", "-W", "3", pod.v4), "3 received", "time=")
	for _, addr := range []string{pod.v6, nodeOf(pod.v4), nodeOf(pod.v6)} {
		want(t, l.run(t, "ping", "-c", "1", "-W", "3", addr), "1 received")
	}
	for _, size := range []string{"1473", "9000", "60000"} {
		want(t, l.run(t, "ping", "-c", "1", "-W", "3", "-s", size, pod.v4), "1 received")
		want(t, l.run(t, "ping", "-c", "1", "-W", "3", "-s", size, pod.v6), "1 received")
	}
	// as the cluster says it: silence, or the ICMP error
	for addr, unreachable := range map[string]bool{dead(pod.v4): false, dead(pod.v6): false, c.unreachable(t, pod.v4): true, c.unreachable(t, pod.v6): true} {
		r := l.try(t, "ping", "-c", "1", "-W", "1", addr)
		want(t, r.stdout, " 0 received")
		if got := strings.Contains(r.stdout, "nreachable"); got != unreachable {
			t.Errorf("%s: want unreachable %v\n%v", addr, unreachable, r)
		}
	}
}

// manyConnections is how many one laptop must bear, and perFlow what one idle flow may cost at each end; the goal for the latter is 12 KiB,
// the rest is for what a garbage-collected process keeps aside.
const (
	manyConnections = 10_000
	perFlow         = 40 << 10
)

func testManyConnections(t *testing.T, c *cluster, l *laptop, bin, addr string) {
	ends := map[string]func() int{"user daemon": func() int { return l.rss(t, "doppel daemon") }, "manager": func() int { return c.managerRSS(t) }}
	before := map[string]int{}
	for name, rss := range ends {
		before[name] = rss()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := l.command(ctx, bin, "hold", addr, strconv.Itoa(manyConnections))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	wait := func() (err error) {
		once.Do(func() {
			_ = in.Close()
			err = cmd.Wait()
		})
		return err
	}
	defer func() { _ = wait() }()
	lines := bufio.NewScanner(out)
	open := false
	for !open && lines.Scan() {
		t.Log(lines.Text())
		open = strings.HasPrefix(lines.Text(), "open ")
	}
	if !open {
		t.Fatalf("not opened: %v %s", wait(), stderr.String())
	}
	for name, rss := range ends {
		per := (rss() - before[name]) / manyConnections
		t.Logf("%s: %d KiB idle, %d bytes more for each flow", name, before[name]>>10, per)
		if per > perFlow {
			t.Errorf("%s: %d bytes for each idle flow, want at most %d", name, per, perFlow)
		}
	}
	// beside them everything goes on
	want(t, l.run(t, bin, "dial", addr), "connected")
	want(t, l.run(t, "ping", "-c", "1", "-W", "3", strings.Split(addr, ":")[0]), "1 received")
	_ = in.Close()
	rest, _ := io.ReadAll(out)
	if err := wait(); err != nil || !strings.Contains(string(rest), "all there") {
		t.Fatalf("after a while: %v\n%s%s", err, rest, stderr.String())
	}
}

var rssRE = regexp.MustCompile(`VmRSS:\s+(\d+) kB`)

// rss is the resident memory of the one process on the laptop whose command line begins like this, in bytes.
func (l *laptop) rss(t *testing.T, cmdline string) int {
	t.Helper()
	out := l.sh(t, "for p in $(pgrep -f '"+cmdline[:3]+"["+cmdline[3:4]+"]"+cmdline[4:]+"'); do cat /proc/$p/status; done")
	return kib(t, out)
}

// managerRSS is the resident memory of the manager's pod, as its node sees it.
func (c *cluster) managerRSS(t *testing.T) int {
	t.Helper()
	return kib(t, c.node(t, "sh", "-c", "cat /proc/$(pgrep -f '[t]raffic-manager --namespace')/status"))
}

func kib(t *testing.T, status string) int {
	t.Helper()
	m := rssRE.FindAllStringSubmatch(status, -1)
	if len(m) != 1 {
		t.Fatalf("%d processes: %s", len(m), status)
	}
	n, err := strconv.Atoi(m[0][1])
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}
