package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	authn "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/kube"
)

// crowd is how many there are of everything. Each session has as many intercepts as any other.
type crowd struct {
	Sessions, Intercepts, Workloads, Changes int
}

var (
	smallCrowd = crowd{Sessions: 50, Intercepts: 150, Workloads: 25, Changes: 30}
	largeCrowd = crowd{Sessions: 1000, Intercepts: 3000, Workloads: 500, Changes: 200}
)

// What is promised of a traffic-manager with the large crowd.
const (
	goalMemory  = 200 // MiB
	goalConnect = time.Second
	goalSeen    = 200 * time.Millisecond
)

// busyBeside is what a change that has nothing to do with doppel takes only if the machine is busy: then nothing can be said about anybody.
const busyBeside = 50 * time.Millisecond

// scaled is the file of the scale's figures.
type scaled struct {
	Commit  string  `json:"commit"`
	Crowd   crowd   `json:"crowd"`
	Connect spread  `json:"connect"` // seconds
	Active  float64 `json:"active"`  // seconds until all intercepts were
	Seen    spread  `json:"seen"`    // seconds from asking the API server for a change to the agent that has it
	Beside  spread  `json:"beside"`  // seconds for a change, beside these, of an object that nobody cares about
	RSS     float64 `json:"rss"`     // MiB of the traffic-manager, with all of them there
	Most    float64 `json:"most"`    // at any time
	Heap    float64 `json:"heap"`    // live
}

// spread is how long something took.
type spread struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

func spreadOf(all []time.Duration) spread {
	s := slices.Sorted(slices.Values(all))
	at := func(q float64) float64 { return s[int(q*float64(len(s)-1))].Seconds() }
	return spread{at(.5), at(.99), at(1)}
}

func (s spread) String() string {
	return fmt.Sprintf("p50 %.0f ms, p99 %.0f ms, longest %.0f ms", s.P50*1000, s.P99*1000, s.Max*1000)
}

// TestScale has many laptops with many intercepts on one traffic-manager. The API server, the manager, their protocols and objects are real; laptops and
// agents are only their ends of the tunnels, without a network of their own; the workloads are pods on nodes that nobody runs.
func TestScale(t *testing.T) {
	dir, n := os.Getenv(envTorture), smallCrowd
	if dir != "" {
		n = largeCrowd
		if s, err := readScale(dir); err != nil || s != nil {
			t.Skipf("%s is there from an earlier run (%v)", scaleFile(dir), err)
		}
	}
	out := scaled{Commit: commit(), Crowd: n}
	w := newScale(t, n)
	memory := w.watchMemory(t)
	out.Connect = w.connect(t)
	t.Logf("%d sessions: connect %v", n.Sessions, out.Connect)
	began := time.Now()
	w.intercept(t)
	out.Active = time.Since(began).Seconds()
	t.Logf("%d intercepts active after %.1f s", n.Intercepts, out.Active)
	quiet := false
	for range tries {
		out.Seen, out.Beside = w.change(t)
		t.Logf("a change is seen by its agent: %v; beside, an object that nobody cares about is changed: %v", out.Seen, out.Beside)
		if quiet = out.Beside.P99 < busyBeside.Seconds(); quiet {
			break
		}
	}
	out.RSS, out.Heap, out.Most = memory()
	t.Logf("the traffic-manager has %.0f MiB, at most %.0f, live heap %.0f", out.RSS, out.Most, out.Heap)
	if out.Most > goalMemory {
		t.Errorf("promised are %d MiB", goalMemory)
	}
	if !quiet {
		t.Logf("the times do not count, the machine was busy")
		return
	}
	if dir == "" { // other tests run beside this one
		return
	}
	if out.Connect.P99 > goalConnect.Seconds() || out.Seen.P99 > goalSeen.Seconds() {
		t.Errorf("promised are connect p99 %v, changes p99 %v", goalConnect, goalSeen)
	}
	if dir != "" {
		if err := writeJSON(scaleFile(dir), out); err != nil {
			t.Fatal(err)
		}
	}
}

func scaleFile(dir string) string { return filepath.Join(dir, "scale.json") }

func readScale(dir string) (*scaled, error) { return readJSON[scaled](scaleFile(dir)) }

// crowdAddr is the address of a workload's pod. All of these addresses lead to the node, where the agents are.
func crowdAddr(i int) string { return fmt.Sprintf("10.250.%d.%d", i/250, i%250+1) }

const (
	crowdNet      = "10.250.0.0/16"
	crowdPort     = 8080
	crowdPerNS    = 50 // workloads
	crowdAtOnce   = 4  // connects
	crowdHeader   = "x-user"
	nodeHeartbeat = 10 * time.Second
)

// scale is a crowd.
type scale struct {
	c     *cluster
	n     crowd
	core  kubernetes.Interface // without a limit of its own
	info  kube.ManagerInfo
	addr  string // of the manager's metrics
	seen  *seenTables
	peers []*peer
}

func newScale(t *testing.T, n crowd) *scale {
	t.Helper()
	c := theCluster(t)
	l := newLaptop(t, "installer")
	l.withManager(t)
	cfg := ok(clientcmd.BuildConfigFromFlags("", c.kubeconfig))(t)
	cfg.QPS = -1
	w := &scale{c: c, n: n, core: ok(kubernetes.NewForConfig(cfg))(t)}
	w.info = ok(ok(kube.Load(kube.Options{}))(t).Manager(t.Context(), managerNS))(t)
	w.addr = ok(c.core.CoreV1().Pods(managerNS).Get(t.Context(), w.info.Pod, metav1.GetOptions{}))(t).Status.PodIP + ":8081"
	c.node(t, "ip", "route", "replace", "local", crowdNet, "dev", "lo")
	t.Cleanup(func() { c.node(t, "ip", "route", "del", "local", crowdNet, "dev", "lo") })
	w.node(t, "nobody")
	w.workloads(t, "nobody")
	return w
}

// node makes a node that nobody runs, and keeps it alive.
func (w *scale) node(t *testing.T, name string) {
	t.Helper()
	ctx := t.Context()
	ok(w.core.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Unschedulable: true}}, metav1.CreateOptions{}))(t)
	leases := w.core.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	t.Cleanup(func() {
		if err := w.core.CoreV1().Nodes().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if err := leases.Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: corev1.NamespaceNodeLease}}
	lease.Spec.HolderIdentity = &name
	beat := func(ctx context.Context) error {
		now := metav1.NowMicro()
		lease.Spec.RenewTime = &now
		l, err := leases.Update(ctx, lease, metav1.UpdateOptions{})
		if err == nil {
			lease = l
		}
		return err
	}
	seconds := int32(40)
	lease.Spec.LeaseDurationSeconds = &seconds
	lease = ok(leases.Create(ctx, lease, metav1.CreateOptions{}))(t)
	if err := beat(ctx); err != nil {
		t.Fatal(err)
	}
	ready := fmt.Sprintf(`{"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":%[1]q,"lastTransitionTime":%[1]q}]}}`, time.Now().UTC().Format(time.RFC3339))
	ok(w.core.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, []byte(ready), metav1.PatchOptions{}, "status"))(t)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(nodeHeartbeat):
			}
			_ = beat(ctx) // the next one is due before the node counts as dead
		}
	}()
}

// each does something for 0 to n-1, so many at once.
func each(t *testing.T, n, atOnce int, do func(context.Context, int) error) {
	t.Helper()
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(atOnce)
	for i := range n {
		g.Go(func() error { return do(ctx, i) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

func crowdNS(workload int) string   { return fmt.Sprint("crowd-", workload/crowdPerNS) }
func crowdName(workload int) string { return fmt.Sprint("web-", workload) }

// workloads makes the pods, each with a service without selector beside it, and starts their agents.
func (w *scale) workloads(t *testing.T, node string) {
	t.Helper()
	for i := 0; i < w.n.Workloads; i += crowdPerNS {
		ns := w.c.namespace(t, crowdNS(i))
		zero := int64(0)
		t.Cleanup(func() { // nobody would end them
			err := w.core.CoreV1().Pods(ns).DeleteCollection(context.Background(), metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{})
			if err != nil {
				t.Error(err)
			}
		})
		eventually(t, 30*time.Second, func() error {
			_, err := w.core.CoreV1().ServiceAccounts(ns).Get(t.Context(), "default", metav1.GetOptions{})
			return err
		})
	}
	service := ok(w.c.core.CoreV1().Services(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{}))(t)
	start := crowdAgents{Manager: service.Spec.ClusterIP + ":8082", Key: w.info.Key, Agents: make([]crowdAgent, w.n.Workloads)}
	each(t, w.n.Workloads, 16, func(ctx context.Context, i int) error {
		ns, name := crowdNS(i), crowdName(i)
		pods := w.core.CoreV1().Pods(ns)
		pod, err := pods.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}, Annotations: map[string]string{agentcfg.AnnotationInject: agentcfg.InjectEnabled}},
			Spec: corev1.PodSpec{
				NodeName: node, Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers: []corev1.Container{{Name: "app", Image: "nothing", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: crowdPort}}}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		if pod.Annotations[agentcfg.Annotation] == "" {
			return fmt.Errorf("pod %s got no agent", name)
		}
		now := metav1.Now()
		pod.Status = corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: crowdAddr(i), PodIPs: []corev1.PodIP{{IP: crowdAddr(i)}}, StartTime: &now,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now}},
		}
		if pod, err = pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
			return err
		}
		_, err = w.core.CoreV1().Services(ns).Create(ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
		}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		token, err := w.core.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authn.TokenRequest{Spec: authn.TokenRequestSpec{
			Audiences: []string{agentcfg.Audience}, BoundObjectRef: &authn.BoundObjectReference{Kind: kinds.Pod, APIVersion: "v1", Name: name, UID: pod.UID},
		}}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		start.Agents[i] = crowdAgent{Pod: name, Namespace: ns, Token: token.Status.Token}
		return nil
	})
	file := filepath.Join(t.TempDir(), "agents.json")
	if err := writeJSON(file, start); err != nil {
		t.Fatal(err)
	}
	w.seen = startSeen(t, w.c, file)
	eventually(t, time.Minute, func() error {
		if n := w.seen.count(); n != w.n.Workloads {
			return fmt.Errorf("%d of %d agents have a table", n, w.n.Workloads)
		}
		return nil
	})
}

// change ends intercepts and makes others, one after the other, while all the rest is there.
func (w *scale) change(t *testing.T) (seen, beside spread) {
	t.Helper()
	var took, others []time.Duration
	maps := w.core.CoreV1().ConfigMaps(crowdNS(0))
	for i := range w.n.Changes {
		k := w.n.Intercepts + rand.IntN(w.n.Workloads)
		pod := crowdNS(k%w.n.Workloads) + "/" + crowdName(k%w.n.Workloads)
		began := time.Now()
		ok(maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "beside"}}, metav1.CreateOptions{}))(t)
		others = append(others, time.Since(began))
		if err := maps.Delete(t.Context(), "beside", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		in, err := w.take(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, w.seen.wait(t, pod, string(in.UID), true).Sub(began))
		began = time.Now()
		if err := w.peers[k%len(w.peers)].cluster.DeleteIntercept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		took = append(took, w.seen.wait(t, pod, string(in.UID), false).Sub(began))
		if i%50 == 49 {
			t.Logf("%d changes: %v", len(took), spreadOf(took))
		}
	}
	return spreadOf(took), spreadOf(others)
}

// watchMemory looks at the manager's memory until its end is called, which says in MiB what is there, what is live, and the most that has been.
func (w *scale) watchMemory(t *testing.T) (end func() (rss, heap, most float64)) {
	t.Helper()
	stop, ended := make(chan struct{}), make(chan struct{})
	var rss, heap, most float64
	go func() {
		defer close(ended)
		for {
			if out, err := w.c.lab("node", "exec", "--", "curl", "-sf", "-m", "5", "http://"+w.addr+"/metrics"); err == nil {
				rss, heap = metric(out, "process_resident_memory_bytes")/mib, metric(out, "go_gc_heap_live_bytes")/mib
				most = max(most, rss)
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return func() (float64, float64, float64) {
		close(stop)
		<-ended
		return rss, heap, most
	}
}

// scalePage is the scale's part of the report.
func scalePage(s *scaled) string {
	if s == nil {
		return ""
	}
	return fmt.Sprintf(`
## A crowd

%d sessions, %d intercepts by request of %d workloads, each with an agent, on one traffic-manager. API server, traffic-manager, protocols and objects are real; laptops and agents are their ends of
the tunnels alone, and the workloads are pods on a node that nobody runs. Connects are %d at a time; then, with all of it there, %d intercepts are made and ended one after the other.
All of it shares the machine's processors. A connect amid 5,000 namespaces and 10,000 services is in [performance.md](performance.md#a-large-cluster).

| | promised | measured |
|---|---|---|
| connect, p99 | ≤ %.0f ms | %v |
| a change of an intercept, from asking the API server to the agent that has it, p99 | ≤ %.0f ms | %v |
| beside it, a change of a ConfigMap, from asking the API server to its answer | | %v |
| memory of the traffic-manager | ≤ %d MiB | %.0f MiB, at most %.0f; live heap %.0f |
| all intercepts active | | %.0f s after the first was asked for |
`, s.Crowd.Sessions, s.Crowd.Intercepts, s.Crowd.Workloads, crowdAtOnce, s.Crowd.Changes, goalConnect.Seconds()*1000, s.Connect, goalSeen.Seconds()*1000, s.Seen, s.Beside, goalMemory, s.RSS, s.Most, s.Heap, s.Active)
}
