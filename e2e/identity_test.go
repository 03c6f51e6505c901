package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestIdentity is what the admission policy and the manager do for an unprivileged user on a shared cluster, with the real programs.
// The attacks on the objects themselves are TestPolicy's.
func TestIdentity(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "shared")
	c.sample(t, ns)
	admin := newLaptop(t, "boss")
	dev := newLaptop(t, "dev")
	dev.as = []string{"--as", "developer", "--user", "1000"} // neither root nor administrator: the root daemon comes through sudo
	svc := c.clusterIP(t, ns, "dataprocessingservice")
	admin.withoutManager(t)
	admin.run(t, "doppel", "helm", "install", "--set", "session.renewInterval=2s",
		"--set", "clientRbac.create=true,clientRbac.subjects[0].kind=User,clientRbac.subjects[0].name=developer")

	dev.colors(t, "blue", "127.0.0.1:3000")

	t.Run("a developer who is not root", func(t *testing.T) {
		dev.run(t, "doppel", "connect", "-n", ns)
		want(t, dev.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")
		dev.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")
		if got := c.color(t, svc); got != "blue" {
			t.Fatalf("the cluster gets %q", got)
		}
		want(t, dev.run(t, "doppel", "status"), "User       : developer")
		want(t, admin.run(t, "doppel", "helm", "upgrade"), "upgrade done") // keeps its values; the manager restarts
		eventually(t, 20*time.Second, func() error { return c.is(t, svc, "blue") })
	})

	t.Run("ports of the manager without a session", func(t *testing.T) {
		pods, err := c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
		if err != nil || len(pods.Items) == 0 {
			t.Fatal(pods, err)
		}
		ip := pods.Items[0].Status.PodIP
		for name, line := range map[string]string{
			"attach without upgrade":      "curl -s -m 3 -o /dev/null -w %{http_code} http://" + ip + ":10250/attach | grep -v ^101 | grep -v ^2",
			"another path":                "curl -s -m 3 -o /dev/null -w %{http_code} http://" + ip + ":10250/api | grep ^404",
			"attach, then silence":        "printf 'GET /attach HTTP/1.1\\r\\nHost: x\\r\\nConnection: Upgrade\\r\\nUpgrade: doppel/1\\r\\n\\r\\n' | timeout 3 nc -q 2 " + ip + " 10250 | head -c 12 | grep 101",
			"agents' port speaks no HTTP": "curl -s -m 3 http://" + ip + ":8082/; test $? -ne 0",
			"a TLS client without a key":  "timeout 5 openssl s_client -connect " + ip + ":8082 </dev/null 2>/dev/null | grep 'no peer certificate available'",
		} {
			for from, enter := range map[string]string{"the node": "", "a pod": "nsenter -n -t $(pgrep -o -f dataprocessingservice) "} {
				if out, err := c.lab("node", "exec", "--", "sh", "-c", enter+"sh -c '"+strings.ReplaceAll(line, "'", `'\''`)+"'"); err != nil {
					t.Errorf("%s, from %s: %v\n%s", name, from, err, out)
				}
			}
		}
		if n := len(c.sessions(t)); n != 1 {
			t.Errorf("%d sessions after calling the manager's ports, want the developer's alone", n)
		}
	})

	t.Run("rights taken away", func(t *testing.T) {
		if err := c.is(t, svc, "blue"); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := c.core.RbacV1().RoleBindings(managerNS).Delete(t.Context(), c.connectBinding(t), metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 15*time.Second, func() error { return c.is(t, svc, "green") })
		t.Logf("the app answered again %v after the rights were taken away; the bound is two renewals of 2 s", time.Since(start).Round(100*time.Millisecond))
		eventually(t, 10*time.Second, func() error {
			if s := c.sessions(t); len(s) != 0 {
				return fmt.Errorf("sessions: %v", s)
			}
			return nil
		})
		eventually(t, 10*time.Second, func() error { // the laptop takes a no for an answer after 5 s
			r := dev.try(t, "doppel", "status")
			if !strings.Contains(r.stdout, "Not connected") {
				return fmt.Errorf("status does not say why: %v", r)
			}
			return nil
		})
		badEnd{"", []string{"doppel", "connect", "-n", ns}, 3, "", "administrator"}.check(t, dev)
	})

	t.Run("policy removed while running", func(t *testing.T) {
		admin.run(t, "doppel", "connect", "-n", ns)
		bindings := c.core.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
		list, err := bindings.List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		removed := 0
		for _, b := range list.Items {
			if strings.HasPrefix(b.Name, "doppel-identity") {
				removed++
				if err := bindings.Delete(t.Context(), b.Name, metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if removed == 0 {
			t.Fatal("no bindings of the policy")
		}
		late := newLaptop(t, "late")
		eventually(t, 20*time.Second, func() error { // API servers take a moment to drop a policy
			r := late.try(t, "doppel", "connect", "-n", ns)
			if r.code == 0 {
				late.run(t, "doppel", "quit")
				return fmt.Errorf("a new session was accepted")
			}
			if !strings.Contains(r.stderr, "policy") {
				return fmt.Errorf("the refusal does not say why: %v", r)
			}
			return nil
		})
		eventually(t, 10*time.Second, func() error {
			if out := admin.run(t, "doppel", "status"); !strings.Contains(out, "new sessions are refused") {
				return fmt.Errorf("status: %s", out)
			}
			return nil
		})
		late.run(t, "doppel", "quit", "-s")
	})
}

// is is nil if the cluster gets the colour.
func (c *cluster) is(t *testing.T, svc, color string) error {
	t.Helper()
	if got := c.color(t, svc); got != color {
		return fmt.Errorf("the cluster gets %q, not %q", got, color)
	}
	return nil
}

// sessions lists the sessions' names.
func (c *cluster) sessions(t *testing.T) []string {
	t.Helper()
	var list metav1.PartialObjectMetadataList
	c.get(t, "/apis/doppel.dev/v1alpha1/namespaces/"+managerNS+"/sessions", &list)
	var out []string
	for _, o := range list.Items {
		out = append(out, o.Name)
	}
	return out
}

// connectBinding is the RoleBinding that lets the chart's subjects connect.
func (c *cluster) connectBinding(t *testing.T) string {
	t.Helper()
	list, err := c.core.RbacV1().RoleBindings(managerNS).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range list.Items {
		if b.RoleRef.Name == "doppel-connect" {
			return b.Name
		}
	}
	t.Fatalf("no binding of doppel-connect: %+v", list.Items)
	return ""
}
