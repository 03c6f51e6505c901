package rootd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// lockWait is how long to wait for another rootd that starts at this moment.
const lockWait = 5 * time.Second

// umaskMu guards the process's umask.
var umaskMu sync.Mutex

// listen binds the socket. A predecessor that ends at this moment may take the directory away: then it starts again.
func listen(ctx context.Context, cfg Config) (l *net.UnixListener, cleanup func(), err error) {
	for range 3 {
		if l, cleanup, err = listenOnce(ctx, cfg); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return l, cleanup, err
}

// listenOnce binds the socket. Exactly one rootd can have it: while its directory is locked (flock on the directory itself, which leaves no
// file behind), a socket that answers belongs to another rootd, and one that does not is left over and removed.
func listenOnce(ctx context.Context, cfg Config) (l *net.UnixListener, cleanup func(), err error) {
	dir := filepath.Dir(cfg.Socket)
	made, err := makeDir(dir)
	if err != nil {
		return nil, nil, err
	}
	unlock, err := lockDir(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	if err := removeStale(cfg.Socket); err != nil {
		return nil, nil, err
	}
	owner, gid, err := socketOwner(cfg)
	if err != nil {
		return nil, nil, err
	}
	umaskMu.Lock()
	old := syscall.Umask(0o117) // rw-rw----, from the first moment
	l, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: cfg.Socket, Net: "unixpacket"})
	syscall.Umask(old)
	umaskMu.Unlock()
	if err != nil {
		return nil, nil, fmt.Errorf("listen: %w", err)
	}
	if err := giveTo(cfg.Socket, owner, gid); err != nil {
		l.Close()
		return nil, nil, fmt.Errorf("give %s to its users: %w", cfg.Socket, err)
	}
	return l, func() {
		l.Close()                                               // removes the socket file
		if made || dir == filepath.Dir(rootapi.DefaultSocket) { // made by a predecessor that was killed
			_ = os.Remove(dir) // only when empty
		}
	}, nil
}

// giveTo changes a file's owner, unless it is right already: a service that runs in the group needs no CAP_CHOWN for that.
func giveTo(path string, uid, gid int) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if int(st.Uid) == uid && int(st.Gid) == gid {
		return nil
	}
	return os.Lchown(path, uid, gid)
}

func socketOwner(cfg Config) (uid, gid int, err error) {
	uid = max(cfg.UID, 0)
	if !cfg.Service {
		return uid, 0, nil
	}
	g, err := user.LookupGroup(Group)
	if err != nil {
		return 0, 0, uerr.Wrap(err, uerr.Usage, "create it: groupadd --system "+Group, "group %s", Group)
	}
	gid, err = strconv.Atoi(g.Gid)
	return uid, gid, err
}

// makeDir creates dir when it is missing, and refuses one in which, or on the way to which, another user could swap files: rootd
// removes and hands over files there as root. What it creates lets all pass through, whatever the umask is: users have to reach the socket.
func makeDir(dir string) (made bool, err error) {
	n := missing(dir)
	if n > 0 {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return false, fmt.Errorf("create %s: %w", dir, err)
		}
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	if err := checkDir(dir, real); err != nil {
		return false, err
	}
	made = n > 0
	if dir == filepath.Dir(rootapi.DefaultSocket) {
		n = max(n, 1) // left over from a predecessor with another umask
	}
	for d := real; n > 0; d, n = filepath.Dir(d), n-1 {
		if err := letIn(d); err != nil {
			return false, err
		}
	}
	return made, nil
}

// checkDir refuses a directory that, or the way to which, others than root could change.
func checkDir(dir, real string) error {
	for d := real; ; d = filepath.Dir(d) {
		var st unix.Stat_t
		if err := unix.Lstat(d, &st); err != nil {
			return fmt.Errorf("look at %s: %w", d, err)
		}
		mine := st.Uid == 0 || int(st.Uid) == os.Geteuid()
		if open := st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0; !mine || open {
			return uerr.New(uerr.Usage, "put the socket where only root can write, such as /run/doppel", "directory %s of the socket can be changed by others than root", d)
		}
		if d == "/" {
			return nil
		}
	}
}

// missing is how many directories there are to make for dir.
func missing(dir string) (n int) {
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(dir); err == nil {
			break
		}
		n++
	}
	return n
}

// letIn has all pass through a directory, if this user owns it.
func letIn(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mode&0o055 == 0o055 {
		return nil
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return fmt.Errorf("let users into %s: %w", dir, err)
	}
	return nil
}

func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		case <-tick.C:
		}
	}
}

// removeStale removes a socket file on which nobody listens.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return uerr.New(uerr.Usage, "choose another path", "%s exists and is no socket", path)
	}
	c, err := net.Dial("unixpacket", path)
	if err == nil {
		c.Close()
		return uerr.New(uerr.Conflict, "use it, or end it first: its user with doppel quit -s, a service with sudo systemctl stop doppel-rootd", "another doppel-rootd listens on %s", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("try %s: %w", path, err)
	}
	return os.Remove(path)
}
