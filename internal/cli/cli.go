// Package cli owns what the user types and reads: one file per command, answers on stdout, everything else on stderr.
package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/internal/config"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Streams are where a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	// Terminal says whether a person sits at In and Err.
	Terminal bool
}

// app is what the commands share.
type app struct {
	Streams
	output string // text, json or yaml
	client *localapi.Client

	config     config.Config // the user's file; zero if configErr
	configFile string
	configErr  error
}

// Main runs the command line and returns the exit code.
func Main(args []string) int {
	ctx, stop := spawn.Interruptible(context.Background())
	defer stop()
	return run(ctx, args, Streams{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr,
		Terminal: term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd())),
	})
}

// Command is the whole command line, for those who describe it: manual pages, completions.
func Command() *cobra.Command { return (&app{}).root() }

func run(ctx context.Context, args []string, s Streams) int {
	a := &app{Streams: s, client: localapi.NewClient(localapi.DaemonSocket())}
	a.loadConfig()
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	return a.fail(ctx, err)
}

// exitCode ends with the exit code of a command that was run for the user.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// fail prints the error with its hint and returns the exit code of its kind.
func (a *app) fail(ctx context.Context, err error) int {
	e := uerr.From(err)
	var ue usageError
	switch {
	case ctx.Err() != nil && e.Kind == uerr.LeftBehind:
		e = uerr.New(uerr.Canceled, e.Hint, "interrupted: %s", e.Msg)
	case ctx.Err() != nil:
		e = uerr.New(uerr.Canceled, "", "interrupted")
	case errors.As(err, &ue):
		e = uerr.New(uerr.Usage, "see: doppel "+ue.command+"--help", "%v", ue.err)
	case errors.Is(err, localapi.ErrNoDaemon):
		e = uerr.New(uerr.NotConnected, "connect first with: doppel connect", "not connected")
	}
	_ = a.print(e, func(io.Writer) {}) // for programs; the exit code says the same
	fmt.Fprintf(a.Err, "doppel: error: %s\n", oneLine(e.Msg))
	if e.Hint != "" {
		fmt.Fprintf(a.Err, "doppel: hint: %s\n", oneLine(e.Hint))
	}
	return e.Kind.ExitCode()
}

// warn prints what has gone wrong beside what the command ends with.
func (a *app) warn(err error) {
	e := uerr.From(err)
	fmt.Fprintf(a.Err, "doppel: warning: %s\n", oneLine(e.Msg))
	if e.Hint != "" {
		fmt.Fprintf(a.Err, "doppel: hint: %s\n", oneLine(e.Hint))
	}
}

func oneLine(s string) string { return harmless(strings.Join(strings.Fields(s), " ")) }

// harmless replaces what a terminal would obey. Much of what people are told is said by others: pods, managers, relays, their clients.
func harmless(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// plain is a terminal that obeys nothing.
type plain struct{ io.Writer }

func (p plain) Write(b []byte) (int, error) {
	_, err := io.WriteString(p.Writer, harmless(string(b)))
	return len(b), err
}

// usageError is a wrong command line.
type usageError struct {
	command string
	err     error
}

func (e usageError) Error() string { return e.err.Error() }

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "doppel",
		Short: "Put your laptop into a Kubernetes cluster's network, and a local process in a service's place",
		Example: `  doppel connect                             every service answers by its cluster name
  doppel list                                what can be intercepted
  doppel intercept web --port 8080:http      its traffic comes to 127.0.0.1:8080
  doppel leave web
  doppel quit`,
		SilenceUsage: true, SilenceErrors: true,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch a.output {
			case "text", "json", "yaml":
				return nil
			}
			return uerr.New(uerr.Usage, "use -o text, -o json or -o yaml", "unknown output format %q", a.output)
		},
	}
	root.PersistentFlags().StringVarP(&a.output, "output", "o", cmp.Or(a.config.Output, "text"), "output format: text, json or yaml")
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.SetIn(a.In)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{sub(c), err} })
	root.AddCommand(
		a.connectCmd(), a.runCmd(), a.quitCmd(), a.statusCmd(), a.routesCmd(), a.listCmd(), a.interceptCmd(), a.wiretapCmd(), a.replaceCmd(), a.ingestCmd(), a.sftpCmd(), a.leaveCmd(),
		a.loginCmd(), a.logoutCmd(), a.previewCmd(), a.relayCmd(),
		a.helmCmd(), a.uninstallCmd(), a.versionCmd(), a.rootdCmd(), a.daemonCmd(), a.insideCmd(), a.volumesCmd(), a.doctorCmd(), a.configCmd(), a.whyCmd(), a.loglevelCmd(), a.gatherLogsCmd(),
	)
	a.completions(root)
	wrapArgs(root)
	return root
}

// useFlag lets a command choose one of several connections.
func useFlag(f *pflag.FlagSet, use *string, without string) {
	f.StringVar(use, "use", "", "`NAME` of the connection, or a regular expression that one alone matches (default: "+without+")")
}

// sub is the command's path below doppel with a trailing space, for hints.
func sub(c *cobra.Command) string {
	if _, rest, ok := strings.Cut(c.CommandPath(), " "); ok {
		return rest + " "
	}
	return ""
}

// wrapArgs makes wrong arguments usage errors, and so an unknown subcommand.
func wrapArgs(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.Args, c.RunE = cobra.NoArgs, func(c *cobra.Command, _ []string) error { return c.Help() }
	}
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usageError{sub(c), err}
			}
			return nil
		}
	}
	for _, s := range c.Commands() {
		wrapArgs(s)
	}
}

// print writes v as JSON or YAML, or calls text for people.
func (a *app) print(v any, text func(w io.Writer)) error {
	switch a.output {
	case "json":
		enc := json.NewEncoder(a.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = a.Out.Write(b)
		return err
	}
	text(plain{a.Out})
	return nil
}

// progress shows steps on stderr: a live line on a terminal, plain lines in a pipe. done erases the live line.
func (a *app) progress() (show func(string), done func()) {
	if !a.Terminal {
		return func(s string) { fmt.Fprintln(a.Err, harmless(s)) }, func() {}
	}
	return func(s string) { fmt.Fprintf(a.Err, "\r\x1b[K%s", harmless(s)) }, func() { fmt.Fprint(a.Err, "\r\x1b[K") }
}

// call asks the user daemon, showing its progress.
func (a *app) call(ctx context.Context, method string, req, res any) error {
	show, done := a.progress()
	defer done()
	return a.client.Call(ctx, method, req, res, show)
}
