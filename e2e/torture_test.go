package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// Environment of make torture; without envTorture the short form runs.
const (
	envTorture       = "DOPPEL_TORTURE"        // the directory of results: each fault has a file, to which rounds are added until it has all
	envTortureOnly   = "DOPPEL_TORTURE_ONLY"   // faults whose names contain this
	envTortureRounds = "DOPPEL_TORTURE_ROUNDS" // at most so many rounds of each
	envTortureWithin = "DOPPEL_TORTURE_WITHIN" // no round begins later
	envTortureRate   = "DOPPEL_TORTURE_RATE"   // requests a second; without it fullRate, and shortRate in the short form
	envTortureSeed   = "DOPPEL_TORTURE_SEED"   // of the random moments
)

// quiet is how long all has to be well before it counts as normal: longer than a caller waits, so that no answer is outstanding of what was not.
const quiet = patience + 200*time.Millisecond

// shortRate is for the short form: it is to find faults, beside which others may be looked for on the same machine.
const shortRate = 125

// tries is how many rounds of a fault may not count since the machine was busy, beyond as many as count.
const tries = 3

// normalLimit bounds how long it may take until all is well after a fault is over.
const normalLimit = time.Minute

// torture is mixed traffic to workloads of which a laptop takes a part.
type torture struct {
	c      *cluster
	l      *laptop
	ns     string
	load   *load
	rand   *rand.Rand
	commit string
	struck time.Time // when what a fault breaks was broken, if it stays so for a while

	managers int       // replicas of the manager
	calm     bool      // all was well at the end of the last round, and nothing was changed since
	ending   []*ending // sessions that the cluster is about to end

	keys map[string][]byte // of the manager, while it has others

	relay   *relay
	person  *browser // of a member of its team
	preview string   // the link to what the laptop serves

	idle, connected picture // of the laptop: with the daemons alone; connected, with all intercepts
	cluster         picture // with all intercepts
}

func newTorture(t *testing.T, seed uint64, rate int) *torture {
	t.Helper()
	c := theCluster(t)
	w := &torture{c: c, ns: c.namespace(t, fmt.Sprint("torture-", seed%10000)), rand: rand.New(rand.NewPCG(seed, 0)), commit: commit(), managers: 1}
	w.l = newLaptop(t, "victim")
	w.l.withManager(t)
	// What requests no CPU gets next to none while the machine is busy with something else, and would have its callers wait for seconds.
	w.l.run(t, "doppel", "helm", "upgrade", "--set", "agent.resources.requests.cpu=200m,agent.resources.limits.memory=64Mi")
	t.Cleanup(func() { w.l.run(t, "doppel", "helm", "upgrade", "--reset-values") })
	bin := c.probe(t)
	requests := func(o any) {
		if nodes() > 1 { // where the callers are, or a node that is cut off would be missed by whoever calls an app on it
			o.(*appsv1.Deployment).Spec.Template.Spec.NodeSelector = map[string]string{corev1.LabelHostname: c.nodeName(1)}
		}
		o.(*appsv1.Deployment).Spec.Template.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m")}
	}
	// Agents are there from the start: what is not taken goes through them, too, which is what its callers would suffer from.
	injected := func(o any) {
		requests(o)
		o.(*appsv1.Deployment).Spec.Template.Annotations = map[string]string{agentcfg.AnnotationInject: "enabled"}
	}
	port := func(name string, p int32, proto corev1.Protocol, target int32) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Port: p, Protocol: proto, TargetPort: intstr.FromInt32(target)}
	}
	c.workload(t, w.ns, taken{
		name: "web", kind: "Deployment", run: []string{"web", "app", ":7000", ":7001"}, count: 2, change: injected,
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{port("http", 80, corev1.ProtocolTCP, 7000), port("grpc", 81, corev1.ProtocolTCP, 7001)}},
	})
	c.workload(t, w.ns, taken{
		name: "raw", kind: "Deployment", count: 2, change: injected, run: []string{"name", "app", "tcp://:7000", "udp://:7000", "tcp://:7001", "udp://:7001", "tcp://:7002"},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{
			port("tcp", 80, corev1.ProtocolTCP, 7000), port("udp", 80, corev1.ProtocolUDP, 7000),
			port("tcp-other", 81, corev1.ProtocolTCP, 7001), port("udp-other", 81, corev1.ProtocolUDP, 7001),
			port("tcp-spare", 82, corev1.ProtocolTCP, 7002), // for intercepts whose beginning is disturbed
		}},
	})
	c.workload(t, w.ns, taken{
		name: "plain", kind: "Deployment", count: 2, change: requests, run: []string{"web", "app", ":7000", ":7001"},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{port("http", 80, corev1.ProtocolTCP, 7000)}},
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs of the agents:\n%s", podLogs(context.Background(), c, w.ns, "app in (web, raw)", agentcfg.Container))
		}
	})
	c.available(t, w.ns, "plain")
	c.available(t, w.ns, "web")
	c.available(t, w.ns, "raw")
	w.relay = newRelay(t, outside)
	w.l.run(t, "doppel", "connect", "-n", w.ns)
	w.person = w.relay.account()
	w.relay.login(w.l, w.person)
	w.relay.join(w.l)
	w.l.run(t, "doppel", "quit")
	w.l.sh(t, "mkdir -p /run/mount") // as mount(8) would, which faults use
	w.idle = w.l.picture(t)
	w.l.start(t, bin, "web", taker, "127.0.0.1:3000", "127.0.0.1:3001")
	w.l.start(t, bin, "name", taker, "tcp://127.0.0.1:3002", "udp://127.0.0.1:3003")
	w.connect(t)
	to, err := json.Marshal(targets{
		Plain: c.clusterIP(t, w.ns, "plain"), Web: c.clusterIP(t, w.ns, "web"), RPC: strings.TrimSuffix(c.clusterIP(t, w.ns, "web"), "80") + "81",
		Taken: c.clusterIP(t, w.ns, "raw"), Untouched: strings.TrimSuffix(c.clusterIP(t, w.ns, "raw"), "80") + "81",
		Rate: rate,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.load = c.begin(t, "traffic", string(to))
	if _, _, err := w.well(time.Now(), taker); err != nil {
		t.Fatal(err)
	}
	w.connected = w.l.picture(t)
	w.cluster = ok(c.picture(t, w.ns))(t)
	return w
}

// commit stands beside figures.
func commit() string {
	out, _ := exec.Command("git", "describe", "--always", "--dirty").Output() // none where there is no history
	return strings.TrimSpace(string(out))
}

// connect connects and takes what is to be taken.
func (w *torture) connect(t *testing.T) {
	t.Helper()
	w.l.run(t, "doppel", "connect", "-n", w.ns)
	for _, args := range [][]string{
		{"web", "-p", "3000:http", "--http-match=x-user=" + taker, "--preview-url", "--ingress-host", "web." + w.ns, "--ingress-port", "80"},
		{"rpc", "-w", "web", "-p", "3001:grpc", "--http-match=x-user=" + taker, "--preview-url=false"},
		{"raw", "-p", "3002:80/tcp", "-p", "3003:80/udp", "--preview-url=false"},
	} {
		out := w.l.run(t, append([]string{"doppel", "intercept"}, args...)...)
		want(t, out, "ACTIVE")
		w.preview = cmp.Or(regexp.MustCompile(`https://\S+`).FindString(out), w.preview)
	}
}

// well waits until for a while every caller has got answers, and from whom it should: requests that are taken from who. It returns all answers and
// the end of the last one that was not as it should be, but not before from.
func (w *torture) well(from time.Time, who string) (all []answer, bad time.Time, err error) {
	bad = from
	var last answer
	for end := time.Now().Add(normalLimit); ; time.Sleep(50 * time.Millisecond) { // between looks at another process
		next := w.load.take()
		all = append(all, next...)
		for _, a := range next {
			if end := a.Start.Add(a.Took); !a.good(who) && end.After(bad) {
				bad, last = end, a
			}
		}
		if time.Since(bad) > quiet {
			seen := map[string]bool{}
			for _, a := range all {
				if a.Start.After(bad) {
					seen[a.kind()] = true
				}
			}
			if len(seen) == 2*len(callers)+1 {
				return all, bad, nil
			}
			err = fmt.Errorf("since %s only %v are answered", bad.Format(time.StampMilli), slices.Sorted(maps.Keys(seen)))
		} else {
			err = fmt.Errorf("not well %v after the fault: %+v", bad.Sub(from).Round(time.Millisecond), last)
		}
		if time.Now().After(end) {
			return all, bad, err
		}
	}
}

// good says whether a caller got its answer from whom it should.
func (a answer) good(who string) bool {
	return a.Err == "" && (a.Taken && a.Body == who || !a.Taken && a.Body == "app")
}

// notice is how long it may take until a death is known where a request is: one on a connection that the dead had taken counts as in flight until then.
// That something hangs is known when it has not answered for a second.
const (
	notice     = 500 * time.Millisecond
	hangNotice = notice + time.Second
)

// round has a fault happen at a random moment, and says what came of it. If a session ends with it, then what came of that follows.
func (w *torture) round(t *testing.T, f fault) (o outcome, ended *ending) {
	t.Helper()
	o = outcome{Commit: w.commit}
	if n := cmp.Or(f.managers, 1); n != w.managers {
		w.c.scaleManager(t, int32(n))
		w.managers, w.calm = n, false
		if _, _, err := w.well(time.Now(), taker); err != nil {
			o.Problems = append(o.Problems, "with other managers: "+err.Error())
			return o, nil
		}
		w.cluster = ok(w.c.picture(t, w.ns))(t)
	}
	if f.prepare != nil {
		w.calm = false
		f.prepare(w, t)
	}
	if w.calm {
		for _, a := range w.load.take() {
			if !a.good(taker) {
				o.Problems = append(o.Problems, fmt.Sprintf("before, when all was well again: %+v", a))
			}
		}
	} else if _, _, err := w.well(time.Now(), taker); err != nil {
		o.Problems = append(o.Problems, "before: "+err.Error())
	}
	w.calm = false
	if len(o.Problems) > 0 {
		return o, nil
	}
	same := w.identities(t)
	time.Sleep(time.Duration(w.rand.Int64N(int64(time.Second)))) // the random moment
	o.Began = time.Now()
	w.struck = time.Time{}
	over := f.do(t, w)
	amid := over // what overlaps the fault is in flight: to kill something takes a moment, in which it is not known when it died
	if !f.lasts && !w.struck.IsZero() {
		amid = w.struck
	}
	if f.hangs {
		amid = amid.Add(hangNotice)
	} else {
		amid = amid.Add(notice)
	}
	expected, who := w.connected, taker
	if len(f.gone) > 0 {
		expected, who = w.idle, "app"
		for _, p := range f.gone {
			expected = expected.without(p)
		}
	}
	if f.app {
		who = "app"
	}
	at, err := settles(laptopResidue-time.Since(over), expected, func() (picture, error) { return w.l.picture(t), nil })
	o.Laptop = at.Sub(over).Seconds()
	o.problem("laptop", err)
	all, normal, err := w.well(over, who)
	o.Normal = normal.Sub(over).Seconds()
	o.problem("traffic", err)
	o.count(all, o.Began, amid, normal)
	if len(f.gone) > 0 {
		ended = w.ends(same["session"], over)
		w.connect(t)
		w.load.take()
		_, _, err = w.well(time.Now(), taker)
		o.problem("connected again", err)
	}
	if f.mend != nil {
		f.mend(t, w)
		w.load.take()
		_, _, err = w.well(time.Now(), taker)
		o.problem("mended", err)
	}
	if len(f.gone) == 0 && !f.renews {
		if now := w.identities(t); !maps.Equal(same, now) {
			o.Problems = append(o.Problems, fmt.Sprintf("the session, or one of its intercepts, is another: %v, before %v", now, same))
		}
	}
	var ending []string
	for _, e := range w.ending {
		ending = append(ending, e.session)
	}
	at, err = settles(max(clusterResidue-time.Since(over), laptopResidue), w.cluster, func() (picture, error) { return w.c.picture(t, w.ns, ending...) })
	if len(f.gone) == 0 {
		o.Cluster = at.Sub(over).Seconds()
	}
	o.problem("cluster", err)
	w.calm = len(o.Problems) == 0
	return o, ended
}

// identities are the UIDs of the session and its intercepts, by name. One that the command which is killed begins is not among them.
func (w *torture) identities(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{"session": w.l.sessionUID(t)}
	var list v1alpha1.InterceptList
	w.c.get(t, "/apis/doppel.dev/v1alpha1/namespaces/"+w.ns+"/intercepts", &list)
	for _, in := range list.Items {
		if in.Spec.Name != "spare" {
			out[in.Spec.Name] = string(in.UID)
		}
	}
	return out
}

// ending is a session that the cluster is about to end, since its laptop's daemon died.
type ending struct {
	session string
	at      time.Duration // since the daemon died
	err     error
	done    chan struct{} // closed when the two above are known
	note    func()        // called then
}

// collect notes what came of rounds whose sessions have ended, or waits for all.
func (w *torture) collect(wait bool) {
	for len(w.ending) > 0 {
		e := w.ending[0]
		select {
		case <-e.done:
		default:
			if !wait {
				return
			}
			<-e.done
		}
		w.ending = w.ending[1:]
		e.note()
	}
}

// ends watches a session end, beside the next rounds.
func (w *torture) ends(session string, died time.Time) *ending {
	e := &ending{session: session, done: make(chan struct{})}
	w.ending = append(w.ending, e)
	go func() {
		defer close(e.done)
		at, err := settles(clusterResidue-time.Since(died), picture{}, func() (picture, error) { return w.sessionLeft(session) })
		e.at, e.err = at.Sub(died), err
	}()
	return e
}

// sessionLeft is a picture of what is there of a session: itself and its intercepts.
func (w *torture) sessionLeft(uid string) (picture, error) {
	left := picture{}
	for _, kind := range []string{"sessions", "intercepts"} {
		b, err := w.c.core.Discovery().RESTClient().Get().AbsPath("/apis/doppel.dev/v1alpha1/" + kind).DoRaw(context.Background())
		if err != nil {
			return nil, err
		}
		if strings.Contains(string(b), uid) {
			left[kind] = []string{uid}
		}
	}
	return left, nil
}

// TestTorture has every fault happen at random moments amid mixed traffic: a few rounds of the quick ones, or as make torture wants it.
func TestTorture(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(envTortureSeed); s != "" {
		seed = ok(strconv.ParseUint(s, 10, 64))(t)
	}
	t.Logf("seed: %s=%d", envTortureSeed, seed)
	dir := os.Getenv(envTorture)
	rounds := 1 << 20
	if s := os.Getenv(envTortureRounds); s != "" {
		rounds = ok(strconv.Atoi(s))(t)
	}
	end := time.Now().Add(24 * time.Hour)
	if s := os.Getenv(envTortureWithin); s != "" {
		end = time.Now().Add(ok(time.ParseDuration(s))(t))
	}
	plan, named := []*results{}, false
	for _, f := range faults {
		if !strings.Contains(f.name, os.Getenv(envTortureOnly)) {
			continue
		}
		named = true
		if f.nodes > nodes() {
			t.Logf("%s: left out, it needs a lab with %d nodes: %s=%d", f.name, f.nodes, envNodes, f.nodes)
			continue
		}
		r := &results{Fault: f.name, Goal: min(f.short, rounds)}
		if dir != "" {
			r = ok(readResults(dir, f.name))(t)
			r.Goal = min(f.long, rounds)
		}
		plan = append(plan, r)
	}
	if !named {
		t.Fatalf("%s=%q is in no fault's name", envTortureOnly, os.Getenv(envTortureOnly))
	}
	if len(plan) == 0 {
		t.Skip("all faults were left out")
	}
	rate := shortRate
	if dir != "" {
		rate = fullRate
	}
	if s := os.Getenv(envTortureRate); s != "" {
		rate = ok(strconv.Atoi(s))(t)
	}
	w := newTorture(t, seed, rate)
	for time.Now().Before(end) {
		r := w.next(plan)
		if r.share() >= 1 {
			break
		}
		f := r.fault()
		w.collect(!f.beside)
		o, ended := w.round(t, f)
		o.Rate = rate
		if len(o.Problems) > 0 {
			w.again(t)
		}
		r.begun++
		note := func() {
			r.begun--
			if ended != nil {
				o.Cluster = ended.at.Seconds()
				o.problem("session", ended.err)
			}
			t.Logf("%s %s", f.name, o)
			if o.disturbed() && r.Disturbed < len(r.Rounds)+tries {
				r.Disturbed++
				t.Logf("%s: that round does not count, the machine was busy: %v %v", f.name, o.Problems, o.broken(f))
				return
			}
			r.Rounds = append(r.Rounds, o)
			for _, p := range append(o.Problems, o.broken(f)...) {
				t.Errorf("%s: %s", f.name, p)
			}
			if dir != "" {
				if err := r.write(dir); err != nil {
					t.Fatal(err)
				}
			}
		}
		if ended != nil {
			ended.note = note
		} else {
			note()
		}
	}
	w.collect(true)
	w.load.stop()
	w.l.run(t, "doppel", "quit", "-s")
}

// next is whose turn it is: who has done the smallest share of its rounds, so that what is interrupted has some of each; among those that have done
// about as much, one for which nothing has to be changed or waited for.
func (w *torture) next(plan []*results) *results {
	least := slices.MinFunc(plan, func(a, b *results) int { return cmp.Compare(a.share(), b.share()) })
	bother := func(r *results) (n int) {
		f := r.fault()
		if cmp.Or(f.managers, 1) != w.managers {
			n += 2
		}
		if !f.beside && len(w.ending) > 0 {
			n++
		}
		return n
	}
	turn, below := least, min(least.share()+about, 1)
	for _, r := range plan {
		if r.share() < below && bother(r) < bother(turn) {
			turn = r
		}
	}
	return turn
}

// about is how much more of its rounds one may have done than others.
const about = 0.05

// again makes the next round possible, whatever the last one has left.
func (w *torture) again(t *testing.T) {
	t.Helper()
	w.l.try(t, "doppel", "quit", "-s")
	w.connect(t)
	w.load.take()
}
