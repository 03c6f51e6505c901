package cli

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/sandbox"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/userd"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// insideCommand is the hidden command that becomes the user's command in its namespaces.
const insideCommand = "run-inside"

func (a *app) runCmd() *cobra.Command {
	var k kubeFlags
	c := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG...]",
		Short: "Run one command in the cluster's network, without root and without touching the machine",
		Long: `Run gives one command, and what it starts, a network of its own in which services and pods answer by their cluster names and addresses.
It needs no root and no daemon, and changes nothing on this machine: two clusters in two terminals do not know of each other. It has a
session of its own, which ends with the command. Linux only.

All other names and addresses are reached as from this machine. But localhost is the command's own: what listens on this machine's localhost
answers it by the name ` + sandbox.HostName + `, and what the command listens on answers itself only.`,
		Example: `  doppel run -- curl http://web.shop
  doppel run --context staging -n shop -- bash`,
		Args: func(c *cobra.Command, args []string) error {
			if c.ArgsLenAtDash() != 0 || len(args) == 0 {
				return errors.New("a command is needed, behind --")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return a.runInside(c.Context(), &k, args) },
	}
	k.add(c.Flags(), true)
	a.configured(&k)
	return c
}

// runInside makes the namespaces, connects, and lets the command begin in them.
func (a *app) runInside(ctx context.Context, k *kubeFlags, command []string) error {
	if a.configErr != nil {
		return a.configErr
	}
	req, err := k.request()
	if err != nil {
		return err
	}
	if _, err := kube.Load(k.Options); err != nil {
		return err
	}
	logFile, err := spawn.LogFile("run")
	if err != nil {
		return err
	}
	f, err := openLog(logFile)
	if err != nil {
		return err
	}
	defer f.Close()
	log, _ := xlog.New(f, "doppel")
	log = log.With("pid", os.Getpid())
	box, err := sandbox.Start(sandbox.Config{
		Argv: command, Env: os.Environ(), Helper: []string{insideCommand, "--"}, Stdin: a.In, Stdout: a.Out, Stderr: a.Err, Log: log,
	})
	if err != nil {
		return err
	}
	defer box.Close()

	show, done := a.progress()
	cfg := userd.SingleConfig{
		Request: req, Root: box.Root, Outside: box, Log: log,
		Progress: func(format string, args ...any) { show(fmt.Sprintf(format, args...)) },
		Ended:    func(err error) { fmt.Fprintf(a.Err, "doppel: error: the session ended: %s\n", oneLine(err.Error())) },
	}
	s, err := userd.OpenSingle(ctx, cfg)
	if e := new(uerr.Error); errors.As(err, &e) && e.Kind == uerr.NoManager {
		if err = a.install(ctx, k); err == nil {
			s, err = userd.OpenSingle(ctx, cfg)
		}
	}
	done()
	if err != nil {
		return err
	}
	defer s.Close()
	return attend(ctx, box.Cmd(), box.Go)
}

func (a *app) insideCmd() *cobra.Command {
	return &cobra.Command{
		Use: insideCommand, Short: "Become a command in namespaces (run starts it by itself)", Hidden: true, Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return sandbox.Become(args) },
	}
}
