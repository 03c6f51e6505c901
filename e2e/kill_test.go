package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// answerLimit is how long a request may take while something dies: the agent waits one second for the laptop (D3).
const answerLimit = 2 * time.Second

// TestKills kills each part with SIGKILL in the middle of an intercept, under load from the cluster.
func TestKills(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "kills")
	c.sample(t, ns)
	l := newLaptop(t, "victim")
	svc := c.clusterIP(t, ns, "dataprocessingservice")
	l.run(t, "doppel", "connect", "-n", ns)
	l.run(t, "doppel", "quit")
	before := l.picture(t)
	l.run(t, "doppel", "connect", "-n", ns)
	l.colors(t, "blue", "127.0.0.1:3000")
	l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")

	kill := func(t *testing.T, programs ...string) time.Time {
		t.Helper()
		line := "kill -9"
		for _, p := range programs {
			line += " $(pgrep -f '[" + p[:1] + "]" + p[1:] + "')" // the brackets keep the shell itself out
		}
		at := time.Now()
		l.sh(t, line)
		return at
	}
	// again connects and intercepts after the user daemon was killed: the dead session of the same user is no obstacle.
	again := func(t *testing.T) {
		t.Helper()
		l.run(t, "doppel", "connect", "-n", ns)
		l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")
		if got := c.color(t, svc); got != "blue" {
			t.Fatalf("after connecting again the cluster gets %q", got)
		}
	}

	t.Run("user daemon", func(t *testing.T) {
		load := c.load(t, "http://"+svc+"/color")
		at := kill(t, "doppel daemon")
		c.until(t, svc, "green")
		load.more(t, 20)
		checkAnswers(t, load.stop(), at, "green")
		eventually(t, 5*time.Second, func() error { return l.noTrace(t, before) })
		again(t)
	})

	t.Run("root daemon", func(t *testing.T) {
		load := c.load(t, "http://"+svc+"/color")
		kill(t, "doppel-rootd")
		// a question that was on its way when the capture went is lost, as on any network; the C library asks again after 5 s
		want(t, l.run(t, "curl", "-s", "-m", "8", "-o", "/dev/null", "-w", "%{http_code}", "http://example.com"), "200")
		eventually(t, 5*time.Second, func() error { // back without a command
			if r := l.try(t, "curl", "-s", "-m", "2", "dataprocessingservice."+ns+":3000/color"); r.code != 0 {
				return fmt.Errorf("a cluster name: %v", r)
			}
			return nil
		})
		if got := bodies(load.stop()); got[`"blue"`] == 0 || len(got) != 1 {
			t.Fatalf("the intercept did not live on: %v", got)
		}
	})

	t.Run("both daemons", func(t *testing.T) {
		load := c.load(t, "http://"+svc+"/color")
		at := kill(t, "doppel daemon", "doppel-rootd")
		c.until(t, svc, "green")
		load.more(t, 20)
		checkAnswers(t, load.stop(), at, "green")
		eventually(t, 5*time.Second, func() error { return l.noTrace(t, before) })
		again(t)
	})

	t.Run("manager", func(t *testing.T) {
		load := c.load(t, "http://"+svc+"/color")
		zero := int64(0)
		old := c.managerPods(t)
		at := time.Now()
		err := c.core.CoreV1().Pods(managerNS).DeleteCollection(t.Context(), metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
		if err != nil {
			t.Fatal(err)
		}
		c.until(t, svc, "green")
		ready := c.managerReady(t, old)
		c.until(t, svc, "blue")
		load.more(t, 5)
		all := load.stop()
		checkAnswers(t, all, at, "green", "blue")
		green := false
		for _, a := range all {
			if green = green || a.Start.After(at) && a.Body == `"green"`; green && a.Body == `"blue"` {
				t.Logf("intercepted again %v after the kill, %v after the new pod of the manager was seen ready", a.Start.Sub(at).Round(time.Millisecond), a.Start.Sub(ready).Round(time.Millisecond))
				if late := a.Start.Sub(ready); late > 2*time.Second {
					t.Errorf("the intercept was resumed %v after the manager's pod was ready", late)
				}
				break
			}
		}
		want(t, l.run(t, "doppel", "status"), "Tunnel     : up", "dataprocessingservice: ACTIVE")
	})

	l.run(t, "doppel", "quit", "-s")
}

// until waits until the cluster gets a colour.
func (c *cluster) until(t *testing.T, svc, color string) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		if got := c.color(t, svc); got != color {
			return fmt.Errorf("the cluster gets %q, not %q", got, color)
		}
		return nil
	})
}

// managerPods lists the manager's pods that are ready.
func (c *cluster) managerPods(t *testing.T) map[types.UID]bool {
	t.Helper()
	pods, err := c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
	if err != nil {
		t.Fatal(err)
	}
	out := map[types.UID]bool{}
	for _, p := range pods.Items {
		for _, cond := range p.Status.Conditions {
			if cond.Type == corev1.PodReady && cond.Status == corev1.ConditionTrue {
				out[p.UID] = true
			}
		}
	}
	return out
}

// managerReady waits for a ready pod of the manager that is not one of the old ones, and says when it was seen.
func (c *cluster) managerReady(t *testing.T, old map[types.UID]bool) time.Time {
	t.Helper()
	eventually(t, time.Minute, func() error {
		for uid := range c.managerPods(t) {
			if !old[uid] {
				return nil
			}
		}
		return errors.New("no new pod of the manager is ready")
	})
	return time.Now()
}

// checkAnswers looks at the answers to connections that were made after the kill: each one within the limit, with one of the colours.
// A connection that the laptop had accepted when its way was cut is reset, never replayed (D3): the load asks one after the other,
// so that can be one request at most.
func checkAnswers(t *testing.T, all []answer, killed time.Time, colors ...string) {
	t.Helper()
	n, resets, slowest := 0, 0, time.Duration(0)
	for _, a := range all {
		if a.Start.Before(killed) {
			continue
		}
		n++
		if strings.Contains(a.Err, "connection reset by peer") || strings.HasSuffix(a.Err, "EOF") {
			if resets++; resets == 1 {
				continue
			}
		}
		slowest = max(slowest, a.Took)
		ok := a.Err == "" && a.Took < answerLimit
		known := a.Body == `"blue"` // until the kill is noticed
		for _, c := range colors {
			known = known || a.Body == `"`+c+`"`
		}
		if !ok || !known {
			t.Errorf("%v after the kill: %+v", a.Start.Sub(killed), a)
		}
	}
	if n == 0 {
		t.Error("no request after the kill")
	}
	t.Logf("%d requests after the kill, the slowest took %v", n, slowest.Round(time.Millisecond))
}

// noTrace is nil if the laptop looks as before, whatever daemons run, and finds names.
func (l *laptop) noTrace(t *testing.T, before picture) error {
	t.Helper()
	if diff := l.picture(t).without("doppel daemon").without("doppel-rootd").since(before.without("doppel daemon").without("doppel-rootd")); diff != "" {
		return fmt.Errorf("left on the laptop:\n%s", diff)
	}
	if out := l.run(t, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://example.com"); out != "200" {
		return fmt.Errorf("an outside name: %s", out)
	}
	return nil
}
