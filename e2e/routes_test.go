package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// subnet is one line of doppel routes -o json.
type subnet struct {
	Kind, Way, Why string
	Real, Virtual  netip.Prefix
}

// subnets are what doppel routes says, by kind; the lab has one of each.
func (l *laptop) subnets(t *testing.T) map[string]subnet {
	t.Helper()
	return parseSubnets(t, l.run(t, "doppel", "routes", "-o", "json"))
}

func parseSubnets(t *testing.T, text string) map[string]subnet {
	t.Helper()
	var out struct{ Subnets []subnet }
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	m := map[string]subnet{}
	for _, s := range out.Subnets {
		if s.Real.Addr().Is4() {
			m[s.Kind] = s
		}
	}
	return m
}

// here is an address of a mapped subnet as the laptop has it.
func (s subnet) here(t *testing.T, a string) string {
	t.Helper()
	real, virtual := netip.MustParseAddr(a).As4(), s.Virtual.Addr().As4()
	if !s.Real.Contains(netip.AddrFrom4(real)) || s.Real.Bits()%8 != 0 {
		t.Fatalf("%s is not in %v", a, s.Real)
	}
	copy(real[:s.Real.Bits()/8], virtual[:])
	return netip.AddrFrom4(real).String()
}

// TestSubnets has a laptop whose own networks overlap those of the cluster, before and while it is connected.
func TestSubnets(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "subnets")
	c.sample(t, ns)
	l := newLaptop(t, "roamer")
	svc, _, _ := strings.Cut(c.clusterIP(t, ns, "dataprocessingservice"), ":")
	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=dataprocessingservice"})
	if err != nil || len(pods.Items) == 0 {
		t.Fatalf("pods of the sample: %v", err)
	}
	pod := pods.Items[0].Status.PodIP
	color := func(t *testing.T, host string) {
		t.Helper()
		want(t, l.run(t, "curl", "-s", "-m", "5", host+":3000/color"), "green")
	}
	via := func(t *testing.T, addr, dev string) {
		t.Helper()
		want(t, l.run(t, "ip", "route", "get", addr)+" ", "dev "+dev+" ")
	}
	l.run(t, "doppel", "connect", "-n", ns, "--also-proxy", "203.0.113.0/28", "--never-proxy", "203.0.113.12/30") // installs the manager, if this test is the first
	color(t, svc)
	color(t, pod)
	want(t, l.run(t, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://203.0.113.10"), "200")
	via(t, "203.0.113.10", "doppel0")
	if got := l.run(t, "ip", "route", "get", "203.0.113.13"); strings.Contains(got, "doppel0") {
		t.Errorf("a never-proxy address goes into the VIF: %s", got)
	}
	l.run(t, "doppel", "quit")

	l.sh(t, "ip link add corp0 type veth peer name corp1 && ip addr add 10.96.77.1/12 dev corp0 && ip link set corp0 up && ip link set corp1 up")
	r := l.try(t, "doppel", "connect", "-n", ns)
	if r.code != 0 {
		t.Fatalf("connect: %v", r)
	}
	s := l.subnets(t)["service"]
	if s.Way != "mapped" || !s.Virtual.IsValid() {
		t.Fatalf("the service subnet: %+v\n%s", s, l.run(t, "doppel", "routes"))
	}
	want(t, r.stderr, fmt.Sprintf("%v is %v on this machine: overlaps 10.96.0.0/12 of corp0", s.Real, s.Virtual))
	want(t, l.run(t, "doppel", "status"), fmt.Sprintf("Subnet     : %v is %v on this machine", s.Real, s.Virtual))
	vip := s.here(t, svc)
	want(t, l.run(t, "dig", "+short", "dataprocessingservice."+ns), vip)
	want(t, l.run(t, "dig", "+short", "-x", vip), "dataprocessingservice."+ns+".svc.cluster.local.")
	color(t, "dataprocessingservice."+ns)
	color(t, vip)
	color(t, pod)
	via(t, svc, "corp0") // the laptop's own network is what it was
	dns, _, _ := strings.Cut(c.clusterIP(t, "kube-system", "kube-dns"), ":")
	want(t, l.run(t, "dig", "+short", "@"+s.here(t, dns), "dataprocessingservice."+ns+".svc.cluster.local"), svc) // UDP; the cluster's own words

	// A VPN comes up: what it has is its own from then on, and the cluster is there by name and by virtual address.
	podNet := l.subnets(t)["pod"].Real
	l.run(t, "ip", "route", "add", podNet.String(), "dev", "corp0")
	eventually(t, 5*time.Second, func() error {
		if p := l.subnets(t)["pod"]; p.Way != "mapped" {
			return fmt.Errorf("the pod subnet: %+v", p)
		}
		return nil
	})
	via(t, pod, "corp0")
	color(t, l.subnets(t)["pod"].here(t, pod))
	color(t, "dataprocessingservice."+ns)
	if again := l.subnets(t)["service"]; again.Virtual != s.Virtual {
		t.Errorf("the service subnet was %v and is %v", s.Virtual, again.Virtual)
	}
	l.run(t, "doppel", "quit")

	l.run(t, "doppel", "connect", "-n", ns, "--allow-conflicting-subnets", "10.0.0.0/8")
	color(t, svc)
	color(t, pod)
	via(t, svc, "doppel0")
	via(t, pod, "doppel0")
	l.run(t, "doppel", "quit")
	if left := l.sh(t, "ip route; ip rule"); strings.Contains(left, "doppel") {
		t.Errorf("left behind:\n%s", left)
	}

	// Out of a pod: what listens on its loopback only, and the cluster as the pod sees it.
	l.sh(t, "ip link del corp0")
	l.run(t, "doppel", "connect", "-n", ns, "--proxy-via", "127.0.0.1/32=dataprocessingservice", "--proxy-via", "service=dataprocessingservice")
	loopback := l.subnets(t)["proxy-via"]
	color(t, loopback.here(t, "127.0.0.1"))
	color(t, "dataprocessingservice."+ns)
	if r := l.try(t, "curl", "-s", "-m", "5", loopback.here(t, "127.0.0.1")+":3999"); r.code != 7 {
		t.Errorf("a port of the pod that nobody listens on: %v", r)
	}
	want(t, l.run(t, "dig", "+short", "@"+dns, "dataprocessingservice."+ns+".svc.cluster.local"), svc) // UDP
	want(t, l.run(t, "doppel", "routes"), "dataprocessingservice")
	if got := l.run(t, "doppel", "list", "-i"); strings.Contains(got, "proxy-via") {
		t.Errorf("an egress is listed as an intercept: %s", got)
	}
	l.run(t, "doppel", "quit")
	t.Run("on a node", func(t *testing.T) { subnetsOnNode(t, c, ns) })
}

// subnetsOnNode connects on a machine that is in the cluster's network already: its own routes stay the way there.
func subnetsOnNode(t *testing.T, c *cluster, ns string) {
	home := t.TempDir()
	doppel := func(args ...string) string {
		t.Helper()
		full := append([]string{"node", "exec", "--", "env", "HOME=" + home, "XDG_RUNTIME_DIR=" + home, "KUBECONFIG=" + c.kubeconfig, c.bin("doppel")}, args...)
		out, err := c.lab(full...)
		if err != nil {
			t.Fatalf("doppel %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	t.Cleanup(func() { doppel("quit", "-s") })
	want(t, doppel("connect", "-n", ns), "is direct: this machine reaches it without doppel")
	for kind, s := range parseSubnets(t, doppel("routes", "-o", "json")) {
		if s.Way != "direct" {
			t.Errorf("%s: %+v", kind, s)
		}
	}
	out, err := c.lab("node", "exec", "--", "sh", "-c", "ip route show dev doppel0; curl -s -m 5 dataprocessingservice."+ns+":3000/color")
	if err != nil || strings.TrimSpace(out) != `"green"` {
		t.Errorf("on the node: %v\n%s", err, out)
	}
}
