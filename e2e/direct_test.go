package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestDirect goes past the API server by a node port, while that is there: flows follow the tunnel there and back.
func TestDirect(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "direct")
	c.sample(t, ns)
	l := newLaptop(t, "near")
	l.withManager(t)
	l.run(t, "doppel", "helm", "upgrade", "--set", "direct.service=NodePort,direct.nodePort=30443")
	t.Cleanup(func() { l.run(t, "doppel", "helm", "upgrade", "--reset-values") })
	const server = "10.244.1.1:7008" // the node's end of the pods' links
	startLines(t, c.onNode, "serve", "0.0.0.0:7008")
	by := func(parts ...string) {
		t.Helper()
		eventually(t, 15*time.Second, func() error {
			st := l.run(t, "doppel", "status")
			for _, p := range parts {
				if !strings.Contains(st, p) {
					return fmt.Errorf("%q is missing in:\n%s", p, st)
				}
			}
			return nil
		})
	}

	eventually(t, 30*time.Second, func() error { // the manager looks where it is reached, and kube-proxy makes it so
		if out := c.node(t, "sh", "-c", "nc -z -w1 $(ip -4 -o addr show eth0 | awk '{sub(\"/.*\", \"\", $4); print $4}') 30443 && echo there || true"); !strings.Contains(out, "there") {
			return fmt.Errorf("nobody answers at the node port")
		}
		cm, err := c.core.CoreV1().ConfigMaps(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{})
		if err == nil && cm.Data["direct"] == "" {
			err = fmt.Errorf("no direct addresses in %v", cm.Data)
		}
		return err
	})
	l.run(t, "doppel", "connect", "-n", ns)
	by("Transport  : direct (its round trip is ")
	want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")

	keep, fetch := startLines(t, l.command, "keep", server), startLines(t, l.command, "fetch", server)
	l.sh(t, "nft 'table inet far { chain output { type filter hook output priority filter; tcp dport 30443 reject with tcp reset; }; }'")
	cut := time.Now()
	by("Transport  : service proxy", "not by direct: the traffic-manager is not reached at ")
	keep.more(t, 3, backLimit)
	t.Logf("three answers on the idle connection %v after the direct way was cut", time.Since(cut).Round(time.Millisecond))
	eventually(t, 30*time.Second, func() error {
		if s := fetch.last(); s != "complete: EOF" {
			return fmt.Errorf("the download: %s", s)
		}
		return nil
	})
	want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")
	l.run(t, "doppel", "quit", "-s")
}
