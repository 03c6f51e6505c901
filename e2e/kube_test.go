package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// namespace creates a namespace that is deleted, without waiting, when the test ends.
func (c *cluster) namespace(t *testing.T, name string) string {
	t.Helper()
	ctx := t.Context()
	_, err := c.core.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := c.core.CoreV1().Namespaces().Delete(context.Background(), name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	return name
}

// sample applies the sample application and waits until its three services answer on a node: kube-proxy may learn of a pod's address
// later than the Deployment is available, and refuses until then whoever asks.
func (c *cluster) sample(t *testing.T, ns string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.root, "examples", "colors", "k8s.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range strings.Split(string(b), "\n---") {
		c.apply(t, ns, []byte(doc))
	}
	for _, n := range []string{"verylargejavaservice", "dataprocessingservice", "verylargedatastore"} {
		c.available(t, ns, n)
		c.answers(t, c.clusterIP(t, ns, n))
	}
}

// answers waits until a node gets through to an address of a service, which is when kube-proxy there has its endpoints.
func (c *cluster) answers(t *testing.T, hostport string) {
	t.Helper()
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		return c.onNode(t.Context(), "timeout", "2", "bash", "-c", "</dev/tcp/"+host+"/"+port).Run()
	})
}

// apply creates the Deployment or Service in doc.
func (c *cluster) apply(t *testing.T, ns string, doc []byte) {
	t.Helper()
	var kind metav1.TypeMeta
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		t.Fatal(err)
	}
	var err error
	switch kind.Kind {
	case "Deployment":
		var d appsv1.Deployment
		if err = yaml.UnmarshalStrict(doc, &d); err == nil {
			_, err = c.core.AppsV1().Deployments(ns).Create(t.Context(), &d, metav1.CreateOptions{})
		}
	case "Service":
		var s corev1.Service
		if err = yaml.UnmarshalStrict(doc, &s); err == nil {
			_, err = c.core.CoreV1().Services(ns).Create(t.Context(), &s, metav1.CreateOptions{})
		}
	case "":
		return // comments only
	default:
		err = fmt.Errorf("kind %q", kind.Kind)
	}
	if err != nil {
		t.Fatalf("apply: %v\n%s", err, doc)
	}
}

func (c *cluster) available(t *testing.T, ns, deployment string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		d, err := c.core.AppsV1().Deployments(ns).Get(t.Context(), deployment, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if d.Status.ObservedGeneration < d.Generation || d.Status.UpdatedReplicas < 1 || d.Status.AvailableReplicas != d.Status.Replicas {
			return fmt.Errorf("%s: %+v", deployment, d.Status.Conditions)
		}
		return nil
	})
}

// clusterIP is the service's address with a port, as host:port.
func (c *cluster) clusterIP(t *testing.T, ns, service string) string {
	t.Helper()
	s, err := c.core.CoreV1().Services(ns).Get(t.Context(), service, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s:%d", s.Spec.ClusterIP, s.Spec.Ports[0].Port)
}

func podLogs(ctx context.Context, c *cluster, ns, selector, container string) string {
	pods, err := c.core.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return err.Error()
	}
	var out strings.Builder
	lines := int64(60)
	for _, p := range pods.Items {
		r, err := c.core.CoreV1().Pods(ns).GetLogs(p.Name, &corev1.PodLogOptions{Container: container, TailLines: &lines}).Stream(ctx)
		if err != nil {
			fmt.Fprintln(&out, err)
			continue
		}
		fmt.Fprintf(&out, "%s:\n%s", p.Name, drain(r))
	}
	return out.String()
}

// get reads a path of the API server into out.
func (c *cluster) get(t *testing.T, path string, out any) {
	t.Helper()
	b, err := c.core.Discovery().RESTClient().Get().AbsPath(path).DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
}
