package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/e2e/hostile/plan"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/tunnel"
	protocol "github.com/doppel-dev/doppel/internal/wire"
)

// hostilePod is a pod of somebody who means harm, in whose network the attacks run.
type hostilePod struct {
	c       *cluster
	program string
	pod     *corev1.Pod
	manager string // IP
	key     string // the manager's fingerprint
}

// TestHostile attacks manager, agents and another's intercept from inside the cluster, with what a pod or a user may have.
func TestHostile(t *testing.T) {
	c := theCluster(t)
	ns, theirs := c.namespace(t, "victim"), c.namespace(t, "theirs")
	c.sample(t, ns)
	c.sample(t, theirs)
	ada := newLaptop(t, "ada")
	ada.withManager(t)
	ada.colors(t, "blue", "127.0.0.1:3000")
	ada.run(t, "doppel", "connect", "-n", ns)
	ada.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")
	svc := c.clusterIP(t, ns, "dataprocessingservice")
	undisturbed := func(t *testing.T) {
		t.Helper()
		if err := c.is(t, svc, "blue"); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		want(t, ada.run(t, "doppel", "status"), "Tunnel     : up")
	}
	h := newHostilePod(t, c, theirs)
	victim := c.podOf(t, ns, "dataprocessingservice")
	var list v1alpha1.InterceptList
	c.get(t, "/apis/doppel.dev/v1alpha1/namespaces/"+ns+"/intercepts", &list)
	in := list.Items[0]
	agents := h.manager + ":8082"

	t.Run("as an agent", func(t *testing.T) {
		own := c.token(t, theirs, h.pod, agentcfg.Audience)
		for name, tt := range map[string]struct{ role, token, want string }{
			"no token":                    {protocol.RoleAgent, "", "the agent's token is not valid"},
			"not a token":                 {protocol.RoleAgent, strings.Repeat("A", 10_000), "the agent's token is not valid"},
			"for the API server":          {protocol.RoleAgent, c.token(t, ns, victim, ""), "the agent's token is not valid"},
			"for no pod":                  {protocol.RoleAgent, c.token(t, ns, nil, agentcfg.Audience), "the agent's token is not valid"},
			"changed":                     {protocol.RoleAgent, own[:len(own)-8] + "AAAAAAAA", "the agent's token is not valid"},
			"as a laptop":                 {protocol.RoleLaptop, own, `role "laptop" does not connect here`},
			"as a manager":                {protocol.RoleManager, own, `role "manager" does not connect here`},
			"of its own pod, for another": {protocol.RoleAgent, own, "this pod has no agent"},
		} {
			hello := protocol.Hello{Role: tt.role, Token: tt.token, Pod: victim.Name, Namespace: ns, Workload: "Deployment/dataprocessingservice", Session: in.Spec.Session}
			h.tries(t, name, plan.Plan{Addr: agents, Peer: h.key, Hello: hello}, "hello: refused: "+tt.want)
		}
		h.tries(t, "to somebody else's key", plan.Plan{Addr: agents, Peer: strings.Repeat("0", len(h.key)), Hello: protocol.Hello{Role: protocol.RoleAgent, Token: own}}, "another key than expected")
		undisturbed(t)
	})

	// Pods are what somebody with the right to create pods says they are; it must not lead to another namespace.
	t.Run("as an agent that an annotation says it is", func(t *testing.T) {
		forged := c.forge(t, theirs, victim)
		p := plan.Plan{Addr: agents, Peer: h.key, Hello: protocol.Hello{Role: protocol.RoleAgent, Token: c.token(t, theirs, forged, agentcfg.Audience), Pod: victim.Name, Namespace: ns}}
		header := protocol.InterceptHeader{Intercept: string(in.UID), Proto: protocol.ProtoTCP, Port: 3000, Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:3000")}
		p.Secret = string(in.UID)
		p.Attempts = []plan.Attempt{
			{Name: "connection to the laptop", Open: protocol.AppendIntercept(nil, header)},
			{Name: "files", Open: protocol.AppendFiles(nil, string(in.UID))},
			{Name: "the cluster's network", Open: protocol.AppendTCP(nil, flow(svc))},
			{Name: "names", Open: protocol.AppendDNS(nil, make([]byte, 12))},
			{Name: "environment", Open: askEnvironment(t, string(in.UID))},
		}
		if out := h.run(t, p); strings.Contains(out, "TOLD") || strings.Count(out, ": refused: ") != len(p.Attempts) {
			t.Errorf("an agent that is not behind the intercept got:\n%s", out)
		}
		undisturbed(t)
	})

	t.Run("as the manager", func(t *testing.T) {
		cfg, err := agentcfg.Parse(victim.Annotations[agentcfg.Annotation])
		if err != nil {
			t.Fatal(err)
		}
		out := h.run(t, plan.Plan{Addr: fmt.Sprintf("%s:%d", victim.Status.PodIP, cfg.HealthPort), Call: true})
		if strings.Contains(out, "TOLD") || !strings.Contains(out, "call: ") {
			t.Errorf("the agent told its caller:\n%s", out)
		}
		undisturbed(t)
	})

	t.Run("as a laptop", func(t *testing.T) {
		kubeconfig := c.accountKubeconfig(t, theirs, "mallory")
		c.bindAccount(t, managerNS, "Role", "doppel-connect", theirs, "mallory")
		c.bindAccount(t, theirs, "ClusterRole", "doppel-intercept", theirs, "mallory")
		k, err := kube.Load(kube.Options{Kubeconfig: kubeconfig})
		if err != nil {
			t.Fatal(err)
		}
		id, err := tunnel.NewIdentity("mallory")
		if err != nil {
			t.Fatal(err)
		}
		key, err := id.MarshalPEM()
		if err != nil {
			t.Fatal(err)
		}
		var mine *v1alpha1.Session
		eventually(t, 10*time.Second, func() error {
			mine, err = k.CreateSession(t.Context(), managerNS, v1alpha1.SessionSpec{User: "system:serviceaccount:" + theirs + ":mallory", Key: id.Fingerprint(), Client: "hostile", RenewTime: metav1.NowMicro()})
			return err
		})
		t.Cleanup(func() { _ = k.DeleteSession(context.Background(), mine) })
		attach := func(session string) plan.Plan {
			return plan.Plan{Addr: h.manager + ":10250", Path: "/attach", Peer: h.key, Key: string(key), Hello: protocol.Hello{Role: protocol.RoleLaptop, Session: session}}
		}
		for name, tt := range map[string]struct{ session, want string }{
			"Ada's session":   {in.Spec.Session, "hello: refused"},
			"no session":      {"", "hello: refused"},
			"one that is not": {"7b0e6f5a-0000-4000-8000-000000000000", "hello: refused"},
		} {
			h.tries(t, name, attach(tt.session), tt.want)
		}
		p := attach(string(mine.UID))
		p.Hello.Resume = &protocol.Resume{Mux: "1", Received: 1}
		p.Attempts = []plan.Attempt{
			{Name: "environment", Open: askEnvironment(t, string(in.UID))},
			{Name: "files", Open: protocol.AppendFiles(nil, string(in.UID))},
			{Name: "connection", Open: protocol.AppendIntercept(nil, protocol.InterceptHeader{Intercept: string(in.UID), Proto: protocol.ProtoTCP, Port: 3000})},
			{Name: "service", Open: protocol.AppendTCP(nil, flow(svc))},
			{Name: "agent's table", Open: protocol.AppendControl(nil, protocol.ControlHeader{Method: control.ManagerIntercepts, Body: []byte("{}")})},
			{Name: "agent's note", Open: protocol.AppendControl(nil, protocol.ControlHeader{Method: control.AgentNote, Body: []byte(`{"port":{"protocol":"TCP","number":3000},"text":"hello"}`)})},
			{Name: "node's own address", Open: protocol.AppendTCP(nil, flow("127.0.0.1:8081"))},
			{Name: "metadata", Open: protocol.AppendTCP(nil, flow("169.254.169.254:80"))},
			{Name: "preview", Open: protocol.AppendPreview(nil, protocol.PreviewHeader{ID: "x"})},
			{Name: "no kind", Open: []byte{0xff, 1, 2, 3}},
		}
		out := h.run(t, p)
		if !strings.Contains(out, "hello: accepted\n") || strings.Contains(out, "ANSWERED") || strings.Count(out, ": refused: ") != len(p.Attempts) {
			t.Errorf("with a session of its own:\n%s", out)
		}
		for what, err := range map[string]error{
			"Ada's intercept": k.DeleteIntercept(t.Context(), &in),
			"an intercept of a namespace that is not its own": func() error {
				_, err := k.CreateIntercept(t.Context(), ns, v1alpha1.InterceptSpec{User: mine.Spec.User, Session: string(mine.UID), Name: "x", Workload: in.Spec.Workload, Ports: in.Spec.Ports})
				return err
			}(),
			"an intercept in Ada's name": func() error {
				_, err := k.CreateIntercept(t.Context(), theirs, v1alpha1.InterceptSpec{User: in.Spec.User, Session: in.Spec.Session, Name: "x", Workload: in.Spec.Workload, Ports: in.Spec.Ports})
				return err
			}(),
		} {
			if err == nil {
				t.Errorf("%s: allowed", what)
			}
		}
		undisturbed(t)
	})

	// Whoever holds connections open keeps nobody else out.
	t.Run("silence", func(t *testing.T) {
		for addr, begin := range map[string]string{agents: protocol.Preface, h.manager + ":10250": "GET /attach HTTP/1.1\r\n"} {
			stop := h.holds(t, plan.Plan{Addr: addr, Silent: 2000, Begin: begin})
			defer stop()
		}
		second := newLaptop(t, "second")
		second.run(t, "doppel", "connect", "-n", ns)
		// New agents have to get in.
		ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), "dataprocessingservice", types.MergePatchType, kinds.RestartPatch(kinds.Deployment, time.Now()), metav1.PatchOptions{}))(t)
		eventually(t, 40*time.Second, func() error { return c.is(t, svc, "blue") })
		second.run(t, "doppel", "quit", "-s")
		undisturbed(t)
	})
	ada.run(t, "doppel", "quit", "-s")
}

func flow(dst string) protocol.FlowHeader {
	return protocol.FlowHeader{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort(dst)}
}

func askEnvironment(t *testing.T, intercept string) []byte {
	t.Helper()
	b, err := json.Marshal(control.AskEnvironment{Intercept: intercept})
	if err != nil {
		t.Fatal(err)
	}
	return protocol.AppendControl(nil, protocol.ControlHeader{Method: control.LaptopEnvironment, Body: b})
}

func newHostilePod(t *testing.T, c *cluster, ns string) *hostilePod {
	t.Helper()
	dir := t.TempDir()
	h := &hostilePod{c: c, program: filepath.Join(dir, "hostile"), pod: c.podOf(t, ns, "dataprocessingservice")}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", h.program, "./e2e/hostile")
	build.Dir, build.Env = c.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	pods := ok(c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"}))(t)
	h.manager = pods.Items[0].Status.PodIP
	h.key = ok(c.core.CoreV1().ConfigMaps(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{}))(t).Data["key"]
	return h
}

// command runs the program in the pod's network.
func (h *hostilePod) command(t *testing.T, p plan.Plan) *exec.Cmd {
	t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	// The pod's process is the one with the pod's address.
	enter := fmt.Sprintf(`for p in $(pgrep -f dataprocessingservice); do if nsenter -n -t $p ip -4 addr show | grep -qF ' %s/'; then exec nsenter -n -t $p %s; fi; done; exit 9`, h.pod.Status.PodIP, h.program)
	cmd := exec.CommandContext(t.Context(), h.c.bin("lab"), "--name", labName, "node", "exec", "--", "sh", "-c", enter)
	cmd.Stdin = bytes.NewReader(b)
	return cmd
}

func (h *hostilePod) run(t *testing.T, p plan.Plan) string {
	t.Helper()
	out, err := h.command(t, p).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// holds runs the program until stop is called.
func (h *hostilePod) holds(t *testing.T, p plan.Plan) (stop func()) {
	t.Helper()
	cmd := h.command(t, p)
	begin := cmd.Stdin
	stdin, more := io.Pipe()
	cmd.Stdin = io.MultiReader(begin, stdin)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasPrefix(line, "holding") {
		t.Errorf("%q, %v", line, err)
	}
	return func() { _ = more.Close(); _ = cmd.Wait() }
}

func (h *hostilePod) tries(t *testing.T, name string, p plan.Plan, want string) {
	t.Helper()
	if out := h.run(t, p); !strings.Contains(out, want) || strings.Contains(out, "accepted") {
		t.Errorf("%s: %q is missing in:\n%s", name, want, out)
	}
}

// podOf is a ready pod of the sample.
func (c *cluster) podOf(t *testing.T, ns, app string) *corev1.Pod {
	t.Helper()
	var found *corev1.Pod
	eventually(t, 30*time.Second, func() error {
		pods := ok(c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app}))(t)
		for i, p := range pods.Items {
			if p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue }) {
				found = &pods.Items[i]
				return nil
			}
		}
		return fmt.Errorf("%s has no ready pod", app)
	})
	return found
}

// token is one of a pod's service account, bound to the pod; nil: to none.
func (c *cluster) token(t *testing.T, ns string, pod *corev1.Pod, audience string) string {
	t.Helper()
	req := &authn.TokenRequest{}
	if audience != "" {
		req.Spec.Audiences = []string{audience}
	}
	if pod != nil {
		req.Spec.BoundObjectRef = &authn.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
	}
	return ok(c.core.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), "default", req, metav1.CreateOptions{}))(t).Status.Token
}

// forge creates a pod with the victim's annotation and owner, in another namespace.
func (c *cluster) forge(t *testing.T, ns string, victim *corev1.Pod) *corev1.Pod {
	t.Helper()
	spec := corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: victim.Spec.Containers[0].Image, ImagePullPolicy: corev1.PullNever, Args: []string{"dataprocessingservice"}}}}
	return ok(c.core.CoreV1().Pods(ns).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "forged", Annotations: map[string]string{agentcfg.Annotation: victim.Annotations[agentcfg.Annotation]}},
		Spec:       spec,
	}, metav1.CreateOptions{}))(t)
}
