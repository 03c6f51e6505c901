package e2e

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/localapi"
)

// How long the soak lasts: in make test, in make torture; and how long what is held may take to be given back afterwards. An idle UDP conversation ends after
// two minutes, an idle connection to the API server after a minute and a half, and a Go program that does nothing collects its garbage every two minutes.
const (
	soakShort  = time.Minute
	soakLong   = 20 * time.Minute
	soakSettle = 150 * time.Second
)

// holding is how much of something a part holds.
type holding struct {
	Part   string  `json:"part"`
	What   string  `json:"what"`
	Before float64 `json:"before"`
	Most   float64 `json:"most"` // at the end of a cycle
	After  float64 `json:"after"`
	May    float64 `json:"may"` // be more after than before
}

// soaked is the file of the soak.
type soaked struct {
	Commit  string    `json:"commit"`
	Seconds float64   `json:"seconds"`
	Cycles  int       `json:"cycles"`
	Settled float64   `json:"settled"` // seconds until all was given back
	Held    []holding `json:"held"`
}

// held are the things that are looked at, and the tolerances: a leak of one goroutine or descriptor a cycle is more in a minute. A Go program's memory in the
// kernel's eyes (RSS) follows its heap with a delay, and is rounded up by what it has not given back; what is live after a collection tells more.
var held = []holding{
	{Part: "user daemon", What: "goroutines", May: 4},
	{Part: "user daemon", What: "descriptors", May: 3},
	{Part: "user daemon", What: "RSS, MiB", May: 6},
	{Part: "root daemon", What: "descriptors", May: 2},
	{Part: "root daemon", What: "RSS, MiB", May: 4},
	{Part: "traffic-manager", What: "goroutines", May: 6},
	{Part: "traffic-manager", What: "descriptors", May: 4},
	{Part: "traffic-manager", What: "live heap, MiB", May: 4},
	{Part: "traffic-manager", What: "RSS, MiB", May: 16},
	{Part: "traffic-agent", What: "goroutines", May: 4},
	{Part: "traffic-agent", What: "descriptors", May: 3},
	{Part: "traffic-agent", What: "live heap, MiB", May: 2},
	{Part: "traffic-agent", What: "RSS, MiB", May: 6},
}

// TestSoak connects and quits, intercepts and leaves, mounts, looks names up and makes connections both ways, again and again: what is held is given back.
func TestSoak(t *testing.T) {
	dir := os.Getenv(envTorture)
	length := soakShort
	if dir != "" {
		length = soakLong
		if s, err := readSoak(dir); err != nil || s != nil {
			t.Skipf("%s is there from an earlier run (%v)", soakFile(dir), err)
		}
	}
	w := newSoak(t)
	for range 3 { // what is made once is there then
		w.cycle(t)
	}
	at := w.settled(t)
	out := soaked{Commit: commit(), Held: make([]holding, len(held))}
	for i, h := range held {
		h.Before = at[i]
		out.Held[i] = h
	}
	began := time.Now()
	for time.Since(began) < length {
		w.cycle(t)
		out.Cycles++
		for i, v := range w.look(t) {
			out.Held[i].Most = max(out.Held[i].Most, v)
		}
	}
	out.Seconds = time.Since(began).Seconds()
	over := time.Now()
	eventually(t, soakSettle, func() error {
		var more []string
		for i, v := range w.look(t) {
			h := &out.Held[i]
			if h.After = v; v > h.Before+h.May {
				more = append(more, fmt.Sprintf("%s has %.1f %s, and had %.1f", h.Part, v, h.What, h.Before))
			}
		}
		if len(more) > 0 {
			return fmt.Errorf("after %d cycles: %s", out.Cycles, strings.Join(more, "; "))
		}
		return nil
	})
	out.Settled = time.Since(over).Seconds()
	for _, h := range out.Held {
		t.Logf("%-16s %-15s before %7.1f, most %7.1f, after %7.1f", h.Part, h.What, h.Before, h.Most, h.After)
	}
	t.Logf("%d cycles in %.0f s, settled %.0f s later", out.Cycles, out.Seconds, out.Settled)
	if dir != "" {
		if err := writeJSON(soakFile(dir), out); err != nil {
			t.Fatal(err)
		}
	}
	w.l.run(t, "doppel", "quit", "-s")
}

func soakFile(dir string) string { return filepath.Join(dir, "soak.json") }

func readSoak(dir string) (*soaked, error) { return readJSON[soaked](soakFile(dir)) }

// soak is a laptop that comes and goes.
type soak struct {
	c       *cluster
	l       *laptop
	ns      string
	web     string // the service's address
	manager string // where metrics are
	agent   string
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	c := theCluster(t)
	w := &soak{c: c, ns: c.namespace(t, "soak"), l: newLaptop(t, "commuter")}
	w.l.withManager(t)
	bin := c.probe(t)
	c.workload(t, w.ns, taken{
		name: "web", kind: "Deployment", run: []string{"web", "app", ":7000", ":7001"},
		change: func(o any) {
			o.(*appsv1.Deployment).Spec.Template.Annotations = map[string]string{agentcfg.AnnotationInject: "enabled"}
		},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromInt32(7000)}, {Name: "grpc", Port: 81, TargetPort: intstr.FromInt32(7001)},
		}},
	})
	c.available(t, w.ns, "web")
	w.web = c.clusterIP(t, w.ns, "web")
	w.l.start(t, bin, "web", taker, "127.0.0.1:3000", "127.0.0.1:3001")
	manager := ok(c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"}))(t).Items[0]
	w.manager = manager.Status.PodIP + ":8081"
	pod := c.podOf(t, w.ns, "web")
	cfg := ok(agentcfg.Parse(pod.Annotations[agentcfg.Annotation]))(t)
	w.agent = fmt.Sprintf("%s:%d", pod.Status.PodIP, cfg.HealthPort)
	return w
}

// whoHeader is where the probe says its name.
const whoHeader = "x-name"

// cycle does a bit of all that a laptop does, and ends it.
func (w *soak) cycle(t *testing.T) {
	t.Helper()
	w.l.run(t, "doppel", "connect", "-n", w.ns)
	name := "web." + w.ns
	w.l.sh(t, "set -e; for i in 1 2 3 4 5 6 7 8; do curl -sf -m 5 -o /dev/null "+name+"/; done; for i in 1 2 3 4 5 6 7 8; do curl -sf -m 5 -o /dev/null "+w.web+"/ & done; wait; "+
		"dig +short "+name+".svc.cluster.local >/dev/null; dig no-such-name."+w.ns+".svc.cluster.local >/dev/null; dig +tcp +short "+name+".svc.cluster.local >/dev/null; dig outside.test >/dev/null; "+
		"dig @10.96.0.10 +short "+name+".svc.cluster.local >/dev/null") // the last is a UDP flow of its own
	ask := func(who string) {
		t.Helper()
		if got := strings.TrimSpace(w.c.node(t, "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do curl -s -m 5 -o /dev/null -w '%header{"+whoHeader+"}\\n' -H 'x-user: "+taker+"' "+w.web+"/; done | sort -u")); got != who {
			t.Fatalf("%q answers, not %q", got, who)
		}
	}
	want(t, w.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--http-match=x-user="+taker, "--", "sh", "-c", "ls -R $DOPPEL_ROOT"), "namespace")
	want(t, w.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--http-match=x-user="+taker), "ACTIVE")
	ask(taker)
	w.l.run(t, "doppel", "leave", "web")
	w.l.run(t, "doppel", "quit")
	ask("app")
}

// settled is what is held when that has not changed by more than half of what is tolerated for a while: the looks themselves take a few KiB until the next
// collection. What still falls would hide a leak of as much; what still rises makes for a stricter comparison.
func (w *soak) settled(t *testing.T) []float64 {
	t.Helper()
	last := w.look(t)
	eventually(t, soakSettle, func() error {
		time.Sleep(5 * time.Second) // between looks at what ends by itself
		now := w.look(t)
		for i, v := range now {
			if h := held[i]; math.Abs(v-last[i]) > h.May/2 {
				err := fmt.Errorf("%s: %s go from %.2f to %.2f", h.Part, h.What, last[i], v)
				last = now
				return err
			}
		}
		last = now
		return nil
	})
	return last
}

var daemonRSS = regexp.MustCompile(`VmRSS:\s+(\d+) kB\nfds (\d+)`)

// look is what is held at the moment, in the order of held.
func (w *soak) look(t *testing.T) []float64 {
	t.Helper()
	process := func(run func(...string) string, pattern string) (fds, mib float64) {
		t.Helper()
		out := run("sh", "-c", "p=$(pgrep -f '"+pattern+"'); grep VmRSS /proc/$p/status; echo fds $(ls /proc/$p/fd | wc -l)")
		m := daemonRSS.FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("%s: %s", pattern, out)
		}
		return ok(strconv.ParseFloat(m[2], 64))(t), ok(strconv.ParseFloat(m[1], 64))(t) / 1024
	}
	onLaptop := func(args ...string) string { return w.l.run(t, args...) }
	onNode := func(args ...string) string { return w.c.node(t, args...) }
	metrics := func(addr string) func(string) float64 {
		text := w.c.node(t, "curl", "-sf", "-m", "5", "http://"+addr+"/metrics")
		return func(name string) float64 {
			v := metric(text, name)
			if v < 0 {
				t.Fatalf("no %s at %s", name, addr)
			}
			return v
		}
	}
	var answer struct{ Result localapi.Stacks }
	text := w.l.sh(t, `curl -sf --unix-socket $XDG_RUNTIME_DIR/doppel/daemon.sock -d '{"collect":true}' http://doppel/v1/`+localapi.MethodStacks)
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	userFDs, userRSS := process(onLaptop, userDaemon)
	rootFDs, rootRSS := process(onLaptop, rootDaemon)
	agentFDs, agentRSS := process(onNode, "^[^ ]*traffic-agent")
	m, a := metrics(w.manager), metrics(w.agent)
	return []float64{
		float64(answer.Result.Goroutines), userFDs, userRSS,
		rootFDs, rootRSS,
		m("go_goroutines"), m("process_open_fds"), m("go_gc_heap_live_bytes") / mib, m("process_resident_memory_bytes") / mib,
		a("go_goroutines"), agentFDs, a("go_gc_heap_live_bytes") / mib, agentRSS,
	}
}

const mib = 1 << 20

// metric is a value in the text format of Prometheus, or -1.
func metric(text, name string) float64 {
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(line, name+" "); found {
			if v, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
				return v
			}
		}
	}
	return -1
}

// soakPage is the soak's part of the report.
func soakPage(s *soaked) string {
	if s == nil {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, `
## A day, shortened

A laptop connects, asks services by name and address, looks names up by UDP and TCP, intercepts with a command that reads the mounted files, intercepts again, is asked from the cluster, leaves and quits:
%d times in %.0f minutes, with daemons, traffic-manager and agent that go on. *Before* is after three such cycles, when nothing changes any more; *most* is the most of any end of a cycle; *after* is
%.0f s after the last one. The user daemon collects its garbage before each look. *May* is the tolerance: how much more *after* may be than *before*.

| part | what | before | most | after | may |
|---|---|---|---|---|---|
`, s.Cycles, s.Seconds/60, s.Settled)
	for _, h := range s.Held {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | +%s |\n", h.Part, h.What, short(h.Before), short(h.Most), short(h.After), short(h.May))
	}
	return b.String()
}

func short(v float64) string { return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") }

func writeJSON(file string, v any) error {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// readJSON is nil if there is no such file.
func readJSON[T any](file string) (*T, error) {
	b, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return nil, nil
	}
	v := new(T)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	return v, err
}
