package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/release/common"
	release "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage"
	"helm.sh/helm/v4/pkg/storage/driver"
	authn "k8s.io/api/authentication/v1"
	authz "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/doppel-dev/doppel/internal/chart"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// envChild makes this test binary an installer that its parent kills.
const envChild = "DOPPEL_E2E_CHART_CHILD"

// chartWorld is a cluster without doppel, and an image that behaves as it is told.
type chartWorld struct {
	held  bool // the namespace was made by the test and stays
	cfg   *rest.Config
	core  kubernetes.Interface
	dyn   dynamic.Interface
	image []string // --set values that name the stub
}

func newChartWorld(t *testing.T) *chartWorld {
	t.Helper()
	cfg := adminConfig(t)
	w := &chartWorld{cfg: cfg, core: kubernetes.NewForConfigOrDie(cfg), dyn: dynamic.NewForConfigOrDie(cfg)}
	w.image = []string{"image.registry=doppel.lab/stub", "image.tag=v1", "image.pullPolicy=Never"}
	lab := os.Getenv("DOPPEL_LAB")
	if lab == "" {
		lab = labName
	}
	dir := t.TempDir()
	for _, args := range [][]string{
		{"go", "build", "-o", filepath.Join(dir, "traffic-manager"), "./testdata/stubmanager"},
		{"../bin/lab", "image", "build", "--binary", filepath.Join(dir, "traffic-manager"), "--name", "doppel.lab/stub/traffic-manager:v1", "--user", "65532", "-o", filepath.Join(dir, "stub.tar")},
		{"../bin/lab", "--name", lab, "load", filepath.Join(dir, "stub.tar")},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	return w
}

// options are those of a test's install: the stub, waiting, and lines of progress in the test's log.
func (w *chartWorld) options(t *testing.T, set ...string) chart.Options {
	start := time.Now()
	return chart.Options{
		CreateNamespace: true, Wait: true, Set: append(slices.Clone(w.image), set...),
		Progress: func(s string) { t.Logf("%5.1fs %s", time.Since(start).Seconds(), s) },
	}
}

// traces are all cluster-wide objects and namespaces that could be ours.
func (w *chartWorld) traces(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, gvr := range []schema.GroupVersionResource{
		{Version: "v1", Resource: "namespaces"},
		{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicies"},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicybindings"},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "mutatingwebhookconfigurations"},
	} {
		l := ok(w.dyn.Resource(gvr).List(t.Context(), metav1.ListOptions{}))(t)
		for _, o := range l.Items {
			theirs := w.held && gvr.Resource == "namespaces" && o.GetName() == managerNS
			if strings.Contains(o.GetName(), "doppel") && !strings.HasPrefix(o.GetName(), "doppel-policy") && !theirs {
				found = append(found, gvr.Resource+" "+o.GetName())
			}
		}
	}
	return found
}

// empty fails unless the cluster has nothing of doppel.
func (w *chartWorld) empty(t *testing.T) {
	t.Helper()
	if left := w.traces(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if w.held {
		w.untouched(t)
	}
}

// refused installs with o and checks the error; nothing may be left.
func (w *chartWorld) refused(t *testing.T, o chart.Options, limit time.Duration, kind uerr.Kind, parts ...string) {
	t.Helper()
	before, start := w.traces(t), time.Now()
	err := chart.Install(t.Context(), w.cfg, o)
	t.Logf("after %.1fs: %v", time.Since(start).Seconds(), err)
	if err == nil {
		t.Fatal("it was installed")
	}
	e := uerr.From(err)
	want(t, err.Error(), parts...)
	if e.Kind != kind || e.Hint == "" || strings.Contains(err.Error(), "\n") {
		t.Errorf("kind %s, hint %q; want kind %s, a hint, and one line", e.Kind, e.Hint, kind)
	}
	if d := time.Since(start); d > limit {
		t.Errorf("took %v, want at most %v", d, limit)
	}
	if d := cmp.Diff(before, w.traces(t)); d != "" {
		t.Errorf("not as before: %s", d)
	}
}

func TestChart(t *testing.T) {
	w := newChartWorld(t)
	w.inNamespace(t, nil, func() { // Kubernetes takes 5 s to delete a namespace, so most tests find one that is there
		t.Run("life", w.life)
		t.Run("failures", w.failures)
		t.Run("not allowed", w.notAllowed)
		t.Run("some rights are missing", w.someRights)
		t.Run("cancelled", w.cancelled)
		t.Run("interrupted", w.interrupted)
		t.Run("at the same time", w.together)
		t.Run("in two namespaces", w.twoNamespaces)
		t.Run("declared", w.declared)
	})
	t.Run("pod security", w.podSecurity)
	t.Run("image not there", w.noImage)
	t.Run("namespace deleted", w.namespaceDeleted)
	t.Run("namespace of others", w.sharedNamespace)
}

// noImage is a failed install in a namespace of our own, which goes as well.
func (w *chartWorld) noImage(t *testing.T) {
	w.refused(t, w.options(t, "image.tag=nope"), 20*time.Second, uerr.Cluster, "doppel.lab/stub/traffic-manager:nope cannot be pulled", "Never")
	o := w.options(t)
	o.CreateNamespace = false
	w.refused(t, o, 5*time.Second, uerr.NotFound, "namespace doppel does not exist")
	w.empty(t)
}

// podSecurity is a namespace that enforces the restricted standard: the chart's defaults pass.
func (w *chartWorld) podSecurity(t *testing.T) {
	w.inNamespace(t, map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}, func() {
		w.refused(t, w.options(t, "manager.podSecurityContext.seccompProfile=null"), 15*time.Second, uerr.Denied, "violates PodSecurity")
		if err := chart.Install(t.Context(), w.cfg, w.options(t)); err != nil {
			t.Fatal(err)
		}
		if err := chart.Uninstall(t.Context(), w.cfg, w.options(t)); err != nil {
			t.Fatal(err)
		}
		w.untouched(t)
	})
}

// life is install, upgrade, failing upgrade, uninstall.
func (w *chartWorld) life(t *testing.T) {
	ctx := t.Context()
	if _, err := chart.Status(ctx, w.cfg, ""); !errors.Is(err, chart.ErrNotInstalled) {
		t.Fatalf("status of nothing: %v", err)
	}
	if err := chart.Upgrade(ctx, w.cfg, w.options(t)); !errors.Is(err, chart.ErrNotInstalled) {
		t.Fatalf("upgrade of nothing: %v", err)
	}
	if err := chart.Install(ctx, w.cfg, w.options(t, "manager.podAnnotations.a=b")); err != nil {
		t.Fatal(err)
	}
	if err := chart.Install(ctx, w.cfg, w.options(t)); !errors.Is(err, chart.ErrInstalled) || uerr.From(err).Kind != uerr.Conflict {
		t.Fatalf("second install: %v", err)
	}

	// What the manager writes at start must outlive upgrades, as must an administrator's scaling be no obstacle.
	asManager := metav1.PatchOptions{FieldManager: "traffic-manager"}
	hook := w.core.AdmissionregistrationV1().MutatingWebhookConfigurations()
	const hookName = "doppel-agent-injector-doppel"
	ok(hook.Patch(ctx, hookName, types.JSONPatchType, []byte(`[{"op":"add","path":"/webhooks/0/clientConfig/caBundle","value":"`+caBundle+`"}]`), asManager))(t)
	ok(w.core.CoreV1().ConfigMaps(managerNS).Patch(ctx, "traffic-manager", types.MergePatchType, []byte(`{"data":{"key":"K"}}`), asManager))(t)
	ok(w.core.CoreV1().Secrets(managerNS).Patch(ctx, "traffic-manager", types.MergePatchType, []byte(`{"data":{"tls.key":"Sw=="}}`), asManager))(t)
	ok(w.core.AppsV1().Deployments(managerNS).Patch(ctx, "traffic-manager", types.MergePatchType, []byte(`{"spec":{"replicas":3}}`), metav1.PatchOptions{FieldManager: "kubectl"}))(t)
	check := func(replicas int32, annotation string) {
		t.Helper()
		h := ok(hook.Get(ctx, hookName, metav1.GetOptions{}))(t)
		if len(h.Webhooks) != 2 || len(h.Webhooks[0].ClientConfig.CABundle) == 0 {
			t.Errorf("the caBundle is gone: %+v", h.Webhooks)
		}
		cm := ok(w.core.CoreV1().ConfigMaps(managerNS).Get(ctx, "traffic-manager", metav1.GetOptions{}))(t)
		s := ok(w.core.CoreV1().Secrets(managerNS).Get(ctx, "traffic-manager", metav1.GetOptions{}))(t)
		if cm.Data["key"] != "K" || string(s.Data["tls.key"]) != "K" {
			t.Errorf("the manager's data is gone: %v %v", cm.Data, s.Data)
		}
		d := ok(w.core.AppsV1().Deployments(managerNS).Get(ctx, "traffic-manager", metav1.GetOptions{}))(t)
		if *d.Spec.Replicas != replicas || d.Spec.Template.Annotations["a"] != annotation {
			t.Errorf("replicas %d, annotation %q; want %d, %q", *d.Spec.Replicas, d.Spec.Template.Annotations["a"], replicas, annotation)
		}
	}
	o := w.options(t)
	o.Set = []string{"manager.replicas=2"} // the rest stays as it was installed
	if err := chart.Upgrade(ctx, w.cfg, o); err != nil {
		t.Fatal(err)
	}
	check(2, "b")

	o.Set = []string{"image.tag=nope"}
	err := chart.Upgrade(ctx, w.cfg, o)
	if err == nil || uerr.From(err).Kind != uerr.Cluster || !strings.Contains(err.Error(), "doppel.lab/stub/traffic-manager:nope cannot be pulled") {
		t.Errorf("upgrade to an image that is not there: %v", err)
	}
	check(2, "b")
	eventually(t, 30*time.Second, func() error {
		d, err := w.core.AppsV1().Deployments(managerNS).Get(ctx, "traffic-manager", metav1.GetOptions{})
		if err != nil || d.Status.UpdatedReplicas != 2 || d.Status.AvailableReplicas != 2 || d.Status.Replicas != 2 {
			return fmt.Errorf("not rolled back: %v %w", d.Status, err)
		}
		return nil
	})

	o = w.options(t)
	o.ResetValues = true
	if err := chart.Upgrade(ctx, w.cfg, o); err != nil {
		t.Fatal(err)
	}
	check(1, "")
	r := ok(chart.Status(ctx, w.cfg, ""))(t)
	if r.Status != "deployed" || r.Revision != 5 || r.Namespace != managerNS {
		t.Errorf("status %+v", r)
	}

	// People are still connected when it goes.
	admin := person{name: "kubernetes-admin", dyn: w.dyn}
	me := ok(w.core.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authn.SelfSubjectReview{}, metav1.CreateOptions{}))(t)
	admin.name = me.Status.UserInfo.Username
	ok(w.dyn.Resource(sessionsGVR).Namespace(managerNS).Create(ctx, object("Session", admin), metav1.CreateOptions{}))(t)
	ok(w.dyn.Resource(interceptsGVR).Namespace("default").Create(ctx, object("Intercept", admin), metav1.CreateOptions{}))(t)
	start := time.Now()
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	t.Logf("uninstalled in %v", time.Since(start))
	w.empty(t)
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); !errors.Is(err, chart.ErrNotInstalled) {
		t.Errorf("second uninstall: %v", err)
	}
}

// caBundle is a certificate, as the API server parses the field.
const caBundle = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUJlVENDQVIrZ0F3SUJBZ0lCQURBS0JnZ3Foa2pPUFFRREFqQUFNQjRYRFRjd01ERXdNVEF3TURBd01GbwpYRFRNd01ERXdNVEF3TURBd01Gb3dBREFBCi0tLS0tRU5EIENFUlRJRklDQVRFLS0tLS0K"

// failures are installs that cannot become ready.
func (w *chartWorld) failures(t *testing.T) {
	t.Run("registry does not answer", func(t *testing.T) {
		w.refused(t, w.options(t, "image.registry=127.0.0.1:1/none", "image.pullPolicy=Always"), 30*time.Second, uerr.Cluster, "127.0.0.1:1/none/traffic-manager:v1 cannot be pulled", "connection refused")
	})
	t.Run("no node", func(t *testing.T) {
		w.refused(t, w.options(t, "manager.resources.requests.cpu=500"), 40*time.Second, uerr.Cluster, "no node takes the traffic-manager", "Insufficient cpu")
	})
	t.Run("crash", func(t *testing.T) {
		w.refused(t, w.options(t, "manager.logLevel=error"), 20*time.Second, uerr.Cluster, "exit code 3", "the stub was told to end")
	})
	t.Run("never ready", func(t *testing.T) {
		o := w.options(t, "manager.logLevel=warn")
		o.Timeout = 15 * time.Second // in which the pod has started on a busy machine, and the kubelet has asked it
		w.refused(t, o, 32*time.Second, uerr.Cluster, "did not become ready in 15s", "statuscode: 503", "the stub was told warn")
	})
	t.Run("cluster does not answer", func(t *testing.T) {
		cfg := rest.CopyConfig(w.cfg)
		cfg.Host = "https://127.0.0.1:1"
		start := time.Now()
		err := chart.Install(t.Context(), cfg, w.options(t))
		if e := uerr.From(err); e == nil || e.Kind != uerr.Cluster || time.Since(start) > 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
	t.Run("quota", func(t *testing.T) {
		quotas := w.core.CoreV1().ResourceQuotas(managerNS)
		ok(quotas.Create(t.Context(), &corev1.ResourceQuota{
			ObjectMeta: metav1.ObjectMeta{Name: "q"},
			Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"pods": resource.MustParse("0")}},
		}, metav1.CreateOptions{}))(t)
		w.refused(t, w.options(t), 15*time.Second, uerr.Cluster, "exceeded quota: q")
		if err := quotas.Delete(t.Context(), "q", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("limit range", func(t *testing.T) {
		ranges := w.core.CoreV1().LimitRanges(managerNS)
		ok(ranges.Create(t.Context(), &corev1.LimitRange{
			ObjectMeta: metav1.ObjectMeta{Name: "l"},
			Spec:       corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{Type: "Container", Max: corev1.ResourceList{"memory": resource.MustParse("8Mi")}}}},
		}, metav1.CreateOptions{}))(t)
		w.refused(t, w.options(t), 15*time.Second, uerr.Cluster, "maximum memory usage")
		if err := ranges.Delete(t.Context(), "l", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	})
	w.empty(t)
}

// inNamespace runs f with a manager's namespace that somebody else created.
func (w *chartWorld) inNamespace(t *testing.T, labels map[string]string, f func()) {
	t.Helper()
	ok(w.core.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: managerNS, Labels: labels}}, metav1.CreateOptions{}))(t)
	w.held = true
	defer func() {
		w.held = false
		if err := w.core.CoreV1().Namespaces().Delete(context.Background(), managerNS, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		eventually(t, time.Minute, func() error {
			if left := w.traces(t); slices.Contains(left, "namespaces "+managerNS) {
				return errors.New("the namespace is still there")
			}
			return nil
		})
	}()
	f()
}

// untouched fails unless the manager's namespace is there and has nothing of ours.
func (w *chartWorld) untouched(t *testing.T) {
	t.Helper()
	ok(w.core.CoreV1().Namespaces().Get(t.Context(), managerNS, metav1.GetOptions{}))(t)
	eventually(t, 10*time.Second, func() error { // a pod takes a moment to end
		for _, r := range []string{"secrets", "configmaps", "services", "serviceaccounts", "pods"} {
			l := ok(w.dyn.Resource(schema.GroupVersionResource{Version: "v1", Resource: r}).Namespace(managerNS).List(t.Context(), metav1.ListOptions{}))(t)
			for _, o := range l.Items {
				if n := o.GetName(); n != "kube-root-ca.crt" && n != "default" {
					return fmt.Errorf("%s %s is left", r, n)
				}
			}
		}
		return nil
	})
}

// as is the cluster as a service account sees it.
func (w *chartWorld) as(t *testing.T, name string) *chartWorld {
	t.Helper()
	ctx := t.Context()
	ok(w.core.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))(t)
	t.Cleanup(func() {
		_ = w.core.CoreV1().ServiceAccounts("default").Delete(context.Background(), name, metav1.DeleteOptions{})
	})
	tok := ok(w.core.CoreV1().ServiceAccounts("default").CreateToken(ctx, name, &authn.TokenRequest{}, metav1.CreateOptions{}))(t)
	cfg := rest.AnonymousClientConfig(w.cfg)
	cfg.BearerToken = tok.Status.Token
	other := *w
	other.cfg = cfg
	return &other
}

// notAllowed is a developer who may not install, and the administrator who runs what the hint says.
func (w *chartWorld) notAllowed(t *testing.T) {
	ctx := t.Context()
	dev := w.as(t, "developer")
	var said []string
	o := w.options(t)
	o.Progress = func(s string) { said = append(said, s) }
	err := chart.Install(ctx, dev.cfg, o)
	e := uerr.From(err)
	if e == nil || e.Kind != uerr.Denied || len(said) > 0 {
		t.Fatalf("%v, progress %v", err, said)
	}
	t.Logf("%v\nhint: %s", err, e.Hint)
	w.empty(t)
	want(t, err.Error(), "customresourcedefinitions", "clusterroles")

	_, flags, found := strings.Cut(e.Hint, "doppel helm install ")
	if !found {
		t.Fatalf("no command in the hint: %s", e.Hint)
	}
	o = w.options(t)
	o.Set = nil
	for _, m := range regexp.MustCompile(`--(set|set-string) '([^']*)'`).FindAllStringSubmatch(flags, -1) { // the developer's own among them
		if m[1] == "set" {
			o.Set = append(o.Set, m[2])
		} else {
			o.SetString = append(o.SetString, m[2])
		}
	}
	if err := chart.Install(ctx, w.cfg, o); err != nil {
		t.Fatal(err)
	}
	devCore := kubernetes.NewForConfigOrDie(dev.cfg)
	for _, a := range []authz.ResourceAttributes{
		{Verb: "create", Group: "doppel.dev", Resource: "sessions", Namespace: managerNS},
		{Verb: "create", Group: "doppel.dev", Resource: "intercepts", Namespace: "default"},
		{Verb: "get", Resource: "services", Subresource: "proxy", Name: "http:traffic-manager:api", Namespace: managerNS},
	} {
		r := ok(devCore.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authz.SelfSubjectAccessReview{Spec: authz.SelfSubjectAccessReviewSpec{ResourceAttributes: &a}}, metav1.CreateOptions{}))(t)
		if !r.Status.Allowed {
			t.Errorf("after the administrator's command the developer may not %+v", a)
		}
	}
	for what, err := range map[string]error{
		"upgrade": chart.Upgrade(ctx, dev.cfg, w.options(t)), "uninstall": chart.Uninstall(ctx, dev.cfg, w.options(t)),
	} {
		if e := uerr.From(err); e == nil || e.Kind != uerr.Denied || !strings.Contains(e.Hint, "doppel helm "+what) {
			t.Errorf("developer's %s: %v (%+v)", what, err, e)
		}
	}
	if r := ok(chart.Status(ctx, w.cfg, ""))(t); r.Status != "deployed" {
		t.Errorf("after the developer's attempts: %+v", r)
	}
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	w.empty(t)
}

// someRights is somebody who may create everything but not give away rights that they do not have themselves.
func (w *chartWorld) someRights(t *testing.T) {
	ctx := t.Context()
	op := w.as(t, "operator")
	verbs := []string{"get", "list", "watch", "create", "update", "patch", "delete"}
	ok(w.core.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "chart-test-operator"},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"namespaces", "secrets", "configmaps", "services", "serviceaccounts", "pods", "events", "persistentvolumeclaims"}, Verbs: verbs},
			{APIGroups: []string{"apps", "policy", "rbac.authorization.k8s.io", "admissionregistration.k8s.io", "apiextensions.k8s.io"}, Resources: []string{"*"}, Verbs: verbs},
		},
	}, metav1.CreateOptions{}))(t)
	ok(w.core.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "chart-test-operator"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "chart-test-operator"},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "default", Name: "operator"}},
	}, metav1.CreateOptions{}))(t)
	t.Cleanup(func() {
		_ = w.core.RbacV1().ClusterRoles().Delete(context.Background(), "chart-test-operator", metav1.DeleteOptions{})
		_ = w.core.RbacV1().ClusterRoleBindings().Delete(context.Background(), "chart-test-operator", metav1.DeleteOptions{})
	})
	err := chart.Install(ctx, op.cfg, w.options(t))
	if e := uerr.From(err); e == nil || e.Kind != uerr.Denied || !strings.Contains(err.Error(), "rights that you do not have yourself") {
		t.Errorf("%v", err)
	}
	t.Log(err)
	w.empty(t)
}

// cancelled is Ctrl-C while the objects are being applied, and while their readiness is waited for.
func (w *chartWorld) cancelled(t *testing.T) {
	for _, at := range []string{"installing traffic-manager", "starting the traffic-manager"} {
		ctx, cancel := context.WithCancel(t.Context())
		o := w.options(t, "manager.logLevel=warn")
		tell := o.Progress
		o.Progress = func(s string) {
			tell(s)
			if strings.HasPrefix(s, at) {
				time.AfterFunc(150*time.Millisecond, cancel)
			}
		}
		err := chart.Install(ctx, w.cfg, o)
		cancel()
		if e := uerr.From(err); e == nil || e.Kind != uerr.Canceled {
			t.Errorf("cancelled at %q: %v", at, err)
		}
		w.empty(t)
	}
}

// TestChartChild installs until its parent kills it.
func TestChartChild(t *testing.T) {
	path := os.Getenv(envChild)
	if path == "" {
		t.Skip("only a helper of TestChart")
	}
	cfg := ok(clientcmd.BuildConfigFromFlags("", path))(t)
	err := chart.Install(t.Context(), cfg, chart.Options{CreateNamespace: true, Progress: func(s string) { fmt.Println(s) }})
	fmt.Println("ended:", err)
}

// interrupted kills an installer in the middle. The next install waits, as somebody may be at it, and clears up once that is too long ago.
func (w *chartWorld) interrupted(t *testing.T) {
	path := os.Getenv(envKubeconfig)
	if path == "" {
		path = shared.kubeconfig
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestChartChild$", "-test.v")
	cmd.Env = append(os.Environ(), envChild+"="+path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	secrets := driver.NewSecrets(w.core.CoreV1().Secrets(managerNS))
	store := storage.Init(secrets)
	eventually(t, 20*time.Second, func() error {
		_, err := store.Last(chart.ReleaseName)
		return err
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	last := ok(store.Last(chart.ReleaseName))(t).(*release.Release)
	if last.Info.Status != common.StatusPendingInstall {
		t.Fatalf("the child was not killed in the middle: %s", last.Info.Status)
	}
	o := w.options(t)
	o.Timeout = 3 * time.Second
	err := chart.Install(ctx, w.cfg, o)
	if e := uerr.From(err); e == nil || e.Kind != uerr.Conflict || !strings.Contains(err.Error(), "pending-install") {
		t.Errorf("while it may be under way: %v", err)
	}
	last.Info.LastDeployed = time.Now().Add(-time.Hour)
	if err := store.Update(last); err != nil {
		t.Fatal(err)
	}
	if err := chart.Install(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}

	// An upgrade that was interrupted does not lock the release for ever.
	last = ok(store.Last(chart.ReleaseName))(t).(*release.Release)
	stuck := *last
	info := *last.Info
	stuck.Info, stuck.Version = &info, last.Version+1
	stuck.Info.Status, stuck.Info.LastDeployed = common.StatusPendingUpgrade, time.Now().Add(-time.Hour)
	if err := store.Create(&stuck); err != nil {
		t.Fatal(err)
	}
	if err := chart.Upgrade(ctx, w.cfg, w.options(t)); err != nil {
		t.Errorf("upgrade after an interrupted one: %v", err)
	}
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	w.empty(t)
}

// together is several people who connect to a fresh cluster at once.
func (w *chartWorld) together(t *testing.T) {
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		wg.Go(func() { errs[i] = chart.Install(t.Context(), w.cfg, w.options(t)) })
	}
	wg.Wait()
	installed := 0
	for _, err := range errs {
		switch {
		case err == nil:
			installed++
		case !errors.Is(err, chart.ErrInstalled):
			t.Errorf("neither installed nor there already: %v", err)
		}
	}
	if installed != 1 {
		t.Errorf("installed %d times: %v", installed, errs)
	}
	if err := chart.WaitReady(t.Context(), w.cfg, w.options(t)); err != nil {
		t.Error(err)
	}
	if err := chart.Uninstall(t.Context(), w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	w.empty(t)
}

// twoNamespaces installs once more elsewhere, which must neither work nor harm.
func (w *chartWorld) twoNamespaces(t *testing.T) {
	if err := chart.Install(t.Context(), w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	before := w.traces(t)
	o := w.options(t)
	o.Namespace = "doppel-too"
	w.refused(t, o, 20*time.Second, uerr.Conflict, "already installed in namespace doppel")
	if d := cmp.Diff(before, w.traces(t)); d != "" {
		t.Error(d)
	}
	if err := chart.WaitReady(t.Context(), w.cfg, w.options(t)); err != nil {
		t.Error(err)
	}
	if err := chart.Uninstall(t.Context(), w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	w.empty(t)
}

// declared is a manager that Argo CD or kubectl has made of what helm template gives, with no release: it is left alone, and no second one is installed.
func (w *chartWorld) declared(t *testing.T) {
	maps := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(w.core.Discovery()))
	each := func(do func(dynamic.ResourceInterface, *unstructured.Unstructured) error) {
		for _, o := range manifests(t, []byte(ok(chart.Manifest(chart.Options{Set: w.image}))(t))) {
			if err := do(ok(clientFor(w.dyn, maps, o))(t), o); err != nil {
				t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
			}
		}
	}
	each(func(c dynamic.ResourceInterface, o *unstructured.Unstructured) error {
		_, err := c.Apply(t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "argocd-controller"})
		return err
	})
	before := w.traces(t)
	elsewhere, sc := w.options(t), w.options(t, "namespaces={default}")
	elsewhere.Namespace, sc.Namespace = "doppel-too", "doppel-too"
	w.refused(t, elsewhere, 20*time.Second, uerr.Conflict, "already installed in namespace doppel")
	w.refused(t, sc, 20*time.Second, uerr.Conflict, "is for the whole cluster")
	for verb, do := range map[string]func() error{
		"install":   func() error { return chart.Install(t.Context(), w.cfg, w.options(t)) },
		"upgrade":   func() error { return chart.Upgrade(t.Context(), w.cfg, w.options(t)) },
		"uninstall": func() error { return chart.Uninstall(t.Context(), w.cfg, w.options(t)) },
	} {
		if err := do(); err == nil || uerr.From(err).Kind != uerr.Conflict || !strings.Contains(err.Error(), "by something else than doppel") {
			t.Errorf("%s: %v, want a conflict", verb, err)
		}
	}
	if d := cmp.Diff(before, w.traces(t)); d != "" {
		t.Error(d)
	}
	each(func(c dynamic.ResourceInterface, o *unstructured.Unstructured) error {
		return c.Delete(t.Context(), o.GetName(), metav1.DeleteOptions{})
	})
	w.empty(t)
}

// namespaceDeleted is kubectl delete namespace doppel: the record of the release is gone, its cluster-wide objects are not.
func (w *chartWorld) namespaceDeleted(t *testing.T) {
	ctx := t.Context()
	lose := func() {
		t.Helper()
		if err := chart.Install(ctx, w.cfg, w.options(t)); err != nil {
			t.Fatal(err)
		}
		if err := w.core.CoreV1().Namespaces().Delete(ctx, managerNS, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	lose()
	// At once: the namespace is on its way out and has to be waited for.
	if err := chart.Install(ctx, w.cfg, w.options(t)); err != nil && !errors.Is(err, chart.ErrInstalled) {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		n, err := w.core.CoreV1().Namespaces().Get(ctx, managerNS, metav1.GetOptions{})
		if err == nil && n.DeletionTimestamp != nil {
			return errors.New("the old namespace is still there")
		}
		return nil
	})
	if _, err := chart.Status(ctx, w.cfg, ""); errors.Is(err, chart.ErrNotInstalled) {
		if err := chart.Install(ctx, w.cfg, w.options(t)); err != nil {
			t.Fatal(err)
		}
	}
	if err := chart.WaitReady(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	w.empty(t)

	lose()
	eventually(t, time.Minute, func() error {
		if slices.Contains(w.traces(t), "namespaces "+managerNS) {
			return errors.New("the namespace is still there")
		}
		return nil
	})
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	w.empty(t)
}

// sharedNamespace is a namespace that doppel created and into which somebody else has moved.
func (w *chartWorld) sharedNamespace(t *testing.T) {
	ctx := t.Context()
	if err := chart.Install(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	ok(w.core.CoreV1().ConfigMaps(managerNS).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}}, metav1.CreateOptions{}))(t)
	if err := chart.Uninstall(ctx, w.cfg, w.options(t)); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"namespaces " + managerNS}, w.traces(t)); d != "" {
		t.Error(d)
	}
	ok(w.core.CoreV1().ConfigMaps(managerNS).Get(ctx, "theirs", metav1.GetOptions{}))(t)
	if err := w.core.CoreV1().Namespaces().Delete(ctx, managerNS, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		if left := w.traces(t); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
}
