// Package cli is the command line of the lab.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/cluster"
	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/progress"
	"github.com/doppel-dev/doppel/lab/internal/state"
	"github.com/doppel-dev/doppel/lab/internal/wan"
)

// exitError is the exit code of a command that ran in the lab; it has said itself what is wrong.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Main runs the program and returns its exit code.
func Main(args []string) int {
	if len(args) > 0 {
		switch args[0] {
		case ns.HoldCommand:
			return report(ns.Hold(map[string]ns.Role{wan.Role: wan.Serve}))
		case ns.DetachCommand:
			return report(ns.RunDetach(args[1:]))
		case ns.ExecCommand:
			return report(ns.RunExec(args[1:]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	root := rootCommand()
	root.SetArgs(args)
	return report(root.ExecuteContext(ctx))
}

func report(err error) int {
	if err == nil {
		return 0
	}
	var exit exitError
	if errors.As(err, &exit) {
		return int(exit)
	}
	fmt.Fprintln(os.Stderr, "lab: error:", err)
	if errors.Is(err, exec.ErrNotFound) {
		return 127 // as a shell says it of a command it was to run
	}
	return 1
}

// app is what the commands share.
type app struct {
	name    string
	verbose bool
}

func rootCommand() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:           "lab",
		Short:         "A real Kubernetes in the network namespaces of one machine, and laptops beside it",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&a.name, "name", cmp.Or(os.Getenv("DOPPEL_LAB"), "lab"), "name of the lab; the default is $DOPPEL_LAB")
	root.PersistentFlags().BoolVar(&a.verbose, "verbose", false, "say more of what is done")
	root.AddCommand(
		a.upCommand(), a.downCommand(), a.buildCommand(), a.statusCommand(),
		a.restartCommand(), a.nodeCommand(), a.laptopCommand(), a.outsideCommand(), a.loadCommand(), a.imageCommand(), a.kubeconfigCommand(),
	)
	return root
}

func (a *app) upCommand() *cobra.Command {
	nodes := 1
	cmd := &cobra.Command{
		Use: "up", Short: "Start the lab and wait until a pod runs and cluster DNS answers", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cluster.Up(cmd.Context(), cluster.Options{Name: a.name, Nodes: nodes}, progress.New(os.Stderr, a.verbose))
		},
	}
	cmd.Flags().IntVar(&nodes, "nodes", nodes, "number of nodes")
	return cmd
}

func (a *app) downCommand() *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use: "down", Short: "End the lab and remove all of it", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			say := progress.New(os.Stderr, a.verbose)
			if !all {
				return cluster.Down(a.name, say)
			}
			names, err := state.Names()
			for _, name := range names {
				err = errors.Join(err, cluster.Down(name, say))
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every lab of this machine")
	return cmd
}

func (a *app) restartCommand() *cobra.Command {
	return &cobra.Command{
		Use: "restart SERVER", Short: "Kill a server of the cluster, kube-apiserver for example, and start it again", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.locked(func(lab *state.Lab) error { return cluster.Restart(cmd.Context(), lab, args[0]) })
		},
	}
}

func (a *app) buildCommand() *cobra.Command {
	return &cobra.Command{
		Use: "build", Short: "Build the programs of a lab into the cache, as up does", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cluster.Build(cmd.Context(), progress.New(os.Stderr, a.verbose))
		},
	}
}

func (a *app) loadCommand() *cobra.Command {
	return &cobra.Command{
		Use: "load IMAGE.tar...", Short: "Import image archives into every node", Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			lab, err := cluster.Open(a.name)
			if err != nil {
				return err
			}
			for _, archive := range args {
				if err := cluster.LoadImage(lab, archive); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func (a *app) nodeCommand() *cobra.Command {
	node := &cobra.Command{Use: "node", Short: "Nodes of the cluster"}
	exec := &cobra.Command{
		Use: "exec [NODE] -- CMD...", Short: "Run a command in the namespaces of a node, the first by default",
		RunE: func(cmd *cobra.Command, args []string) error {
			before, argv, err := splitAtDash(cmd, args)
			if err != nil {
				return err
			}
			lab, err := cluster.Open(a.name)
			if err != nil {
				return err
			}
			name := "node1"
			if len(before) == 1 {
				name = strings.TrimPrefix(before[0], a.name+"-")
			} else if len(before) > 1 {
				return errors.New("more than one node before --")
			}
			holder, ok := lab.Nodes[name]
			if !ok {
				return fmt.Errorf("there is no node %q", name)
			}
			return runInside(holder, argv)
		},
	}
	node.AddCommand(exec)
	return node
}

func (a *app) outsideCommand() *cobra.Command {
	outside := &cobra.Command{Use: "outside", Short: "The network outside the cluster"}
	outside.AddCommand(&cobra.Command{
		Use: "exec -- CMD...", Short: "Run a command outside: what listens on port 443 there is relay.test to the cluster and the laptops",
		RunE: func(cmd *cobra.Command, args []string) error {
			before, argv, err := splitAtDash(cmd, args)
			if err != nil {
				return err
			}
			if len(before) > 0 {
				return errors.New("nothing can stand before --")
			}
			lab, err := cluster.Open(a.name)
			if err != nil {
				return err
			}
			return runInside(lab.Wan, argv)
		},
	})
	return outside
}

// splitAtDash returns the arguments before and after --.
func splitAtDash(cmd *cobra.Command, args []string) (before, after []string, err error) {
	i := cmd.ArgsLenAtDash()
	if i < 0 || i == len(args) {
		return nil, nil, errors.New("a command is missing after --")
	}
	return args[:i], args[i:], nil
}

// binDir is the directory of this program, where the others are too.
func binDir() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	return filepath.Dir(exe), nil
}
