package ns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// ExecCommand is the hidden command of the program that becomes a command inside.
const ExecCommand = "__exec"

// RunExec is what ExecCommand does: it becomes a user and then the command, and dies with its parent.
//
// os/exec cannot ask for that itself here: it checks the parent's id afterwards, which is 0 in another PID namespace.
func RunExec(args []string) error {
	if len(args) < 2 {
		return errors.New("a user id and a command are needed")
	}
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	path, err := exec.LookPath(args[1])
	if err != nil {
		return err
	}
	if uid != 0 {
		if err := errors.Join(syscall.Setgroups([]int{uid}), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	// After the change of user, which resets it; see PR_SET_PDEATHSIG(2const).
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("tie to the parent: %w", err)
	}
	return fmt.Errorf("%s: %w", args[1], unix.Exec(path, args[1:], os.Environ()))
}
