package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/kinds"
)

// oldRevision is the oldest one whose programs have to get on with today's: since then Session, Intercept and what goes through the tunnel have only got
// fields, methods and kinds. Nothing older has been released.
const (
	oldRevision = "3c125fec011788958f5f34bac1d1a94093c5a011"
	oldVersion  = "0.0.1" // what its programs are built as, so that its images have names of their own
)

// oldPrograms builds the programs and images of oldRevision, once for this checkout, and returns their directory.
func (c *cluster) oldPrograms(t *testing.T) string {
	t.Helper()
	if out, err := exec.Command("git", "-C", c.root, "cat-file", "-e", oldRevision+"^{commit}").CombinedOutput(); err != nil {
		t.Skipf("an older doppel is built from the repository's history, which is not here: git has no revision %s: %v %s", oldRevision, err, out)
	}
	dir := filepath.Join(c.root, "bin", "revision-"+oldRevision[:12])
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	made, err := os.MkdirTemp(filepath.Dir(dir), "revision-") // it gets its name when it is whole
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(made) })
	script := `set -euo pipefail
mkdir "$1/src" && git archive ` + oldRevision + ` | tar -x -C "$1/src"
cd "$1/src" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X github.com/doppel-dev/doppel/internal/buildinfo.Version=` + oldVersion + `' -o "$1/" ./cmd/doppel ./cmd/doppel-helm ./cmd/doppel-rootd ./cmd/traffic-manager ./cmd/traffic-agent
for p in traffic-manager traffic-agent; do "$2" image build --user 65532 --binary "$1/$p" --name ghcr.io/doppel-dev/$p:` + oldVersion + ` -o "$1/$p.tar"; done
rm -rf "$1/src" && chmod 755 "$1"`
	build := exec.Command("bash", "-c", script, "bash", made, c.bin("lab"))
	build.Dir = c.root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build revision %s: %v\n%s", oldRevision, err, out)
	}
	if err := os.Rename(made, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestSkew has a laptop of an older release and one of today's work with an older traffic-manager and older agents, through the upgrade of both, and
// after it.
func TestSkew(t *testing.T) {
	c := theCluster(t)
	old := c.oldPrograms(t)
	for _, p := range []string{"traffic-manager", "traffic-agent"} {
		if out, err := c.lab("load", filepath.Join(old, p+".tar")); err != nil {
			t.Fatalf("load the older %s: %v\n%s", p, err, out)
		}
	}
	ns := c.namespace(t, "skew")
	c.sample(t, ns)
	const app = "dataprocessingservice"
	patch := []byte(`{"spec":{"replicas":2,"strategy":{"rollingUpdate":{"maxUnavailable":0}}}}`)
	ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), app, types.MergePatchType, patch, metav1.PatchOptions{}))(t)
	c.available(t, ns, app)

	today, elder := newLaptop(t, "today"), newLaptop(t, "elder")
	elder.programs = old
	today.withoutManager(t)
	want(t, elder.run(t, "doppel", "version"), oldVersion)
	// What requests no CPU gets next to none while the machine is busy with something else, and would have its callers wait for seconds.
	elder.run(t, "doppel", "helm", "install", "--set", "agent.resources.requests.cpu=100m")

	users := []*laptop{elder, today}
	color := map[*laptop]string{elder: "blue", today: "red"}
	svc := c.clusterIP(t, ns, app)
	// asked is who answers a request of a laptop's user.
	asked := func(user string) string {
		out, err := c.lab("node", "exec", "--", "curl", "-s", "-m", "3", "-H", "x-user: "+user, "http://"+svc+"/color")
		if err != nil {
			return fmt.Sprintf("error: %v %s", err, out)
		}
		return strings.Trim(strings.TrimSpace(out), `"`)
	}
	// intercepted checks that each laptop gets its user's requests, and nobody else's.
	intercepted := func(t *testing.T, when string) {
		t.Helper()
		eventually(t, 30*time.Second, func() error {
			for _, l := range users {
				if got := asked(l.name); got != color[l] {
					return fmt.Errorf("%s a request of laptop %s is answered by %q", when, l.name, got)
				}
			}
			return nil
		})
		if got := asked("somebody"); got != "green" {
			t.Errorf("%s a request of nobody's is answered by %q", when, got)
		}
	}
	join := func(t *testing.T, l *laptop) {
		t.Helper()
		l.run(t, "doppel", "connect", "-n", ns)
		want(t, l.run(t, "curl", "-s", "-m", "5", app+"."+ns+":3000/color"), "green")
		want(t, l.run(t, "doppel", "intercept", app, "-p", "3000", "--mount=false", "--http-match=x-user="+l.name), "ACTIVE")
	}
	for _, l := range users {
		l.colors(t, color[l], "127.0.0.1:3000")
		join(t, l)
	}
	intercepted(t, "before the upgrade")
	today.run(t, "doppel", "leave", app)
	eventually(t, 5*time.Second, func() error {
		if got := asked(today.name); got != "green" {
			return fmt.Errorf("after leave a request is answered by %q", got)
		}
		return nil
	})
	join(t, today)

	sessions := map[*laptop]string{elder: elder.sessionUID(t), today: today.sessionUID(t)}
	team := c.load(t, "http://"+svc+"/color") // the rest of it
	mine := map[*laptop]*load{}
	for _, l := range users {
		mine[l] = c.load(t, "http://"+svc+"/color#x-user="+l.name)
	}
	alive := func(t *testing.T, when string) {
		t.Helper()
		intercepted(t, when)
		for _, l := range users {
			if got := l.sessionUID(t); got != sessions[l] {
				t.Errorf("%s laptop %s has session %s, not %s", when, l.name, got, sessions[l])
			}
			// A rollout is over before the traffic-manager that led has ended: tunnels may be on their way to the next one. And the older one, which knows
			// of no leader, may write of an intercept whose agents have left it that it is pending.
			eventually(t, 10*time.Second, func() error {
				if out := l.run(t, "doppel", "status"); !strings.Contains(out, "Tunnel     : up") || !strings.Contains(out, app+": ACTIVE") {
					return fmt.Errorf("%s the status of laptop %s is %s", when, l.name, out)
				}
				return nil
			})
			want(t, l.run(t, "curl", "-s", "-m", "5", app+"."+ns+":3000/color"), "green")
		}
	}
	served := c.served(t)
	began := time.Now()
	today.run(t, "doppel", "helm", "upgrade", "--set", "manager.replicas=2")
	alive(t, "after the upgrade of the traffic-manager")
	t.Logf("upgraded, and all as before, in %v", time.Since(began).Round(time.Millisecond))
	served()
	var list v1alpha1.InterceptList
	c.get(t, "/apis/doppel.dev/v1alpha1/namespaces/"+ns+"/intercepts", &list)
	for _, in := range list.Items {
		if in.Status.Taken == "" || in.Status.Requests == "" { // columns of kubectl's table that the older one did not have
			t.Errorf("intercept %s after the upgrade: %+v", in.Name, in.Status)
		}
	}

	// From now on one stands by, and a rolling restart has each of the two lead once more.
	c.available(t, managerNS, "traffic-manager")
	ok(c.core.AppsV1().Deployments(managerNS).Patch(t.Context(), "traffic-manager", types.MergePatchType, kinds.RestartPatch(kinds.Deployment, time.Now()), metav1.PatchOptions{}))(t)
	c.available(t, managerNS, "traffic-manager")
	alive(t, "after a rolling restart of two traffic-managers")

	// The agents of pods that are there are older until their workload is restarted.
	ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), app, types.MergePatchType, kinds.RestartPatch(kinds.Deployment, time.Now()), metav1.PatchOptions{}))(t)
	c.available(t, ns, app)
	eventually(t, time.Minute, func() error { return c.noOldAgents(t, ns, app) })
	alive(t, "after the agents' upgrade")
	for _, a := range team.stop() {
		if a.Err != "" || a.Status != http.StatusOK || a.Body != `"green"` {
			t.Errorf("somebody's request at %v: %+v", a.Start.Sub(began), a)
		}
	}

	for l, load := range mine {
		failed := 0
		for _, a := range load.stop() {
			switch {
			case a.Err != "":
				t.Logf("the request of laptop %s at %v: %+v", l.name, a.Start.Sub(began), a)
				failed++
			case a.Body != `"green"` && a.Body != strconv.Quote(color[l]):
				t.Errorf("the request of laptop %s at %v: %+v", l.name, a.Start.Sub(began), a)
			}
		}
		if failed > 3 { // one at a time is in flight, and the one that leads has ended three times
			t.Errorf("%d requests of laptop %s failed", failed, l.name)
		}
	}

	// And from the beginning, with all in the cluster of today.
	for _, l := range users {
		l.run(t, "doppel", "leave", app)
		l.run(t, "doppel", "quit")
		join(t, l)
	}
	intercepted(t, "after connecting again")
	for _, l := range users {
		l.run(t, "doppel", "quit", "-s")
	}
}

// served looks, until the function that it returns is called, whether the manager's Services lead to a ready pod at every moment.
func (c *cluster) served(t *testing.T) (stop func()) {
	t.Helper()
	const of = "kubernetes.io/service-name"
	o := metav1.ListOptions{LabelSelector: of + " in (traffic-manager, agent-injector)"}
	list := ok(c.core.DiscoveryV1().EndpointSlices(managerNS).List(t.Context(), o))(t)
	check := func(s *discoveryv1.EndpointSlice) {
		if !slices.ContainsFunc(s.Endpoints, func(e discoveryv1.Endpoint) bool { return e.Conditions.Ready != nil && *e.Conditions.Ready }) {
			t.Errorf("at %s service %s leads nowhere: %+v", time.Now().Format(time.StampMilli), s.Labels[of], s.Endpoints)
		}
	}
	for i := range list.Items {
		check(&list.Items[i])
	}
	if len(list.Items) != 2 {
		t.Fatalf("%d endpoint slices, want one of each service", len(list.Items))
	}
	o.ResourceVersion = list.ResourceVersion
	w := ok(c.core.DiscoveryV1().EndpointSlices(managerNS).Watch(t.Context(), o))(t)
	done, stopping := make(chan int), make(chan struct{})
	go func() {
		n := 0
		defer func() { done <- n }()
		for {
			select {
			case <-stopping:
				return
			case e, open := <-w.ResultChan():
				s, is := e.Object.(*discoveryv1.EndpointSlice)
				if !open || !is || e.Type == watch.Deleted {
					t.Errorf("the watch of endpoint slices got %s %T", e.Type, e.Object)
					return
				}
				n++
				check(s)
			}
		}
	}()
	return func() {
		close(stopping)
		if n := <-done; n == 0 {
			t.Error("no endpoint slice has changed, although pods came and went")
		}
		w.Stop()
	}
}

// noOldAgents is nil when each pod of a workload has an agent that is not of the older release.
func (c *cluster) noOldAgents(t *testing.T, ns, app string) error {
	t.Helper()
	for _, p := range ok(c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app}))(t).Items {
		i := slices.IndexFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == agentcfg.Container })
		if p.DeletionTimestamp != nil || i < 0 || strings.HasSuffix(p.Spec.Containers[i].Image, ":"+oldVersion) {
			return fmt.Errorf("pod %s is an old one", p.Name)
		}
	}
	return nil
}
