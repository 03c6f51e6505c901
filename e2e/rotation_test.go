package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestKeyExchange exchanges the manager's key, and with it the certificate of its webhook, as docs/security.md says, under load: the app answers until its
// pods are replaced, and the laptop needs no command.
func TestKeyExchange(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "exchange")
	c.sample(t, ns)
	const app = "dataprocessingservice"
	l := newLaptop(t, "keeper")
	l.withManager(t)
	l.run(t, "doppel", "connect", "-n", ns)
	l.colors(t, "blue", "127.0.0.1:3000")
	l.run(t, "doppel", "intercept", app, "-p", "3000")
	svc, session := c.clusterIP(t, ns, app), l.sessionUID(t)
	if got := c.color(t, svc); got != "blue" {
		t.Fatalf("the cluster gets %q", got)
	}
	old := c.managerKey(t)
	restart := func(ns, name string) {
		t.Helper()
		patch := fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{"restarted":%q}}}}}`, time.Now())
		ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}))(t)
		c.available(t, ns, name)
	}
	load := c.load(t, "http://"+svc+"/color")
	ok(c.core.CoreV1().Secrets(managerNS).Patch(t.Context(), "traffic-manager", types.MergePatchType, []byte(`{"data":null}`), metav1.PatchOptions{}))(t)
	at := time.Now()
	restart(managerNS, "traffic-manager")
	eventually(t, 20*time.Second, func() error {
		if c.managerKey(t) == old {
			return errors.New("it is the old key")
		}
		return c.is(t, svc, "green")
	})
	eventually(t, 20*time.Second, func() error {
		if r := l.try(t, "curl", "-s", "-m", "2", app+"."+ns+":3000/color"); r.code != 0 {
			return fmt.Errorf("the service by name: %v", r)
		}
		return nil
	})
	if got := l.sessionUID(t); got != session {
		t.Errorf("session %s became %s", session, got)
	}
	load.more(t, 20)
	checkAnswers(t, load.stop(), at, "green")

	restart(ns, app)
	eventually(t, time.Minute, func() error { return c.is(t, svc, "blue") })
	l.run(t, "doppel", "quit", "-s")
}
