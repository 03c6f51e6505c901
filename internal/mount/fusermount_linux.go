package mount

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// ErrNoFUSE says that this machine cannot mount anything for a user.
var ErrNoFUSE = errors.New("this machine has no FUSE")

// canMount says what is missing: fusermount3 itself tells only whoever started the daemon.
func canMount() error {
	if _, err := exec.LookPath("fusermount3"); err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// helperTimeout bounds what fusermount3 does.
const helperTimeout = 5 * time.Second

// unmountCommand unmounts also what is still in use.
func unmountCommand(point string) *exec.Cmd {
	return exec.Command("fusermount3", "-u", "-z", "-q", "--", point)
}

// unmount unmounts; whoever has files open there gets errors.
func unmount(point string) error {
	cmd := unmountCommand(point)
	cmd.WaitDelay = helperTimeout
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("unmount %s: %w: %s", point, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// guard is a process that unmounts when this one has ended, killed or not: its standard input ends then. The kernel itself leaves the mount of
// a file system whose process is gone, and every access to it fails. (fusermount3's own auto_unmount does nothing if it looks a moment
// before the kernel knows that the process is gone.)
type guard struct {
	cmd   *exec.Cmd
	input io.WriteCloser
}

func startGuard(point string) (*guard, error) {
	cmd := exec.Command("/bin/sh", "-c", `trap "" HUP INT TERM; read -r _; cd /; exec "$@"`, "doppel-mount-guard")
	cmd.Args = append(cmd.Args, unmountCommand(point).Args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	input, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start the process that unmounts: %w", err)
	}
	return &guard{cmd, input}, nil
}

// end ends the guard, which unmounts.
func (g *guard) end() {
	_ = g.input.Close()
	t := time.AfterFunc(helperTimeout, func() { _ = g.cmd.Process.Kill() })
	defer t.Stop()
	_ = g.cmd.Wait()
}
