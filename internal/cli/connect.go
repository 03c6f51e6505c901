package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/helm"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// kubeFlags choose the cluster.
type kubeFlags struct {
	kube.Options
	managerNS string
	chart     helm.Options // the values of an install, should there be one
}

func (k *kubeFlags) add(f *pflag.FlagSet, namespace bool) {
	f.StringVar(&k.Context, "context", "", "kubeconfig context (default: the current one)")
	f.StringVar(&k.Kubeconfig, "kubeconfig", "", "kubeconfig file (default: $KUBECONFIG, then ~/.kube/config)")
	f.StringVar(&k.As, "as", "", "user to impersonate in the cluster")
	f.StringArrayVar(&k.AsGroups, "as-group", nil, "group to impersonate; may be repeated")
	f.StringVar(&k.managerNS, "manager-namespace", helm.DefaultNamespace, "namespace of the traffic-manager")
	if namespace {
		f.StringVarP(&k.Namespace, "namespace", "n", "", "namespace whose services answer by their bare name (default: the context's)")
	}
}

// configured puts the user's configuration in the places of flags; those that are typed win, as they are read later.
func (a *app) configured(k *kubeFlags) {
	c := a.config.Connect
	k.Kubeconfig, k.Context, k.Namespace, k.As, k.AsGroups = c.Kubeconfig, c.Context, c.Namespace, c.As, c.AsGroups
	if c.ManagerNamespace != "" {
		k.managerNS = c.ManagerNamespace
	}
}

// request is what the daemon needs to load the same cluster: it does not share our environment or working directory.
func (k *kubeFlags) request() (localapi.ConnectRequest, error) {
	r := localapi.ConnectRequest{Kubeconfig: k.Kubeconfig, Context: k.Context, Namespace: k.Namespace, ManagerNamespace: k.managerNS, As: k.As, AsGroups: k.AsGroups}
	if r.Kubeconfig == "" {
		r.Kubeconfig = os.Getenv("KUBECONFIG")
	}
	var abs []string
	for _, p := range filepath.SplitList(r.Kubeconfig) {
		if p == "" { // as kubectl has it: KUBECONFIG=$KUBECONFIG:FILE with nothing before
			continue
		}
		a, err := filepath.Abs(p)
		if err != nil {
			return r, err
		}
		abs = append(abs, a)
	}
	r.Kubeconfig = strings.Join(abs, string(filepath.ListSeparator))
	return r, nil
}

// The three kinds of connect that differ in what has to be done.
const (
	startFirst = "first" // the traffic-manager had to be installed
	startCold  = "cold"  // no daemons were running
	startWarm  = "warm"  // the daemons were running
)

// connectOutput is the JSON form of connect.
type connectOutput struct {
	localapi.Status
	Start   string  `json:"start"`
	Reused  bool    `json:"reused"` // this machine was connected like this already
	Seconds float64 `json:"seconds"`
}

// dnsFlags choose whose names the cluster answers.
type dnsFlags struct {
	localapi.DNSOptions
	mappings []string
}

func (d *dnsFlags) add(f *pflag.FlagSet) {
	f.StringSliceVar(&d.MappedNamespaces, "mapped-namespaces", nil, "namespaces whose services answer by name, beside the connected one (default: all)")
	f.StringSliceVar(&d.IncludeSuffixes, "include-suffixes", nil, "further domains that the cluster's DNS answers")
	f.StringSliceVar(&d.ExcludeSuffixes, "exclude-suffixes", nil, "domains that the cluster's DNS is never asked for; of two that fit, the longer decides")
	f.StringSliceVar(&d.mappings, "dns-mapping", nil, "answer a name as another is, or with an address: `NAME=OTHER`")
}

// options checks what the user typed.
func (d *dnsFlags) options() (localapi.DNSOptions, error) {
	o := d.DNSOptions
	for _, m := range d.mappings {
		name, other, _ := strings.Cut(m, "=")
		o.Mappings = append(o.Mappings, localapi.DNSMapping{Name: name, AliasFor: other})
	}
	return o, o.Validate()
}

func (a *app) connectCmd() *cobra.Command {
	var base localapi.ConnectRequest // what no group of flags has
	var k kubeFlags
	var d dnsFlags
	var n networkFlags
	c := &cobra.Command{
		Use:   "connect [flags] [-- COMMAND [ARG...]]",
		Short: "Put this machine into the cluster's network",
		Long: `Connect puts this machine into the cluster's network: services and pods answer by their cluster names and addresses.
It starts the two daemons when they are not running (the root daemon through sudo, because only root may create a network device)
and installs the traffic-manager when the cluster has none and you may.

With --name, connect joins another cluster beside those that are connected. A subnet that overlaps one of an earlier connection gets
virtual addresses. A name that exists in several clusters is the one's that was connected first. Other commands choose with --use.

With a command after --, connect runs it and ends with its exit code, and quits unless this machine was connected before.`,
		Args: func(c *cobra.Command, args []string) error {
			if c.ArgsLenAtDash() != 0 && len(args) > 0 {
				return fmt.Errorf("unexpected argument %q; a command goes behind --", args[0])
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			base.RefuseIntercepts = c.Flags().Changed("accept-intercepts") && !base.AcceptIntercepts
			return a.connectRun(c.Context(), base, &k, &d, &n, args)
		},
	}
	c.Flags().StringVar(&base.Name, "name", a.config.Connect.Name, "name of the connection, to have several at once (default: the context's)")
	c.Flags().BoolVar(&base.AcceptIntercepts, "accept-intercepts", a.config.Connect.AcceptIntercepts, "let intercepts that you declare in the cluster (kubectl apply) lead to ports of this machine")
	c.Flags().StringArrayVar(&k.chart.ValueFiles, "values", nil, "file with values for the chart, should connect install it (may be repeated)")
	c.Flags().StringArrayVar(&k.chart.Set, "set", nil, "a value for the chart, KEY=VALUE, should connect install it (may be repeated)")
	k.add(c.Flags(), true)
	d.add(c.Flags())
	n.add(c.Flags())
	a.configured(&k)
	d.DNSOptions = a.config.Connect.DNS
	n.configured(a.config.Connect.Network)
	return c
}

func (a *app) connectRun(ctx context.Context, base localapi.ConnectRequest, k *kubeFlags, d *dnsFlags, n *networkFlags, command []string) error {
	if err := found(command); err != nil {
		return err
	}
	out, err := a.connect(ctx, base, k, d, n)
	if err != nil {
		return err
	}
	if err := a.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "Connected to context %s, namespace %s (%s)\n", out.Session.Context, out.Session.Namespace, out.Session.Server)
	}); err != nil {
		return err
	}
	for _, s := range out.Session.Subnets {
		if note := subnetNote(s); note != "" {
			fmt.Fprintf(a.Err, "%s\n", note)
		}
	}
	for _, p := range out.Session.Problems {
		fmt.Fprintf(a.Err, "doppel: warning: %s\n", oneLine(p))
	}
	if a.output == "text" {
		fmt.Fprintf(a.Err, "%s connect: %.2f s\n", out.Start, out.Seconds)
	}
	if len(command) == 0 {
		return nil
	}
	runErr := a.runCommand(ctx, exec.Command(command[0], command[1:]...))
	if out.Reused {
		return runErr
	}
	quitErr := a.call(context.WithoutCancel(ctx), localapi.MethodQuit, localapi.QuitRequest{Choice: localapi.Choice{Use: out.Session.Connection}, UID: out.Session.UID}, nil)
	if a.gone(quitErr) {
		quitErr = nil
	}
	if runErr != nil && quitErr != nil { // both count: the session may still be there
		a.warn(quitErr)
		return runErr
	}
	return cmp.Or(runErr, quitErr)
}

// connect starts what is missing, from the daemons to the traffic-manager, and connects.
// A connect that fails stops the daemons again if it was what started them and nobody else uses them.
func (a *app) connect(ctx context.Context, base localapi.ConnectRequest, k *kubeFlags, d *dnsFlags, n *networkFlags) (out connectOutput, err error) {
	if a.configErr != nil {
		return connectOutput{}, a.configErr
	}
	start, kind := time.Now(), startWarm
	req, err := k.request()
	if err != nil {
		return connectOutput{}, err
	}
	req.Name, req.AcceptIntercepts, req.RefuseIntercepts = base.Name, base.AcceptIntercepts, base.RefuseIntercepts
	if req.DNS, err = d.options(); err != nil {
		return connectOutput{}, err
	}
	if req.Network, err = n.options(); err != nil {
		return connectOutput{}, err
	}
	cluster, err := kube.Load(k.Options) // before sudo asks for a password
	if err != nil {
		return connectOutput{}, err
	}
	req.Env = cluster.Environment()
	started, err := a.startDaemons(ctx)
	if started {
		kind = startCold
		defer func() {
			if err != nil {
				err = errors.Join(err, a.stopDaemons(context.WithoutCancel(ctx), true)) // another connect may have succeeded meanwhile
			}
		}()
	}
	if err != nil {
		return connectOutput{}, err
	}
	if level := a.startLevel(); started && level != "" {
		if err := a.client.Call(ctx, localapi.MethodLogLevel, localapi.LogLevelRequest{Level: level, Start: true}, nil, nil); err != nil {
			return connectOutput{}, err
		}
	}
	var res localapi.ConnectResult
	err = a.call(ctx, localapi.MethodConnect, req, &res)
	var ue *uerr.Error
	if errors.As(err, &ue) && ue.Kind == uerr.NoManager {
		kind = startFirst
		if err := a.install(ctx, k); err != nil {
			return connectOutput{}, err
		}
		err = a.call(ctx, localapi.MethodConnect, req, &res)
	}
	if err != nil {
		return connectOutput{}, err
	}
	return connectOutput{Status: res.Status, Start: kind, Reused: res.Reused, Seconds: time.Since(start).Seconds()}, nil
}

// startLevel is what daemons that are started log: as the environment says, which sudo does not pass on, or the configuration; "" if neither does.
func (a *app) startLevel() string {
	env := os.Getenv(xlog.EnvLevel)
	if _, err := xlog.ParseLevel(env); err != nil {
		env = "" // as in the daemons
	}
	return cmp.Or(env, a.config.LogLevel)
}

// startDaemons starts those that do not run and says whether it started any, also when it fails.
func (a *app) startDaemons(ctx context.Context) (bool, error) {
	rootNew, err := spawn.RootDaemon(ctx, spawn.Root{
		MayAsk: a.Terminal,
		Reason: func() {
			fmt.Fprintln(a.Err, "doppel needs root to create a network device and to set routes and DNS for it (never again after: doppel rootd install). sudo asks for your password:")
		},
	})
	if err != nil {
		return rootNew, err
	}
	for again := false; ; again = true {
		userNew, err := spawn.UserDaemon(ctx)
		if err != nil {
			return rootNew || userNew, err
		}
		err = a.checkDaemon(ctx)
		if again || !errors.Is(err, localapi.ErrEnded) { // one that was killed takes connections for a moment more
			return rootNew || userNew, err
		}
	}
}

// checkDaemon refuses a user daemon of another release, whose answers we might misread.
func (a *app) checkDaemon(ctx context.Context) error {
	var st localapi.Status
	if err := a.client.Call(ctx, localapi.MethodStatus, localapi.Empty{}, &st, nil); err != nil {
		return err
	}
	if st.Version != buildinfo.Version {
		return uerr.New(uerr.Conflict, "end it with: doppel quit -s", "the running daemon is doppel %s, this is %s", st.Version, buildinfo.Version)
	}
	return nil
}

// install installs the embedded chart for a connect that found no traffic-manager.
func (a *app) install(ctx context.Context, k *kubeFlags) error {
	show, done := a.progress()
	defer done()
	show("No traffic-manager yet: installing it in namespace " + k.managerNS)
	o := k.chart
	o.Namespace, o.CreateNamespace, o.Wait = k.managerNS, true, true
	return a.helm(ctx, helm.Request{Verb: helm.Ensure, Cluster: k.Options, Options: o}, show) // a colleague may connect for the first time at the same moment
}

// runCommand runs the user's command with our terminal and passes its exit code on.
func (a *app) runCommand(ctx context.Context, cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.In, a.Out, a.Err
	return attend(ctx, cmd, func() error { return startCommand(cmd) })
}

// found says, before anything is made for it, that a command is not there. No command is one that is.
func found(command []string) error {
	if len(command) == 0 {
		return nil
	}
	if _, err := exec.LookPath(command[0]); err != nil {
		return uerr.Wrap(err, uerr.Usage, "", "run %s", command[0])
	}
	return nil
}

func startCommand(cmd *exec.Cmd) error {
	if err := cmd.Start(); err != nil {
		return uerr.Wrap(err, uerr.Usage, "", "run %s", cmd.Args[0])
	}
	return nil
}

// attend starts a command, and ends with it and not before: an interrupt and a quit (by which a Java program shows what it is at) are the command's to deal
// with (the terminal sends them to both of us), other signals are handed on, from the start. It does not start it if a signal has come before (it has ended ctx).
func attend(ctx context.Context, cmd *exec.Cmd, start func() error) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, spawn.Ends(syscall.SIGTERM, syscall.SIGQUIT)...)
	defer signal.Stop(signals)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case s := <-signals:
				if s != syscall.SIGQUIT || !term.IsTerminal(int(os.Stdin.Fd())) { // the terminal sends its keys' signal to both of us
					_ = cmd.Process.Signal(s)
				}
			case <-ended:
				return
			}
		}
	}()
	err := cmd.Wait()
	var ee *exec.ExitError
	if !errors.As(err, &ee) {
		return err
	}
	if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return exitCode(128 + int(ws.Signal())) // as a shell does
	}
	return exitCode(ee.ExitCode())
}
