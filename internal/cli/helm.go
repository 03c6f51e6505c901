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
	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/internal/chart"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) helmCmd() *cobra.Command {
	c := &cobra.Command{Use: "helm", Short: "Install, upgrade or uninstall the traffic-manager with the embedded Helm chart"}
	c.AddCommand(
		a.chartCmd("install", "Install the traffic-manager", chart.Install),
		a.chartCmd("upgrade", "Upgrade the traffic-manager, keeping its values", chart.Upgrade),
		a.chartCmd("uninstall", "Uninstall the traffic-manager and its resources; agents stay (see: doppel uninstall)", chart.Uninstall),
	)
	return c
}

// chartCmd is one verb of the chart.
func (a *app) chartCmd(verb, short string, do func(context.Context, *rest.Config, chart.Options) error) *cobra.Command {
	var k kubeFlags
	var o chart.Options
	c := &cobra.Command{
		Use: verb, Short: short, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if a.configErr != nil {
				return a.configErr
			}
			cluster, err := kube.Load(k.Options)
			if err != nil {
				return err
			}
			show, done := a.progress()
			o.Namespace, o.Progress = k.managerNS, show
			err = do(c.Context(), cluster.RESTConfig(), o)
			done()
			if err != nil {
				return err
			}
			return a.print(localapi.Empty{}, func(w io.Writer) {
				fmt.Fprintf(w, "Traffic-manager in namespace %s: %s done\n", o.Namespace, verb)
			})
		},
	}
	k.add(c.Flags(), false)
	a.configured(&k)
	if verb != "uninstall" {
		addValues(c.Flags(), &o)
	}
	if verb == "upgrade" {
		c.Flags().BoolVar(&o.ResetValues, "reset-values", false, "forget the values of earlier installs and upgrades")
	}
	return c
}

func addValues(f *pflag.FlagSet, o *chart.Options) {
	f.StringArrayVarP(&o.ValueFiles, "values", "f", nil, "file with values for the chart (may be repeated)")
	f.StringArrayVar(&o.Set, "set", nil, "a value for the chart, KEY=VALUE (may be repeated)")
	f.BoolVar(&o.CreateNamespace, "create-namespace", true, "create the namespace if it is missing")
	f.BoolVar(&o.Wait, "wait", true, "wait until the traffic-manager runs, or say why it does not")
	f.DurationVar(&o.Timeout, "timeout", chart.DefaultTimeout, "how long to wait")
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
			return a.uninstallRun(c.Context(), &k, agent, everything)
		},
	}
	k.add(c.Flags(), true)
	a.configured(&k)
	c.Flags().Lookup("namespace").Usage = "namespace of the workload (default: the context's)"
	c.Flags().StringVar(&agent, "agent", "", "remove the agent of one workload in the namespace")
	c.Flags().BoolVar(&all, "all-agents", false, "remove all agents in all namespaces")
	c.Flags().BoolVar(&everything, "everything", false, "remove agents, sessions, the traffic-manager, its resource types, its namespace if doppel created it, and stop the daemons")
	return c
}

// uninstallTimeout bounds the rolling restarts that take agents out, and the deletion of the namespace.
const uninstallTimeout = 3 * time.Minute

func (a *app) uninstallRun(ctx context.Context, k *kubeFlags, agent string, everything bool) error {
	if a.configErr != nil {
		return a.configErr
	}
	cluster, err := kube.Load(k.Options)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, uninstallTimeout)
	defer cancel()
	show, done := a.progress()
	defer done()
	if everything {
		if err := a.uninstallEverything(ctx, cluster, k.managerNS, show); err != nil {
			return err
		}
	} else {
		ns, only := "", func(kube.Workload) bool { return true }
		if agent != "" {
			ns, only = cluster.Namespace, func(w kube.Workload) bool { return w.Name == agent || strings.EqualFold(w.Kind+"/"+w.Name, agent) }
		}
		if err := refuseUnknown(ctx, cluster, agent); err != nil {
			return err
		}
		if err := cluster.RefuseIntercepted(ctx, ns, agent); err != nil {
			return err
		}
		if err := cluster.RemoveAgents(ctx, ns, only, show); err != nil {
			return err
		}
	}
	done()
	return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintln(w, "Uninstalled") })
}

// refuseUnknown is an error if the namespace has no workload of that name; "" is none in particular.
func refuseUnknown(ctx context.Context, cluster *kube.Cluster, name string) error {
	if name == "" {
		return nil
	}
	list, err := cluster.Workloads(ctx, cluster.Namespace)
	if err != nil || slices.ContainsFunc(list, func(w kube.Workload) bool { return w.Name == name }) {
		return err
	}
	return uerr.New(uerr.NotFound, "choose another namespace with -n", "no workload %q in namespace %s", name, cluster.Namespace)
}

func (a *app) uninstallEverything(ctx context.Context, cluster *kube.Cluster, managerNS string, show func(string)) error {
	show("Ending the session of this machine")
	if err := a.stopDaemons(ctx); err != nil {
		return err
	}
	show("Ending all sessions and intercepts")
	if err := cluster.EndAll(ctx, managerNS); err != nil {
		return err
	}
	if err := cluster.RemoveAgents(ctx, "", nil, show); err != nil {
		return err
	}
	show("Uninstalling the traffic-manager")
	err := chart.Uninstall(ctx, cluster.RESTConfig(), chart.Options{Namespace: managerNS, Progress: show})
	if errors.Is(err, chart.ErrNotInstalled) {
		return nil
	}
	return err
}
