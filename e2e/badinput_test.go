package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// badEnd is how a command must end: within seconds, with an exit code, one error line and one hint line.
type badEnd struct {
	name  string
	args  []string
	code  int
	error string // part of the error line
	hint  string // part of the hint line; empty: there need be none
}

func (b badEnd) check(t *testing.T, l *laptop) {
	t.Helper()
	start := time.Now()
	r := l.try(t, b.args...)
	took := time.Since(start)
	if r.code != b.code {
		t.Fatalf("%s: want exit code %d, got %v", strings.Join(b.args, " "), b.code, r)
	}
	var errs, hints []string
	for _, line := range strings.Split(r.stderr, "\n") {
		if s, ok := strings.CutPrefix(line, "doppel: error: "); ok {
			errs = append(errs, s)
		}
		if s, ok := strings.CutPrefix(line, "doppel: hint: "); ok {
			hints = append(hints, s)
		}
	}
	if len(errs) != 1 || !strings.Contains(errs[0], b.error) {
		t.Errorf("%s: want one error line with %q, got %v", strings.Join(b.args, " "), b.error, r)
	}
	if b.hint != "" && (len(hints) != 1 || !strings.Contains(hints[0], b.hint)) {
		t.Errorf("%s: want one hint line with %q, got %v", strings.Join(b.args, " "), b.hint, r)
	}
	t.Logf("%.1f s: %s", took.Seconds(), strings.TrimSpace(strings.Join(errs, " ")+" | "+strings.Join(hints, " ")))
	if took > 30*time.Second {
		t.Errorf("took %v", took)
	}
}

// kubeconfig writes a kubeconfig for another server onto the laptop.
func (l *laptop) kubeconfigFor(t *testing.T, server string) string {
	t.Helper()
	path := "/run/" + strings.NewReplacer(":", "-", "/", "-").Replace(server)
	l.sh(t, fmt.Sprintf(`cat > %s <<'X'
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
X`, path, server))
	return path
}

// TestBadInputWithoutManager is everything that can be wrong before a session exists. Nothing may be left behind.
func TestBadInputWithoutManager(t *testing.T) {
	c := theCluster(t)
	l := newLaptop(t, "clumsy")
	l.withoutManager(t)
	dev := &laptop{c: c, name: l.name, as: []string{"--as", "developer"}}
	refused := l.kubeconfigFor(t, "https://127.0.0.1:1")
	l.start(t, "sh", "-c", "exec nc -lk 127.0.0.1 6444") // accepts and never answers
	silent := l.kubeconfigFor(t, "https://127.0.0.1:6444")
	eventually(t, 5*time.Second, func() error {
		if r := l.try(t, "nc", "-z", "127.0.0.1", "6444"); r.code != 0 {
			return errors.New(r.String())
		}
		return nil
	})
	l.sh(t, "mkdir -p ~/.local/state") // where the daemons' directory is
	before := l.picture(t)
	for _, b := range []badEnd{
		{"no kubeconfig", []string{"env", "KUBECONFIG=/nonexistent", "doppel", "connect"}, 2, "no kubeconfig", "KUBECONFIG"},
		{"unknown context", []string{"doppel", "connect", "--context", "nope"}, 2, `no context "nope"`, "lab-" + labName},
		{"API server refuses", []string{"doppel", "connect", "--kubeconfig", refused}, 5, "connection refused", "is the cluster up"},
		{"API server silent", []string{"doppel", "connect", "--kubeconfig", silent}, 5, "does not answer", "is the cluster up"},
		{"unknown flag", []string{"doppel", "connect", "--nope"}, 2, "--nope", "doppel connect --help"},
		{"not connected", []string{"doppel", "list"}, 4, "not connected", "doppel connect"},
		{"leave when not connected", []string{"doppel", "leave", "x"}, 4, "not connected", "doppel connect"},
		{"manager image that cannot be pulled", []string{"doppel", "helm", "install", "--set", "image.registry=127.0.0.1:1,image.tag=nosuchtag"}, 5, "nosuchtag", ""},
	} {
		t.Run(b.name, func(t *testing.T) { b.check(t, l) })
	}
	t.Run("no right to install", func(t *testing.T) {
		badEnd{"", []string{"doppel", "connect"}, 3, "you may not", "helm install"}.check(t, dev)
	})
	want(t, l.run(t, "doppel", "status"), "User daemon: not running", "Root daemon: not running")
	if err := l.noTrace(t, before); err != nil {
		t.Error(err)
	}
	eventually(t, 30*time.Second, func() error { // a namespace takes a moment to go
		_, err := c.core.CoreV1().Namespaces().Get(t.Context(), managerNS, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("namespace %s is left: %w", managerNS, err)
		}
		return nil
	})
}

// TestBadInputWithManager is everything that can be wrong with an intercept. Nothing may be left behind, and the app answers all along.
func TestBadInputWithManager(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "clumsy")
	c.sample(t, ns)
	l := newLaptop(t, "clumsy2")
	other := newLaptop(t, "colleague")
	svc := c.clusterIP(t, ns, "dataprocessingservice")
	l.run(t, "doppel", "connect", "-n", ns)
	c.deployment(t, ns, "lonely", nil, nil)
	c.deployment(t, ns, "recreate", []corev1.ContainerPort{{ContainerPort: 8080}}, func(d *appsv1.Deployment) {
		d.Spec.Strategy = appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}
	})

	intercept := func(args ...string) []string { return append([]string{"doppel", "intercept"}, args...) }
	for _, b := range []badEnd{
		{"no port", intercept("dataprocessingservice"), 2, "no port", "-p 8080"},
		{"port is no number", intercept("dataprocessingservice", "-p", "http"), 2, "LOCAL[:REMOTE]", ""},
		{"unknown workload", intercept("nosuch", "-p", "3000"), 1, `no workload "nosuch"`, "doppel list"},
		{"unknown namespace", intercept("dataprocessingservice", "-p", "3000", "-n", "nosuch"), 1, "no namespace nosuch", "get ns"},
		{"unknown port", intercept("dataprocessingservice", "-p", "3000:4711"), 1, `"4711"; there is 3000 (http)`, "-p LOCAL:REMOTE"},
		{"no service and no port", intercept("lonely", "-p", "3000"), 1, "no port: no service", "containerPort"},
		{"cannot be rolled", intercept("recreate", "-p", "3000"), 5, "Recreate", "--recreate"},
		{"unknown intercept", []string{"doppel", "leave", "nosuch"}, 1, `no intercept "nosuch"`, "doppel list"},
		{"another namespace", []string{"doppel", "connect", "-n", "default"}, 1, "connected already", "doppel quit"},
	} {
		t.Run(b.name, func(t *testing.T) { b.check(t, l) })
	}

	t.Run("ports and names that are taken", func(t *testing.T) {
		l.colors(t, "blue", "127.0.0.1:3000")
		l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")
		badEnd{"", intercept("dataprocessingservice", "-p", "3001"), 1, "there is an intercept dataprocessingservice already", "doppel leave"}.check(t, l)
		badEnd{"", intercept("second", "-w", "verylargedatastore", "-p", "3000"), 1, "127.0.0.1:3000 is taken", "another local port"}.check(t, l)
		other.run(t, "doppel", "connect", "-n", ns)
		badEnd{"", intercept("dataprocessingservice", "-p", "3000"), 1, "is intercepted by admin", "doppel list"}.check(t, other)
		if got := c.color(t, svc); got != "blue" {
			t.Errorf("the holder lost the intercept: the cluster gets %q", got)
		}
		other.run(t, "doppel", "quit", "-s")
		l.run(t, "doppel", "leave", "dataprocessingservice")
	})

	t.Run("pod security", func(t *testing.T) {
		c.deployment(t, ns, "unnamed", []corev1.ContainerPort{{ContainerPort: 8080}}, nil)
		label := func(ctx context.Context, value string) {
			patch := fmt.Appendf(nil, `{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":%s}}}`, value)
			if _, err := c.core.CoreV1().Namespaces().Patch(ctx, ns, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
				t.Error(err)
			}
		}
		label(t.Context(), `"baseline"`)
		defer label(context.Background(), "null")
		badEnd{"", intercept("unnamed", "-p", "3009"), 5, "pod security standard of namespace " + ns + " (baseline)", "targetPort"}.check(t, l)
	})

	t.Run("no redirect", func(t *testing.T) {
		c.deployment(t, ns, "policed", []corev1.ContainerPort{{ContainerPort: 8080}}, nil)
		l.run(t, "doppel", "helm", "upgrade", "--set", "agent.redirect=false")
		badEnd{"", intercept("policed", "-p", "3009"), 5, "agent.redirect does not let in", "targetPort"}.check(t, l)
		l.run(t, "doppel", "helm", "upgrade", "--reset-values")
	})

	t.Run("quota", func(t *testing.T) { // neither a Deployment nor a StatefulSet, which has no condition for it, waits in vain
		c.statefulSet(t, ns, "db", 2)
		q := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "tight"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourceLimitsCPU: resource.MustParse("1")}}}
		if _, err := c.core.CoreV1().ResourceQuotas(ns).Create(t.Context(), q, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		remove := func(ctx context.Context) error {
			return c.core.CoreV1().ResourceQuotas(ns).Delete(ctx, q.Name, metav1.DeleteOptions{})
		}
		t.Cleanup(func() { _ = remove(context.Background()) })
		eventually(t, 10*time.Second, func() error { // the quota controller has counted
			got, err := c.core.CoreV1().ResourceQuotas(ns).Get(t.Context(), q.Name, metav1.GetOptions{})
			if err == nil && len(got.Status.Hard) == 0 {
				err = errors.New("no status yet")
			}
			return err
		})
		for _, name := range []string{"verylargedatastore", "db"} {
			badEnd{"", intercept(name, "-p", "3009"), 5, "must specify limits.cpu", "get pods"}.check(t, l)
		}
		if err := remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.available(t, ns, "verylargedatastore")
	})

	t.Run("webhook unreachable", func(t *testing.T) {
		before := c.generation(t, ns, "verylargedatastore")
		c.breakWebhook(t, 0, 1)
		badEnd{"", intercept("verylargedatastore", "-p", "3000"), 5, "nothing was restarted: the API server does not reach the agent-injector webhook", "10250"}.check(t, l)
		if after := c.generation(t, ns, "verylargedatastore"); after != before {
			t.Errorf("it was restarted: generation %d, before %d", after, before)
		}
	})

	t.Run("webhook unreachable for pods", func(t *testing.T) { // of several API servers, another may have been asked
		c.breakWebhook(t, 0)
		badEnd{"", intercept("verylargedatastore", "-p", "3000"), 5, "came up without a traffic-agent", "10250"}.check(t, l)
	})

	t.Run("agent image that cannot be pulled", func(t *testing.T) {
		l.run(t, "doppel", "helm", "upgrade", "--set", "agent.image=127.0.0.1:1/traffic-agent:nosuchtag")
		badEnd{"", intercept("verylargedatastore", "-p", "3000"), 5, "nosuchtag", "get pods"}.check(t, l)
		c.available(t, ns, "verylargedatastore") // restarted without the agent
		l.run(t, "doppel", "helm", "upgrade", "--set", "agent.image=")
	})

	t.Run("manager of another version", func(t *testing.T) {
		l.run(t, "doppel", "quit")
		patch := []byte(`{"data":{"protocol":"99","version":"99.0.0"}}`)
		if _, err := c.core.CoreV1().ConfigMaps(managerNS).Patch(t.Context(), "traffic-manager", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		badEnd{"", []string{"doppel", "connect", "-n", ns}, 1, "speaks tunnel protocol 99", "upgrade"}.check(t, l)
	})

	t.Run("manager down", func(t *testing.T) {
		c.restartManager(t) // writes the ConfigMap anew
		l.run(t, "doppel", "connect", "-n", ns)
		l.run(t, "doppel", "quit")
		c.scaleManager(t, 0)
		badEnd{"", []string{"doppel", "connect", "-n", ns}, 5, "traffic-manager is not running", "get pods"}.check(t, l)
		c.scaleManager(t, 1)
	})

	eventually(t, 10*time.Second, func() error { return c.none(t, "intercepts") })
	if got := c.color(t, svc); got != "green" {
		t.Errorf("the cluster gets %q", got)
	}
}

// none is nil if there is no object of the kind (a path below doppel.dev/v1alpha1).
func (c *cluster) none(t *testing.T, kind string) error {
	t.Helper()
	b, err := c.core.Discovery().RESTClient().Get().AbsPath("/apis/doppel.dev/v1alpha1/" + kind).DoRaw(t.Context())
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), `"items":[]`) {
		return fmt.Errorf("left: %s", b)
	}
	return nil
}

// deployment creates a Deployment of the sample's data store.
func (c *cluster) deployment(t *testing.T, ns, name string, ports []corev1.ContainerPort, change func(*appsv1.Deployment)) {
	t.Helper()
	labels := map[string]string{"app": name}
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{
					Name: "app", Image: "ghcr.io/doppel-dev/colors:0.1.0-dev", Args: []string{"verylargedatastore"}, Ports: ports,
				}}},
			},
		},
	}
	if change != nil {
		change(d)
	}
	if _, err := c.core.AppsV1().Deployments(ns).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.available(t, ns, name)
}

// statefulSet creates one of the sample's data store and waits until its pods are ready.
func (c *cluster) statefulSet(t *testing.T, ns, name string, replicas int32) {
	t.Helper()
	labels := map[string]string{"app": name}
	s := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.StatefulSetSpec{
		Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels}, PodManagementPolicy: appsv1.ParallelPodManagement,
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "app", Image: "ghcr.io/doppel-dev/colors:0.1.0-dev", Args: []string{"verylargedatastore"}, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
		}}}},
	}}
	c.create(t, ns, s)
	eventually(t, time.Minute, func() error {
		got, err := c.core.AppsV1().StatefulSets(ns).Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && got.Status.ReadyReplicas != replicas {
			err = fmt.Errorf("%d pods of %s are ready", got.Status.ReadyReplicas, name)
		}
		return err
	})
}

// breakWebhook lets the API server call a port that nobody listens on for some of the webhooks, until the test ends.
func (c *cluster) breakWebhook(t *testing.T, which ...int) {
	t.Helper()
	hooks := c.core.AdmissionregistrationV1().MutatingWebhookConfigurations()
	name := "doppel-agent-injector-" + managerNS
	set := func(ctx context.Context, port int) {
		for _, i := range which {
			patch := fmt.Appendf(nil, `[{"op":"add","path":"/webhooks/%d/clientConfig/service/port","value":%d}]`, i, port)
			if _, err := hooks.Patch(ctx, name, types.JSONPatchType, patch, metav1.PatchOptions{}); err != nil {
				t.Error(err)
			}
		}
	}
	set(t.Context(), 4711)
	t.Cleanup(func() { set(context.Background(), 443) })
}

func (c *cluster) restartManager(t *testing.T) {
	t.Helper()
	c.scaleManager(t, 0)
	c.scaleManager(t, 1)
}

func (c *cluster) scaleManager(t *testing.T, n int32) {
	t.Helper()
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, n)
	if _, err := c.core.AppsV1().Deployments(managerNS).Patch(t.Context(), "traffic-manager", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		pods, err := c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
		if err != nil {
			return err
		}
		if ready := len(c.managerPods(t)); len(pods.Items) != int(n) || ready != int(n) {
			return fmt.Errorf("%d pods, %d ready", len(pods.Items), ready)
		}
		return nil
	})
}
