package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

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
	intercept := func() string {
		t.Helper()
		began := time.Now()
		out := l.run(t, "doppel", "intercept", "web", "-p", "3000")
		t.Logf("%v: %s", time.Since(began), out)
		want(t, out, "ACTIVE")
		return out
	}
	if out := intercept(); strings.Contains(out, "connections to") {
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
	want(t, intercept(), "port 7000 of pod "+pod.Name, "is not answered")
	inPod("nft delete table inet block")
	eventually(t, 30*time.Second, func() error { // it is tried again
		if out := l.run(t, "doppel", "list"); strings.Contains(out, "not answered") {
			return fmt.Errorf("still: %s", out)
		}
		return nil
	})
	l.run(t, "doppel", "leave", "web")

	inPod("nft flush ruleset")
	want(t, intercept(), "connections to port 7000 of pod "+pod.Name+" do not reach a traffic-agent")
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
