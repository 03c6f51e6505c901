package sandbox

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// helperTimeout bounds what the helper does before it becomes the command.
const helperTimeout = 10 * time.Second

// Box is a set of namespaces in which a command waits to be started.
type Box struct {
	cfg  Config
	cmd  *exec.Cmd
	conn *net.UnixConn // to the helper
	own  *daemon
}

// Start makes the namespaces. The helper in them ends with this process, however that ends, and so does the command: call it from the
// goroutine that waits for the command, because the kernel ties the two to its thread.
func Start(cfg Config) (*Box, error) {
	cfg.ResolvConf = cmp.Or(cfg.ResolvConf, resolvConf)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if _, err := exec.LookPath(cfg.Argv[0]); err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "", "run %s", cfg.Argv[0])
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	b := &Box{cfg: cfg, conn: ours}
	b.own = newDaemon(b)
	b.cmd = exec.Command("/proc/self/exe", append(cfg.Helper, cfg.Argv...)...)
	b.cmd.Env, b.cmd.Stdin, b.cmd.Stdout, b.cmd.Stderr = cfg.Env, cfg.Stdin, cfg.Stdout, cfg.Stderr
	b.cmd.ExtraFiles = []*os.File{theirs}
	uid, gid := os.Getuid(), os.Getgid()
	b.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}},
		// A user who is not root inside either loses all capabilities at exec, but for ambient ones (capabilities(7)).
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is of this thread; it is the caller's until the end
	if err := b.cmd.Start(); err != nil {
		ours.Close()
		return nil, refusal(lookAtKernel(), err)
	}
	theirs.Close() // so that the helper's end is seen
	if f, err := b.receive(); err != nil || f != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Root connects as a user daemon does to a doppel-rootd: the network that is set through it is the box's.
func (b *Box) Root(ctx context.Context, o rootapi.Options) (*rootapi.Client, error) {
	return b.own.connect(ctx, o)
}

// Go lets the command begin.
func (b *Box) Go() error {
	if err := b.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if _, err := b.conn.Write([]byte(begin)); err != nil {
		return fmt.Errorf("start the command: %w", err)
	}
	return nil
}

// Cmd is the command, which was started (as the helper, until Go) and is to be waited for.
func (b *Box) Cmd() *exec.Cmd { return b.cmd }

// Close kills what still runs and ends what serves it.
func (b *Box) Close() {
	b.conn.Close()
	if b.cmd.ProcessState == nil {
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait() // killed
	}
	b.own.close()
}

// order is what the helper is told to set up.
type order struct {
	Network rootapi.Network
	Search  []string
}

// setUp has the helper make the network, and returns the device.
func (b *Box) setUp(o order) (*os.File, error) {
	msg, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	if _, err := b.conn.Write(msg); err != nil {
		return nil, fmt.Errorf("set up the namespaces: %w", err)
	}
	f, err := b.receive()
	if err == nil && f == nil {
		err = errors.New("the helper passed no device")
	}
	return f, err
}

// receive reads one answer of the helper, with the descriptor that came along, if any.
func (b *Box) receive() (*os.File, error) {
	if err := b.conn.SetDeadline(time.Now().Add(helperTimeout)); err != nil {
		return nil, err
	}
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := b.conn.ReadMsgUnix(buf, oob)
	if err == nil && n == 0 {
		err = errors.New("the helper ended")
	}
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Internal, "", "set up the namespaces")
	}
	if e := new(uerr.Error); json.Unmarshal(buf[:n], e) == nil && e.Msg != "" {
		if e.Kind == uerr.Denied && e.Hint == "" {
			return nil, refusal(lookAtKernel(), e)
		}
		return nil, e
	}
	return descriptor(oob[:oobn])
}

func descriptor(oob []byte) (*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("message of the helper: %w", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(errors.New("message of the helper: not one descriptor"), err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // os.File waits by the poller then
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "passed by the helper"), nil
}

// socketPair returns one end for this process and one to be inherited.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	return c.(*net.UnixConn), theirs, nil
}

func lookAtKernel() facts {
	read := func(name string) string {
		b, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	return facts{
		clone: read("kernel/unprivileged_userns_clone"), max: read("user/max_user_namespaces"),
		appArmor: read("kernel/apparmor_restrict_unprivileged_userns"),
	}
}
