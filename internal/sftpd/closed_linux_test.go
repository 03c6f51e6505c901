package sftpd

import (
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// A volume that this process may not read is there, closed; the others are served, those in it too, and the log has the cause.
func TestClosedVolume(t *testing.T) {
	w := newWorld(t)
	base := filepath.Dir(w.dir)
	must(t, os.Chmod(filepath.Dir(base), 0o755))
	must(t, os.Chmod(w.dir, 0))
	t.Cleanup(func() { _ = os.Chmod(w.dir, 0o755) })
	var log strings.Builder
	here, there := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: it ends with the goroutine
		if os.Getuid() == 0 {
			_ = unix.Setfsuid(65534)
		}
		_ = Serve(there, w.exports, slog.New(slog.NewTextHandler(&log, nil)))
	}()
	c, err := sftp.NewClientPipe(here, here)
	must(t, err)
	for _, name := range []string{"/data/cache/c", "/etc/app/key", "/etc/one.conf"} {
		if _, err := read(c, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, do := range map[string]func() error{
		"list":    func() error { _, err := c.ReadDir("/data"); return err },
		"stat":    func() error { _, err := c.Stat("/data/a"); return err },
		"read":    func() error { _, err := c.Open("/data/a"); return err },
		"create":  func() error { _, err := c.Create("/data/new"); return err },
		"rename":  func() error { return c.PosixRename("/data/a", "/data/b") },
		"chmod":   func() error { return c.Chmod("/data", 0o777) },
		"statvfs": func() error { _, err := c.StatVFS("/data"); return err },
	} {
		if err := do(); !errors.Is(err, fs.ErrPermission) && (err == nil || !strings.Contains(err.Error(), "permission denied")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if fi, err := c.Stat("/data"); err != nil || fi.Mode() != fs.ModeDir {
		t.Errorf("%v, %v", fi, err)
	}
	if fis, err := c.ReadDir("/"); err != nil || len(fis) != 2 {
		t.Errorf("%v, %v", fis, err)
	}
	_ = c.Close()
	<-done
	if !strings.Contains(log.String(), "path=/data err=") || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log: %s", log.String())
	}
}
