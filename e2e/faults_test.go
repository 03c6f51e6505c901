package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// fault is something that breaks.
type fault struct {
	name        string
	short, long int // rounds in make test and in make torture
	// do breaks it and, if it does not come back by itself, brings it back; it returns when that was, since when all is to become well.
	do func(*testing.T, *torture) time.Time
	// gone are the daemons that are away afterwards, and the session with them: the app answers, until doppel connect.
	gone []string
	// lasts: as long as it goes on, requests that are taken may fail.
	lasts bool
	// hangs: what is broken says nothing.
	hangs bool
	// ends: connections of everybody through what is killed end with it, as if it were the app, and none can be made until it is back (endsBack).
	ends bool
	// renews: the session is another one afterwards.
	renews bool
	// app: the app answers afterwards, until mend has brought the rest back.
	app  bool
	mend func(*testing.T, *torture)
	// beside: it leaves alone what ends sessions, which may go on meanwhile.
	beside bool
	// unseen: nobody is to notice anything.
	unseen bool
	// prepare makes what it needs, before all is well.
	prepare func(*torture, *testing.T)
	// nodes are how many the lab has to have; default 1.
	nodes int
	// managers are how many replicas of the manager there are; default 1.
	managers int
}

// Programs, as pgrep -f finds them; the brackets keep the shell itself out.
const (
	userDaemon = "[d]oppel daemon"
	rootDaemon = "[d]oppel-rootd"
)

// endsBack bounds how long an agent is away that was killed: its container is started again at once.
const endsBack = 10 * time.Second

// previewBack bounds how long a preview may be away when the relay was killed.
const previewBack = 10 * time.Second

var faults = []fault{
	{name: "kill -9 of the CLI", short: 1, long: 100, beside: true, do: killCLI},
	{name: "kill -9 of the user daemon", short: 1, long: 100, beside: true, do: killOnLaptop(userDaemon), gone: []string{"doppel daemon"}},
	{name: "kill -9 of the root daemon", short: 1, long: 100, beside: true, do: killOnLaptop(rootDaemon)},
	{name: "kill -9 of both daemons", long: 100, beside: true, do: killOnLaptop(userDaemon, rootDaemon), gone: []string{"doppel daemon", "doppel-rootd"}},
	{name: "kill -9 of the agent", short: 1, long: 100, beside: true, do: killInCluster("traffic-agent"), ends: true},
	{name: "kill -9 of the manager", short: 1, long: 100, do: killInCluster("traffic-manager")},
	{name: "kill -9 of the manager that leads of two", short: 1, long: 100, managers: 2, do: killManagers(func(leads bool) bool { return leads })},
	{name: "kill -9 of the manager that stands by", short: 1, long: 100, managers: 2, do: killManagers(func(leads bool) bool { return !leads }), unseen: true},
	{name: "kill -9 of both managers", short: 1, long: 100, managers: 2, do: killManagers(func(bool) bool { return true })},
	{name: "kill -9 of the relay", short: 1, long: 100, beside: true, do: killRelay, unseen: true},
	{name: "node of the manager that leads cut off", short: 1, long: 10, nodes: 2, managers: 2, prepare: (*torture).leaderAway, do: nodeCutOff, hangs: true},
	{name: "API server restarted", short: 1, long: 10, do: restartAPI},
	{name: "laptop's link down", short: 1, long: 10, do: linkDown, hangs: true},
	{name: "laptop's address changed", short: 1, long: 10, do: newAddress, hangs: true},
	{name: "laptop's line loses 30 %", short: 1, long: 10, do: badLine("--loss", "30%"), lasts: true},
	{name: "laptop's line delays 300 ms", long: 10, do: badLine("--delay", "300ms"), lasts: true},
	{name: "user daemon out of descriptors", short: 1, long: 10, do: noDescriptors},
	{name: "agent out of memory", short: 1, long: 10, beside: true, do: agentOutOfMemory, ends: true},
	{name: "state directory full", long: 3, do: diskFull, lasts: true, renews: true},
	{name: "laptop asleep", long: 3, do: asleep, hangs: true, renews: true},
	{name: "kubelet stopped", long: 3, do: kubeletStopped},
	{name: "manager's key and certificate exchanged", long: 3, do: exchangeKey, app: true, mend: oldKey},
}

func killOnLaptop(programs ...string) func(*testing.T, *torture) time.Time {
	return func(t *testing.T, w *torture) time.Time {
		t.Helper()
		w.l.sh(t, "pkill -9 -f '"+strings.Join(programs, "|")+"'") // not kill $(pgrep): what begins another program bears their name for a moment
		return time.Now()
	}
}

// killCLI kills the command that begins an intercept, somewhere on its way. That one is there or not then, and leaves nothing when it is ended.
func killCLI(t *testing.T, w *torture) time.Time {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	after := time.Duration(w.rand.Int64N(int64(800 * time.Millisecond)))
	line := fmt.Sprintf("doppel intercept spare -w raw -p 3009:82/tcp & sleep %.3f; kill -9 $!; wait $!; true", after.Seconds())
	if out, err := w.l.command(ctx, "sh", "-c", line).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if r := w.l.try(t, "doppel", "leave", "spare"); r.code != 0 && !strings.Contains(r.stderr, "no intercept") {
		t.Errorf("after the command was killed %v after its start: %v", after, r)
	}
	return time.Now()
}

// killInCluster kills one of the processes of a program on the nodes.
func killInCluster(program string) func(*testing.T, *torture) time.Time {
	return func(t *testing.T, w *torture) time.Time {
		t.Helper()
		pids := strings.Fields(w.c.node(t, "pgrep", "-f", "^[^ ]*"+program))
		w.c.node(t, "kill", "-9", pids[w.rand.IntN(len(pids))])
		return time.Now()
	}
}

// hog has something that the kernel does not kill take all the memory that a process's control group (of either version) may have, until the process is
// gone. It prints the group's name, which is that of the container.
const hog = `
pid=%s
v1=$(sed -n 's/^[0-9]*:memory://p' /proc/$pid/cgroup)
if [ "$v1" ]; then cd "/sys/fs/cgroup/memory$v1"; else cd "/sys/fs/cgroup$(sed -n s/^0:://p /proc/$pid/cgroup)"; fi || exit 1
basename "$PWD"
sh -c 'echo -1000 > /proc/self/oom_score_adj; echo $$ > cgroup.procs; exec tail /dev/zero' > /dev/null 2>&1 &
for i in $(seq 500); do kill -0 $pid 2> /dev/null || break; sleep 0.01; done
kill -9 $!
wait
! kill -0 $pid 2> /dev/null`

// agentOutOfMemory has the kernel kill one of the agents, as it does when the container needs more than its limit.
func agentOutOfMemory(t *testing.T, w *torture) time.Time {
	t.Helper()
	pids := strings.Fields(w.c.node(t, "pgrep", "-f", "^[^ ]*traffic-agent"))
	id := strings.TrimSpace(w.c.node(t, "sh", "-c", fmt.Sprintf(hog, pids[w.rand.IntN(len(pids))])))
	over := time.Now()
	eventually(t, 10*time.Second, func() error {
		for _, p := range ok(w.c.core.CoreV1().Pods(w.ns).List(t.Context(), metav1.ListOptions{}))(t).Items {
			for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
				for _, e := range []*corev1.ContainerStateTerminated{s.State.Terminated, s.LastTerminationState.Terminated} {
					if e != nil && strings.HasSuffix(e.ContainerID, "/"+id) && e.Reason == "OOMKilled" {
						return nil
					}
				}
			}
		}
		return fmt.Errorf("container %s was not killed for want of memory", id)
	})
	return over
}

// killManagers kills those replicas of the manager that which wants, by whether it leads.
func killManagers(which func(leads bool) bool) func(*testing.T, *torture) time.Time {
	return func(t *testing.T, w *torture) time.Time {
		t.Helper()
		var pids []string
		for _, p := range ok(w.c.managers(t.Context()))(t) {
			if which(leads(p)) {
				pids = append(pids, strings.Fields(w.c.node(t, "pgrep", "-f", "^[^ ]*traffic-manager .*--pod-ip="+p.Status.PodIP+" "))...)
			}
		}
		w.c.node(t, append([]string{"kill", "-9"}, pids...)...)
		return time.Now()
	}
}

// managers are the pods of the manager.
func (c *cluster) managers(ctx context.Context) ([]corev1.Pod, error) {
	list, err := c.core.CoreV1().Pods(managerNS).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
	return list.Items, err
}

// leads says whether the Services lead to a pod of the manager.
func leads(p corev1.Pod) bool { return p.Labels["app.kubernetes.io/part-of"] == "doppel" }

// leaderAway has a manager lead that is on another node than the callers and the apps. What it knows of that node may be old: it was cut off.
func (w *torture) leaderAway(t *testing.T) {
	t.Helper()
	home := w.c.nodeName(1)
	var killed time.Time
	eventually(t, time.Minute, func() error {
		where := map[string]string{}
		leading, other := "", false
		for _, p := range ok(w.c.managers(t.Context()))(t) {
			where[p.Name] = fmt.Sprintf("%s, leads: %v, ready: %v", p.Spec.NodeName, leads(p), ready(&p))
			if leads(p) && ready(&p) {
				leading = p.Spec.NodeName
			}
			other = other || p.Spec.NodeName != home && ready(&p)
		}
		if leading != "" && leading != home {
			return nil
		}
		if leading == home && other && time.Since(killed) > 5*time.Second {
			killManagers(func(leads bool) bool { return leads })(t, w)
			killed = time.Now()
		}
		return fmt.Errorf("the managers are at %v", where)
	})
}

// cut drops all that comes to a node or leaves it, without a word to anybody.
const cut = `dev=$(ip -o -4 route show default | sed 's/.* dev \([^ ]*\).*/\1/') && nft "
table inet cut {
	chain in { type filter hook prerouting priority -400; iifname $dev drop; }
	chain out { type filter hook postrouting priority 400; oifname $dev drop; }
}"`

// nodeCutOff cuts the second node off for longer than its manager's Lease lasts, and for less than the time after which Kubernetes gives the node up.
func nodeCutOff(t *testing.T, w *torture) time.Time {
	t.Helper()
	on := func(line string) {
		t.Helper()
		if out, err := w.c.lab("node", "exec", "node2", "--", "sh", "-c", line); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	on(cut)
	w.struck = time.Now()
	w.while(20*time.Second, 20*time.Second)
	on("nft delete table inet cut")
	return time.Now()
}

// killRelay kills the relay and starts it again, as what runs it would, and waits for the preview: the callers in the cluster have nothing to do with it.
func killRelay(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.relay.kill()
	w.struck = time.Now()
	w.relay.restart()
	eventually(t, previewBack, func() error {
		p, err := w.person.try(w.preview, nil)
		if err == nil && p.from != taker {
			err = fmt.Errorf("the preview: %+v", p)
		}
		return err
	})
	t.Logf("the preview was back %v after the relay was killed", time.Since(w.struck).Round(time.Millisecond))
	return time.Now()
}

func restartAPI(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.struck = w.c.restartAPI(t)
	return time.Now()
}

// while waits for as long as something is broken.
func (w *torture) while(from, to time.Duration) {
	time.Sleep(from + time.Duration(w.rand.Int64N(int64(to-from)+1)))
}

func linkDown(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.l.link(t, "down")
	w.struck = time.Now()
	w.while(time.Second, 5*time.Second)
	w.l.link(t, "up")
	w.l.online(t)
	return time.Now()
}

func newAddress(t *testing.T, w *torture) time.Time {
	t.Helper()
	gw := strings.TrimSpace(w.l.sh(t, "ip -4 route show default | cut -d' ' -f3"))
	addr := fmt.Sprintf("%s.%d", gw[:strings.LastIndex(gw, ".")], 10+w.rand.IntN(200))
	w.l.sh(t, "ip -4 addr flush dev eth0; ip addr add "+addr+"/24 brd + dev eth0; ip route add default via "+gw)
	w.struck = time.Now()
	w.l.online(t)
	return time.Now()
}

// badLine makes the laptop's line bad for a while.
func badLine(flag, value string) func(*testing.T, *torture) time.Time {
	return func(t *testing.T, w *torture) time.Time {
		t.Helper()
		for _, v := range []string{value, "0"} {
			if out, err := w.c.lab("laptop", "link", w.l.name, flag, v); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if v != "0" {
				w.while(8*time.Second, 8*time.Second)
			}
		}
		w.l.online(t)
		return time.Now()
	}
}

// asleep stops what runs on the laptop for longer than its session is kept.
func asleep(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.l.sh(t, "kill -STOP $(pgrep -f '"+userDaemon+"|"+rootDaemon+"|[p]robe web|[p]robe name')")
	w.struck = time.Now()
	w.while(40*time.Second, 40*time.Second)
	w.l.sh(t, "kill -CONT $(pgrep -f '"+userDaemon+"|"+rootDaemon+"|[p]robe web|[p]robe name')")
	return time.Now()
}

// noDescriptors has the user daemon open nothing more for a while.
func noDescriptors(t *testing.T, w *torture) time.Time {
	t.Helper()
	pid := strings.TrimSpace(w.l.sh(t, "pgrep -f '"+userDaemon+"'"))
	limit := strings.TrimSpace(w.l.sh(t, "prlimit --pid "+pid+" --nofile -o SOFT --noheadings"))
	w.l.sh(t, "prlimit --pid "+pid+" --nofile=$(ls /proc/"+pid+"/fd | sort -n | tail -n 1):")
	w.struck = time.Now()
	w.while(3*time.Second, 6*time.Second)
	w.l.sh(t, "prlimit --pid "+pid+" --nofile="+limit+":")
	return time.Now()
}

// diskFull has the daemons write into a directory without room, from their start on, and takes that away again. Its quits end requests, as quits do.
func diskFull(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.l.run(t, "doppel", "quit", "-s")
	w.l.sh(t, "mount -t tmpfs -o size=64k none ~/.local/state/doppel")
	w.connect(t)
	w.l.sh(t, "! cat /dev/zero > ~/.local/state/doppel/full")
	want(t, w.l.run(t, "doppel", "intercept", "spare", "-w", "raw", "-p", "3009:82/tcp"), "ACTIVE")
	w.l.run(t, "doppel", "leave", "spare")
	w.l.run(t, "doppel", "quit", "-s")
	w.connect(t)
	w.l.run(t, "doppel", "quit", "-s")
	w.l.sh(t, "umount ~/.local/state/doppel")
	w.connect(t)
	return time.Now()
}

func kubeletStopped(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.c.node(t, "sh", "-c", "kill -STOP $(pgrep -f '[k]ubelet --config=')")
	w.struck = time.Now()
	w.while(20*time.Second, 20*time.Second)
	if out, err := w.c.lab("restart", "node1/kubelet"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return time.Now()
}

// exchangeKey gives the manager another key, and with it the certificate of its webhook, as docs/security.md says. Agents go on with the old one: they leave all to
// the app until their pods are replaced, or the manager has the old key again.
func exchangeKey(t *testing.T, w *torture) time.Time {
	t.Helper()
	w.keys = ok(w.c.core.CoreV1().Secrets(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{}))(t).Data
	w.restartWith(t, nil)
	return time.Now()
}

// oldKey brings the old key back.
func oldKey(t *testing.T, w *torture) { w.restartWith(t, w.keys) }

// restartWith restarts the manager with other keys.
func (w *torture) restartWith(t *testing.T, keys map[string][]byte) {
	t.Helper()
	old := w.c.managerKey(t)
	patch := ok(json.Marshal(map[string]any{"data": keys}))(t)
	ok(w.c.core.CoreV1().Secrets(managerNS).Patch(t.Context(), "traffic-manager", types.MergePatchType, patch, metav1.PatchOptions{}))(t)
	for _, p := range ok(w.c.managers(t.Context()))(t) {
		if err := w.c.core.CoreV1().Pods(managerNS).Delete(t.Context(), p.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, time.Minute, func() error {
		if w.c.managerKey(t) == old {
			return errors.New("the manager has its old key")
		}
		return nil
	})
	w.c.available(t, managerNS, "traffic-manager")
}

// managerKey is the manager's public key, as everybody may read it.
func (c *cluster) managerKey(t *testing.T) string {
	t.Helper()
	return ok(c.core.CoreV1().ConfigMaps(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{}))(t).Data["key"]
}
