package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// The outcomes of a check.
const (
	checkOK   = "ok"
	checkWarn = "warn" // works, or will for now
	checkFail = "fail" // connect or intercept does not work
	checkSkip = "skip" // could not be looked at; Detail says why
)

// maxSkew is a difference of clocks beyond which certificates and tokens begin to fail.
const maxSkew = 2 * time.Minute

// check is one thing that doctor looked at.
type check struct {
	Name   string    `json:"name"`
	State  string    `json:"state"`
	Detail string    `json:"detail"`
	Fix    string    `json:"fix,omitempty"`
	Kind   uerr.Kind `json:"kind,omitempty"` // of a failure
}

// checkup gathers checks.
type checkup struct {
	list []check
	show func(string)
}

func (c *checkup) add(name, state, detail, fix string) {
	c.list = append(c.list, check{Name: name, State: state, Detail: detail, Fix: fix})
}

// failed adds a failure with the reason and the next step of err.
func (c *checkup) failed(name string, err error) {
	e := uerr.From(err)
	c.list = append(c.list, check{Name: name, State: checkFail, Detail: oneLine(e.Msg), Fix: oneLine(e.Hint), Kind: e.Kind})
}

// verdict is the error with which doctor ends: the first failure's kind, or nil.
func (c *checkup) verdict() error {
	n := 0
	var first *check
	for i := range c.list {
		if c.list[i].State == checkFail {
			n++
			if first == nil {
				first = &c.list[i]
			}
		}
	}
	if first == nil {
		return nil
	}
	kind := first.Kind
	if kind == "" {
		kind = uerr.Internal
	}
	return exitCode(kind.ExitCode())
}

func (a *app) doctorCmd() *cobra.Command {
	var k kubeFlags
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Find out what is wrong with this machine, the cluster or the connection, and how to mend it",
		Long: `Doctor looks at everything that connect and intercept need, and, while this machine is connected, at the connection. It changes
nothing. Each line is a check with its outcome: ok, warn, fail, or skip for what could not be looked at. The exit code is 0 if nothing
failed, else that of the first failure (3 denied, 5 cluster, 1 and 2 for the rest).`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.doctorRun(c.Context(), &k) },
	}
	k.add(c.Flags(), true)
	a.configured(&k)
	return c
}

func (a *app) doctorRun(ctx context.Context, k *kubeFlags) error {
	show, done := a.progress()
	if !a.Terminal {
		show = func(string) {} // the checks themselves say enough
	}
	c := &checkup{show: show}
	a.diagnose(ctx, c, k)
	done()
	if err := a.print(c.list, func(w io.Writer) { writeChecks(w, c.list) }); err != nil {
		return err
	}
	return c.verdict()
}

// diagnose goes from the outside in: the machine, the cluster, the manager, the connection.
func (a *app) diagnose(ctx context.Context, c *checkup, k *kubeFlags) {
	if a.configErr != nil {
		c.failed("configuration", a.configErr)
	} else {
		c.add("configuration", checkOK, a.configFile, "")
	}
	checkMachine(ctx, c)
	st := a.checkDaemons(ctx, c)
	if ctx.Err() == nil {
		checkCluster(ctx, c, k, st.Session == nil)
	}
	if st.Session != nil {
		checkConnection(ctx, c, st)
	} else {
		c.add("connection", checkSkip, "not connected"+because(st.Ended), "connect with: doppel connect")
	}
}

func because(why string) string {
	if why == "" {
		return ""
	}
	return "; the last session ended: " + why
}

// checkDaemons looks at the two daemons and returns the user daemon's status.
func (a *app) checkDaemons(ctx context.Context, c *checkup) localapi.Status {
	var st localapi.Status
	err := a.client.Call(ctx, localapi.MethodStatus, localapi.Empty{}, &st, nil)
	switch {
	case errors.Is(err, localapi.ErrNoDaemon):
		c.add("user daemon", checkOK, "does not run; connect starts it", "")
	case err != nil:
		c.failed("user daemon", err)
	case st.Version != buildinfo.Version:
		c.add("user daemon", checkFail, fmt.Sprintf("it is doppel %s, this is %s", st.Version, buildinfo.Version), "end it with: doppel quit -s")
	default:
		c.add("user daemon", checkOK, fmt.Sprintf("runs (%s, pid %d)", st.Version, st.PID), "")
	}
	root, err := rootDaemon(ctx)
	switch {
	case err != nil:
		c.failed("root daemon", err)
	case strings.HasPrefix(root, "running"):
		c.add("root daemon", checkOK, root, "")
	default:
		if err := spawn.CanStartRoot(ctx); err != nil {
			c.failed("root daemon", err)
			if c.list[len(c.list)-1].Kind == uerr.Denied {
				c.list[len(c.list)-1].State = checkWarn // sudo may ask for a password in a terminal
			}
		} else {
			c.add("root daemon", checkOK, "does not run; connect can start it", "")
		}
	}
	return st
}

// checkCluster looks at the cluster with the user's own credentials; before says that this machine is not connected.
func checkCluster(ctx context.Context, c *checkup, k *kubeFlags, before bool) {
	cluster, err := kube.Load(k.Options)
	if err != nil {
		c.failed("kubeconfig", err)
		return
	}
	c.add("kubeconfig", checkOK, fmt.Sprintf("context %s, namespace %s", cluster.Context, cluster.Namespace), "")
	c.show("Asking the API server")
	start := time.Now()
	user, err := cluster.WhoAmI(ctx)
	if err != nil {
		c.failed("API server", err)
		return
	}
	c.add("API server", checkOK, fmt.Sprintf("%s answers in %d ms and knows you as %s", cluster.Server, time.Since(start).Milliseconds(), user), "")
	if skew := cluster.Skew(); skew.Abs() > maxSkew {
		c.add("clock", checkWarn, fmt.Sprintf("this machine's clock is %v off the cluster's", skew.Round(time.Second)), "set it by NTP; certificates and tokens fail when clocks differ")
	} else {
		c.add("clock", checkOK, "as the cluster's", "")
	}
	checkRights(ctx, c, cluster, k.managerNS)
	if before {
		checkSubnets(ctx, c, cluster)
	}
	c.show("Looking for the traffic-manager")
	m, err := cluster.Manager(ctx, k.managerNS)
	if err != nil {
		c.failed("traffic-manager", err)
		return
	}
	if m.Protocol != wire.Version {
		c.list = append(c.list, check{
			Name: "traffic-manager", State: checkFail, Kind: uerr.Conflict, Fix: "upgrade the older of the two; the manager with: doppel helm upgrade" + kube.ManagerFlag(k.managerNS),
			Detail: fmt.Sprintf("version %s speaks tunnel protocol %d, this program %d", m.Version, m.Protocol, wire.Version),
		})
	} else if m.Version != buildinfo.Version {
		c.add("traffic-manager", checkWarn, fmt.Sprintf("version %s, this program %s", m.Version, buildinfo.Version), "make them the same with: doppel helm upgrade"+kube.ManagerFlag(k.managerNS))
	} else {
		c.add("traffic-manager", checkOK, "version "+m.Version, "")
	}
	c.show("Trying the way to the traffic-manager")
	checkTransports(ctx, c, cluster, k.managerNS)
	checkReach(ctx, c, cluster, m)
	switch {
	case m.NoWebhook:
		c.add("injection webhook", checkWarn, "doppel was installed without it (admission.webhook): nothing can be intercepted", "")
		return
	case len(m.Namespaces) > 0 && !slices.Contains(m.Namespaces, cluster.Namespace):
		c.add("injection webhook", checkSkip, fmt.Sprintf("namespace %s is not one of this traffic-manager's (%s)", cluster.Namespace, strings.Join(m.Namespaces, ", ")), "choose one of them with -n")
		return
	}
	c.show("Trying the injection webhook")
	answers, err := cluster.WebhookAnswers(ctx, cluster.Namespace)
	switch {
	case err != nil:
		c.add("injection webhook", checkSkip, oneLine(err.Error()), "")
	case answers:
		c.add("injection webhook", checkOK, "the API server reaches it", "")
	default:
		c.list = append(c.list, check{
			Name: "injection webhook", State: checkFail, Kind: uerr.Cluster,
			Detail: "the API server does not get an answer from the traffic-manager, so that no intercept becomes active",
			Fix:    fmt.Sprintf("let the control plane reach port 10250 of the pods in namespace %s (firewall of a private cluster), and look at them with: kubectl -n %s get pods", k.managerNS, k.managerNS),
		})
	}
}

// checkTransports tries the ways to the traffic-manager until one works.
func checkTransports(ctx context.Context, c *checkup, cluster *kube.Cluster, managerNS string) {
	var first error
	for _, t := range kube.Transports {
		start := time.Now()
		conn, err := cluster.Attach(ctx, managerNS, t)
		switch {
		case err == nil:
			_ = conn.Close()
			detail := fmt.Sprintf("%s connects in %d ms", t, time.Since(start).Milliseconds())
			if first == nil {
				c.add("way in", checkOK, detail, "")
			} else {
				c.add("way in", checkWarn, fmt.Sprintf("%s, slower than the service proxy, which fails: %v", detail, first),
					"let the API server reach port 10250 of the traffic-manager's pod, and let proxies before the API server pass HTTP upgrades")
			}
			return
		case first == nil && !kube.Obstructed(err):
			c.failed("way in", err)
			return
		case first == nil:
			first = err
		}
	}
	c.failed("way in", first)
}

// checkRights asks for each right that connect and intercept need.
func checkRights(ctx context.Context, c *checkup, cluster *kube.Cluster, managerNS string) {
	c.show("Asking what you may do")
	for _, set := range []struct {
		name, fix string
		rights    []kube.Right
		state     string
	}{
		{"right to connect", "ask an administrator to bind role doppel-connect in namespace " + managerNS, kube.ConnectRights(managerNS), checkFail},
		{"right to intercept", "ask an administrator to bind role doppel-intercept in namespace " + cluster.Namespace, kube.InterceptRights(cluster.Namespace), checkWarn},
	} {
		var missing []string
		var err error
		for _, r := range set.rights {
			var may bool
			if may, err = cluster.May(ctx, r); err != nil {
				break
			}
			if !may {
				missing = append(missing, r.String())
			}
		}
		switch {
		case err != nil:
			c.failed(set.name, err)
		case len(missing) > 0:
			c.list = append(c.list, check{Name: set.name, State: set.state, Kind: uerr.Denied, Detail: "you may not " + strings.Join(missing, ", nor "), Fix: set.fix})
		default:
			c.add(set.name, checkOK, "you have it", "")
		}
	}
}

// checkReach asks which namespaces a session would get to.
func checkReach(ctx context.Context, c *checkup, cluster *kube.Cluster, m kube.ManagerInfo) {
	if m.ReachAll {
		c.add("reach", checkOK, "this cluster lets everybody who may connect reach everything", "")
		return
	}
	r, err := cluster.ReachThrough(ctx, m)
	if err != nil {
		c.failed("reach", err)
		return
	}
	got := localapi.Reach{Namespaces: r.Namespaces, Outside: r.Outside}
	if !slices.Contains(r.Namespaces, "*") && !slices.Contains(r.Namespaces, cluster.Namespace) {
		c.add("reach", checkWarn, fmt.Sprintf("you may reach %s, and not namespace %s", reaches(got), cluster.Namespace), "ask an administrator to bind role doppel-reach there")
		return
	}
	c.add("reach", checkOK, "you may reach "+reaches(got), "")
}

// checkConnection looks at a session that is there.
func checkConnection(ctx context.Context, c *checkup, st localapi.Status) {
	s := st.Session
	switch {
	case s.Tunnel != "up":
		c.list = append(c.list, check{Name: "tunnel", State: checkFail, Kind: uerr.Cluster, Detail: s.Tunnel, Fix: "it is dialled again by itself; see the checks above for what stands in the way"})
	case s.LatencyMS == 0:
		c.list = append(c.list, check{Name: "tunnel", State: checkFail, Kind: uerr.Cluster, Detail: "up, but a ping got no answer", Fix: fmt.Sprintf("look at the manager with: kubectl -n %s logs deploy/traffic-manager", s.ManagerNamespace)})
	default:
		c.add("tunnel", checkOK, fmt.Sprintf("a ping takes %.1f ms", s.LatencyMS), "")
	}
	if r := st.Root; r != nil {
		if len(r.Routes) == 0 {
			c.add("routes", checkFail, "no subnet of the cluster is routed into "+r.Interface, "see the problems below; a VPN may have the same subnets")
		} else {
			c.add("routes", checkOK, fmt.Sprintf("%d subnets into %s", len(r.Routes), r.Interface), "")
		}
		if len(s.Subnets) > 0 {
			c.list = append(c.list, judgeSubnets(s.Subnets))
		}
		if r.DNS == "" || r.DNS == "none" {
			c.add("DNS", checkFail, "the laptop's DNS is not captured: cluster names do not resolve", "see the problems below")
		} else {
			c.add("DNS", checkOK, fmt.Sprintf("captured by %s, other names from %s", r.DNS, strings.Join(r.Resolvers, ", ")), "")
			checkLookup(ctx, c)
		}
	}
	for _, p := range s.Problems {
		c.add("problem", checkWarn, p, "")
	}
}

func writeChecks(w io.Writer, list []check) {
	width := 0
	for _, c := range list {
		width = max(width, len(c.Name))
	}
	count := map[string]int{}
	for _, c := range list {
		count[c.State]++
		fmt.Fprintf(w, "%-4s  %-*s  %s\n", c.State, width, c.Name, c.Detail)
		if c.Fix != "" && c.State != checkOK {
			fmt.Fprintf(w, "      %-*s  -> %s\n", width, "", c.Fix)
		}
	}
	fmt.Fprintf(w, "%d ok, %d warn, %d fail, %d skip\n", count[checkOK], count[checkWarn], count[checkFail], count[checkSkip])
}
