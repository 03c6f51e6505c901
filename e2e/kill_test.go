package e2e

import (
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
	t.Cleanup(func() { l.try(t, "doppel", "uninstall", "--everything") })
	l.colors(t, "blue", "127.0.0.1:3000")
	l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")

	kill := func(t *testing.T, programs ...string) time.Time {
		t.Helper()
		line := "kill -9"
		for _, p := range programs {
			line += " $(pgrep -f '" + p + "')"
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
		stop := c.load(t, "http://"+svc+"/color")
		at := kill(t, "doppel daemon")
		c.until(t, svc, "green")
		checkAnswers(t, stop(), at, "green")
		eventually(t, 5*time.Second, func() error { return l.noTrace(t) })
		again(t)
	})

	t.Run("root daemon", func(t *testing.T) {
		stop := c.load(t, "http://"+svc+"/color")
		kill(t, "doppel-rootd")
		want(t, l.run(t, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://example.com"), "200")
		eventually(t, 5*time.Second, func() error { // back without a command
			if r := l.try(t, "curl", "-s", "-m", "2", "dataprocessingservice."+ns+":3000/color"); r.code != 0 {
				return fmt.Errorf("a cluster name: %v", r)
			}
			return nil
		})
		if got := bodies(stop()); got[`"blue"`] == 0 || len(got) != 1 {
			t.Fatalf("the intercept did not live on: %v", got)
		}
	})

	t.Run("both daemons", func(t *testing.T) {
		stop := c.load(t, "http://"+svc+"/color")
		at := kill(t, "doppel daemon", "doppel-rootd")
		c.until(t, svc, "green")
		checkAnswers(t, stop(), at, "green")
		eventually(t, 5*time.Second, func() error { return l.noTrace(t) })
		again(t)
	})

	t.Run("manager", func(t *testing.T) {
		stop := c.load(t, "http://"+svc+"/color")
		zero := int64(0)
		at := time.Now()
		err := c.core.CoreV1().Pods(managerNS).DeleteCollection(t.Context(), metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
		if err != nil {
			t.Fatal(err)
		}
		c.until(t, svc, "green")
		ready := c.managerReady(t)
		c.until(t, svc, "blue")
		all := stop()
		checkAnswers(t, all, at, "green", "blue")
		for _, a := range all {
			if a.Start.After(ready) && a.Body == `"blue"` {
				t.Logf("intercepted again %v after the manager's pod was ready (%v after it was killed)", a.Start.Sub(ready).Round(time.Millisecond), a.Start.Sub(at).Round(time.Millisecond))
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

// managerReady waits for a ready pod of the manager and says when it was.
func (c *cluster) managerReady(t *testing.T) time.Time {
	t.Helper()
	eventually(t, time.Minute, func() error {
		d, err := c.core.AppsV1().Deployments(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if d.Status.ReadyReplicas < 1 {
			return fmt.Errorf("%+v", d.Status)
		}
		return nil
	})
	return time.Now()
}

// checkAnswers looks at the answers to connections that were made after the kill: each one within the limit, with one of the colours.
// A connection that the laptop had accepted when it died is reset, never replayed: it began before the kill.
func checkAnswers(t *testing.T, all []answer, killed time.Time, colors ...string) {
	t.Helper()
	n, slowest := 0, time.Duration(0)
	for _, a := range all {
		if a.Start.Before(killed) {
			continue
		}
		n++
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

// noTrace is nil if the laptop has no device, route, rule or DNS capture of ours.
func (l *laptop) noTrace(t *testing.T) error {
	t.Helper()
	if out := l.sh(t, "ip -o link show | grep doppel; ip route show table all | grep doppel; nft list ruleset; true"); out != "" {
		return fmt.Errorf("left on the laptop:\n%s", out)
	}
	if out := l.run(t, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://example.com"); out != "200" {
		return fmt.Errorf("an outside name: %s", out)
	}
	return nil
}
