package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// WithVolumes has cmd run by a helper that first shows it directories below root at their own paths too, in a mount namespace of its own.
// helper are the arguments by which this program runs BecomeWithVolumes. A user who is not root needs a user namespace for that.
func WithVolumes(cmd *exec.Cmd, helper []string, root string, paths []string) {
	cmd.Args = slices.Concat([]string{"/proc/self/exe"}, helper, []string{"--", root, strings.Join(paths, ":")}, cmd.Args)
	cmd.Path = "/proc/self/exe"
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
	}
	cmd.SysProcAttr = attr
}

// BecomeWithVolumes is the helper: it shows what it can, tells what it cannot, and becomes the command.
func BecomeWithVolumes(args []string, tell func(error)) error {
	if len(args) < 3 {
		return errors.New("use: doppel intercept NAME -- COMMAND")
	}
	runtime.LockOSThread() // what a thread drops, only that thread's exec(2) is without
	root, paths, argv := args[0], strings.Split(args[1], ":"), args[2:]
	if err := showVolumes(root, paths); err != nil {
		tell(err)
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return fmt.Errorf("run %s: %w", argv[0], unix.Exec(path, argv, os.Environ()))
}

// showVolumes binds each path below root to itself, where this machine has nothing of that name.
func showVolumes(root string, paths []string) error {
	cwd, err := os.Getwd()
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return refused(err, "make mounts private")
	}
	paths = slices.Clone(paths)
	slices.SortFunc(paths, func(a, b string) int { return len(a) - len(b) })
	var errs []error
	for _, p := range paths {
		if err := showVolume(filepath.Join(root, p), p, cwd); err != nil {
			errs = append(errs, fmt.Errorf("show %s at its own path: %w", p, err))
		}
	}
	return errors.Join(append(errs, os.Chdir(cwd))...) // into the same directory, where it is now
}

func showVolume(source, p, cwd string) error {
	if _, err := os.Lstat(p); err == nil {
		return nil // this machine's own
	}
	above, err := existing(p)
	if err != nil || keptAsIs(above, cwd) {
		return err
	}
	fi, err := os.Stat(source)
	if err != nil {
		return err
	}
	if above == "/" {
		err = mirrorRoot()
	} else {
		err = mirror(above)
	}
	if err != nil {
		return err
	}
	if fi.IsDir() {
		err = os.MkdirAll(p, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(p), 0o755); err == nil {
		err = os.WriteFile(p, nil, 0o600)
	}
	if err != nil {
		return err
	}
	return os.NewSyscallError("mount", unix.Mount(source, p, "", unix.MS_BIND|unix.MS_REC, ""))
}

// existing is the deepest directory above a path that this machine has, without symbolic links.
func existing(p string) (string, error) {
	for d := filepath.Dir(p); ; d = filepath.Dir(d) {
		real, err := filepath.EvalSymlinks(d)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return real, err
		}
	}
}

// keptAsIs says that a directory must not be replaced by a likeness: the command may make files there that are to stay.
func keptAsIs(dir, cwd string) bool {
	if dir == cwd {
		return true
	}
	if os.Geteuid() != 0 {
		return unix.Access(dir, unix.W_OK) == nil
	}
	fi, err := os.Stat(dir)
	home, herr := os.UserHomeDir()
	return err != nil || fi.Mode()&0o002 != 0 || herr == nil && home != "/" && (dir == home || strings.HasPrefix(dir, home+"/"))
}

// mirror puts a likeness in memory over a directory, to which names can be added: everything in it is the original's.
func mirror(dir string) error {
	original, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(original)
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if err := mountMemory(dir); err != nil {
		return err
	}
	return fillMirror(fmt.Sprintf("/proc/self/fd/%d", original), dir, names)
}

// fillMirror binds the entries of a directory into another. What cannot be bound is left out.
func fillMirror(from, to string, names []os.DirEntry) error {
	for _, n := range names {
		source, target := filepath.Join(from, n.Name()), filepath.Join(to, n.Name())
		var err error
		switch {
		case n.Type() == fs.ModeSymlink:
			var link string
			if link, err = os.Readlink(source); err == nil {
				err = os.Symlink(link, target)
			}
			if err != nil {
				return err
			}
			continue
		case n.IsDir():
			err = os.Mkdir(target, 0o755)
		default:
			err = os.WriteFile(target, nil, 0o600)
		}
		if err != nil {
			return err
		}
		if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			_ = os.Remove(target)
		}
	}
	return nil
}

// mirrorRoot makes a likeness of / this process's root: mounting over / would not change what its paths begin at (pivot_root(2)).
func mirrorRoot() error {
	const aside, old = "/tmp", ".doppel-old"
	kept, err := unix.OpenTree(unix.AT_FDCWD, aside, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE) // without what is mounted on it next
	if err != nil {
		return refused(err, "keep "+aside)
	}
	defer unix.Close(kept)
	names, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	if err := mountMemory(aside); err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(n os.DirEntry) bool { return n.Name() == "tmp" })
	if err := fillMirror("/", aside, names); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(filepath.Join(aside, "tmp"), 0o755), os.Mkdir(filepath.Join(aside, old), 0o700)); err != nil {
		return err
	}
	if err := unix.MoveMount(kept, "", unix.AT_FDCWD, filepath.Join(aside, "tmp"), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return refused(err, "keep "+aside)
	}
	if err := os.Chdir(aside); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", old); err != nil {
		return refused(err, "change the root")
	}
	if err := unix.Unmount("/"+old, unix.MNT_DETACH); err != nil {
		return refused(err, "let go of the old root")
	}
	return os.Remove("/" + old)
}
