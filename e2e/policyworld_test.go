package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"

	doppel "github.com/doppel-dev/doppel/charts/doppel"
	"github.com/doppel-dev/doppel/internal/chart"
)

// envKubeconfig names a cluster of one's own for those tests that need no lab; they make and remove everything they use.
const envKubeconfig = "DOPPEL_E2E_KUBECONFIG"

const (
	policyNS = "doppel-policy" // stands for the manager's namespace
	workNS   = "doppel-policy-work"
	otherNS  = "doppel-policy-other"
)

var (
	sessionsGVR   = schema.GroupVersionResource{Group: "doppel.dev", Version: "v1alpha1", Resource: "sessions"}
	interceptsGVR = schema.GroupVersionResource{Group: "doppel.dev", Version: "v1alpha1", Resource: "intercepts"}
	secretsGVR    = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	policiesGVR   = schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicies"}
)

// adminConfig is the administrator's way into a cluster on which doppel is not installed.
func adminConfig(t *testing.T) *rest.Config {
	t.Helper()
	path := os.Getenv(envKubeconfig)
	if path == "" {
		path = theCluster(t).kubeconfig
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS, cfg.Burst = 200, 400
	cfg.WarningHandler = rest.NoWarnings{}
	if err := chart.Uninstall(t.Context(), cfg, chart.Options{Namespace: managerNS}); err != nil && !errors.Is(err, chart.ErrNotInstalled) {
		t.Fatalf("make the cluster empty: %v", err)
	}
	return cfg
}

// person is somebody with credentials of their own and the name under which the API server knows them.
type person struct {
	name string
	dyn  dynamic.Interface
}

func (p person) sessions() dynamic.ResourceInterface {
	return p.dyn.Resource(sessionsGVR).Namespace(policyNS)
}

func (p person) intercepts() dynamic.ResourceInterface {
	return p.dyn.Resource(interceptsGVR).Namespace(workNS)
}

// of is the interface to the objects of kind.
func (p person) of(kind string) dynamic.ResourceInterface {
	if kind == "Session" {
		return p.sessions()
	}
	return p.intercepts()
}

// policyWorld is a cluster with the chart's custom resources, roles and, when guarded, its policy, and the people who attack it.
type policyWorld struct {
	cfg  *rest.Config
	core kubernetes.Interface
	dyn  dynamic.Interface
	maps meta.RESTMapper
	// alice and bob may do everything that RBAC can give on sessions, intercepts and their status, but not revoke: whatever is
	// refused to them is refused by the policy. carol may also revoke. manager is the manager's service account with the chart's
	// roles and, on top, the right to update. user has exactly the roles that the chart gives to users.
	admin, alice, bob, carol, manager, user person
}

func newPolicyWorld(t *testing.T) *policyWorld {
	t.Helper()
	cfg := adminConfig(t)
	w := &policyWorld{cfg: cfg, core: kubernetes.NewForConfigOrDie(cfg), dyn: dynamic.NewForConfigOrDie(cfg)}
	w.maps = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(w.core.Discovery()))
	w.admin = person{name: "kubernetes-admin", dyn: w.dyn}
	ctx := t.Context()

	for _, ns := range []string{policyNS, workNS, otherNS} {
		w.mustNamespace(t, ns)
	}
	for _, f := range []string{"crds/doppel.dev_sessions.yaml", "crds/doppel.dev_intercepts.yaml", "rbac.yaml", "rbac-clients.yaml"} {
		w.apply(t, f)
	}
	t.Cleanup(func() {
		w.remove(t, "policy.yaml")
		w.wipe(t)
		for _, f := range []string{"rbac-clients.yaml", "rbac.yaml", "crds/doppel.dev_sessions.yaml", "crds/doppel.dev_intercepts.yaml"} {
			w.remove(t, f)
		}
		_ = w.core.RbacV1().ClusterRoles().Delete(context.Background(), "doppel-policy-test", metav1.DeleteOptions{})
		_ = w.core.RbacV1().ClusterRoleBindings().Delete(context.Background(), "doppel-policy-test", metav1.DeleteOptions{})
		for _, ns := range []string{policyNS, workNS, otherNS} {
			_ = w.core.CoreV1().Namespaces().Delete(context.Background(), ns, metav1.DeleteOptions{})
		}
	})
	w.alice, w.bob = w.account(t, otherNS, "alice"), w.account(t, otherNS, "bob")
	w.carol, w.user = w.account(t, otherNS, "carol"), w.account(t, otherNS, "user")
	w.manager = w.account(t, policyNS, "traffic-manager")

	all := []rbacv1.PolicyRule{{
		APIGroups: []string{"doppel.dev"},
		Resources: []string{"sessions", "intercepts", "sessions/status", "intercepts/status"},
		Verbs:     []string{"create", "get", "list", "watch", "update", "patch", "delete", "deletecollection"},
	}}
	ok(w.core.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "doppel-policy-test"}, Rules: all}, metav1.CreateOptions{}))(t)
	ok(w.core.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "doppel-policy-test"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "doppel-policy-test"},
		Subjects: []rbacv1.Subject{
			w.alice.subject(), w.bob.subject(), w.carol.subject(), w.manager.subject(),
			{APIGroup: rbacv1.GroupName, Kind: "User", Name: oddName},
		},
	}, metav1.CreateOptions{}))(t)
	for _, ns := range []string{policyNS, workNS} { // not in otherNS
		w.bind(t, ns, "ClusterRole", "doppel-admin", w.carol)
	}
	w.bind(t, policyNS, "Role", "doppel-connect", w.user)
	w.bind(t, workNS, "ClusterRole", "doppel-intercept", w.user)

	eventually(t, 30*time.Second, func() error {
		for _, gvr := range []schema.GroupVersionResource{sessionsGVR, interceptsGVR} {
			if _, err := w.alice.dyn.Resource(gvr).Namespace(workNS).List(ctx, metav1.ListOptions{}); err != nil {
				return err
			}
		}
		return nil
	})
	return w
}

// oddName is a user's name with everything in it that could upset an expression or a message.
const oddName = `https://issuer.example/#jane "the \ quote" o'hara`

// odd is somebody of that name, by impersonation, as no service account can have it.
func (w *policyWorld) odd() person {
	cfg := rest.CopyConfig(w.cfg)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: oddName}
	return person{name: oddName, dyn: dynamic.NewForConfigOrDie(cfg)}
}

// ok passes on the value of a call that must not fail: ok(t, f()) cannot be written, ok(f())(t) can.
func ok[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// mustNamespace creates a namespace; one that an earlier run left is waited for.
func (w *policyWorld) mustNamespace(t *testing.T, name string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		_, err := w.core.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	})
}

// account creates a service account and returns it with a token of its own.
func (w *policyWorld) account(t *testing.T, ns, name string) person {
	t.Helper()
	ctx := t.Context()
	_, err := w.core.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	tok := ok(w.core.CoreV1().ServiceAccounts(ns).CreateToken(ctx, name, &authn.TokenRequest{}, metav1.CreateOptions{}))(t)
	cfg := rest.AnonymousClientConfig(w.cfg)
	cfg.BearerToken = tok.Status.Token
	cfg.QPS, cfg.Burst = 200, 400
	cfg.WarningHandler = rest.NoWarnings{}
	return person{name: "system:serviceaccount:" + ns + ":" + name, dyn: dynamic.NewForConfigOrDie(cfg)}
}

func (p person) subject() rbacv1.Subject {
	parts := strings.Split(p.name, ":")
	return rbacv1.Subject{Kind: "ServiceAccount", Namespace: parts[2], Name: parts[3]}
}

func (w *policyWorld) bind(t *testing.T, ns, kind, role string, p person) {
	t.Helper()
	_, err := w.core.RbacV1().RoleBindings(ns).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "policy-test-"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: kind, Name: role},
		Subjects:   []rbacv1.Subject{p.subject()},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// objects are the chart's objects in one of its files.
func (w *policyWorld) objects(t *testing.T, file string) []*unstructured.Unstructured {
	t.Helper()
	var text []byte
	if strings.HasPrefix(file, "crds/") {
		text = ok(doppel.Files.ReadFile(file))(t)
	} else {
		text = []byte(ok(chart.Render(chart.Options{Namespace: policyNS}))(t)[file])
	}
	return manifests(t, text)
}

// manifests are the objects in a YAML stream.
func manifests(t *testing.T, text []byte) []*unstructured.Unstructured {
	t.Helper()
	var objs []*unstructured.Unstructured
	d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		if err := d.Decode(o); errors.Is(err, io.EOF) {
			return objs
		} else if err != nil {
			t.Fatal(err)
		}
		if o.GetKind() != "" {
			objs = append(objs, o)
		}
	}
}

func (w *policyWorld) client(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	return clientFor(w.dyn, w.maps, o)
}

// clientFor is the client for an object's kind and namespace.
func clientFor(dyn dynamic.Interface, maps meta.RESTMapper, o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	m, err := maps.RESTMapping(o.GroupVersionKind().GroupKind(), o.GroupVersionKind().Version)
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return dyn.Resource(m.Resource).Namespace(o.GetNamespace()), nil
	}
	return dyn.Resource(m.Resource), nil
}

func (w *policyWorld) apply(t *testing.T, file string) {
	t.Helper()
	for _, o := range w.objects(t, file) {
		c, err := w.client(o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Apply(t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "policy-test", Force: true}); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
}

func (w *policyWorld) remove(t *testing.T, file string) {
	t.Helper()
	for _, o := range w.objects(t, file) {
		c, err := w.client(o)
		if err == nil {
			err = c.Delete(context.Background(), o.GetName(), metav1.DeleteOptions{})
		}
		if err != nil && !apierrors.IsNotFound(err) {
			t.Errorf("remove %s: %v", file, err)
		}
	}
}

// guard puts the policy in force, or takes it out, and waits until the API server acts accordingly, for both kinds. The probe is the manager's own:
// a forged create as a dry run.
func (w *policyWorld) guard(t *testing.T, on bool) {
	t.Helper()
	if on {
		w.apply(t, "policy.yaml")
	} else {
		w.remove(t, "policy.yaml")
	}
	in := 0
	eventually(t, 30*time.Second, func() error {
		for _, kind := range []string{"Session", "Intercept"} {
			o := object(kind, w.alice)
			_, err := w.bob.of(kind).Create(t.Context(), o, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if denied := err != nil && strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'doppel-identity-"); denied != on {
				in = 0
				return fmt.Errorf("policy wanted in force: %v; a forged %s: %w", on, kind, err)
			}
		}
		if in++; in < 3 {
			return errors.New("not steady yet")
		}
		return nil
	})
}

// object is an honest session or intercept of p.
func object(kind string, p person) *unstructured.Unstructured {
	spec := map[string]any{"user": p.name}
	if kind == "Session" {
		spec["key"] = "sha256:" + strings.Repeat("A", 43)
		spec["namespace"] = workNS
		spec["client"] = "doppel test"
		spec["renewTime"] = stamp(0)
	} else {
		spec["session"] = "00000000-0000-0000-0000-000000000000"
		spec["name"] = "web"
		spec["workload"] = map[string]any{"kind": "Deployment", "name": "web"}
		spec["ports"] = []any{map[string]any{"port": "http"}}
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "doppel.dev/v1alpha1", "kind": kind,
		"metadata": map[string]any{"generateName": "laptop-"},
		"spec":     spec,
	}}
}

// stamp is the time d from now as a session writes it.
func stamp(d time.Duration) string {
	return time.Now().Add(d).UTC().Format(metav1.RFC3339Micro)
}

// patch sends a JSON merge patch.
func patch(ctx context.Context, c dynamic.ResourceInterface, name, body string, sub ...string) error {
	_, err := c.Patch(ctx, name, types.MergePatchType, []byte(body), metav1.PatchOptions{}, sub...)
	return err
}
