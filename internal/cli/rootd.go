package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) rootdCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "rootd",
		Short: "Install, uninstall or show the root daemon as a service of the system",
		Long: `The root daemon makes the network device and sets routes and DNS. Without these commands, connect starts it through sudo when it is
needed. As a service of systemd it runs from boot on, for the members of the group doppel, and connect never asks for a password.`,
	}
	c.AddCommand(a.rootdInstallCmd(), a.rootdUninstallCmd(), a.rootdStatusCmd())
	return c
}

func (a *app) rootdInstallCmd() *cobra.Command {
	var name string
	var dry bool
	c := &cobra.Command{
		Use:   "install",
		Short: "Make the root daemon a service, so that connect never asks for a password",
		Long: `Install copies doppel-rootd to /usr/local/libexec, where only root can change it, makes it a service of systemd that only has
CAP_NET_ADMIN, creates the group doppel and adds you to it: members of the group can connect this machine to clusters. It needs root and
asks for it through sudo. A login from before knows of the group after logging in again; until then connect asks as before.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			if name == "" {
				name = invoker()
			}
			if os.Geteuid() != 0 && !dry {
				return a.throughRoot(ctx, "rootd", "install", "--user", name, "-o", a.output)
			}
			steps, err := spawn.Service{}.Install(ctx, name, dry)
			return a.printSteps(steps, dry, err)
		},
	}
	c.Flags().StringVar(&name, "user", "", "who is to use it (default: you)")
	c.Flags().BoolVar(&dry, "dry-run", false, "only say what would be done")
	return c
}

func (a *app) rootdUninstallCmd() *cobra.Command {
	var dry bool
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Undo install; connect asks through sudo again",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 && !dry {
				return a.throughRoot(c.Context(), "rootd", "uninstall", "-o", a.output)
			}
			steps, err := spawn.Service{}.Uninstall(c.Context(), dry)
			return a.printSteps(steps, dry, err)
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "only say what would be done")
	return c
}

// invoker is who sits at the terminal, also behind sudo.
func invoker() string {
	if u := os.Getenv("SUDO_USER"); u != "" && os.Geteuid() == 0 {
		return u
	}
	return os.Getenv("USER")
}

// throughRoot runs this command again as root.
func (a *app) throughRoot(ctx context.Context, args ...string) error {
	err := spawn.AsRoot(ctx, spawn.Root{
		MayAsk: a.Terminal,
		Reason: func() { fmt.Fprintln(a.Err, "Services are root's to change; sudo may ask for your password.") },
	}, args...)
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return exitCode(ee.ExitCode()) // it has said why
	}
	return err
}

// printSteps tells what was done before err, if that is not nil.
func (a *app) printSteps(steps []spawn.Step, dry bool, err error) error {
	says := make([]string, len(steps))
	for i, s := range steps {
		says[i] = s.Say
	}
	if err != nil {
		for _, s := range says {
			fmt.Fprintln(a.Err, "done:", s)
		}
		return err
	}
	return a.print(map[string]any{"steps": says, "dryRun": dry}, func(w io.Writer) {
		for _, s := range says {
			if dry {
				s = "would " + s
			}
			fmt.Fprintln(w, s)
		}
	})
}

func (a *app) rootdStatusCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether the root daemon is a service, and whether you may use it",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := spawn.Service{}.Status(c.Context())
			if err != nil {
				return uerr.Wrap(err, uerr.Internal, "", "look at the service")
			}
			return a.print(st, func(w io.Writer) { writeService(w, st) })
		},
	}
}

func writeService(w io.Writer, st spawn.ServiceStatus) {
	say := func(what, value string) { fmt.Fprintf(w, "%-8s: %s\n", what, value) }
	if !st.Systemd {
		say("systemd", "does not run here; connect starts the root daemon through sudo")
	}
	switch {
	case st.Unit == "":
		say("Unit", "none; install it with: doppel rootd install")
	case st.Enabled:
		say("Unit", st.Unit+", started at boot")
	default:
		say("Unit", st.Unit+", not started at boot")
	}
	say("Daemon", cmp.Or(st.Running, "not running as a service"))
	switch {
	case !st.Group:
		say("Group", "there is no group doppel")
	case !st.Member:
		say("Group", "you are not in the group doppel: doppel rootd install adds you")
	case !st.Login:
		say("Group", "you are in the group doppel; log in again for that to count")
	default:
		say("Group", "you may use the service")
	}
}
