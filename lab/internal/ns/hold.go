package ns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Role is a server that a holder runs until ctx ends; arg is its RoleArg.
type Role func(ctx context.Context, arg string) error

// Hold is the life of a holder, the first process of its namespaces. Roles are the servers it can run by name.
func Hold(roles map[string]Role) error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
	var spec Spec
	if err := json.NewDecoder(os.Stdin).Decode(&spec); err != nil {
		return fmt.Errorf("no instructions: %w", err)
	}
	if err := setUp(spec); err != nil {
		fmt.Println(strings.ReplaceAll(err.Error(), "\n", "; "))
		return err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	if spec.Role != "" {
		role, ok := roles[spec.Role]
		if !ok {
			fmt.Printf("no role %q\n", spec.Role)
			return fmt.Errorf("no role %q", spec.Role)
		}
		go func() { cancel(role(ctx, spec.RoleArg)) }()
	}
	fmt.Println("ok")
	if err := closeStandardStreams(); err != nil {
		return err
	}
	reap(ctx)
	return context.Cause(ctx)
}

// closeStandardStreams lets go of the pipes to the starter.
func closeStandardStreams() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	return errors.Join(unix.Dup2(int(null.Fd()), 0), unix.Dup2(int(null.Fd()), 1))
}

// reap collects the orphans of the PID namespace, whose parent the kernel makes us, until ctx ends.
func reap(ctx context.Context) {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		select {
		case <-children:
		case <-ctx.Done():
			return
		}
	}
}

const cgroups = "/sys/fs/cgroup"

func setUp(spec Spec) error {
	if spec.Hostname != "" {
		if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// A new /sys, below, shows the links of the new network namespace, but lacks the control groups.
	binds := append([]Bind{{From: cgroups, To: cgroups}}, spec.Binds...)
	sources, err := openSources(binds)
	defer func() {
		for _, f := range sources {
			f.Close()
		}
	}()
	if err != nil {
		return err
	}
	for _, dir := range spec.Hide {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("hide %s: %w", dir, err)
		}
	}
	for i, dir := range spec.Overlay {
		if err := overlay(dir, fmt.Sprintf("/run/.overlay/%d", i)); err != nil {
			return err
		}
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	for i, b := range binds {
		if err := bind(sources[i], b.To); err != nil {
			return err
		}
	}
	// The PID namespace is new, so /proc must be too.
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := shadow(spec.Shadow); err != nil {
		return err
	}
	if spec.Shared {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
			return fmt.Errorf("make mounts shared: %w", err)
		}
	}
	return write(spec)
}

func openSources(binds []Bind) ([]*os.File, error) {
	var files []*os.File
	for _, b := range binds {
		fd, err := unix.Open(b.From, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return files, fmt.Errorf("open %s: %w", b.From, err)
		}
		files = append(files, os.NewFile(uintptr(fd), b.From))
	}
	return files, nil
}

func bind(source *os.File, to string) error {
	info, err := source.Stat()
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(to, 0o755)
	} else {
		err = touch(to)
	}
	if err != nil {
		return fmt.Errorf("mount point %s: %w", to, err)
	}
	from := fmt.Sprintf("/proc/self/fd/%d", source.Fd())
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source.Name(), to, err)
	}
	return nil
}

func touch(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o644)
}

// overlay keeps the changes below dir in store, which must be on a file system of this holder alone.
func overlay(dir, store string) error {
	upper, work := filepath.Join(store, "upper"), filepath.Join(store, "work")
	if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", dir, upper, work)
	if err := unix.Mount("overlay", dir, "overlay", 0, options); err != nil {
		return fmt.Errorf("overlay on %s: %w", dir, err)
	}
	return nil
}

func shadow(files map[string]string) error {
	for path, content := range files {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		private := filepath.Join("/run/.shadow", path)
		err := errors.Join(os.MkdirAll(filepath.Dir(private), 0o755), os.WriteFile(private, []byte(content+"\n"), 0o644))
		if err == nil {
			err = unix.Mount(private, path, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("shadow %s: %w", path, err)
		}
	}
	return nil
}

func write(spec Spec) error {
	for _, path := range spec.Remove {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, f := range spec.Files {
		var err error
		if f.Dir {
			err = os.MkdirAll(f.Path, 0o755)
		} else {
			err = os.WriteFile(f.Path, []byte(f.Content), 0o600)
		}
		if err == nil {
			err = errors.Join(os.Chown(f.Path, f.UID, f.UID), os.Chmod(f.Path, fs.FileMode(f.Mode)))
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
	}
	return nil
}
