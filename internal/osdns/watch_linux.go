package osdns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/netwatch"
)

// settle is how long after a first change the changes are told as one: DHCP and VPN clients make several in a row.
const settle = 100 * time.Millisecond

// Watch calls changed after one of the files, a symbolic link on the way to it, or an address or route of the machine has changed, until ctx
// ends. It does not say what changed: look again. changed runs on one goroutine. Files behind the first one may have no directory yet.
func Watch(ctx context.Context, changed func(), files ...string) error {
	events := make(chan struct{}, 1)
	poke := func() {
		select {
		case events <- struct{}{}:
		default:
		}
	}
	for i, file := range files {
		if err := watchFile(ctx, file, poke); err != nil && (i == 0 || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	if err := netwatch.Network(ctx, poke); err != nil {
		return fmt.Errorf("watch addresses and routes: %w", err)
	}
	var pending <-chan time.Time // set by the first change since changed was called
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			if pending == nil {
				pending = time.After(settle)
			}
		case <-pending:
			pending = nil
			changed()
		}
	}
}

// watchFile pokes at changes of what file reads as. Programs replace resolv.conf by renaming, by writing into it, by turning a link, or by
// changing the link's target; and a bind mount over it has events of its own. So every directory on the way is watched as well as the file
// itself, again after each event.
func watchFile(ctx context.Context, file string, poke func()) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch %s: %w", file, err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if err := addWatches(fd, file); err != nil {
		f.Close()
		return fmt.Errorf("watch %s: %w", file, err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer stop()
		buf := make([]byte, 16<<10)
		for {
			if _, err := f.Read(buf); err != nil {
				return // closed
			}
			rearm(f, file)
			poke()
		}
	}()
	return nil
}

func rearm(f *os.File, file string) {
	if rc, err := f.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = addWatches(int(fd), file) })
	}
}

const watchMask = unix.IN_CLOSE_WRITE | unix.IN_MODIFY | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM |
	unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

// addWatches watches what is on the way to file; adding a watch twice is one watch (inotify(7)).
func addWatches(fd int, file string) error {
	first := true
	for _, p := range hops(file) {
		_, err := unix.InotifyAddWatch(fd, p, watchMask)
		switch {
		case err == nil:
			first = false
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EACCES):
		default:
			return err
		}
	}
	if first {
		return fs.ErrNotExist
	}
	return nil
}

// hops lists the directories that hold file and each symbolic link that it leads through, and at the end the file itself. Directories are
// not resolved themselves: nobody turns /run into a link while a laptop runs.
func hops(file string) []string {
	var out []string
	for range 10 { // as deep as anybody goes; the kernel gives up at 40
		out = append(out, filepath.Dir(file))
		target, err := os.Readlink(file)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(file), target)
		}
		file = target
	}
	return append(out, file)
}
