package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) interceptCmd() *cobra.Command {
	var req localapi.InterceptRequest
	var m matchFlags
	c := &cobra.Command{
		Use:   "intercept NAME -p LOCAL[:REMOTE]",
		Short: "Send a workload's traffic to a process on this machine",
		Long: `Intercept sends the connections of one port of a workload to a local process. A traffic-agent is put into the workload's
pods first (a rolling restart; with --recreate also where that interrupts the workload). When the local process or this machine does not
answer, the app in the cluster does. A workload is a Deployment, StatefulSet, DaemonSet, a ReplicaSet or a pod without owner.

REMOTE is a service port's or container port's name or number, with /udp or /tcp behind it where that matters; without it the workload's
only port is meant.

With --http-… flags only the HTTP requests come that fulfil all of them (HTTP/1.1 and HTTP/2 without TLS), each by
itself, whatever connection it is on; all else goes to the app untouched. Several people can take different requests of one port. The more
specific match wins; one that would leave it open who gets a request is refused with the name of the one who was first.`,
		Example: `  doppel intercept web -p 8080           web's only port comes to 127.0.0.1:8080
  doppel intercept web -p 8080:http -n shop
  doppel intercept db -w statefulset/db -p 5432 --recreate
  doppel intercept dns -p 5353:53/udp
  doppel intercept web -p 8080 --http-match=x-user=louise --http-path-prefix=/api/`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			req.Name = args[0]
			var err error
			if req.Match, err = m.rule(); err != nil {
				return err
			}
			return a.interceptRun(c.Context(), req)
		},
	}
	f := c.Flags()
	f.StringVarP(&req.Workload, "workload", "w", "", "the workload, as NAME or KIND/NAME (default: NAME)")
	f.StringVarP(&req.Namespace, "namespace", "n", "", "namespace of the workload (default: the connected one)")
	f.StringVarP(&req.Port, "port", "p", "", "local port, and the port to take if the workload has several: LOCAL[:REMOTE]")
	f.StringVar(&req.Address, "address", cmp.Or(a.config.Intercept.Address, defaultAddress), "where the local process listens")
	f.StringVar(&req.Service, "service", "", "the service, if several lead to the workload")
	f.StringVar(&req.Container, "container", "", "the container, if several have such a port")
	f.Int32SliceVar(&req.ToPod, "to-pod", nil, "TCP ports that containers beside the app serve on localhost: the same ports of 127.0.0.1 here lead to them")
	m.register(f)
	f.BoolVar(&req.Takeover, "takeover", false, "end intercepts of others that are in the way (needs the right to takeover intercepts)")
	f.BoolVar(&req.Recreate, "recreate", false, "replace the workload's pods even if that interrupts it for a moment")
	useFlag(f, &req.Use, "the only one")
	f.DurationVar(&req.Timeout, "timeout", cmp.Or(time.Duration(a.config.Intercept.Timeout), defaultInterceptTimeout), "how long it may take to become active")
	return c
}

func (a *app) interceptRun(ctx context.Context, req localapi.InterceptRequest) error {
	if a.configErr != nil {
		return a.configErr
	}
	if req.Port == "" {
		return uerr.New(uerr.Usage, "for example: doppel intercept "+req.Name+" -p 8080", "no port: which local port shall the traffic come to?")
	}
	var in localapi.Intercept
	if err := a.call(ctx, localapi.MethodIntercept, req, &in); err != nil {
		return err
	}
	return a.print(in, func(w io.Writer) {
		fmt.Fprintf(w, "Using %s %s\n", in.Kind, in.Workload)
		writeIntercept(w, in)
	})
}

func writeIntercept(w io.Writer, in localapi.Intercept) {
	fmt.Fprintf(w, "   Intercept name : %s\n", in.Name)
	fmt.Fprintf(w, "   State          : %s\n", in.State)
	fmt.Fprintf(w, "   Workload kind  : %s\n", in.Kind)
	if in.Mine {
		fmt.Fprintf(w, "   Destination    : %s\n", in.Target)
	} else {
		fmt.Fprintf(w, "   Held by        : %s\n", in.User)
	}
	if in.Port != 0 {
		fmt.Fprintf(w, "   Container port : %d\n", in.Port)
	}
	if in.Match.IsZero() {
		fmt.Fprintf(w, "   Intercepting   : all %s\n", map[bool]string{false: "TCP connections", true: "UDP datagrams"}[in.Protocol == "UDP"])
	} else {
		fmt.Fprintf(w, "   Intercepting   : HTTP requests that match all of:\n")
		for _, l := range in.Match.Lines() {
			fmt.Fprintf(w, "                    %s\n", l)
		}
	}
	for _, p := range in.ToPod {
		fmt.Fprintf(w, "   To the pod     : 127.0.0.1:%d\n", p)
	}
	if in.Message != "" {
		fmt.Fprintf(w, "   Message        : %s\n", in.Message)
	}
}

func (a *app) leaveCmd() *cobra.Command {
	var req localapi.LeaveRequest
	c := &cobra.Command{
		Use:   "leave NAME",
		Short: "End an intercept; the app in the cluster answers again",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			req.Name = args[0]
			if err := a.call(c.Context(), localapi.MethodLeave, req, nil); err != nil {
				return err
			}
			return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintf(w, "Left %s\n", args[0]) })
		},
	}
	useFlag(c.Flags(), &req.Use, "the one with that intercept")
	return c
}

func (a *app) listCmd() *cobra.Command {
	var req localapi.ListRequest
	var onlyIntercepts bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the workloads that can be or are intercepted",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return a.listRun(c.Context(), req, onlyIntercepts) },
	}
	c.Flags().StringVarP(&req.Namespace, "namespace", "n", "", "namespace (default: the connected one)")
	c.Flags().BoolVarP(&req.AllNamespaces, "all-namespaces", "A", false, "all namespaces")
	c.Flags().BoolVarP(&onlyIntercepts, "intercepts", "i", false, "only intercepted workloads")
	useFlag(c.Flags(), &req.Use, "the only one")
	return c
}

func (a *app) listRun(ctx context.Context, req localapi.ListRequest, onlyIntercepts bool) error {
	var res localapi.ListResult
	if err := a.call(ctx, localapi.MethodList, req, &res); err != nil {
		return err
	}
	if onlyIntercepts {
		kept := []localapi.Workload{}
		for _, w := range res.Workloads {
			if len(w.Intercepts) > 0 {
				kept = append(kept, w)
			}
		}
		res.Workloads = kept
	}
	return a.print(res, func(w io.Writer) {
		if len(res.Workloads) == 0 {
			what := map[bool]string{true: "intercepts", false: "workloads"}[onlyIntercepts]
			fmt.Fprintf(w, "No %s in %s\n", what, cmp.Or(res.Namespace, "any namespace"))
			return
		}
		writeList(w, res, req.AllNamespaces)
	})
}

func writeList(w io.Writer, res localapi.ListResult, withNamespace bool) {
	label := func(l localapi.Workload) string {
		if withNamespace {
			return l.Namespace + "/" + l.Name
		}
		return l.Name
	}
	width := 0
	for _, l := range res.Workloads {
		width = max(width, len(label(l)))
	}
	for _, l := range res.Workloads {
		fmt.Fprintf(w, "%-*s: %s\n", width, label(l), workloadState(l))
		for _, in := range l.Intercepts {
			writeIntercept(w, in)
		}
	}
}

func workloadState(l localapi.Workload) string {
	switch {
	case len(l.Intercepts) > 0:
		return "intercepted"
	case l.NotReady != "":
		return "cannot be intercepted: " + l.NotReady
	case l.Agent:
		return "ready to intercept (traffic-agent already installed)"
	}
	return "ready to intercept (traffic-agent not yet installed)"
}
