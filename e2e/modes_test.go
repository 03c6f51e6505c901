package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// modes is the world of TestModes: two laptops, and a workload with several ports.
type modes struct {
	c          *cluster
	ns         string
	bin        string // the probe
	lou, mary  *laptop
	clusterIPs map[string]string // by service
}

// TestModes is what can be wanted of a workload besides one port's traffic.
func TestModes(t *testing.T) {
	c := theCluster(t)
	m := &modes{c: c, ns: c.namespace(t, "modes"), bin: c.probe(t), lou: newLaptop(t, "lou"), mary: newLaptop(t, "mary"), clusterIPs: map[string]string{}}
	m.lou.withManager(t)
	c.workload(t, m.ns, taken{
		name: "several", kind: "Deployment", count: 2, listen: []string{"tcp://:7000", "tcp://:7001", "udp://:7001"},
		ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 7000}, {Name: "rpc", ContainerPort: 7001}, {Name: "dns", ContainerPort: 7001, Protocol: corev1.ProtocolUDP}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromString("http")},
			{Name: "rpc", Port: 81, TargetPort: intstr.FromInt32(7001)},
			{Name: "dns", Port: 81, Protocol: corev1.ProtocolUDP, TargetPort: intstr.FromString("dns")},
		}},
	})
	m.lou.run(t, "doppel", "connect", "-n", m.ns)
	m.mary.run(t, "doppel", "connect", "-n", m.ns)
	t.Run("Ports", m.ports)
	t.Run("Names", m.names)
	t.Run("Wiretap", m.wiretap)
	t.Run("Replace", m.replace)
}

// who says who answers at a port of a service: "tcp/80".
func (m *modes) who(t *testing.T, service, port string) string {
	t.Helper()
	if m.clusterIPs[service] == "" {
		host, _, err := net.SplitHostPort(m.c.clusterIP(t, m.ns, service))
		if err != nil {
			t.Fatal(err)
		}
		m.clusterIPs[service] = host
	}
	network, n, _ := strings.Cut(port, "/")
	out, err := m.c.lab("node", "exec", "--", m.bin, "who", network, net.JoinHostPort(m.clusterIPs[service], n))
	if err != nil {
		return err.Error() + " " + out
	}
	return strings.TrimSpace(out)
}

// all checks who answers at each port of service several.
func (m *modes) all(t *testing.T, http, rpc, dns string) error {
	t.Helper()
	for range 2 { // some of its pods each time
		got := [3]string{m.who(t, "several", "tcp/80"), m.who(t, "several", "tcp/81"), m.who(t, "several", "udp/81")}
		if got != [3]string{http, rpc, dns} {
			return fmt.Errorf("the ports are answered by %q", got)
		}
	}
	return nil
}

// ports has several ports of a workload come to several places, by one command or one object.
func (m *modes) ports(t *testing.T) {
	m.lou.start(t, m.bin, "name", "lou-http", "tcp://127.0.0.1:7100")
	m.lou.start(t, m.bin, "name", "lou-rpc", "tcp://127.0.0.1:7101")
	m.lou.start(t, m.bin, "name", "lou-dns", "udp://127.0.0.1:7101")
	eventually(t, 30*time.Second, func() error { return m.all(t, "several", "several", "several") })

	out := m.lou.run(t, "doppel", "intercept", "several", "-p", "7101:dns/udp", "-p", "7100:http", "-p", "7101:rpc")
	want(t, out, "ACTIVE", "Ports          : 7001/udp to 127.0.0.1:7101\n                    7000/tcp to 127.0.0.1:7100\n                    7001/tcp to 127.0.0.1:7101\n", "all TCP connections and UDP datagrams")
	if err := m.all(t, "lou-http", "lou-rpc", "lou-dns"); err != nil {
		t.Error("when ACTIVE was said: ", err)
	}
	want(t, m.lou.run(t, "doppel", "status"), "several: ACTIVE, ports 7001/udp to 127.0.0.1:7101, 7000/tcp to 127.0.0.1:7100, 7001/tcp to 127.0.0.1:7101")

	// One that is held is enough to refuse all.
	r := m.mary.try(t, "doppel", "intercept", "hers", "-w", "several", "-p", "7100:rpc")
	want(t, r.stderr, "port 7001 of several is intercepted by admin (intercept several since")
	m.lou.run(t, "doppel", "leave", "several")
	m.mary.run(t, "doppel", "intercept", "hers", "-w", "several", "-p", "7100:rpc")
	r = m.lou.try(t, "doppel", "intercept", "several", "-p", "7100:http", "-p", "7101:rpc")
	want(t, r.stderr, "port 7001 of several is intercepted by admin (intercept hers since")
	if err := m.all(t, "several", "several", "several"); err != nil { // nobody listens on mary's laptop
		t.Error(err)
	}
	m.mary.run(t, "doppel", "leave", "hers")
	r = m.lou.try(t, "doppel", "intercept", "several", "-p", "7100:http", "-p", "7101:dns", "--http-method=GET")
	want(t, r.stderr, "port 7001 of several is a UDP port: HTTP requests come over TCP")

	// The same as an object, which a second session takes too.
	object := fmt.Appendf(nil, `{"apiVersion": "doppel.dev/v1alpha1", "kind": "Intercept", "metadata": {"name": "declared", "namespace": %q}, "spec": {
		"user": "admin", "name": "declared", "workload": {"kind": "Deployment", "name": "several"},
		"ports": [{"port": "http", "target": "127.0.0.1:7100"}, {"port": "dns", "target": "127.0.0.1:7101"}]}}`, m.ns)
	path := "/apis/doppel.dev/v1alpha1/namespaces/" + m.ns + "/intercepts/declared"
	if err := m.c.core.Discovery().RESTClient().Patch(types.ApplyPatchType).AbsPath(path).Param("fieldManager", "kubectl").Body(object).Do(t.Context()).Error(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m.lou.run(t, "doppel", "quit")
		m.lou.run(t, "doppel", "connect", "-n", m.ns, "--accept-intercepts")
		eventually(t, 10*time.Second, func() error { return m.all(t, "lou-http", "several", "lou-dns") })
	}
	var list struct {
		Workloads []struct {
			Intercepts []struct {
				Ports []struct {
					Port             int
					Protocol, Target string
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(m.lou.run(t, "doppel", "list", "-i", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	if p := list.Workloads[0].Intercepts[0].Ports; len(p) != 2 || p[0].Port != 7000 || p[1].Port != 7001 || p[1].Protocol != "UDP" || p[1].Target != "127.0.0.1:7101" {
		t.Errorf("list says %+v", p)
	}
	m.lou.run(t, "doppel", "leave", "declared")
	eventually(t, 5*time.Second, func() error { return m.all(t, "several", "several", "several") })
	m.lou.run(t, "doppel", "quit")
	m.lou.run(t, "doppel", "connect", "-n", m.ns)
}

// names has the laptop know the names that a pod has of its own, for as long as it is intercepted.
func (m *modes) names(t *testing.T) {
	m.c.workload(t, m.ns, taken{
		name: "aliases", kind: "Deployment", count: 1, ports: []corev1.ContainerPort{{Name: "probe", ContainerPort: 7000}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("probe")}}},
		change: func(o any) {
			spec := &o.(*appsv1.Deployment).Spec.Template.Spec
			spec.HostAliases = []corev1.HostAlias{{IP: "192.0.2.7", Hostnames: []string{"legacy.example", "old"}}}
			spec.DNSPolicy, spec.DNSConfig = corev1.DNSNone, &corev1.PodDNSConfig{Nameservers: []string{"10.96.0.10"}}
		},
	})
	resolve := func(name, address string) {
		t.Helper()
		if out := m.lou.sh(t, "dig +short +time=3 +tries=1 "+name); strings.TrimSpace(out) != address {
			t.Errorf("%s is %q, want %q", name, strings.TrimSpace(out), address)
		}
	}
	host, _, err := net.SplitHostPort(m.c.clusterIP(t, m.ns, "aliases"))
	if err != nil {
		t.Fatal(err)
	}
	service := "aliases." + m.ns + ".svc.cluster.local"
	resolve(service, host)
	m.lou.run(t, "doppel", "intercept", "aliases", "-p", "7100")
	resolve("legacy.example", "192.0.2.7")
	resolve(service, host) // by the agent now, whose pod's resolver is the cluster's as well
	m.lou.run(t, "doppel", "leave", "aliases")
	resolve(service, host)
	if out := m.lou.sh(t, "dig +short +time=3 +tries=1 legacy.example || true"); strings.Contains(out, "192.0.2.7") {
		t.Errorf("after leave legacy.example is %q", out)
	}
}

// recorder keeps what comes to addresses of a laptop in a file.
type recorder struct {
	l    *laptop
	file string
	stop func()
}

func (m *modes) record(t *testing.T, l *laptop, addrs ...string) *recorder {
	t.Helper()
	r := &recorder{l: l, file: filepath.Join(t.TempDir(), "record")}
	r.stop = l.start(t, "sh", "-c", "echo $$ > "+r.file+".pid; exec "+m.bin+" record "+strings.Join(addrs, " ")+" > "+r.file)
	return r
}

// has waits until the record has each of the parts.
func (r *recorder) has(t *testing.T, parts ...string) {
	t.Helper()
	eventually(t, 5*time.Second, func() error {
		b, err := os.ReadFile(r.file)
		for _, p := range parts {
			if err == nil && !strings.Contains(string(b), p) {
				err = fmt.Errorf("%q was not copied:\n%.2000s", p, b)
			}
		}
		return err
	})
}

func (r *recorder) text(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(r.file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wiretap has two people copy what others answer.
func (m *modes) wiretap(t *testing.T) {
	m.c.workload(t, m.ns, taken{
		name: "tapped", kind: "StatefulSet", count: 2, run: []string{"web", "app", ":7000", ":7001"}, ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 7000}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("http")}}},
	})
	all, some := m.record(t, m.lou, "tcp://127.0.0.1:7200", "udp://127.0.0.1:7202"), m.record(t, m.mary, "tcp://127.0.0.1:7201")
	m.mary.start(t, m.bin, "web", "may", "127.0.0.1:7300", "127.0.0.1:7301")

	out := m.lou.run(t, "doppel", "wiretap", "tapped", "-p", "7200")
	want(t, out, "Using StatefulSet tapped", "ACTIVE", "Wiretapping    : all TCP connections")
	want(t, m.mary.run(t, "doppel", "list"), "tapped : wiretapped")
	m.mary.run(t, "doppel", "wiretap", "some", "-w", "tapped", "-p", "7201", "--http-header=x-user=lou")
	m.mary.run(t, "doppel", "intercept", "hers", "-w", "tapped", "-p", "7300", "--http-header=x-user=may")

	dial := m.c.dialer(t)
	addr := m.c.clusterIP(t, m.ns, "tapped")
	ask := func(c net.Conn, path, user, body string) string {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: %d\r\n\r\n%s", path, user, len(body), body); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		return resp.Header.Get("X-Name")
	}
	c, err := dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, q := range []struct{ path, user, from string }{{"/1", "lou", "app"}, {"/2", "may", "may"}, {"/3", "", "app"}, {"/4", "lou", "app"}} {
		if got := ask(c, q.path, q.user, "body of "+q.path); got != q.from {
			t.Errorf("%s was answered by %q", q.path, got)
		}
	}
	all.has(t, "POST /1 ", "body of /1", "POST /2 ", "POST /3 ", "body of /4")
	some.has(t, "POST /1 ", "body of /1", "POST /4 ", "body of /4")
	if s := some.text(t); strings.Contains(s, "/2") || strings.Contains(s, "/3") || strings.Contains(s, "EOF") {
		t.Errorf("what was not meant was copied:\n%s", s)
	}
	_ = c.Close()
	all.has(t, "EOF")
	some.has(t, "EOF")

	// A process that does not read, or is gone, is not noticed by clients.
	m.lou.sh(t, "kill -STOP $(cat "+all.file+".pid)")
	big := strings.Repeat("b", 8<<20)
	began := time.Now()
	for range 3 {
		c, err := dial(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := ask(c, "/big", "nobody", big); got != "app" {
			t.Errorf("answered by %q", got)
		}
		_ = c.Close()
	}
	t.Logf("three uploads of %d MiB beside a stopped wiretap took %s", len(big)>>20, time.Since(began))
	m.lou.sh(t, "kill -CONT $(cat "+all.file+".pid)")
	all.stop()
	c, err = dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := ask(c, "/gone", "lou", ""); got != "app" {
		t.Errorf("answered by %q", got)
	}
	some.has(t, "POST /gone ")
	m.lou.run(t, "doppel", "leave", "tapped")
	m.mary.run(t, "doppel", "leave", "some")
	m.mary.run(t, "doppel", "leave", "hers")

	udp := m.record(t, m.lou, "udp://127.0.0.1:7202")
	m.lou.run(t, "doppel", "wiretap", "several", "-p", "7202:dns/udp")
	eventually(t, 5*time.Second, func() error { return m.all(t, "several", "several", "several") })
	udp.has(t, `udp "?"`)
	m.lou.run(t, "doppel", "leave", "several")
}

// asker asks a port all the time, as clients do that should notice nothing.
type asker struct {
	t    *testing.T
	stop context.CancelFunc
	done chan struct{}

	answers map[string]int
	failed  []string
}

func (m *modes) ask(t *testing.T, addr string) *asker {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	a := &asker{t: t, stop: cancel, done: make(chan struct{}), answers: map[string]int{}}
	dial := m.c.dialer(t)
	go func() {
		defer close(a.done)
		for ctx.Err() == nil {
			began := time.Now()
			c, err := dial(ctx, "tcp", addr)
			var b []byte
			if err == nil {
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				b, err = io.ReadAll(c)
				_ = c.Close()
			}
			switch {
			case ctx.Err() != nil:
			case err != nil:
				a.failed = append(a.failed, fmt.Sprintf("%s after %s: %v", began.Format(time.StampMilli), time.Since(began).Round(time.Millisecond), err))
			default:
				a.answers[string(b)]++
			}
			time.Sleep(5 * time.Millisecond) // a client's pace
		}
	}()
	return a
}

// end wants that each question was answered by one of those.
func (a *asker) end(when string, by ...string) {
	a.t.Helper()
	a.stop()
	<-a.done
	if len(a.failed) > 0 {
		a.t.Errorf("%s %d questions failed: %q", when, len(a.failed), a.failed[:min(len(a.failed), 5)])
	}
	for name, n := range a.answers {
		a.t.Logf("%s %d answers came from %s", when, n, name)
		if !slices.Contains(by, name) {
			a.t.Errorf("%s %d answers came from %q", when, n, name)
		}
	}
}

// specs are the specifications of a workload's pods, each once, without what is another in each pod.
func (m *modes) specs(t *testing.T, name string) []string {
	t.Helper()
	pods, err := m.c.core.CoreV1().Pods(m.ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + name})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil {
			continue
		}
		delete(p.Annotations, "kubectl.kubernetes.io/restartedAt")
		for _, l := range []string{"pod-template-hash", "controller-revision-hash", "statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index"} {
			delete(p.Labels, l)
		}
		p.Spec.Hostname = ""
		if len(p.Annotations) == 0 {
			p.Annotations = nil
		}
		b, err := json.MarshalIndent([]any{p.Labels, p.Annotations, p.Spec}, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, regexp.MustCompile("kube-api-access-[a-z0-9]{5}").ReplaceAllString(string(b), "kube-api-access"))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// stoodIn counts the pods of a workload in which a stand-in is, or was and still runs.
func (m *modes) stoodIn(t *testing.T, name string) int {
	t.Helper()
	pods, err := m.c.core.CoreV1().Pods(m.ns).List(t.Context(), metav1.ListOptions{LabelSelector: "doppel.dev/stand-in,app=" + name})
	if err != nil {
		t.Fatal(err)
	}
	return len(pods.Items)
}

// replace puts a laptop in the place of a container, which does not run meanwhile and comes back as it was.
func (m *modes) replace(t *testing.T) {
	m.c.workload(t, m.ns, taken{
		name: "worker", kind: "Deployment", count: 2, listen: []string{"tcp://:7000", "tcp://:7001"}, ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 7000}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}, {Name: "rpc", Port: 81, TargetPort: intstr.FromInt32(7001)}}},
		change: func(o any) {
			spec := &o.(*appsv1.Deployment).Spec.Template.Spec
			spec.Containers[0].ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString("http")}}, PeriodSeconds: 1}
			// What ends waits until clients know of it, as anything should that is restarted without loss.
			spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 3}}}
			grace := int64(10)
			spec.TerminationGracePeriodSeconds = &grace
			beside := *spec.Containers[0].DeepCopy()
			beside.Name, beside.Ports, beside.ReadinessProbe, beside.Args = "beside", nil, nil, []string{"name", "beside", "tcp://:7500"}
			spec.Containers = append(spec.Containers, beside)
		},
	})
	stop := m.lou.start(t, m.bin, "name", "lou", "tcp://127.0.0.1:7100", "tcp://127.0.0.1:7001")
	eventually(t, time.Minute, func() error {
		if got := m.who(t, "worker", "tcp/80") + m.who(t, "worker", "tcp/81"); got != "workerworker" {
			return errors.New(got)
		}
		return nil
	})
	m.c.available(t, m.ns, "worker")
	before := m.specs(t, "worker")
	addr := net.JoinHostPort(m.clusterIPs["worker"], "80")

	a := m.ask(t, addr)
	out := m.lou.run(t, "doppel", "replace", "worker", "-p", "7100:http", "--container=app")
	want(t, out, "Using Deployment worker", "ACTIVE", "7000/tcp to 127.0.0.1:7100\n", "7001/tcp to 127.0.0.1:7001\n", "Replacing      : container app", "The app does not run until you end this with: doppel leave worker")
	for range 4 {
		if got := m.who(t, "worker", "tcp/80") + m.who(t, "worker", "tcp/81"); got != "loulou" {
			t.Errorf("when ACTIVE was said: %s", got)
		}
	}
	a.end("while the container was replaced", "worker", "lou")
	for _, spec := range m.specs(t, "worker") {
		if strings.Count(spec, `"stand-in"`) != 1 || !strings.Contains(spec, `"beside"`) || strings.Count(spec, `"worker"`) != 1 { // its label
			t.Errorf("a pod is\n%s", spec)
		}
	}
	want(t, m.lou.run(t, "doppel", "list"), "worker : replaced")
	r := m.mary.try(t, "doppel", "intercept", "hers", "-w", "worker", "-p", "7300:http", "--http-method=GET")
	want(t, r.stderr, "port 7000 of worker is replaced by admin (intercept worker since")
	r = m.mary.try(t, "doppel", "replace", "hers", "-w", "worker", "--container=app")
	want(t, r.stderr, "container app of worker is replaced by admin (intercept worker since")

	// Nothing can answer instead.
	stop()
	if got := m.who(t, "worker", "tcp/80"); !strings.Contains(got, "reset") && !strings.Contains(got, "refused") {
		t.Errorf("without the local process: %s", got)
	}
	m.lou.start(t, m.bin, "name", "lou", "tcp://127.0.0.1:7100", "tcp://127.0.0.1:7001")
	eventually(t, 5*time.Second, func() error {
		if got := m.who(t, "worker", "tcp/80"); got != "lou" {
			return errors.New(got)
		}
		return nil
	})

	a = m.ask(t, addr)
	m.lou.run(t, "doppel", "leave", "worker")
	for range 4 {
		if got := m.who(t, "worker", "tcp/80") + m.who(t, "worker", "tcp/81"); got != "workerworker" {
			t.Errorf("after leave: %s", got)
		}
	}
	a.end("while the container came back", "lou", "worker")
	if after := m.specs(t, "worker"); !slices.Equal(after, before) {
		t.Errorf("the pods came back as\n%s\nand were\n%s", after, before)
	}

	// What ends while there is no manager is noticed by the next one.
	m.lou.start(t, m.bin, "web", "lou", "127.0.0.1:7000", "127.0.0.1:7400")
	want(t, m.lou.run(t, "doppel", "replace", "tapped"), "Using StatefulSet tapped", "ACTIVE", "Container port : 7000")
	m.c.scaleManager(t, 0)
	path := "/apis/doppel.dev/v1alpha1/namespaces/" + m.ns + "/intercepts"
	if err := m.c.core.Discovery().RESTClient().Delete().AbsPath(path).Do(t.Context()).Error(); err != nil {
		t.Fatal(err)
	}
	m.c.scaleManager(t, 1)
	eventually(t, time.Minute, func() error {
		if n := m.stoodIn(t, "tapped"); n > 0 {
			return fmt.Errorf("%d stand-ins", n)
		}
		return nil
	})
	eventually(t, 30*time.Second, func() error {
		for _, spec := range m.specs(t, "tapped") {
			if strings.Contains(spec, "traffic-agent") {
				return errors.New("an agent is left in a pod that nobody intercepts")
			}
		}
		return nil
	})
}
