// Package spawn owns starting the two daemons, as processes of their own that outlive the terminal (the root daemon through sudo or as a service of the system), and when a command is told to end.
package spawn

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// RootProgram is the root daemon's file name; it lies beside the doppel program or in PATH.
const RootProgram = "doppel-rootd"

// startTimeout is how long a daemon may take to listen.
const startTimeout = 5 * time.Second

// EnvRootSocket names the environment variable that moves the root daemon's socket, for two daemons side by side and for tests.
const EnvRootSocket = "DOPPEL_ROOT_SOCKET"

// RootSocket is where this user's root daemon listens: the one that was started for this user, else the system's service. Without
// either it is where one would be started.
func RootSocket() string {
	own := ownRootSocket()
	if !answers("unixpacket", own) && os.Getenv(EnvRootSocket) == "" && answers("unixpacket", rootapi.DefaultSocket) {
		return rootapi.DefaultSocket
	}
	return own
}

// ownRootSocket is the socket of a root daemon that serves this user alone.
func ownRootSocket() string {
	if s := os.Getenv(EnvRootSocket); s != "" {
		return s
	}
	return fmt.Sprintf("/run/doppel/rootd-%d.sock", os.Getuid())
}

// UserDaemon starts the user daemon if nobody listens on its socket. It says whether it had to.
func UserDaemon(ctx context.Context) (bool, error) {
	socket := localapi.DaemonSocket()
	if answers("unix", socket) {
		return false, nil
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	logFile, err := LogFile("daemon")
	if err != nil {
		return false, err
	}
	d := daemon{"the user daemon", "unix", socket, logFile}
	return d.start(ctx, func() error { return detached(self, "daemon", "--log", logFile) })
}

// LogFile is where the named daemon logs.
func LogFile(name string) (string, error) {
	dir, err := localapi.StateDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, name+".log"), nil
}

// Root is how the root daemon may be started.
type Root struct {
	// MayAsk allows sudo to ask for a password; Reason is called before it does.
	MayAsk bool
	Reason func()
}

// RootDaemon starts the root daemon if nobody listens on its socket. It says whether it had to.
func RootDaemon(ctx context.Context, r Root) (bool, error) {
	if answers("unixpacket", RootSocket()) || waitService(ctx) {
		return false, nil
	}
	socket := ownRootSocket()
	program, err := Find(RootProgram)
	if err != nil {
		return false, err
	}
	logFile, err := LogFile("rootd")
	if err != nil {
		return false, err
	}
	args := []string{"--socket", socket, "--uid", strconv.Itoa(os.Getuid()), "--log", logFile}
	d := daemon{"the root daemon", "unixpacket", socket, logFile}
	return d.start(ctx, func() error {
		if os.Geteuid() == 0 {
			return detached(program, args...)
		}
		return throughSudo(ctx, r, program, args)
	})
}

// waitService waits for a service that is being started again, by systemd or by a package's upgrade.
func waitService(ctx context.Context) bool {
	if os.Getenv(EnvRootSocket) != "" || !(Service{}).expected() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, serviceWait)
	defer cancel()
	for !answers("unixpacket", rootapi.DefaultSocket) {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
	return true
}

// throughSudo starts the program as root: silently where sudo needs no password, else after the reason for it was said.
func throughSudo(ctx context.Context, r Root, program string, args []string) error {
	quiet := exec.CommandContext(ctx, "sudo", append([]string{"-n", "-b", "--", program}, args...)...)
	if err := quiet.Run(); err == nil {
		return nil
	} else if errors.Is(err, exec.ErrNotFound) {
		return uerr.Wrap(err, uerr.Denied, "run "+program+" as root yourself, or install sudo", "the root daemon needs root to create a network device, and there is no sudo")
	}
	if !r.MayAsk {
		return uerr.New(uerr.Denied, "run doppel connect in a terminal, or allow sudo without a password for "+program, "sudo needs a password to start the root daemon and there is no terminal to ask in")
	}
	r.Reason()
	ask := exec.CommandContext(ctx, "sudo", append([]string{"-b", "--", program}, args...)...)
	ask.Stdin, ask.Stdout, ask.Stderr = os.Stdin, os.Stderr, os.Stderr
	if err := ask.Run(); err != nil {
		return uerr.Wrap(err, uerr.Denied, "you need sudo rights on this machine", "sudo did not start the root daemon")
	}
	return nil
}

// CanStartRoot is nil if RootDaemon would start the root daemon without asking for a password. It starts nothing.
func CanStartRoot(ctx context.Context) error {
	program, err := Find(RootProgram)
	if err != nil || os.Geteuid() == 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	err = exec.CommandContext(ctx, "sudo", "-n", "-l", "--", program).Run()
	if errors.Is(err, exec.ErrNotFound) {
		return uerr.Wrap(err, uerr.Denied, "run "+program+" as root yourself, or install sudo", "there is no sudo to start the root daemon with")
	}
	if err != nil {
		return uerr.New(uerr.Denied, "run doppel connect in a terminal, or allow sudo without a password for "+program, "sudo will ask for a password to start the root daemon")
	}
	return nil
}

// AsRoot runs this program again as root, through sudo, with our terminal.
func AsRoot(ctx context.Context, r Root, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := append([]string{"--", self}, args...)
	if !r.MayAsk {
		argv = append([]string{"-n"}, argv...)
	} else {
		r.Reason()
	}
	cmd := exec.CommandContext(ctx, "sudo", argv...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = cmd.Run()
	if errors.Is(err, exec.ErrNotFound) {
		return uerr.Wrap(err, uerr.Denied, "run it as root", "this needs root, and there is no sudo")
	}
	return err
}

// Find returns where a program lies that belongs to this one.
func Find(program string) (string, error) {
	if self, err := os.Executable(); err == nil {
		if real, err := filepath.EvalSymlinks(self); err == nil {
			self = real
		}
		p := filepath.Join(filepath.Dir(self), program)
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	p, err := exec.LookPath(program)
	if err != nil {
		return "", uerr.Wrap(err, uerr.Usage, "install it beside the doppel program", "%s is missing", program)
	}
	return p, nil
}

// answers says whether somebody listens on a unix socket.
func answers(network, socket string) bool {
	c, err := net.DialTimeout(network, socket, time.Second)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// daemon is a program to be started and what is known of it.
type daemon struct {
	what, network, socket, logFile string
}

// start runs the program and polls its socket; a daemon that does not come up is explained with the end of its log.
func (d daemon) start(ctx context.Context, run func() error) (started bool, err error) {
	logged := size(d.logFile)
	if err := run(); err != nil {
		return false, err
	}
	// Also when ctx ends: what has been started can be stopped once it answers.
	deadline := time.After(startTimeout)
	for !answers(d.network, d.socket) {
		select {
		case <-deadline:
			if ctx.Err() != nil {
				return true, context.Cause(ctx)
			}
			return true, uerr.New(uerr.Internal, "its log is "+d.logFile, "%s did not start%s", d.what, lastLine(d.logFile, logged))
		case <-time.After(10 * time.Millisecond):
		}
	}
	if ctx.Err() != nil {
		return true, context.Cause(ctx)
	}
	return true, nil
}

// WaitStopped returns when neither daemon listens any more, but for a root daemon that is the system's service, and when the processes have
// ended: until then they have files open.
func WaitStopped(ctx context.Context, pids ...int) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for answers("unix", localapi.DaemonSocket()) || answers("unixpacket", ownRootSocket()) || slices.ContainsFunc(pids, runs) {
		select {
		case <-ctx.Done():
			return uerr.New(uerr.Internal, "look at them with: doppel status", "the daemons did not stop")
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

func size(file string) int64 {
	st, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return st.Size()
}

// lastLine is the last line of a log after a colon, if anything was written behind offset; a log may also have been begun anew.
func lastLine(file string, offset int64) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	if offset <= int64(len(b)) {
		b = b[offset:]
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if l := lines[len(lines)-1]; l != "" {
		return ": " + l
	}
	return ""
}
