package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// reported is by when a fault on the way to an agent is to be reported, from when the intercept would be there without it.
const reported = 2 * time.Second

// TestCanary breaks the way to an agent whose intercept says ACTIVE: the user is told.
func TestCanary(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "canary")
	l := newLaptop(t, "louise")
	l.withManager(t)
	bin := c.probe(t)
	row := taken{name: "web", kind: "Deployment", service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(7000)}}}}
	c.workload(t, ns, row)
	eventually(t, time.Minute, func() error { return c.says(t, bin, ns, row, "web") })
	l.run(t, "doppel", "connect", "-n", ns)
	l.start(t, bin, "name", "laptop", "tcp://127.0.0.1:3000")
	intercept := func() (string, time.Duration) {
		t.Helper()
		began := time.Now()
		out := l.run(t, "doppel", "intercept", "web", "-p", "3000")
		took := time.Since(began)
		t.Logf("%v: %s", took, out)
		want(t, out, "ACTIVE")
		return out, took
	}
	intercept() // which brings the agent
	l.run(t, "doppel", "leave", "web")
	out, well := intercept()
	// broken has an intercept begin whose way is broken, and checks what is said of it, and when.
	broken := func(problem ...string) {
		t.Helper()
		out, took := intercept()
		want(t, out, problem...)
		if took > well+reported {
			t.Errorf("reported after %v; without a fault an intercept takes %v", took, well)
		}
	}
	if strings.Contains(out, "connections to") {
		t.Error("a fault is reported: ", out)
	}
	if err := c.says(t, bin, ns, row, "laptop"); err != nil {
		t.Error(err)
	}
	l.run(t, "doppel", "leave", "web")

	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=web", FieldSelector: "status.phase=Running"})
	if err != nil || len(pods.Items) != 1 {
		t.Fatal(err, len(pods.Items))
	}
	pod := pods.Items[0]
	inPod := func(line string) {
		t.Helper()
		c.node(t, "sh", "-c", fmt.Sprintf(`for p in $(pgrep -f '[t]raffic-agent'); do if nsenter -n -t $p ip -4 addr show | grep -qF ' %s/'; then exec nsenter -n -t $p sh -c '%s'; fi; done; exit 9`, pod.Status.PodIP, line))
	}
	inPod("nft add table inet block; nft add chain inet block in \"{ type filter hook input priority -5; }\"; nft add rule inet block in tcp dport 9901 drop")
	broken("port 7000 of pod "+pod.Name, "is not answered")
	inPod("nft delete table inet block")
	eventually(t, 30*time.Second, func() error { // it is tried again
		if out := l.run(t, "doppel", "list"); strings.Contains(out, "not answered") {
			return fmt.Errorf("still: %s", out)
		}
		return nil
	})
	l.run(t, "doppel", "leave", "web")

	t.Run("stale", func(t *testing.T) { c.stale(t, l, ns, broken) })

	inPod("nft flush ruleset")
	broken("connections to port 7000 of pod " + pod.Name + " do not reach a traffic-agent")
	want(t, l.run(t, "doppel", "list"), "do not reach a traffic-agent")
	if err := c.core.CoreV1().Pods(ns).Delete(t.Context(), pod.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		if out := l.run(t, "doppel", "list"); strings.Contains(out, "do not reach") {
			return fmt.Errorf("still: %s", out)
		}
		return c.says(t, bin, ns, row, "laptop")
	})
	l.run(t, "doppel", "leave", "web")
	l.run(t, "doppel", "quit", "-s")
}

// stale has the service lead elsewhere: by a rule of the node, and when that is gone by what the node remembers of connections (conntrack).
func (c *cluster) stale(t *testing.T, l *laptop, ns string, broken func(...string)) {
	self := ok(os.Executable())(t)
	svc, port := c.clusterIP(t, ns, "web"), "9555"
	elsewhere := "connections to service web, port 80 do not reach a traffic-agent, something else accepts them"
	startLines(t, c.onNode, "swallow", "0.0.0.0:"+port)
	pods := ok(c.managers(t.Context()))(t)
	c.node(t, "sh", "-c", fmt.Sprintf(`nft "table ip stale { chain in { type nat hook prerouting priority -150; ip daddr %s tcp dport 80 dnat to %s:%s; }; }"`,
		strings.TrimSuffix(svc, ":80"), pods[0].Status.HostIP, port))
	t.Cleanup(func() { _ = c.onNode(context.Background(), "nft", "delete", "table", "ip", "stale").Run() })
	broken(elsewhere)
	l.run(t, "doppel", "leave", "web")

	// The manager's next connections come from ports from which the node believes to have some already.
	manager := strings.Fields(c.node(t, "pgrep", "-f", "^[^ ]*traffic-manager"))[0]
	inManager := func(args ...string) { c.node(t, append([]string{"nsenter", "-n", "-t", manager}, args...)...) }
	was := strings.TrimSpace(c.node(t, "nsenter", "-n", "-t", manager, "cat", "/proc/sys/net/ipv4/ip_local_port_range"))
	t.Cleanup(func() {
		_ = c.onNode(context.Background(), "nsenter", "-n", "-t", manager, "sh", "-c", "echo "+was+" > /proc/sys/net/ipv4/ip_local_port_range").Run()
	})
	inManager("env", envHelper+"=silently", self, svc)
	inManager("sh", "-c", fmt.Sprintf("echo %d %d > /proc/sys/net/ipv4/ip_local_port_range", stalePort, stalePort+stalePorts-1))
	c.node(t, "nft", "delete", "table", "ip", "stale")
	broken(elsewhere)
	inManager("sh", "-c", "echo "+was+" > /proc/sys/net/ipv4/ip_local_port_range")
	eventually(t, 30*time.Second, func() error { // it is tried again
		if out := l.run(t, "doppel", "list"); strings.Contains(out, "something else") {
			return fmt.Errorf("still: %s", out)
		}
		return nil
	})
	l.run(t, "doppel", "leave", "web")
}

// The ports from which the node believes to have connections. The node forgets one as soon as the manager has tried it, for it is reset; so they are
// many, or the next try may come from the same one and arrive.
const stalePort, stalePorts = 61000, 1024

// silentlyHelper opens a connection from each port that the kernel would choose from, and has it vanish without a word to anybody.
func silentlyHelper(addr string) int {
	for port := stalePort; port < stalePort+stalePorts; port++ {
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Timeout: 5 * time.Second}
		c, err := d.Dial("tcp4", addr)
		if err == nil {
			err = vanish(c.(*net.TCPConn))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, port, err)
			return 1
		}
	}
	return 0
}

// swallowHelper accepts connections and has each vanish.
func swallowHelper(addr string) int {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("listening")
	go func() {
		<-stdinEnds()
		_ = l.Close()
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return 0
		}
		if err := vanish(c.(*net.TCPConn)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
}

// vanish closes a connection without a FIN or RST (TCP_REPAIR, tcp(7)).
func vanish(c *net.TCPConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) }); cerr != nil {
		return cerr
	}
	if err != nil {
		return os.NewSyscallError("setsockopt TCP_REPAIR", err)
	}
	return c.Close()
}
