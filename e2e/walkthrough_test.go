package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// state is everything of a laptop that doppel touches: links, addresses, routes, rules, resolv.conf, nftables and processes.
func (l *laptop) state(t *testing.T) string {
	t.Helper()
	return l.sh(t, `ip -o link show | sed 's/ qdisc.*//'; ip -o addr show | sed 's/ valid_lft.*//'; ip route show table all; ip -6 route show table all; ip rule
		cat /etc/resolv.conf; nft list ruleset; ls -A /run/doppel 2>/dev/null; for p in /proc/[0-9]*; do readlink $p/exe; done | grep -v -e /dash -e /sleep -e /readlink -e /grep -e /sort | sort`)
}

// ask is what a pod of the cluster gets from a service: asked from the node, through kube-proxy.
func (c *cluster) color(t *testing.T, hostport string) string {
	t.Helper()
	out, err := c.lab("node", "exec", "--", "curl", "-s", "-m", "3", "http://"+hostport+"/color")
	if err != nil {
		return fmt.Sprintf("error: %v %s", err, out)
	}
	return strings.Trim(strings.TrimSpace(out), `"`)
}

// TestWalkthrough is the main job as a user does it, from an empty cluster to an empty cluster.
func TestWalkthrough(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "walk")
	c.sample(t, ns)
	l := newLaptop(t, "walker")
	l.withoutManager(t)
	before := l.state(t)

	// connect on an empty cluster installs the manager
	r := l.try(t, "doppel", "connect", "-n", ns)
	if r.code != 0 {
		t.Fatalf("connect: %v", r)
	}
	want(t, r.stdout, "Connected to context lab-"+labName+", namespace "+ns+" (https://")
	want(t, r.stderr, "first connect: ")

	// TCP and DNS: the API server's own service, by name
	var status metav1.Status
	if err := json.Unmarshal([]byte(l.run(t, "curl", "-sk", "-m", "5", "https://kubernetes.default")), &status); err != nil || status.Code != 401 && status.Code != 403 {
		t.Fatalf("the API server by its cluster name: %v %+v", err, status)
	}
	api, err := c.core.CoreV1().Services("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, l.run(t, "nslookup", "kubernetes.default"), "Address: "+api.Spec.ClusterIP)
	want(t, l.run(t, "dig", "+short", "dataprocessingservice."+ns+".svc.cluster.local"), strings.Split(c.clusterIP(t, ns, "dataprocessingservice"), ":")[0])
	want(t, l.run(t, "dig", "+noall", "+comments", "nosuchservice."+ns+".svc.cluster.local"), "NXDOMAIN")
	want(t, l.run(t, "dig", "+noall", "+comments", "AAAA", "dataprocessingservice."+ns+".svc.cluster.local"), "NOERROR", "ANSWER: 0")
	want(t, l.run(t, "dig", "+tcp", "+short", "dataprocessingservice."+ns+".svc"), strings.Split(c.clusterIP(t, ns, "dataprocessingservice"), ":")[0])
	dnsIP := c.clusterIP(t, "kube-system", "kube-dns") // UDP and TCP flows to an address of the cluster
	for _, how := range []string{"+notcp", "+tcp"} {
		want(t, l.run(t, "dig", how, "+short", "@"+strings.Split(dnsIP, ":")[0], "kubernetes.default.svc.cluster.local"), api.Spec.ClusterIP)
	}
	want(t, l.run(t, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://example.com"), "200")

	// the sample application: by full name, by service.namespace, by bare name
	for _, host := range []string{"dataprocessingservice." + ns, "dataprocessingservice." + ns + ".svc.cluster.local", "dataprocessingservice"} {
		want(t, l.run(t, "curl", "-s", "-m", "5", host+":3000/color"), "green")
	}
	if r := l.try(t, "curl", "-s", "-m", "5", "dataprocessingservice."+ns+":3001"); r.code != 7 && r.code != 28 {
		t.Errorf("a port that no service has: %v", r) // 7 refused, 28 timeout: what the cluster itself answers
	}
	want(t, l.run(t, "doppel", "list"), "dataprocessingservice: ready to intercept (traffic-agent not yet installed)")

	// intercept: a rolling restart without a dropped request, then the laptop answers
	stopColors := l.colors(t, "blue", "127.0.0.1:3000")
	svc := c.clusterIP(t, ns, "dataprocessingservice")
	load := c.load(t, "http://"+svc+"/color")
	want(t, l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000"),
		"Using Deployment dataprocessingservice\n   Intercept name : dataprocessingservice\n   State          : ACTIVE\n   Workload kind  : Deployment\n", "   Intercepting   : all TCP connections\n")
	if got := c.color(t, svc); got != "blue" {
		t.Fatalf("after ACTIVE the cluster gets %q", got)
	}
	got := bodies(load.stop())
	if got[`"green"`] == 0 || got[`"blue"`] == 0 || len(got) != 2 {
		t.Fatalf("answers while the workload was restarted and intercepted: %v", got)
	}
	want(t, l.run(t, "doppel", "list"), "dataprocessingservice: intercepted\n")
	c.objectsVisible(t, ns)

	// the local process changes its colour and the cluster sees it at once
	l.run(t, "curl", "-s", "-X", "POST", "127.0.0.1:3000/color?c=orange")
	if got := c.color(t, svc); got != "orange" {
		t.Fatalf("after the change the cluster gets %q", got)
	}
	page := c.clusterIP(t, ns, "verylargejavaservice") // another pod of the cluster asks the intercepted service
	if got := c.color(t, page); got != "orange" {
		t.Fatalf("a pod of the cluster gets %q", got)
	}

	want(t, l.run(t, "doppel", "leave", "dataprocessingservice"), "Left dataprocessingservice")
	if got := c.color(t, svc); got != "green" {
		t.Fatalf("after leave the cluster gets %q", got)
	}
	want(t, l.run(t, "doppel", "list"), "dataprocessingservice: ready to intercept (traffic-agent already installed)")

	// a numeric target port goes through the nftables redirect
	l.run(t, "doppel", "intercept", "page", "-w", "verylargejavaservice", "-p", "3000")
	if got := c.color(t, page); got != "orange" {
		t.Fatalf("through the redirect the cluster gets %q", got)
	}
	l.run(t, "doppel", "leave", "page")
	eventually(t, 15*time.Second, func() error { // the page's own connection to the data service may run on for 10 s
		if got := c.color(t, page); got != "green" {
			return fmt.Errorf("after leaving the redirected port the cluster gets %q", got)
		}
		return nil
	})

	// warm and cold connects are told apart
	l.run(t, "doppel", "quit")
	want(t, l.try(t, "doppel", "connect", "-n", ns).stderr, "warm connect: ")
	l.run(t, "doppel", "quit", "-s")
	want(t, l.try(t, "doppel", "connect", "-n", ns).stderr, "cold connect: ")

	// nothing is left: on the laptop, and in the cluster
	c.userToken(t, ns) // who was given a right over doppel and nothing else does not keep it
	l.uninstallEverything(t, ns)
	want(t, l.try(t, "doppel", "connect", "-n", ns).stderr, "first connect: ")
	l.uninstallEverything(t, ns)
	stopColors()
	eventually(t, 5*time.Second, func() error {
		if after := l.state(t); after != before {
			return fmt.Errorf("the laptop is not as before (-before +after):\n%s", cmp.Diff(strings.Split(before, "\n"), strings.Split(after, "\n")))
		}
		return nil
	})
}

// objectsVisible checks what the cluster's own tools show of an intercept.
func (c *cluster) objectsVisible(t *testing.T, ns string) {
	t.Helper()
	rc := c.core.Discovery().RESTClient()
	for path, parts := range map[string][]string{
		"/apis/doppel.dev/v1alpha1/namespaces/" + ns + "/intercepts":      {`"state":"Active"`, `"name":"dataprocessingservice"`, `"user":"admin"`},
		"/apis/doppel.dev/v1alpha1/namespaces/" + managerNS + "/sessions": {`"state":"Connected"`, `"user":"admin"`},
	} {
		b, err := rc.Get().AbsPath(path).DoRaw(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want(t, string(b), parts...)
	}
	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=dataprocessingservice", FieldSelector: "status.phase=Running"})
	if err != nil {
		t.Fatal(err)
	}
	agents := 0
	for _, p := range pods.Items {
		for _, ct := range p.Spec.Containers {
			if ct.Name == "traffic-agent" {
				agents++
			}
		}
	}
	if agents == 0 {
		t.Fatal("no pod shows its traffic-agent")
	}
}

// uninstallEverything leaves nothing of doppel in the cluster.
func (l *laptop) uninstallEverything(t *testing.T, ns string) {
	t.Helper()
	r := l.try(t, "doppel", "uninstall", "--everything")
	if r.code != 0 || strings.Contains(r.stderr, "stays") {
		t.Errorf("uninstall: %v", r)
	}
	l.c.empty(t, ns)
}

// empty checks that nothing of doppel is left in the cluster, agents included.
func (c *cluster) empty(t *testing.T, ns string) {
	t.Helper()
	for _, path := range []string{
		"/api/v1/namespaces",
		"/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
		"/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
		"/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
		"/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
		"/apis/rbac.authorization.k8s.io/v1/clusterroles",
		"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
		"/apis/rbac.authorization.k8s.io/v1/roles",
		"/apis/rbac.authorization.k8s.io/v1/rolebindings",
	} {
		var list metav1.PartialObjectMetadataList
		c.get(t, path, &list)
		for _, o := range list.Items {
			if strings.Contains(o.Name, "doppel") || strings.Contains(o.Name, "traffic-manager") {
				t.Errorf("%s is left: %s", path, o.Name)
			}
		}
	}
	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil && len(p.Spec.Containers) != 1 {
			t.Errorf("pod %s still has an agent", p.Name)
		}
	}
}
