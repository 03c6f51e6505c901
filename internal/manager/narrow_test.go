package manager

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/wire"
)

// narrowTo has the manager be for some namespaces, and the API server give it nothing of the whole cluster.
func (w *world) narrowTo(namespaces ...string) {
	w.t.Helper()
	cfg := w.cfg
	cfg.Namespaces = strings.Join(namespaces, ",")
	m, err := assemble(w.t.Context(), cfg, w.ctrl, w.election, w.clock)
	if err != nil {
		w.t.Fatal(err)
	}
	m.tokens.fetch = jwks("k", signKey())
	w.Manager = m
	w.set(func() {
		w.fail = func(_ string, o runtime.Object) error {
			switch o.(type) {
			case *corev1.NamespaceList, *corev1.NodeList:
				return errors.New("forbidden")
			}
			return nil
		}
	})
}

// A narrow manager tells of its namespaces, and of subnets around what it sees there.
func TestNarrowCluster(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: meta("shop", "web-1"), Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.244.3.9"}}}}
	w := newWorld(t, svc("shop", "web", "10.97.0.1"))
	w.narrowTo("shop", "data")
	w.cluster.seePod(pod)
	got, err := w.cluster.read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for ns := range got.Services {
		names = append(names, ns)
	}
	slices.Sort(names)
	if d := fmt.Sprint(names, got.ServiceCIDRs, got.PodCIDRs, got.Nodes); d != "[data doppel shop] [10.96.0.0/16 10.97.0.0/16] [10.244.3.0/24] []" {
		t.Error(d)
	}
}

// An address that a narrow manager does not know may be another namespace's: only who may reach the whole cluster gets there.
func TestNarrowReach(t *testing.T) {
	w := newWorld(t, reachCluster()...)
	w.narrowTo("shop")
	s := &v1alpha1.Session{Spec: v1alpha1.SessionSpec{Reach: v1alpha1.Reach{Namespaces: []string{"shop"}, Outside: true}}}
	whole := &v1alpha1.Session{Spec: v1alpha1.SessionSpec{Reach: v1alpha1.Reach{Namespaces: []string{v1alpha1.ReachAll}}}}
	w.cfg.CheckReach = true
	for ip, want := range map[string]bool{"10.96.0.5": true, "10.244.0.1": true, "192.0.2.9": false, "198.51.100.1": false, "10.244.9.9": false} {
		for _, tt := range []struct {
			of   *v1alpha1.Session
			want bool
		}{{s, want}, {whole, true}} {
			ok, err := w.reachOf(tt.of).address(t.Context(), w.addresses, netip.MustParseAddr(ip))
			if err != nil || ok != tt.want {
				t.Errorf("%s with %+v: %v, %v", ip, tt.of.Spec.Reach, ok, err)
			}
		}
	}

	// Without the policy, what the object says counts for nothing.
	w.cfg.NoPolicy = true
	r := w.reachOf(whole)
	if r.all || r.outside || !slices.Equal(r.namespaces, []string{"shop"}) {
		t.Errorf("an unchecked session reaches %+v", r)
	}
}

// A narrow manager may not read nodes, and does not need them where a load balancer leads to it.
func TestNarrowDirect(t *testing.T) {
	direct := svc("doppel", directService, "10.96.0.98")
	direct.Spec.Type, direct.Spec.Ports = corev1.ServiceTypeLoadBalancer, []corev1.ServicePort{{Port: 443, NodePort: 30443}}
	direct.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.9"}}
	w := newWorld(t, direct)
	w.narrowTo("shop")
	cm := &corev1.ConfigMap{ObjectMeta: meta("doppel", objectName)}
	w.get(cm)
	cm.Data = map[string]string{configListed: "shop"}
	if err := w.kc.Update(t.Context(), cm); err != nil {
		t.Fatal(err)
	}
	if err := w.ensureDirect(t.Context()); err != nil {
		t.Error(err)
	}
	if w.get(cm); cm.Data[configDirect] != "192.0.2.9:443" {
		t.Errorf("published %v", cm.Data)
	}

	w.get(direct)
	direct.Spec.Type = corev1.ServiceTypeNodePort
	if err := w.kc.Update(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	if err := w.ensureDirect(t.Context()); err == nil || !strings.Contains(err.Error(), "direct.addresses") {
		t.Errorf("at nodes: %v", err)
	}
	w.cfg.DirectPublic = "cluster.example.com:443"
	if err := w.ensureDirect(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestNarrowAgents(t *testing.T) {
	w := newWorld(t, webPods()...)
	w.narrowTo("data")
	err := w.agents.authorize(t.Context(), wire.Hello{Role: wire.RoleAgent, Token: sign(t, "ES256", signKey(), "k", token("shop", "web-1"))}, &agentConn{})
	if err == nil || !strings.Contains(err.Error(), "not this traffic-manager's") {
		t.Errorf("the agent of another manager's namespace: %v", err)
	}
}

// What an install does without is refused at once, with the chart's value that would give it.
func TestWithheld(t *testing.T) {
	declared := func(name string) *v1alpha1.Intercept {
		in := intercept(name, "ada", "")
		in.Spec.Ports = []v1alpha1.WantedPort{{Target: "127.0.0.1:3000"}}
		return in
	}
	takeover := intercept("takes", "ada", "mine")
	takeover.Spec.Takeover = true
	for name, tt := range map[string]struct {
		in                *v1alpha1.Intercept
		noPolicy, noHook  bool
		reason, mentioned string
	}{
		"no webhook":                     {intercept("in", "ada", "mine"), false, true, "NoWebhook", "admission.webhook"},
		"no webhook, declared":           {declared("in"), false, true, "NoWebhook", "admission.webhook"},
		"no policy, declared":            {declared("in"), true, false, "NoPolicy", "admission.policy"},
		"no policy, takeover":            {takeover, true, false, "NoPolicy", "admission.policy"},
		"no policy, of one's own laptop": {intercept("in", "ada", "mine"), true, false, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReconciler(t, []client.Object{tt.in}...)
			r.m.cfg.NoPolicy, r.m.cfg.NoWebhook = tt.noPolicy, tt.noHook
			st, _ := r.look(tt.in.Name)
			failed := st.State == v1alpha1.InterceptFailed
			if failed != (tt.reason != "") || st.Reason != tt.reason || !strings.Contains(st.Message, tt.mentioned) {
				t.Errorf("%+v", st)
			}
			if got := len(r.m.losses()); got != 1 {
				t.Errorf("laptops are told of %d losses", got)
			}
			if r.restarts() != 0 && tt.reason != "" {
				t.Error("the workload was restarted for nothing")
			}
		})
	}
}

// A manager without policy takes sessions, and one that is not limited to some namespaces does not start.
func TestNoPolicy(t *testing.T) {
	w := newWorld(t)
	cfg := w.cfg
	cfg.NoPolicy = true
	if err := cfg.complete(); err == nil {
		t.Error("the whole cluster without a policy")
	}
	cfg.Namespaces = "shop"
	if err := cfg.complete(); err != nil {
		t.Error(err)
	}
	m, err := assemble(t.Context(), cfg, w.ctrl, w.election, w.clock)
	if err != nil {
		t.Fatal(err)
	}
	if err := publish(t.Context(), w.kc, w.kc, m.identity.Fingerprint(), cfg); err != nil {
		t.Fatal(err)
	}
	w.policyErr = nil // forged objects are accepted
	if err := m.policy.run(t.Context()); err != nil || m.policy.ok(t.Context()) != nil || !m.policy.settled() || m.policy.problem() != "" {
		t.Errorf("%v, %v, %q", err, m.policy.ok(t.Context()), m.policy.problem())
	}
	cm := &corev1.ConfigMap{ObjectMeta: meta("doppel", objectName)}
	if w.get(cm); cm.Data[configListed] != "shop" || cm.Data[configReach] != "all" { // reach is not checked in this world
		t.Errorf("published %v", cm.Data)
	}
}
