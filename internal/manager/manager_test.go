package manager

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/internal/inject"
)

func TestConfig(t *testing.T) {
	var c Config
	err := c.complete()
	for _, want := range []string{"namespace is required", "pod name is required", "agent image is required", "kube configuration and log are required"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	c = Config{Namespace: "doppel", PodName: "p", AgentImage: "i", Kube: &rest.Config{}, Log: slog.New(slog.DiscardHandler), AgentLogLevel: "debug"}
	if err := c.complete(); err != nil {
		t.Fatal(err)
	}
	if c.RenewInterval != 10*time.Minute || c.LostGrace != 30*time.Second || c.APIAddr != ":10250" || c.AgentLogLevel != "debug" || c.AgentPullPolicy != "IfNotPresent" {
		t.Errorf("defaults: %+v", c)
	}
}

func TestAssemble(t *testing.T) {
	w := newWorld(t)
	cfg := w.cfg
	cfg.Namespaces, cfg.AgentResources = "shop,data", `{"limits":{"memory":"1Gi"}}`
	m, err := assemble(t.Context(), cfg, w.ctrl, w.election, w.clock)
	if err != nil || len(m.allowed) != 2 || m.resources.Limits.Memory().String() != "1Gi" {
		t.Errorf("%v, %v, %v", m.allowed, m.resources, err)
	}
	cfg.AgentResources = "{"
	if _, err := assemble(t.Context(), cfg, w.ctrl, w.election, w.clock); err == nil {
		t.Error("resources that are not JSON were taken")
	}
	cfg.AgentResources, cfg.ResolvConf = "", "/nonexistent"
	if _, err := assemble(t.Context(), cfg, w.ctrl, w.election, w.clock); err == nil {
		t.Error("no resolv.conf, and no error")
	}
}

// All replicas have one key, whoever was first; the fingerprint that laptops pin is the one in the ConfigMap.
func TestIdentity(t *testing.T) {
	w := newWorld(t)
	again, err := ensureIdentity(t.Context(), w.kc, w.cfg)
	if err != nil || again.Fingerprint() != w.identity.Fingerprint() {
		t.Fatalf("a second start has another key: %v", err)
	}
	published := func() error { return publish(t.Context(), w.kc, w.kc, w.identity.Fingerprint(), w.cfg) }
	if err := published(); err != nil {
		t.Fatal(err)
	}
	cm := &corev1.ConfigMap{ObjectMeta: meta("doppel", objectName)}
	w.get(cm)
	if cm.Data[configKey] != w.identity.Fingerprint() || cm.Data[configVersion] == "" || cm.Data[configProtocol] != "1" {
		t.Errorf("published %v", cm.Data)
	}
	cm.Data[configKey] = "sha256:somebody else's"
	if err := w.kc.Update(t.Context(), cm); err != nil {
		t.Fatal(err)
	}
	if err := published(); err != nil {
		t.Fatal(err)
	}
	if w.get(cm); cm.Data[configKey] != w.identity.Fingerprint() {
		t.Error("the ConfigMap was not mended")
	}

	// Two replicas that start at once: the second to write finds the Secret changed and takes the first's key.
	sec := &corev1.Secret{ObjectMeta: meta("doppel", objectName)}
	w.get(sec)
	first := sec.Data[secretIdentity]
	sec.Data = nil
	if err := w.kc.Update(t.Context(), sec); err != nil {
		t.Fatal(err)
	}
	id, err := ensureIdentity(t.Context(), racingClient{w.kc, first}, w.cfg)
	if err != nil || id.Fingerprint() != w.identity.Fingerprint() {
		t.Errorf("lost the race: %v", err)
	}

	w.get(sec)
	sec.Data[secretIdentity] = []byte("garbage")
	if err := w.kc.Update(t.Context(), sec); err != nil {
		t.Fatal(err)
	}
	if _, err := ensureIdentity(t.Context(), w.kc, w.cfg); err == nil {
		t.Error("a key that cannot be read was replaced in silence: every laptop's pin would break")
	}
	w.delete(sec)
	if _, err := ensureIdentity(t.Context(), w.kc, w.cfg); !apierrors.IsNotFound(err) {
		t.Errorf("no Secret: %v", err)
	}
}

func TestCABundle(t *testing.T) {
	wh := &admissionv1.MutatingWebhookConfiguration{ObjectMeta: meta("", webhookPrefix+"doppel"), Webhooks: []admissionv1.MutatingWebhook{{Name: "a"}, {Name: "b"}}}
	w := newWorld(t, wh)
	if err := w.ensureCABundle(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.get(wh)
	for _, h := range wh.Webhooks {
		if !strings.HasPrefix(string(h.ClientConfig.CABundle), "-----BEGIN CERTIFICATE-----") {
			t.Errorf("webhook %s: %q", h.Name, h.ClientConfig.CABundle)
		}
	}
	version := wh.ResourceVersion
	if err := w.ensureCABundle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.get(wh); wh.ResourceVersion != version {
		t.Error("written again without need")
	}
	wh.Webhooks[1].ClientConfig.CABundle = nil // helm upgrade
	if err := w.kc.Update(t.Context(), wh); err != nil {
		t.Fatal(err)
	}
	if err := w.ensureCABundle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.get(wh); wh.Webhooks[1].ClientConfig.CABundle == nil {
		t.Error("not mended")
	}
	w.delete(wh)
	if err := w.ensureCABundle(t.Context()); !apierrors.IsNotFound(err) {
		t.Errorf("no configuration: %v", err)
	}
}

// What is cut off services and nodes in the cache is nothing that anybody here reads.
func TestPruned(t *testing.T) {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u", Labels: map[string]string{"big": "label"}},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeExternalName, ClusterIP: "None", Selector: map[string]string{"app": "web"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}},
		},
	}
	o, err := pruneService(s)
	if err != nil {
		t.Fatal(err)
	}
	if p := o.(*corev1.Service); p.Labels != nil || p.Name != "web" || p.UID != "u" {
		t.Errorf("pruned to %+v", p.ObjectMeta)
	}
	spec, labels := corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}}, map[string]string{"app": "web"}
	for _, typ := range []corev1.ServiceType{corev1.ServiceTypeClusterIP, corev1.ServiceTypeExternalName} {
		for _, ip := range []string{"10.96.0.1", "None"} {
			s.Spec.Type, s.Spec.ClusterIP = typ, ip
			o, _ := pruneService(s)
			with := inject.Ports(&spec, labels, inject.Facts{Services: []corev1.Service{*s}})
			without := inject.Ports(&spec, labels, inject.Facts{Services: []corev1.Service{*o.(*corev1.Service)}})
			if d := cmp.Diff(with, without); d != "" {
				t.Errorf("%s %s: the pruned service leads elsewhere:\n%s", typ, ip, d)
			}
		}
	}
	n := node("a", "10.0.0.0/24")
	n.Labels = map[string]string{"big": "label"}
	if o, err := pruneNode(n); err != nil || o.(*corev1.Node).Labels != nil || o.(*corev1.Node).Spec.PodCIDRs[0] != "10.0.0.0/24" {
		t.Errorf("%+v, %v", o, err)
	}
	for _, prune := range []func(any) (any, error){pruneNode, pruneService} {
		if o, err := prune("tombstone"); err != nil || o != "tombstone" {
			t.Errorf("%v, %v", o, err)
		}
	}
}

func TestAgentsAddress(t *testing.T) {
	w := newWorld(t)
	for ip, want := range map[string]string{"10.0.0.1": "10.0.0.1:8082", "fd00::1": "[fd00::1]:8082", "": ""} {
		w.cfg.PodIP = ip
		if got := w.agentsAddress(); got != want {
			t.Errorf("%q: %q, want %q", ip, got, want)
		}
	}
	got, err := w.managerAddrs(t.Context())
	if d := cmp.Diff([]string{"10.96.0.99:8082", "traffic-manager.doppel.svc.cluster.test:8082"}, got); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	w.fail = func(verb string, _ runtime.Object) error { return errors.New("away") }
	if _, err := w.managerAddrs(t.Context()); err == nil {
		t.Error("no service, and no error")
	}
}
