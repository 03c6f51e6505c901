package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/helm"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) helmCmd() *cobra.Command {
	c := &cobra.Command{Use: "helm", Short: "Install, upgrade or uninstall the traffic-manager with the embedded Helm chart"}
	c.AddCommand(
		a.chartCmd(helm.Install, "Install the traffic-manager"),
		a.chartCmd(helm.Upgrade, "Upgrade the traffic-manager, keeping its values"),
		a.chartCmd(helm.Uninstall, "Uninstall the traffic-manager and its resources; agents stay (see: doppel uninstall)"),
	)
	return c
}

// chartCmd is one verb of the chart.
func (a *app) chartCmd(verb helm.Verb, short string) *cobra.Command {
	var k kubeFlags
	var o helm.Options
	c := &cobra.Command{
		Use: string(verb), Short: short, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if a.configErr != nil {
				return a.configErr
			}
			cluster, err := kube.Load(k.Options)
			if err != nil {
				return err
			}
			show, done := a.progress()
			o.Namespace = k.managerNS
			injects := true
			err = a.helm(c.Context(), helm.Request{Verb: verb, Cluster: k.Options, Options: o}, show)
			if err == nil && o.Wait {
				show("waiting until the API server reaches the injection webhook")
				injects = awaitWebhook(c.Context(), cluster, k.managerNS) || c.Context().Err() != nil
			}
			done()
			if err != nil {
				return err
			}
			if !injects {
				fmt.Fprintln(a.Err, "doppel: warning: the API server does not reach the injection webhook, so that pods get no agents; why: doppel doctor")
			}
			return a.print(localapi.Empty{}, func(w io.Writer) {
				fmt.Fprintf(w, "Traffic-manager in namespace %s: %s done\n", o.Namespace, verb)
			})
		},
	}
	k.add(c.Flags(), false)
	a.configured(&k)
	if verb != helm.Uninstall {
		addValues(c.Flags(), &o)
	}
	if verb == helm.Upgrade {
		c.Flags().BoolVar(&o.ResetValues, "reset-values", false, "forget the values of earlier installs and upgrades")
	}
	return c
}

// How long a new traffic-manager's webhook is waited for, and the pause between two looks: kube-proxy and the API server know its pod a moment
// after that is ready, and a pod that is made before then gets no agent.
const (
	webhookPatience = 10 * time.Second
	webhookPause    = 200 * time.Millisecond
)

// awaitWebhook waits until pods get their agents; false says that they do not. What may not be tried counts as well.
func awaitWebhook(ctx context.Context, cluster *kube.Cluster, managerNS string) bool {
	ctx, cancel := context.WithTimeout(ctx, webhookPatience)
	defer cancel()
	m, err := cluster.Manager(ctx, managerNS)
	if err != nil || m.NoWebhook {
		return true
	}
	namespace := corev1.NamespaceDefault
	if len(m.Namespaces) > 0 {
		namespace = m.Namespaces[0]
	}
	for {
		answers, err := cluster.WebhookAnswers(ctx, namespace)
		switch {
		case answers:
			return true
		case ctx.Err() != nil:
			return false
		case err != nil:
			return true
		}
		select {
		case <-ctx.Done():
		case <-time.After(webhookPause):
		}
	}
}

// helm has the chart's program do something.
func (a *app) helm(ctx context.Context, r helm.Request, show func(string)) error {
	program, err := spawn.Find(helm.Program)
	if err != nil {
		return err
	}
	return helm.Run(ctx, program, r, show)
}

func addValues(f *pflag.FlagSet, o *helm.Options) {
	f.StringArrayVarP(&o.ValueFiles, "values", "f", nil, "file with values for the chart (may be repeated)")
	f.StringArrayVar(&o.Set, "set", nil, "a value for the chart, KEY=VALUE (may be repeated)")
	f.StringArrayVar(&o.SetString, "set-string", nil, "a value that is text whatever it looks like, as 2024 or true, KEY=VALUE (may be repeated)")
	f.BoolVar(&o.CreateNamespace, "create-namespace", true, "create the namespace if it is missing")
	f.BoolVar(&o.Wait, "wait", true, "wait until the traffic-manager runs, or say why it does not")
	f.DurationVar(&o.Timeout, "timeout", helm.DefaultTimeout, "how long to wait")
}

func (a *app) uninstallCmd() *cobra.Command {
	var k kubeFlags
	var agent string
	var all, everything bool
	c := &cobra.Command{
		Use:   "uninstall {--agent WORKLOAD | --all-agents | --everything}",
		Short: "Remove traffic-agents, or everything of doppel, from the cluster",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			n := 0
			for _, b := range []bool{agent != "", all, everything} {
				if b {
					n++
				}
			}
			if n != 1 {
				return uerr.New(uerr.Usage, "see: doppel uninstall --help", "say what to remove: one of --agent, --all-agents, --everything")
			}
			return a.uninstallRun(c.Context(), &k, agent, everything, c.Flags().Changed)
		},
	}
	k.add(c.Flags(), true)
	a.configured(&k)
	c.Flags().Lookup("namespace").Usage = "namespace of the workload (default: the connected one, or the context's)"
	c.Flags().StringVar(&agent, "agent", "", "remove the agent of one workload in the namespace, NAME or KIND/NAME")
	c.Flags().BoolVar(&all, "all-agents", false, "remove all agents in all namespaces of the traffic-manager, but for those that pod templates ask for")
	c.Flags().BoolVar(&everything, "everything", false, "remove agents, sessions, the traffic-manager, the resource types if no other needs them, its namespace if doppel created it, and stop the daemons")
	return c
}

// uninstallTimeout bounds the rolling restarts that take agents out, and the deletion of the namespace.
const uninstallTimeout = 3 * time.Minute

func (a *app) uninstallRun(ctx context.Context, k *kubeFlags, agent string, everything bool, typed func(flag string) bool) error {
	if a.configErr != nil {
		return a.configErr
	}
	cluster, err := kube.Load(k.Options)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, uninstallTimeout)
	defer cancel()
	if agent != "" && !typed("namespace") { // the configuration's is where connect goes, and this machine may have gone elsewhere
		if err := a.useConnected(ctx, cluster); err != nil {
			return err
		}
	}
	show, done := a.progress()
	defer done()
	if everything {
		if err := a.uninstallEverything(ctx, cluster, k, show); err != nil {
			return err
		}
	} else {
		ns, only := "", func(kube.Workload) bool { return true }
		if agent != "" {
			ns, only = cluster.Namespace, func(w kube.Workload) bool { return kube.Names(agent, w.Kind, w.Name) }
		}
		if err := refuseUnknown(ctx, cluster, agent); err != nil {
			return err
		}
		namespaces := []string{ns}
		if agent != "" {
			if err := cluster.RefuseKept(ctx, ns, agent); err != nil {
				return err
			}
		} else {
			if namespaces, err = cluster.ManagedNamespaces(ctx, k.managerNS); err != nil {
				return err
			}
		}
		for _, ns := range namespaces {
			if err := cluster.RefuseIntercepted(ctx, ns, agent); err != nil {
				return err
			}
		}
		for _, ns := range namespaces {
			if err := cluster.RemoveAgents(ctx, ns, only, show); err != nil {
				return err
			}
		}
	}
	done()
	return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintln(w, "Uninstalled") })
}

// useConnected makes the namespace that this machine is connected to the cluster's, if it is connected to that cluster: what list shows by
// default is what can be named.
func (a *app) useConnected(ctx context.Context, cluster *kube.Cluster) error {
	var st localapi.Status
	err := a.client.Call(ctx, localapi.MethodStatus, localapi.StatusRequest{}, &st, nil)
	if errors.Is(err, localapi.ErrNoDaemon) {
		return nil
	}
	found := ""
	for _, s := range sessions(st) {
		switch {
		case s.Context != cluster.Context || s.Server != cluster.Server:
		case found != "" && found != s.Namespace:
			return uerr.New(uerr.Usage, "say which with --namespace", "this machine is connected to namespaces %s and %s of that cluster", found, s.Namespace)
		default:
			found = s.Namespace
			cluster.Namespace = s.Namespace
		}
	}
	return err
}

// sessions are those of this machine.
func sessions(st localapi.Status) []localapi.Session {
	if st.Session == nil {
		return nil
	}
	return append([]localapi.Session{*st.Session}, st.Others...)
}

// refuseUnknown is an error if the namespace has no workload of that name; "" is none in particular.
func refuseUnknown(ctx context.Context, cluster *kube.Cluster, name string) error {
	if name == "" {
		return nil
	}
	list, err := cluster.Workloads(ctx, cluster.Namespace)
	if err != nil || slices.ContainsFunc(list, func(w kube.Workload) bool { return kube.Names(name, w.Kind, w.Name) }) {
		return err
	}
	return uerr.New(uerr.NotFound, "choose another namespace with -n", "no workload %q in namespace %s", name, cluster.Namespace)
}

func (a *app) uninstallEverything(ctx context.Context, cluster *kube.Cluster, k *kubeFlags, show func(string)) error {
	namespaces, err := cluster.ManagedNamespaces(ctx, k.managerNS)
	if err != nil {
		return err
	}
	manager := helm.Request{Verb: helm.Removable, Cluster: k.Options, Options: helm.Options{Namespace: k.managerNS}}
	if err := a.helm(ctx, manager, show); err != nil {
		return err // before anybody's session ends
	}
	show("Ending the session of this machine")
	if err := a.stopDaemons(ctx, false); err != nil {
		return err
	}
	show("Ending all sessions and intercepts")
	if err := cluster.EndAll(ctx, k.managerNS, namespaces); err != nil {
		return err
	}
	// The manager goes first: it would add agents again to pods that always have one.
	show("Uninstalling the traffic-manager")
	manager.Verb = helm.Remove
	if err := a.helm(ctx, manager, show); err != nil {
		return err
	}
	for _, ns := range namespaces {
		if err := cluster.RemoveAgents(ctx, ns, nil, show); err != nil {
			return err
		}
	}
	return nil
}
