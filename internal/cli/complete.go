package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
)

// completeTimeout bounds what the shell waits for names.
const completeTimeout = 2 * time.Second

// names gives words for the shell to complete.
type names func(ctx context.Context, c *cobra.Command) []string

// complete makes a completion of names; whatever goes wrong, there are none: a shell has no room for errors.
func complete(fn names) cobra.CompletionFunc {
	return func(c *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		ctx := c.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, completeTimeout)
		defer cancel()
		list := slices.DeleteFunc(fn(ctx, c), func(s string) bool { return !strings.HasPrefix(s, typed) })
		slices.Sort(list)
		return slices.Compact(list), cobra.ShellCompDirectiveNoFileComp
	}
}

// completions gives each command of the tree the names that its arguments and flags can have.
func (a *app) completions(root *cobra.Command) {
	flags := map[string]names{
		"context": a.contextNames, "namespace": a.namespaceNames, "manager-namespace": a.namespaceNames, "workload": a.workloadNames,
		"agent": a.workloadNames, "use": a.connectionNames,
		"output": func(context.Context, *cobra.Command) []string { return []string{"text", "json", "yaml"} },
	}
	args := map[string]names{"intercept": a.workloadNames, "wiretap": a.workloadNames, "replace": a.workloadNames, "ingest": a.workloadNames, "leave": a.interceptNames, "sftp": a.interceptNames, "why": a.interceptNames, "loglevel": levelNames}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for name, fn := range flags {
			if c.Flags().Lookup(name) != nil || c.PersistentFlags().Lookup(name) != nil {
				_ = c.RegisterFlagCompletionFunc(name, complete(fn)) // only an unknown flag is an error
			}
		}
		if fn := args[c.Name()]; fn != nil && c.Parent() == root {
			first := complete(fn)
			c.ValidArgsFunction = func(c *cobra.Command, done []string, typed string) ([]string, cobra.ShellCompDirective) {
				if len(done) > 0 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return first(c, done, typed)
			}
		} else if c.ValidArgsFunction == nil && c.Name() != "connect" && !c.HasSubCommands() {
			c.ValidArgsFunction = cobra.NoFileCompletions
		}
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(root)
}

func levelNames(context.Context, *cobra.Command) []string {
	return []string{"error", "warn", "info", "debug"}
}

// options are the cluster that the flags typed so far choose.
func (a *app) options(c *cobra.Command) kube.Options {
	get := func(flag string) string {
		if f := c.Flags().Lookup(flag); f != nil {
			return f.Value.String()
		}
		return ""
	}
	o := kube.Options{Kubeconfig: get("kubeconfig"), Context: get("context")}
	if o.Kubeconfig == "" {
		o.Kubeconfig = a.config.Connect.Kubeconfig
	}
	if o.Context == "" {
		o.Context = a.config.Connect.Context
	}
	return o
}

func (a *app) contextNames(_ context.Context, c *cobra.Command) []string {
	o := a.options(c)
	o.Context = ""
	return kube.Contexts(o)
}

func (a *app) namespaceNames(ctx context.Context, c *cobra.Command) []string {
	cluster, err := kube.Load(a.options(c))
	if err != nil {
		return nil
	}
	list, err := cluster.Namespaces(ctx)
	if err != nil {
		return nil
	}
	return list
}

// workloadNames asks the user daemon while it is connected, else the cluster.
func (a *app) workloadNames(ctx context.Context, c *cobra.Command) []string {
	ns := ""
	if f := c.Flags().Lookup("namespace"); f != nil {
		ns = f.Value.String()
	}
	var res localapi.ListResult
	if err := a.client.Call(ctx, localapi.MethodList, localapi.ListRequest{Namespace: ns}, &res, nil); err == nil {
		var out []string
		for _, w := range res.Workloads {
			out = append(out, w.Name)
		}
		return out
	}
	o := a.options(c)
	o.Namespace = ns
	cluster, err := kube.Load(o)
	if err != nil {
		return nil
	}
	list, err := cluster.Workloads(ctx, cluster.Namespace)
	if err != nil {
		return nil
	}
	var out []string
	for _, w := range list {
		out = append(out, w.Name)
	}
	return out
}

func (a *app) interceptNames(ctx context.Context, _ *cobra.Command) []string {
	var st localapi.Status
	if err := a.client.Call(ctx, localapi.MethodStatus, localapi.Empty{}, &st, nil); err != nil {
		return nil
	}
	var out []string
	for _, s := range sessions(st) {
		for _, i := range s.Intercepts {
			out = append(out, i.Name)
		}
	}
	return out
}

func (a *app) connectionNames(ctx context.Context, _ *cobra.Command) []string {
	var st localapi.Status
	if err := a.client.Call(ctx, localapi.MethodStatus, localapi.StatusRequest{}, &st, nil); err != nil || st.Session == nil {
		return nil
	}
	out := []string{st.Session.Connection}
	for _, s := range st.Others {
		out = append(out, s.Connection)
	}
	return out
}
