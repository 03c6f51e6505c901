package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/environ"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/sandbox"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// appFlags choose what of an app comes to this machine beside its traffic: its environment, its files, and a process in its place.
type appFlags struct {
	envFile, envSyntax, envJSON string
	mount, mountMode            string
	ownPaths                    bool
}

// The modes of --mount-mode.
const (
	mountFUSE = "fuse"
	mountCopy = "copy"
)

func (p *appFlags) register(c *cobra.Command) {
	f := c.Flags()
	f.StringVarP(&p.envFile, "env-file", "e", "", "write the app's environment to this file")
	f.StringVar(&p.envSyntax, "env-syntax", "docker", "syntax of --env-file: "+strings.Join(environ.Syntaxes, ", "))
	f.StringVarP(&p.envJSON, "env-json", "j", "", "write the app's environment to this file, as JSON")
	f.StringVar(&p.mount, "mount", "true", "where the app's volumes are mounted: `PATH`, true (a directory of doppel's) or false; :rw behind it to write as well")
	f.StringVar(&p.mountMode, "mount-mode", mountFUSE, "fuse, or copy: the files as they are now, without a mount, in the place of an earlier copy")
	f.BoolVar(&p.ownPaths, "volumes-in-place", true, "show the volumes to COMMAND at their own paths as well, where this machine has nothing there (Linux)")
}

// request checks what the user typed.
func (p *appFlags) request() (localapi.MountRequest, error) {
	var m localapi.MountRequest
	if !slices.Contains(environ.Syntaxes, p.envSyntax) {
		return m, uerr.New(uerr.Usage, "one of: "+strings.Join(environ.Syntaxes, ", "), "unknown --env-syntax %q", p.envSyntax)
	}
	if p.mountMode != mountFUSE && p.mountMode != mountCopy {
		return m, uerr.New(uerr.Usage, "fuse or copy", "unknown --mount-mode %q", p.mountMode)
	}
	where, rw := strings.CutSuffix(p.mount, ":rw")
	m.ReadWrite, m.Copy = rw, p.mountMode == mountCopy
	switch where = strings.TrimSuffix(where, ":ro"); where {
	case "true", "":
	case "false":
		m.None = true
	default:
		abs, err := filepath.Abs(where)
		if err != nil {
			return m, err
		}
		m.Point = abs
	}
	switch {
	case m.None && (m.ReadWrite || m.Copy):
		return m, uerr.New(uerr.Usage, "leave one of them out", "--mount=false and a way to mount")
	case m.ReadWrite && m.Copy:
		return m, uerr.New(uerr.Usage, "leave one of them out", "a copy is not written back: --mount-mode copy and :rw")
	}
	return m, nil
}

// wanted says whether the environment is asked for.
func (p *appFlags) wanted(command []string) bool {
	return p.envFile != "" || p.envJSON != "" || len(command) > 0
}

// environ gets the environment of an intercept's container and writes the files that were asked for.
func (p *appFlags) environ(ctx context.Context, a *app, use, name string) (environ.Env, error) {
	var out localapi.Environ
	if err := a.call(ctx, localapi.MethodEnviron, localapi.EnvironRequest{Choice: localapi.Choice{Use: use}, Name: name}, &out); err != nil {
		return nil, err
	}
	if out.Incomplete != "" {
		fmt.Fprintf(a.Err, "doppel: warning: without the variables of the image: %s\n", oneLine(out.Incomplete))
	}
	env := environ.Env(out.Variables).Local()
	if p.envFile != "" {
		text, left, err := env.Format(p.envSyntax)
		if err != nil {
			return nil, err
		}
		if len(left) > 0 {
			fmt.Fprintf(a.Err, "doppel: warning: the syntax %s cannot hold %s\n", p.envSyntax, strings.Join(left, ", "))
		}
		if err := writePrivate(p.envFile, []byte(text)); err != nil {
			return nil, err
		}
	}
	if p.envJSON != "" {
		b, err := json.MarshalIndent(env, "", "  ")
		if err == nil {
			err = writePrivate(p.envJSON, append(b, '\n'))
		}
		if err != nil {
			return nil, err
		}
	}
	return env, nil
}

// writePrivate writes a file for the user alone: there may be secrets in it.
func writePrivate(name string, b []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		err = f.Chmod(0o600)
		if err == nil {
			_, err = f.Write(b)
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return uerr.Wrap(err, uerr.Usage, "", "write the environment")
	}
	return nil
}

// inPlace does what was asked for beside the traffic of a new intercept, and runs the command in the app's place. The intercept ends with
// the command, and with an error.
func (p *appFlags) inPlace(ctx context.Context, a *app, req localapi.InterceptRequest, uid string, command []string, show func() error) error {
	var env environ.Env
	var err error
	if p.wanted(command) {
		env, err = p.environ(ctx, a, req.Use, req.Name)
	}
	if err == nil {
		err = show()
	}
	if err == nil && len(command) == 0 {
		return nil
	}
	if err == nil {
		err = p.command(ctx, a, command, env)
	}
	lctx, stop := spawn.Interruptible(context.WithoutCancel(ctx)) // who interrupts once more does not wait for the app to be back
	defer stop()
	lerr := a.call(lctx, localapi.MethodLeave, localapi.LeaveRequest{Choice: req.Choice, Name: req.Name, UID: uid}, nil)
	if a.gone(lerr) {
		lerr = nil
	}
	if err != nil && lerr != nil { // both count: the app may still be replaced
		a.warn(lerr)
		return err
	}
	return cmp.Or(err, lerr)
}

// gone says whether err is that somebody else has ended, or is just ending, what was to be ended: worth a warning, and no other exit code than
// the command's.
func (a *app) gone(err error) bool {
	if err == nil {
		return false
	}
	e := uerr.From(err)
	if !errors.Is(err, localapi.ErrNoDaemon) && !slices.Contains([]uerr.Kind{uerr.NotFound, uerr.NotConnected, uerr.Conflict}, e.Kind) {
		return false
	}
	fmt.Fprintf(a.Err, "doppel: warning: %s\n", oneLine(e.Msg))
	return true
}

// command runs a command in the app's place: with its environment, and with its volumes at their own paths where this machine has nothing
// there. So what an app finds without asking, its service account's token above all, is where it looks.
func (p *appFlags) command(ctx context.Context, a *app, command []string, env environ.Env) error {
	full := env.Over(os.Environ())
	run := func() *exec.Cmd {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Env = full
		return cmd
	}
	root, volumes := env["DOPPEL_ROOT"], env["DOPPEL_MOUNTS"]
	if root == "" || volumes == "" || !p.ownPaths {
		return a.runCommand(ctx, run())
	}
	cmd := run()
	sandbox.WithVolumes(cmd, []string{volumesCommand}, root, strings.Split(volumes, ":"))
	err := a.runCommand(ctx, cmd)
	if err != nil && cmd.Process == nil && sandbox.Refused(err) { // this machine lets nobody make namespaces
		fmt.Fprintf(a.Err, "doppel: warning: the volumes are below %s only, not at their own paths: %s\n", root, oneLine(err.Error()))
		return a.runCommand(ctx, run())
	}
	return err
}

// volumesCommand is the hidden command that becomes the user's command among the app's volumes.
const volumesCommand = "run-with-volumes"

func (a *app) volumesCmd() *cobra.Command {
	return &cobra.Command{
		Use: volumesCommand, Short: "Become a command among an app's volumes (intercept starts it by itself)", Hidden: true, Args: cobra.MinimumNArgs(3),
		RunE: func(_ *cobra.Command, args []string) error {
			return sandbox.BecomeWithVolumes(args, func(err error) { fmt.Fprintf(a.Err, "doppel: warning: %s\n", oneLine(err.Error())) })
		},
	}
}

// mountLine says where an app's volumes are.
func mountLine(m *localapi.Mount) string {
	switch {
	case m.Error != "":
		return "none: " + oneLine(m.Error)
	case m.LeftOut != "":
		return m.Point + " (a copy; " + oneLine(m.LeftOut) + ")"
	case m.Copy:
		return m.Point + " (a copy)"
	case m.ReadWrite:
		return m.Point
	}
	return m.Point + " (read-only)"
}
