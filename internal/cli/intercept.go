package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) interceptCmd() *cobra.Command {
	f := interceptFlags{app: &appFlags{}, preview: &previewFlags{}}
	c := &cobra.Command{
		Use:   "intercept NAME -p LOCAL[:REMOTE]... [-- COMMAND [ARG...]]",
		Short: "Send a workload's traffic to a process on this machine",
		Long: `Intercept sends the connections of ports of a workload to a local process. A traffic-agent is put into the workload's
pods first (a rolling restart; with --recreate also where that interrupts the workload). When the local process or this machine does not
answer, the app in the cluster does. A workload is a Deployment, StatefulSet, DaemonSet, Argo Rollout, a ReplicaSet or a pod
without owner.

REMOTE is a service port's or container port's name or number, with /udp or /tcp behind it where that matters; without it the workload's
only port is meant. With several -p all of the ports are taken, or none.

With --http-… flags only the HTTP requests come that fulfil all of them (HTTP/1.1 and HTTP/2), each by
itself, whatever connection it is on; all else goes to the app untouched. If the port speaks TLS, the annotation doppel.dev/tls of its pods has to name
the secret of its certificate; requests come here without TLS, or with --local-tls in TLS of this machine's own. Several people can take different requests of one port. The more
specific match wins; one that would leave it open who gets a request is refused with the name of the one who was first.

The volumes of the app's container are mounted on this machine, each at its own path below one directory (DOPPEL_ROOT), as far as the cluster
allows it. With a command after --, intercept runs it with the app's environment, ends with its exit code, and the intercept ends too.
This machine's own PATH, HOME and the like stay.

With --preview-url a link is made through which others see it, at the relay that the cluster is joined to and you are logged in at (doppel login): the
requests that come through the link are taken, and besides those that match --http-… flags; --http-match=all takes all. Where requests enter the
cluster is asked for once. At first your team can see it; see: doppel preview. Once you are logged in and that was said, an intercept without
the flag has a link for your team as well, besides what it takes; --preview-url=false makes none.`,
		Example: `  doppel intercept web -p 8080           web's only port comes to 127.0.0.1:8080
  doppel intercept web -p 8080:http -p 9090:grpc -p 5353:dns/udp -n shop
  doppel intercept db -w statefulset/db -p 5432 --recreate
  doppel intercept dns -p 5353:53/udp
  doppel intercept web -p 8080 --http-match=x-user=louise --http-path-prefix=/api/
  doppel intercept web -p 8080 --env-file web.env --mount ./web-files
  doppel intercept web -p 8080 -- go run ./cmd/web`,
		Args: nameAndCommand,
		RunE: f.run(a),
	}
	f.register(a, c)
	f.app.register(c)
	f.takeover(c)
	f.preview.register(c.Flags())
	return c
}

func (a *app) wiretapCmd() *cobra.Command {
	f := interceptFlags{req: localapi.InterceptRequest{Mode: localapi.ModeWiretap}}
	c := &cobra.Command{
		Use:   "wiretap NAME -p LOCAL[:REMOTE]...",
		Short: "Send a copy of a workload's traffic to a process on this machine",
		Long: `Wiretap sends a copy of what clients send to ports of a workload to a local process. Who answers stays as it is, the app or somebody's
intercept; what the local process answers is dropped. A copy never holds up its original: where the local process or this machine cannot keep
up, that copy ends. Any number of people can wiretap a port, beside each other and beside intercepts.

A traffic-agent is put into the workload's pods first, as by doppel intercept; workloads, ports and flags are as there. With --http-… flags
only the HTTP requests that match are copied, each whole; one of HTTP/2 arrives as HTTP/1.1. End it with doppel leave.`,
		Example: `  doppel wiretap web -p 8080             what comes to web's only port comes to 127.0.0.1:8080 too
  doppel wiretap web -p 8080 --http-path-prefix=/api/ --http-method=POST`,
		Args: cobra.ExactArgs(1),
		RunE: f.run(a),
	}
	f.register(a, c)
	return c
}

func (a *app) replaceCmd() *cobra.Command {
	f := interceptFlags{req: localapi.InterceptRequest{Mode: localapi.ModeReplace}, app: &appFlags{}}
	c := &cobra.Command{
		Use:   "replace NAME [-p LOCAL[:REMOTE]]... [-- COMMAND [ARG...]]",
		Short: "Put a process on this machine in the place of a workload's container, which does not run meanwhile",
		Long: `Replace sends the connections of all ports of a container to a local process, and lets the container itself not run while it
lasts: in new pods (a rolling restart) something that does nothing is in its place, so that what it does besides, such as reading a queue, is
left to you too. A port comes to the same number here unless -p says otherwise.

There is no app that could answer instead. When the local process or this machine does not answer, connections are refused; when this
machine is gone for as long as a session is kept, the app is brought back. "doppel leave" restarts the workload, and the traffic comes here until
the app is back. One container can be replaced by one person, and its ports have to be free of intercepts.

The container's environment and volumes come to this machine, and a command after -- runs with them, as by doppel intercept. Variables that only
the image sets are not among them: nothing of it runs.`,
		Example: `  doppel replace worker
  doppel replace web -p 3000:http --container app
  doppel replace worker --env-file worker.env -- go run ./cmd/worker`,
		Args: nameAndCommand,
		RunE: f.run(a),
	}
	f.register(a, c)
	f.app.register(c)
	f.takeover(c)
	return c
}

func (a *app) ingestCmd() *cobra.Command {
	f := interceptFlags{req: localapi.InterceptRequest{Mode: localapi.ModeIngest}, app: &appFlags{}}
	c := &cobra.Command{
		Use:   "ingest NAME [-- COMMAND [ARG...]]",
		Short: "Use a workload's environment and files on this machine, without its traffic",
		Long: `Ingest brings the environment and the volumes of a workload's container to this machine, as doppel intercept does, and takes none of
its traffic: a process here works beside the app, not in its place. The workload needs no port, and any number of people can do it, beside each
other and beside intercepts.

A traffic-agent is put into the workload's pods first, as by doppel intercept. With a command after --, ingest runs it with the app's
environment and files and ends with its exit code. End it with doppel leave otherwise.`,
		Example: `  doppel ingest web --env-file web.env
  doppel ingest worker --container app -- go test ./...`,
		Args: nameAndCommand,
		RunE: f.run(a),
	}
	f.about(a, c)
	f.app.register(c)
	return c
}

// interceptFlags are the flags of commands that want something of a workload's ports.
type interceptFlags struct {
	req localapi.InterceptRequest
	m   matchFlags
	app *appFlags // nil: nothing but traffic

	preview *previewFlags // nil: there is none
}

// nameAndCommand wants a name and lets a command stand behind --.
func nameAndCommand(c *cobra.Command, args []string) error {
	if dash := c.ArgsLenAtDash(); dash >= 0 {
		args = args[:dash]
	}
	return cobra.ExactArgs(1)(c, args)
}

// run asks for what the flags say.
func (i *interceptFlags) run(a *app) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		i.req.Name = args[0]
		var err error
		if i.req.Match, err = i.m.rule(); err != nil {
			return err
		}
		if i.app != nil {
			if i.req.Mount, err = i.app.request(); err != nil {
				return err
			}
		}
		if i.preview != nil {
			err = i.preview.check()
		}
		if err := cmp.Or(a.configErr, i.ready(), err, found(args[1:])); err != nil {
			return err
		}
		var m *made
		switch {
		case i.preview == nil:
		case i.preview.want:
			i.req.All = i.m.all()
			if i.req.Preview, m, err = i.preview.make(c.Context(), a, i.req.Use, i.req.Name, i.req.Namespace, cmp.Or(i.req.Workload, i.req.Name)); err != nil {
				return err
			}
		case !i.preview.said.Changed:
			i.req.Preview, m = i.preview.byItself(c.Context(), a, i.req)
			i.req.All = i.req.Preview != nil && i.req.Match.IsZero() // it takes what it would have taken
		}
		return a.interceptRun(c.Context(), i.req, i.app, m, args[1:])
	}
}

// ready checks what can be checked before anything is made.
func (i *interceptFlags) ready() error {
	if len(i.req.Ports) == 0 && i.req.Mode != localapi.ModeReplace && i.req.Mode != localapi.ModeIngest {
		return uerr.New(uerr.Usage, fmt.Sprintf("for example: doppel %s %s -p 8080", cmp.Or(i.req.Mode, localapi.ModeIntercept), i.req.Name), "no port: which local port shall the traffic come to?")
	}
	return nil
}

func (i *interceptFlags) takeover(c *cobra.Command) {
	c.Flags().BoolVar(&i.req.Takeover, "takeover", false, "end intercepts of others that are in the way (needs the right to takeover intercepts)")
}

// about registers the flags that say what workload is meant.
func (i *interceptFlags) about(a *app, c *cobra.Command) {
	f, req := c.Flags(), &i.req
	container := "the container, if several have such a port"
	switch req.Mode {
	case localapi.ModeReplace:
		container = "the container, if the pods have several"
	case localapi.ModeIngest:
		container = "the container, if the pods have several (default: the one that kubectl exec means)"
	}
	f.StringVarP(&req.Workload, "workload", "w", "", "the workload, as NAME or KIND/NAME (default: NAME)")
	f.StringVarP(&req.Namespace, "namespace", "n", "", "namespace of the workload (default: the connected one)")
	f.StringVar(&req.Container, "container", "", container)
	f.BoolVar(&req.Recreate, "recreate", false, "replace the workload's pods even if that interrupts it for a moment")
	useFlag(f, &req.Use, "the only one")
	f.DurationVar(&req.Timeout, "timeout", cmp.Or(time.Duration(a.config.Intercept.Timeout), defaultInterceptTimeout), "how long it may make no progress before it is active")
}

func (i *interceptFlags) register(a *app, c *cobra.Command) {
	i.about(a, c)
	f, req := c.Flags(), &i.req
	f.StringArrayVarP(&req.Ports, "port", "p", nil, "local port, and the port to take if the workload has several: LOCAL[:REMOTE]; may be repeated")
	f.StringVar(&req.Address, "address", cmp.Or(a.config.Intercept.Address, defaultAddress), "where the local process listens")
	f.StringVar(&req.Service, "service", "", "the service, if several lead to the workload")
	f.StringSliceVar(&req.ToPod, "to-pod", nil, "`PORT[/udp]` that containers beside the app serve on localhost: the same ports of 127.0.0.1 here lead to them")
	if req.Mode != localapi.ModeReplace {
		i.m.register(f)
	}
	f.BoolVar(&req.LocalTLS, "local-tls", false, "the local process speaks TLS: connect to it so (its certificate is not verified)")
}

func (a *app) interceptRun(ctx context.Context, req localapi.InterceptRequest, app *appFlags, preview *made, command []string) error {
	var out interceptOutput
	if err := a.call(ctx, localapi.MethodIntercept, req, &out.Intercept); err != nil {
		preview.undo(ctx)
		return err
	}
	in := out.Intercept
	if preview != nil && (preview.byItself || preview.hint != "") && !slices.ContainsFunc(in.Ports, func(p localapi.InterceptPort) bool { return p.Protocol == "TCP" }) {
		preview.undo(ctx) // all of them UDP's
		preview = nil
	}
	if preview != nil {
		out.PreviewURL = preview.URL
	}
	show := func() error {
		if preview != nil && preview.hint != "" {
			defer fmt.Fprintf(a.Err, "doppel: hint: %s\n", preview.hint)
		}
		return a.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "Using %s %s\n", in.Kind, in.Workload)
			writeIntercept(w, in)
			if out.PreviewURL != "" {
				writePreview(w, preview.Preview)
			}
			if in.Mode == localapi.ModeReplace {
				end := "you end this with: doppel leave " + in.Name
				if len(command) > 0 {
					end = "the command ends."
				}
				fmt.Fprintf(w, "The app does not run until %s\nMeanwhile connections are refused when nothing here answers.\n", end)
			}
		})
	}
	if app == nil {
		return show()
	}
	return app.inPlace(ctx, a, req, in.UID, command, show)
}

// interceptOutput is the JSON form of what intercept has made.
type interceptOutput struct {
	localapi.Intercept
	PreviewURL string `json:"previewURL,omitempty"`
}

func writeIntercept(w io.Writer, in localapi.Intercept) {
	fmt.Fprintf(w, "   Intercept name : %s\n", in.Name)
	fmt.Fprintf(w, "   State          : %s\n", in.State)
	fmt.Fprintf(w, "   Workload kind  : %s\n", in.Kind)
	if !in.Mine {
		fmt.Fprintf(w, "   Held by        : %s\n", in.User)
	}
	for i, p := range in.Ports {
		label := map[bool]string{true: "Ports          :", false: "                "}[i == 0]
		switch {
		case len(in.Ports) > 1:
			fmt.Fprintf(w, "   %s %s\n", label, portLine(in, p))
			continue
		case in.Mine:
			fmt.Fprintf(w, "   Destination    : %s%s\n", p.Target, overTLS(in))
		}
		if p.Port != 0 {
			fmt.Fprintf(w, "   Container port : %d\n", p.Port)
		}
	}
	what := "Intercepting   :"
	switch in.Mode {
	case localapi.ModeWiretap:
		what = "Wiretapping    :"
	case localapi.ModeReplace:
		fmt.Fprintf(w, "   Replacing      : container %s\n", in.Container)
	}
	switch {
	case in.Mode == localapi.ModeIngest:
		fmt.Fprintf(w, "   Ingesting      : %s\n", ingested(in))
	case in.Mode == localapi.ModeReplace && len(in.Ports) == 0:
		fmt.Fprintf(w, "   %s nothing: it has no ports\n", what)
	case in.Match.IsZero() && in.Preview != "" && !in.All:
		fmt.Fprintf(w, "   %s the requests of its preview\n", what)
	case in.Match.IsZero():
		fmt.Fprintf(w, "   %s all %s\n", what, traffic(in))
	default:
		and := map[bool]string{true: "the requests of its preview, and "}[in.Preview != ""]
		fmt.Fprintf(w, "   %s %sHTTP requests that match all of:\n", what, and)
		for _, l := range in.Match.Lines() {
			fmt.Fprintf(w, "                    %s\n", l)
		}
	}
	for _, p := range in.ToPod {
		fmt.Fprintf(w, "   To the pod     : 127.0.0.1:%s\n", p)
	}
	if in.Mount != nil {
		fmt.Fprintf(w, "   Volume Mount Point: %s\n", mountLine(in.Mount))
	}
	if in.Message != "" {
		fmt.Fprintf(w, "   Message        : %s\n", in.Message)
	}
}

func overTLS(in localapi.Intercept) string {
	if in.LocalTLS {
		return " over TLS"
	}
	return ""
}

// ingested is what comes without traffic.
func ingested(in localapi.Intercept) string {
	if in.Container == "" { // not known yet
		return "environment and files"
	}
	return "environment and files of container " + in.Container
}

// portLine is one of several ports, with where its traffic goes if it is ours.
func portLine(in localapi.Intercept, p localapi.InterceptPort) string {
	from, to := "pending", ""
	if p.Port != 0 {
		from = fmt.Sprintf("%d/%s", p.Port, strings.ToLower(p.Protocol))
	}
	if in.Mine {
		to = " to " + p.Target + overTLS(in)
	}
	return from + to
}

// portsLine is all ports of an intercept of ours on one line.
func portsLine(in localapi.Intercept) string {
	if in.Mode == localapi.ModeIngest {
		return ingested(in)
	}
	if len(in.Ports) == 1 {
		return fmt.Sprintf("port %d to %s", in.Ports[0].Port, in.Ports[0].Target)
	}
	var out []string
	for _, p := range in.Ports {
		out = append(out, portLine(in, p))
	}
	if len(in.Ports) == 0 {
		return "no port"
	}
	return "ports " + strings.Join(out, ", ")
}

// traffic names what an intercept takes of its ports.
func traffic(in localapi.Intercept) string {
	udp := 0
	for _, p := range in.Ports {
		if p.Protocol == "UDP" {
			udp++
		}
	}
	switch {
	case udp == 0:
		return "TCP connections"
	case udp == len(in.Ports):
		return "UDP datagrams"
	}
	return "TCP connections and UDP datagrams"
}

func (a *app) leaveCmd() *cobra.Command {
	var req localapi.LeaveRequest
	c := &cobra.Command{
		Use:   "leave NAME",
		Short: "End an intercept, wiretap, replace or ingest; the app in the cluster answers again",
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
	is := func(mode string) bool {
		return slices.ContainsFunc(l.Intercepts, func(in localapi.Intercept) bool { return in.Mode == mode })
	}
	switch {
	case is(localapi.ModeReplace):
		return "replaced"
	case is(localapi.ModeIntercept):
		return "intercepted"
	case is(localapi.ModeWiretap):
		return "wiretapped"
	case is(localapi.ModeIngest):
		return "ingested"
	case l.NotReady != "":
		return "cannot be intercepted: " + l.NotReady
	case l.Agent:
		return "ready to intercept (traffic-agent already installed)"
	}
	return "ready to intercept (traffic-agent not yet installed)"
}
