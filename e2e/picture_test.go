package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// Nothing is left behind by a fault when a picture equals the one before, within these.
const (
	laptopResidue  = time.Second
	clusterResidue = 35 * time.Second
)

// picture is how something is, as lines under headings. What changes by itself is not in it: counters, handles, names by lot.
type picture map[string][]string

// parse reads what a script printed: "# HEADING" lines, and what belongs to each, whose order says nothing.
func parsePicture(out string) picture {
	p, heading := picture{}, ""
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, " \n")
		if h, ok := strings.CutPrefix(line, "# "); ok {
			heading = h
		} else if line != "" {
			p[heading] = append(p[heading], line)
		}
	}
	for _, lines := range p {
		slices.Sort(lines)
	}
	return p
}

// since says what was added to before and what is missing of it; nothing if they are equal.
func (p picture) since(before picture) string {
	var b strings.Builder
	headings := map[string]bool{}
	for h := range p {
		headings[h] = true
	}
	for h := range before {
		headings[h] = true
	}
	for _, h := range slices.Sorted(maps.Keys(headings)) {
		missing := slices.Clone(before[h])
		for _, line := range p[h] {
			if i := slices.Index(missing, line); i >= 0 {
				missing = slices.Delete(missing, i, i+1)
			} else {
				fmt.Fprintf(&b, "%s: + %s\n", h, line)
			}
		}
		for _, line := range missing {
			fmt.Fprintf(&b, "%s: - %s\n", h, line)
		}
	}
	return b.String()
}

// without is a copy that lacks the lines with a text.
func (p picture) without(text string) picture {
	out := picture{}
	for h, lines := range p {
		out[h] = slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return strings.Contains(line, text) })
	}
	return out
}

// laptopPicture is what doppel could leave on a laptop. Not looked at are its state directory, and the directory of the user's sockets: the file of a
// killed daemon's is there until the next one takes its place. The laptop's own address, which a fault may change, is called LAPTOP.
const laptopPicture = `
echo "# links"; ip -o link show | sed 's/^[0-9]*: //; s/ state [A-Z]*//; s/@if[0-9]*//'
echo "# addresses"; ip -o addr show | sed 's/^[0-9]*: //; s/ valid_lft.*//'
echo "# routes"; { ip -4 route show table all; ip -6 route show table all; } | sed 's/ expires [0-9]*sec//; s/ linkdown//; s/ dead//'
echo "# rules"; { ip -4 rule; ip -6 rule; }
echo "# redirects"; nft list ruleset | sed 's/redirect to :[0-9]*/redirect to :PORT/; s/dnat\( ip6*\)* to \(.*\):[0-9]*/dnat to \2:PORT/; s/doppel-dns-[0-9]*/doppel-dns-PID/'
echo "# resolver"; cat /etc/resolv.conf /etc/hosts
echo "# mounts"; cut -d' ' -f 2,3 /proc/self/mounts
echo "# processes"; for p in /proc/[0-9]*; do tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -aE '^[^ ]*(doppel|doppel-rootd|doppel-mount-guard) |doppel-mount-guard' | cut -c 1-120; done
echo "# files"; find /run /etc "$HOME" -xdev \( -path "$HOME/.local/state/doppel" -o -path "$XDG_RUNTIME_DIR/doppel" \) -prune -o -printf '%y %m %p %l\n'
`

func (l *laptop) picture(t *testing.T) picture {
	t.Helper()
	out := l.sh(t, laptopPicture)
	addr := strings.TrimSpace(l.sh(t, `ip -4 -o addr show dev eth0 | awk '{sub("/.*", "", $4); print $4; exit}'`))
	if addr != "" {
		out = regexp.MustCompile(`\b`+regexp.QuoteMeta(addr)+`\b`).ReplaceAllString(out, "LAPTOP")
	}
	return parsePicture(out)
}

// podNets prints the rules of each network on a node but its own; which pod's each is does not matter.
const podNets = `
mine=$(readlink /proc/self/ns/net); seen=$mine
for p in /proc/[0-9]*; do
  n=$(readlink $p/ns/net) || continue
  case "$seen" in *"$n"*) continue;; esac
  seen="$seen $n"
  nsenter --net=$p/ns/net nft -s list ruleset | sed 's/^/redirect /'
done
`

var (
	tokenVolume = regexp.MustCompile(`kube-api-access-\w+`)
	anyUID      = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	managerPod  = regexp.MustCompile(`traffic-manager-[a-z0-9]+-[a-z0-9]+`)
	podAddress  = regexp.MustCompile(`\b10\.244\.\d+\.\d+\b|\bfd10:244:[0-9a-f:]+`)
)

// picture is what doppel could leave in the cluster: its objects, what is in the manager's namespace, and in ns the workloads' templates, the pods'
// specifications and the redirects in them. Sessions with the UIDs in ending, and their intercepts, are left out.
func (c *cluster) picture(t *testing.T, ns string, ending ...string) (picture, error) {
	t.Helper()
	p := picture{}
	// The names of sessions and pods are by lot, so what refers to one says that there is one.
	add := func(heading, name string, objects ...any) error {
		b, err := json.Marshal(objects)
		if err != nil {
			return err
		}
		s := anyUID.ReplaceAllString(tokenVolume.ReplaceAllString(string(b), "TOKEN"), "UID")
		p[heading] = append(p[heading], name+" "+podAddress.ReplaceAllString(managerPod.ReplaceAllString(s, "POD"), "POD"))
		return nil
	}
	ctx := t.Context()
	var sessions v1alpha1.SessionList
	var intercepts v1alpha1.InterceptList
	for path, list := range map[string]any{"sessions": &sessions, "intercepts": &intercepts} {
		b, err := c.core.Discovery().RESTClient().Get().AbsPath("/apis/doppel.dev/v1alpha1/" + path).DoRaw(ctx)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(b, list); err != nil {
			return nil, err
		}
	}
	for _, s := range sessions.Items {
		if slices.Contains(ending, string(s.UID)) {
			continue
		}
		if err := add("sessions", s.Spec.User, s.Spec.Namespace, s.Spec.Reach, s.Status.State); err != nil {
			return nil, err
		}
	}
	for _, i := range intercepts.Items {
		if slices.Contains(ending, i.Spec.Session) {
			continue
		}
		if err := add("intercepts", i.Namespace+"/"+i.Spec.Name, i.Spec, i.Status.State, i.Status.Message); err != nil {
			return nil, err
		}
	}
	for _, n := range []string{ns, managerNS} {
		pods, err := c.core.CoreV1().Pods(n).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, pod := range pods.Items {
			if pod.DeletionTimestamp != nil {
				continue
			}
			pod.Spec.NodeName = ""
			ready := ""
			for _, cond := range pod.Status.Conditions {
				if cond.Type == "Ready" {
					ready = "ready: " + string(cond.Status)
				}
			}
			if err := add("pods", n+"/"+pod.GenerateName, pod.Labels, pod.Annotations, pod.Spec, ready); err != nil {
				return nil, err
			}
		}
		deployments, err := c.core.AppsV1().Deployments(n).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, d := range deployments.Items {
			if err := add("workloads", n+"/"+d.Name, d.Labels, d.Spec); err != nil {
				return nil, err
			}
		}
		services, err := c.core.CoreV1().Services(n).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, s := range services.Items {
			if err := add("services", n+"/"+s.Name, s.Labels, s.Spec); err != nil {
				return nil, err
			}
		}
		configs, err := c.core.CoreV1().ConfigMaps(n).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, m := range configs.Items {
			if err := add("config maps", n+"/"+m.Name, m.Data); err != nil {
				return nil, err
			}
		}
		secrets, err := c.core.CoreV1().Secrets(n).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, s := range secrets.Items {
			p["secrets"] = append(p["secrets"], n+"/"+s.Name)
		}
	}
	nodes, err := c.core.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for i := range nodes.Items {
		out, err := exec.Command(c.bin("lab"), "--name", labName, "node", "exec", fmt.Sprint("node", i+1), "--", "sh", "-c", podNets).Output()
		if err != nil {
			return nil, fmt.Errorf("redirects: %w", err)
		}
		for line := range strings.Lines(podAddress.ReplaceAllString(string(out), "POD")) {
			p["redirects"] = append(p["redirects"], strings.TrimSpace(line))
		}
	}
	for _, lines := range p {
		slices.Sort(lines)
	}
	return p, nil
}

// settles takes pictures until one equals before, and returns when that one was begun; it gives up after the limit. An error is what is different at last.
func settles(limit time.Duration, before picture, take func() (picture, error)) (time.Time, error) {
	for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) { // between looks at another process
		began := time.Now()
		now, err := take()
		diff := ""
		if err == nil {
			if diff = now.since(before); diff == "" {
				return began, nil
			}
			err = fmt.Errorf("left behind after %v:\n%s", limit, diff)
		}
		if began.After(end) {
			return began, err
		}
	}
}

func TestPicture(t *testing.T) {
	before := parsePicture("# links\nlo\neth0\n# routes\ndefault\n")
	if d := parsePicture("# routes\ndefault\n# links\neth0\nlo\n").since(before); d != "" {
		t.Errorf("equal but for the order:\n%s", d)
	}
	got := parsePicture("# links\nlo\nlo\n# rules\n0: all\n").since(before)
	if want := "links: + lo\nlinks: - eth0\nroutes: - default\nrules: + 0: all\n"; got != want {
		t.Errorf("got\n%s, want\n%s", got, want)
	}
	if d := before.since(before.without("eth0")); d != "links: + eth0\n" {
		t.Errorf("without: %s", d)
	}
}
