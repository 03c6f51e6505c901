package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// taken is a workload of the table: what it is, and how it is intercepted.
type taken struct {
	name    string
	kind    string
	listen  []string // what its pods say their name at; default tcp://:7000
	run     []string // what its pods run of the probe; default: name
	ports   []corev1.ContainerPort
	service *corev1.ServiceSpec // nil: none
	count   int32
	change  func(any) // the object before it is created

	args []string // of doppel intercept: what follows -p LOCAL, and flags
	gap  string   // what doppel says without --recreate; "": it needs none
	ask  string   // network of the client: tcp
	both string   // what another network on the same number answers: the pod, as ever
}

// TestWorkloads intercepts every kind of workload and port, all at once, from one laptop, and gives each back.
func TestWorkloads(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "workloads")
	bin := c.probe(t)
	l := newLaptop(t, "collector")
	l.withManager(t)
	named := []corev1.ContainerPort{{Name: "probe", ContainerPort: 7000}}
	byName := &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("probe")}}}
	byNumber := &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(7000)}}}
	headless := &corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Ports: []corev1.ServicePort{{Port: 7000}}}
	udp := &corev1.ServiceSpec{Ports: []corev1.ServicePort{
		{Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80, TargetPort: intstr.FromInt32(7000)}, {Name: "tcp", Port: 80, TargetPort: intstr.FromInt32(7000)},
	}}
	list, err := c.core.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	nodes := int32(len(list.Items))
	rows := []taken{
		{name: "replicas", kind: "Deployment", count: 3, ports: named, service: byName},
		{name: "number", kind: "Deployment", service: byNumber},
		{name: "localhost", kind: "Deployment", service: byNumber, listen: []string{"tcp://127.0.0.1:7000"}},
		{name: "podip", kind: "Deployment", service: byNumber, listen: []string{"tcp://${POD_IP}:7000"}},
		{name: "noservice", kind: "Deployment", ports: named, listen: []string{"tcp://:7000", "tcp://127.0.0.1:7500", "udp://127.0.0.1:7500", "udp://127.0.0.1:7501"}, args: []string{"", "--to-pod=7500", "--to-pod=7500/udp,7501/udp"}},
		{name: "udpname", kind: "Deployment", ask: "udp", listen: []string{"udp://:7000"}, ports: []corev1.ContainerPort{{Name: "probe", Protocol: corev1.ProtocolUDP, ContainerPort: 7000}}, service: &corev1.ServiceSpec{
			Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolUDP, Port: 80, TargetPort: intstr.FromString("probe")}},
		}},
		{name: "both", kind: "Deployment", ask: "udp", both: "tcp", listen: []string{"udp://:7000", "tcp://:7000"}, service: udp, args: []string{":80/udp"}},
		{name: "udpip", kind: "Deployment", ask: "udp", listen: []string{"udp://${POD_IP}:7000"}, service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolUDP, Port: 80, TargetPort: intstr.FromInt32(7000)}}}},
		{name: "recreate", kind: "Deployment", service: byNumber, gap: "has strategy Recreate", change: func(o any) {
			o.(*appsv1.Deployment).Spec.Strategy.Type = appsv1.RecreateDeploymentStrategyType
		}},
		{name: "db", kind: "StatefulSet", count: 2, ports: named, service: headless},
		{name: "ondelete", kind: "StatefulSet", count: 2, ports: named, service: byName, gap: "has strategy OnDelete", change: func(o any) {
			o.(*appsv1.StatefulSet).Spec.UpdateStrategy.Type = appsv1.OnDeleteStatefulSetStrategyType
		}},
		{name: "everywhere", kind: "DaemonSet", ports: named, service: byName, count: nodes},
		{name: "bareset", kind: "ReplicaSet", count: 2, ports: named, service: byName, gap: "has no Deployment"},
		{name: "alone", kind: "Pod", ports: named, service: byName, gap: "has no controller that would replace it"},
	}
	for i, r := range rows {
		if r.name == "everywhere" && nodes == 1 {
			rows[i].gap = "runs on one node"
		}
		c.workload(t, ns, r)
	}
	c.create(t, ns, &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: "once"}, Spec: batchv1.JobSpec{Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{
		RestartPolicy: corev1.RestartPolicyNever, Containers: []corev1.Container{{Name: "app", Image: probeImage, Args: []string{"name", "once", "tcp://:7000"}}},
	}}}})
	for _, r := range rows {
		if r.name != "localhost" { // nobody reaches that one without an agent
			eventually(t, time.Minute, func() error { return c.says(t, bin, ns, r, r.name) })
		}
	}
	alone := c.spec(t, ns, "alone")
	l.run(t, "doppel", "connect", "-n", ns)
	want(t, l.run(t, "doppel", "list"), "replicas  : ready to intercept", "db        : ready to intercept", "alone     : cannot be intercepted: not without --recreate: it has no controller")
	for _, tt := range []struct{ name, msg, hint string }{
		{"once", "Job once runs to completion", ""},
		{"statefulset/replicas", "no StatefulSet \"replicas\"", "doppel list"},
		{"rocket/x", "is no workload", "statefulset/db"},
	} {
		r := l.try(t, "doppel", "intercept", "x", "-w", tt.name, "-p", "7999")
		if r.code == 0 || !strings.Contains(r.stderr, tt.msg) || !strings.Contains(r.stderr, tt.hint) {
			t.Errorf("%s: %v", tt.name, r)
		}
	}

	t.Run("take", func(t *testing.T) {
		for i, r := range rows {
			t.Run(r.name, func(t *testing.T) {
				t.Parallel()
				local := 7100 + i
				network := or(r.ask, "tcp")
				l.start(t, bin, "name", "laptop "+r.name, fmt.Sprintf("%s://127.0.0.1:%d", network, local))
				args := []string{"doppel", "intercept", r.name, "-p", fmt.Sprint(local)}
				if len(r.args) > 0 {
					args[4] += r.args[0]
					args = append(args, r.args[1:]...)
				}
				if r.gap != "" {
					res := l.try(t, args...)
					if res.code == 0 || !strings.Contains(res.stderr, r.gap) || !strings.Contains(res.stderr, "--recreate") {
						t.Errorf("without --recreate: %v", res)
					}
					args = append(args, "--recreate")
				}
				out := l.run(t, args...)
				want(t, out, "Using "+r.kind+" "+r.name, "ACTIVE")
				if err := c.says(t, bin, ns, r, "laptop "+r.name); err != nil {
					t.Error("when ACTIVE was said: ", err)
				}
				if r.both != "" {
					other := r
					other.ask = r.both
					if err := c.says(t, bin, ns, other, r.name); err != nil {
						t.Error("the other protocol of the number: ", err)
					}
				}
				if r.name == "noservice" {
					for _, to := range []string{"tcp 127.0.0.1:7500", "udp 127.0.0.1:7500", "udp 127.0.0.1:7501"} {
						network, addr, _ := strings.Cut(to, " ")
						want(t, l.run(t, bin, "who", network, addr), r.name)
					}
				}
				if r.name == "replicas" { // scaling while intercepted
					patch := []byte(`{"spec":{"replicas":5}}`)
					if _, err := c.core.AppsV1().Deployments(ns).Patch(t.Context(), r.name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
						t.Fatal(err)
					}
					r.count = 5
					eventually(t, time.Minute, func() error { return c.says(t, bin, ns, r, "laptop "+r.name) })
				}
				l.run(t, "doppel", "leave", r.name)
				eventually(t, 5*time.Second, func() error { return c.says(t, bin, ns, r, r.name) })
			})
		}
	})

	l.run(t, "doppel", "uninstall", "--all-agents")
	if after := c.spec(t, ns, "alone"); after != alone {
		t.Errorf("the pod without owner came back as\n%s\nand was\n%s", after, alone)
	}
	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil && slices.ContainsFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == "traffic-agent" }) {
			t.Errorf("pod %s has its agent still", p.Name)
		}
	}
	l.run(t, "doppel", "quit", "-s")
}

func or(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// workload creates a row's workload and its service.
func (c *cluster) workload(t *testing.T, ns string, r taken) {
	t.Helper()
	labels := map[string]string{"app": r.name}
	listen := r.listen
	if listen == nil {
		listen = []string{"tcp://:7000"}
	}
	run := r.run
	if run == nil {
		run = append([]string{"name", r.name}, listen...)
	}
	meta := metav1.ObjectMeta{Name: r.name, Labels: labels}
	count, grace := max(r.count, 1), int64(1)
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{{
		Name: "app", Image: probeImage, ImagePullPolicy: corev1.PullNever, Args: run, Ports: r.ports,
		Env: []corev1.EnvVar{{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}}},
	}}}}
	selector := &metav1.LabelSelector{MatchLabels: labels}
	var o metav1.Object
	switch r.kind {
	case "Deployment":
		o = &appsv1.Deployment{ObjectMeta: meta, Spec: appsv1.DeploymentSpec{Replicas: &count, Selector: selector, Template: template}}
	case "StatefulSet":
		o = &appsv1.StatefulSet{ObjectMeta: meta, Spec: appsv1.StatefulSetSpec{Replicas: &count, Selector: selector, Template: template, ServiceName: r.name, PodManagementPolicy: appsv1.ParallelPodManagement}}
	case "DaemonSet":
		o = &appsv1.DaemonSet{ObjectMeta: meta, Spec: appsv1.DaemonSetSpec{Selector: selector, Template: template}}
	case "ReplicaSet":
		o = &appsv1.ReplicaSet{ObjectMeta: meta, Spec: appsv1.ReplicaSetSpec{Replicas: &count, Selector: selector, Template: template}}
	case "Rollout":
		var err error
		if o, err = rollout(&appsv1.Deployment{ObjectMeta: meta, Spec: appsv1.DeploymentSpec{Replicas: &count, Selector: selector, Template: template}}); err != nil {
			t.Fatal(err)
		}
	case "Pod":
		o = &corev1.Pod{ObjectMeta: meta, Spec: template.Spec}
	}
	if r.change != nil {
		r.change(o)
	}
	c.create(t, ns, o)
	if r.service != nil {
		s := &corev1.Service{ObjectMeta: meta, Spec: *r.service.DeepCopy()}
		s.Spec.Selector = labels
		c.create(t, ns, s)
	}
}

func (c *cluster) create(t *testing.T, ns string, o metav1.Object) {
	t.Helper()
	var err error
	create := metav1.CreateOptions{}
	switch o := o.(type) {
	case *appsv1.Deployment:
		_, err = c.core.AppsV1().Deployments(ns).Create(t.Context(), o, create)
	case *appsv1.StatefulSet:
		_, err = c.core.AppsV1().StatefulSets(ns).Create(t.Context(), o, create)
	case *appsv1.DaemonSet:
		_, err = c.core.AppsV1().DaemonSets(ns).Create(t.Context(), o, create)
	case *appsv1.ReplicaSet:
		_, err = c.core.AppsV1().ReplicaSets(ns).Create(t.Context(), o, create)
	case *batchv1.Job:
		_, err = c.core.BatchV1().Jobs(ns).Create(t.Context(), o, create)
	case *corev1.Pod:
		_, err = c.core.CoreV1().Pods(ns).Create(t.Context(), o, create)
	case *unstructured.Unstructured:
		var b []byte
		if b, err = o.MarshalJSON(); err == nil {
			err = c.core.AppsV1().RESTClient().Post().AbsPath(fmt.Sprintf(rollouts, ns)).Body(b).Do(t.Context()).Error()
		}
	case *corev1.Service:
		_, err = c.core.CoreV1().Services(ns).Create(t.Context(), o, create)
	default:
		err = fmt.Errorf("%T", o)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// says checks that the row's service, or each of its pods where it has none with an address, answers a client in the cluster with the name.
func (c *cluster) says(t *testing.T, bin, ns string, r taken, name string) error {
	t.Helper()
	var addrs []string
	if r.service != nil && r.service.ClusterIP != corev1.ClusterIPNone {
		for range max(r.count, 1) * 2 { // some of its pods each time
			addrs = append(addrs, c.clusterIP(t, ns, r.name))
		}
	} else {
		pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + r.name})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.DeletionTimestamp == nil && p.Status.PodIP != "" {
				addrs = append(addrs, p.Status.PodIP+":7000")
			}
		}
		if len(addrs) < int(max(r.count, 1)) {
			return fmt.Errorf("%s has %d pods", r.name, len(addrs))
		}
	}
	for _, a := range addrs {
		out, err := c.lab("node", "exec", "--", bin, "who", or(r.ask, "tcp"), a)
		if got := strings.TrimSpace(out); err != nil || got != name {
			return fmt.Errorf("%s at %s: %q, not %q", r.name, a, got, name)
		}
	}
	return nil
}

// spec is a pod's specification and annotations, but for what changes with each pod.
func (c *cluster) spec(t *testing.T, ns, pod string) string {
	t.Helper()
	p, err := c.core.CoreV1().Pods(ns).Get(t.Context(), pod, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Spec.NodeName = "" // the scheduler's choice, made anew for a pod made anew
	b, err := json.MarshalIndent([]any{p.Labels, p.Annotations, p.Spec}, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
