package ns

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/state"
)

// Net is for Do: the network namespace only.
const Net = unix.CLONE_NEWNET

// All is for Do: every namespace of a holder.
const All = namespaces

// Do runs fn on a thread of its own inside the holder's namespaces (a mask of CLONE_NEW*). Goroutines that fn starts
// are outside; processes that fn starts are inside.
func Do(holder state.Process, mask int, fn func() error) error {
	fd, err := open(holder)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its changed namespaces with it.
		runtime.LockOSThread()
		result <- enterAndRun(fd, mask, fn)
	}()
	return <-result
}

func enterAndRun(pidfd, mask int, fn func() error) error {
	if mask&unix.CLONE_NEWNS != 0 {
		// setns(2): a thread that shares its root and working directory with others cannot change its mounts.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare working directory: %w", err)
		}
	}
	if err := unix.Setns(pidfd, mask); err != nil {
		return fmt.Errorf("enter namespaces: %w", err)
	}
	return fn()
}

// Command is a command to run inside.
type Command struct {
	Argv []string
	// Env is the whole environment; its PATH finds the program.
	Env []string
	// Dir is the working directory; empty means the root directory.
	Dir string
	// UID is the user, and the only group, that the command runs as.
	UID            int
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Started is called with the process, if it is set.
	Started func(*os.Process)
}

// Run runs a command inside the holder's namespaces and waits for it. The command dies with the caller; what it
// leaves running in the background does not.
func Run(holder state.Process, c Command) error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	cmd := inside(self, append([]string{ExecCommand, itoa(c.UID)}, c.Argv...)...)
	cmd.Env, cmd.Dir = c.Env, cmp.Or(c.Dir, "/")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	return Do(holder, All, func() error {
		if err := cmd.Start(); err != nil {
			return err
		}
		if c.Started != nil {
			c.Started(cmd.Process)
		}
		// On this thread: RunExec asks to die with the thread that forked.
		return cmd.Wait()
	})
}

// inside is our own program with hidden arguments. Its path may be hidden inside, its descriptor is not.
func inside(self *os.File, args ...string) *exec.Cmd {
	return exec.Command(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), args...)
}

// ExitCode turns the error of Run into the exit code a shell would show, and true, if the command ran at all.
func ExitCode(err error) (int, bool) {
	if err == nil {
		return 0, true
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0, false
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), true
	}
	return exit.ExitCode(), true
}
