package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/sftpd"
)

// world is a pod's volumes, and a mount of them.
type world struct {
	t          *testing.T
	data, conf string // on the pod: /data and, read-only, /etc/app
	point      string
	fs         *FS

	mu      sync.Mutex
	streams []net.Conn                        // guarded by mu
	down    bool                              // guarded by mu: the pod is away
	wrap    func(net.Conn) io.ReadWriteCloser // guarded by mu; nil: the next stream is as it is
	once    bool                              // guarded by mu: only until somebody has asked
	asked   chan struct{}                     // guarded by mu; nil: nobody wants to know that somebody asked while it was away
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Skip("fusermount3 is not installed")
	}
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skip("no FUSE: ", err)
	} else {
		_ = f.Close()
	}
	w := &world{t: t, data: t.TempDir(), conf: t.TempDir(), point: t.TempDir()}
	w.write(filepath.Join(w.conf, "key"), "value")
	m, err := Mount(t.Context(), Config{Point: w.point, Source: "shop/web", Dial: w.dial})
	must(t, err)
	w.fs = m
	t.Cleanup(func() {
		m.Close()
		w.cut(true)
		if b, _ := os.ReadFile("/proc/self/mounts"); bytes.Contains(b, []byte(w.point)) {
			t.Errorf("still mounted: %s", b)
		}
	})
	return w
}

func (w *world) dial(context.Context) (io.ReadWriteCloser, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down {
		w.down = !w.once
		select {
		case w.asked <- struct{}{}:
		default:
		}
		return nil, syscall.ECONNREFUSED
	}
	here, there := net.Pipe()
	w.streams = append(w.streams, here)
	go func() {
		_ = sftpd.Serve(there, []sftpd.Export{{Path: "/data", Dir: w.data}, {Path: "/etc/app", Dir: w.conf, ReadOnly: true}}, slog.New(slog.DiscardHandler))
	}()
	if w.wrap != nil {
		return w.wrap(here), nil
	}
	return here, nil
}

// cut ends all streams; the pod may stay away.
func (w *world) cut(down bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = down
	for _, s := range w.streams {
		_ = s.Close()
	}
	w.streams = nil
}

func (w *world) write(name, text string) {
	w.t.Helper()
	must(w.t, os.WriteFile(name, []byte(text), 0o644))
}

func (w *world) in(names ...string) string {
	return filepath.Join(append([]string{w.point}, names...)...)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func TestContents(t *testing.T) {
	w := newWorld(t)
	big := noise(5<<20 + 123)
	must(t, os.WriteFile(w.in("data", "big"), big, 0o640))
	there, err := os.ReadFile(filepath.Join(w.data, "big"))
	if err != nil || !bytes.Equal(there, big) {
		t.Fatalf("written: %d bytes, %v", len(there), err)
	}
	if fi, err := os.Stat(filepath.Join(w.data, "big")); err != nil || fi.Mode() != 0o640 {
		t.Errorf("%v, %v", fi, err)
	}
	back, err := os.ReadFile(w.in("data", "big"))
	if err != nil || !bytes.Equal(back, big) {
		t.Fatalf("read: %d bytes, %v", len(back), err)
	}
	// Here and there, in any order.
	f, err := os.OpenFile(w.in("data", "big"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	for range 300 {
		off, n := rand.IntN(len(big)-70_000), 1+rand.IntN(70_000)
		if rand.IntN(2) == 0 {
			p := noise(n)
			copy(big[off:], p)
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		p := make([]byte, n)
		if _, err := f.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, big[off:off+n]) {
			t.Fatalf("at %d, %d bytes: %v", off, n, err)
		}
	}
	must(t, f.Sync())
	if there, err := os.ReadFile(filepath.Join(w.data, "big")); err != nil || !bytes.Equal(there, big) {
		t.Errorf("after writes here and there: %d bytes, %v", len(there), err)
	}
}

// A copy takes the place of an earlier one, and of nothing else.
func TestCopy(t *testing.T) {
	w := newWorld(t)
	big, point := noise(1<<20), filepath.Join(t.TempDir(), "deep", "copy")
	must(t, os.WriteFile(filepath.Join(w.data, "big"), big, 0o644))
	must(t, os.Symlink("/etc/app/key", filepath.Join(w.data, "link")))
	must(t, os.Symlink("../../../../../../../../../../../../etc/passwd", filepath.Join(w.data, "out")))
	w.write(filepath.Join(w.data, "\xff name"), "x")
	cfg := Config{Point: point, Source: "shop/web", Dial: w.dial}
	for i := range 2 {
		made, err := PreparePoint(point, true)
		must(t, err)
		if made != (i == 0) {
			t.Errorf("the %d. time it was made: %v", i+1, made)
		}
		must(t, Copy(t.Context(), cfg))
		if b, err := os.ReadFile(filepath.Join(point, "data", "big")); err != nil || !bytes.Equal(b, big) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		if b, err := os.ReadFile(filepath.Join(point, "data", "link")); err != nil || string(b) != "value" {
			t.Errorf("by a link: %q, %v", b, err)
		}
		if b, err := os.ReadFile(filepath.Join(point, "data", "out")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("by a link that leads out: %d bytes, %v", len(b), err)
		}
		_, err = os.Stat(filepath.Join(point, "data", "\xff name"))
		if i == 0 && err != nil || i == 1 && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the %d. time: %v", i+1, err)
		}
		_ = os.Remove(filepath.Join(w.data, "\xff name"))
	}
	if _, err := PreparePoint(point, false); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("a mount over a copy: %v", err)
	}
	foreign := t.TempDir()
	w.write(filepath.Join(foreign, "f"), "mine")
	must(t, os.Mkdir(filepath.Join(foreign, copyMark), 0o755))
	if _, err := PreparePoint(foreign, true); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("another's directory: %v", err)
	}
}

// A copy leaves out what the server refuses, and ends with what concerns all that follows. TestApp/Copy leaves out a file.
func TestIsAnswer(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		want bool
	}{
		"denied":     {fs.ErrPermission, true},
		"vanished":   {fs.ErrNotExist, true},
		"failure":    {&sftp.StatusError{Code: 4}, true},
		"disk full":  {&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, false},
		"not ours":   {&fs.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, false},
		"lost":       {sftp.ErrSSHFxConnectionLost, false},
		"broken off": {io.ErrUnexpectedEOF, false},
	} {
		if got := isAnswer(fmt.Errorf("with more: %w", tt.err)); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// What programs do with files.
func TestFileSystem(t *testing.T) {
	w := newWorld(t)
	d := w.in("data")
	odd := "\xff\xfe odd\n\"name\""
	w.write(filepath.Join(d, odd), "x")
	if b, err := os.ReadFile(filepath.Join(w.data, odd)); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	must(t, os.MkdirAll(filepath.Join(d, "a", "b"), 0o750))
	w.write(filepath.Join(d, "a", "b", "f"), "one")
	must(t, os.Rename(filepath.Join(d, "a", "b", "f"), filepath.Join(d, "a", "g")))
	f, err := os.OpenFile(filepath.Join(d, "a", "g"), os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	for _, s := range []string{" two", " three"} {
		_, err = f.WriteString(s)
		must(t, err)
	}
	if fi, err := os.Stat(filepath.Join(d, "a", "g")); err != nil || fi.Size() != 13 {
		t.Errorf("while it is open: %v, %v", fi, err)
	}
	must(t, f.Close())
	if b, err := os.ReadFile(filepath.Join(d, "a", "g")); string(b) != "one two three" {
		t.Errorf("%q, %v", b, err)
	}
	must(t, os.Truncate(filepath.Join(d, "a", "g"), 3))
	if b, err := os.ReadFile(filepath.Join(d, "a", "g")); string(b) != "one" {
		t.Errorf("%q, %v", b, err)
	}
	must(t, os.Symlink("g", filepath.Join(d, "a", "rel")))
	must(t, os.Symlink(filepath.Join(d, "a", "g"), filepath.Join(d, "abs"))) // in the pod it leads to /data/a/g
	if to, err := os.Readlink(filepath.Join(w.data, "abs")); to != "/data/a/g" {
		t.Errorf("%q, %v", to, err)
	}
	for _, l := range []string{"a/rel", "abs"} {
		if b, err := os.ReadFile(filepath.Join(d, l)); string(b) != "one" {
			t.Errorf("%s: %q, %v", l, b, err)
		}
	}
	must(t, os.Link(filepath.Join(d, "a", "g"), filepath.Join(d, "hard")))
	must(t, os.Chtimes(filepath.Join(d, "hard"), time.Unix(1e9, 0), time.Unix(1e9, 0)))
	must(t, os.Chmod(filepath.Join(d, "hard"), 0o600))
	if fi, err := os.Stat(filepath.Join(d, "hard")); err != nil || fi.ModTime().Unix() != 1e9 || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	// A file that is deleted while it is open is there for whoever has it open.
	f, err = os.Open(filepath.Join(d, "hard"))
	must(t, err)
	must(t, os.Remove(filepath.Join(d, "hard")))
	time.Sleep(cacheTime + 100*time.Millisecond) // until the kernel asks again
	if fi, err := f.Stat(); err != nil || fi.Size() != 3 {
		t.Errorf("deleted: %v, %v", fi, err)
	}
	if b, err := io.ReadAll(f); string(b) != "one" {
		t.Errorf("deleted: %q, %v", b, err)
	}
	must(t, f.Close())
	out, err := exec.Command("sh", "-c", "cd \"$0\" && mkdir t && for i in $(seq 300); do echo $i > t/$i; done && tar cf - t | (mkdir u && cd u && tar xf -) && diff -r t u/t && rm -r t u && ls -A", d).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "abs") {
		t.Errorf("%s%v", out, err)
	}
	if out, err := exec.Command("df", d).CombinedOutput(); err != nil {
		t.Errorf("%s%v", out, err)
	}
}

func TestErrors(t *testing.T) {
	w := newWorld(t)
	w.write(filepath.Join(w.data, "f"), "")
	must(t, os.Mkdir(filepath.Join(w.data, "full"), 0o755))
	w.write(filepath.Join(w.data, "full", "f"), "")
	for name, tt := range map[string]struct {
		do   func() error
		want syscall.Errno
	}{
		"none":          {func() error { _, err := os.Open(w.in("data", "none")); return err }, syscall.ENOENT},
		"outside":       {func() error { _, err := os.Stat(w.in("etc", "passwd")); return err }, syscall.ENOENT},
		"read-only":     {func() error { return os.WriteFile(w.in("etc", "app", "new"), nil, 0o644) }, syscall.EROFS},
		"read-only dir": {func() error { return os.Mkdir(w.in("etc", "app", "new"), 0o755) }, syscall.EROFS},
		"not empty":     {func() error { return syscall.Rmdir(w.in("data", "full")) }, syscall.ENOTEMPTY},
		"exists":        {func() error { return os.Mkdir(w.in("data", "full"), 0o755) }, syscall.EEXIST},
		"O_EXCL":        {func() error { _, err := os.OpenFile(w.in("data", "f"), os.O_CREATE|os.O_EXCL, 0); return err }, syscall.EEXIST},
		"volume":        {func() error { return syscall.Rmdir(w.in("data")) }, syscall.EBUSY},
		"across":        {func() error { return os.Rename(w.in("etc", "app", "key"), w.in("data", "key")) }, syscall.EROFS},
		"long name":     {func() error { return os.Mkdir(w.in("data", strings.Repeat("x", 256)), 0o755) }, syscall.ENAMETOOLONG},
		"owner":         {func() error { return os.Chown(w.in("data", "f"), 4242, -1) }, syscall.EPERM},
	} {
		t.Run(name, func(t *testing.T) {
			if err := tt.do(); !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}

// A full disk is told to whoever writes or closes.
func TestDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a small file system")
	}
	w := newWorld(t)
	small := filepath.Join(w.data, "small")
	must(t, os.Mkdir(small, 0o755))
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("no tmpfs: ", err)
	}
	defer func() { must(t, syscall.Unmount(small, syscall.MNT_DETACH)) }()
	if err := os.WriteFile(w.in("data", "small", "f"), noise(4<<20), 0o644); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	w.write(w.in("data", "f"), "the mount lives")
}

// What changes in the pod is seen, a ConfigMap's update included.
func TestChangesThere(t *testing.T) {
	w := newWorld(t)
	for i := range 3 {
		version := fmt.Sprintf("..v%d", i)
		must(t, os.Mkdir(filepath.Join(w.conf, version), 0o755))
		w.write(filepath.Join(w.conf, version, "k"), version)
		must(t, os.Symlink(version, filepath.Join(w.conf, "..tmp")))
		must(t, os.Rename(filepath.Join(w.conf, "..tmp"), filepath.Join(w.conf, "..data")))
		if i == 0 {
			must(t, os.Symlink("..data/k", filepath.Join(w.conf, "k")))
			w.seen(w.in("etc", "app", "k"), version)
		} else { // the old contents are gone at once, and nobody finds none, or the old ones, because of what is remembered of names
			must(t, os.RemoveAll(filepath.Join(w.conf, fmt.Sprintf("..v%d", i-1))))
			if b, err := os.ReadFile(w.in("etc", "app", "k")); string(b) != version {
				t.Errorf("%q, %v, want %s", b, err, version)
			}
		}
		_, err := os.ReadDir(w.in("etc", "app"))
		must(t, err)
	}
	for i := range 3 { // in place, of the same length, in one second
		s := strings.Repeat(fmt.Sprint(i), 5000)
		w.write(filepath.Join(w.data, "f"), s)
		w.seen(w.in("data", "f"), s)
	}
	must(t, os.Remove(filepath.Join(w.data, "f")))
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(w.in("data", "f")); errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	t.Error("a file that is gone is still seen")
}

// Contents are kept when a change in the second of the last one is no longer possible, whatever the laptop's clock says against the pod's.
func TestUnchanged(t *testing.T) {
	for name, ahead := range map[string]time.Duration{"together": 0, "laptop ahead": time.Hour, "laptop behind": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &node{}
				now := fuse.Attr{Size: 5, Mtime: uint64(time.Now().Add(-ahead).Unix())}
				open := func(after time.Duration, want bool) {
					t.Helper()
					time.Sleep(after)
					if got := n.unchanged(now); got != want {
						t.Errorf("kept: %v, want %v", got, want)
					}
				}
				for range 2 { // the second time after a change
					open(0, false)
					open(settleTime-time.Millisecond, false)
					open(time.Millisecond, false) // read once more
					open(0, true)
					open(time.Hour, true)
					now.Mtime += 3600
				}
			})
		})
	}
}

// seen waits until a file has the text: not longer than what is known of names is kept.
func (w *world) seen(name, want string) {
	w.t.Helper()
	var b []byte
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(20 * time.Millisecond) {
		if b, _ = os.ReadFile(name); string(b) == want {
			return
		}
	}
	w.t.Errorf("%s: %.20q, want %.20q", name, b, want)
}

// The pod is replaced: open files go on, and what is written meanwhile arrives.
func TestPodReplaced(t *testing.T) {
	w := newWorld(t)
	w.once = true
	big := noise(3 << 20)
	must(t, os.WriteFile(filepath.Join(w.data, "big"), big, 0o644))
	in, err := os.Open(w.in("data", "big"))
	must(t, err)
	defer in.Close()
	out, err := os.Create(w.in("data", "out"))
	must(t, err)
	defer out.Close()
	for off := 0; off < len(big); off += 64 << 10 {
		if off%(512<<10) == 0 {
			w.cut(off%(1<<20) == 0) // until somebody has asked in vain
		}
		p := make([]byte, 64<<10)
		if _, err := io.ReadFull(in, p); err != nil || !bytes.Equal(p, big[off:off+len(p)]) {
			t.Fatalf("at %d: %v", off, err)
		}
		if _, err := out.Write(p); err != nil {
			t.Fatalf("at %d: %v", off, err)
		}
	}
	must(t, out.Close())
	if b, err := os.ReadFile(filepath.Join(w.data, "out")); err != nil || !bytes.Equal(b, big) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// inPlaceOf is a stream that has something happen in the place of one of its writes.
type inPlaceOf struct {
	net.Conn
	left *atomic.Int64
	then func()
}

func (s *inPlaceOf) Write(p []byte) (int, error) {
	if s.left.Add(-1) == 0 {
		s.then()
	}
	return s.Conn.Write(p)
}

// A pod that has its ConfigMap's files elsewhere takes the place of the one before, whatever a program has just asked for.
func TestPodReplacedAtEveryStep(t *testing.T) {
	cat := func(name string) (string, error) {
		out, err := exec.Command("cat", name).CombinedOutput()
		return string(out), err
	}
	stat := func(name string) (string, error) {
		fi, err := os.Stat(name)
		if err != nil {
			return "", err
		}
		return strings.Repeat("x", int(fi.Size())), nil
	}
	for name, do := range map[string]func(string) (string, error){"cat": cat, "stat": stat} {
		for _, before := range []int{0, 1} { // how often a program has been there in this pod, so that the kernel knows the way
			t.Run(fmt.Sprint(name, " after ", before), func(t *testing.T) {
				step := int64(1)
				for ; replacedAt(t, step, do, before); step++ {
					if step > 100 {
						t.Fatal("it asks for ever")
					}
				}
				if step == 1 && (name != "stat" || before == 0) { // the kernel knows by itself what stat(2) found a moment ago
					t.Error("it has asked nothing")
				}
			})
		}
	}
}

// replacedAt has the pod replaced instead of the program's message of that number, and returns whether there was one.
func replacedAt(t *testing.T, step int64, do func(string) (string, error), before int) bool {
	w := newWorld(t)
	pod := func(dir string) {
		names, err := os.ReadDir(w.conf)
		must(t, err)
		for _, n := range names {
			must(t, os.RemoveAll(filepath.Join(w.conf, n.Name())))
		}
		must(t, os.Mkdir(filepath.Join(w.conf, dir), 0o755))
		w.write(filepath.Join(w.conf, dir, "k"), "xxxx")
		must(t, os.Symlink(dir, filepath.Join(w.conf, "..data")))
		must(t, os.Symlink("..data/k", filepath.Join(w.conf, "k")))
	}
	pod("..2026_11_27_01_00_00.1")
	var left atomic.Int64
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser {
		return &inPlaceOf{Conn: c, left: &left, then: func() {
			pod("..2026_11_27_02_00_00.2")
			_ = c.Close()
		}}
	}
	w.mu.Unlock()
	w.cut(false)
	if _, err := os.ReadDir(w.in("data")); err != nil { // by the client that is counted
		t.Fatal(err)
	}
	for range before {
		if _, err := do(w.in("etc", "app", "k")); err != nil {
			t.Fatal(err)
		}
	}
	left.Store(step)
	if got, err := do(w.in("etc", "app", "k")); err != nil || got != "xxxx" {
		t.Errorf("replaced at step %d: %q, %v", step, got, err)
	}
	return left.Load() <= 0
}

// Who has a ConfigMap's file open while it is updated reads what it was, whole; who opens it then reads what it is.
func TestUpdatedWhileOpen(t *testing.T) {
	w := newWorld(t)
	version := func(dir, text string) {
		must(t, os.Mkdir(filepath.Join(w.conf, dir), 0o755))
		w.write(filepath.Join(w.conf, dir, "k"), text)
		must(t, os.Symlink(dir, filepath.Join(w.conf, "..tmp")))
		must(t, os.Rename(filepath.Join(w.conf, "..tmp"), filepath.Join(w.conf, "..data")))
	}
	version("..1", "a long text")
	must(t, os.Symlink("..data/k", filepath.Join(w.conf, "k")))
	f, err := os.Open(w.in("etc", "app", "k"))
	must(t, err)
	defer f.Close()
	version("..2", "short")
	must(t, os.RemoveAll(filepath.Join(w.conf, "..1")))
	time.Sleep(cacheTime + 100*time.Millisecond) // until the kernel asks again
	if fi, err := f.Stat(); err != nil || fi.Size() != int64(len("a long text")) {
		t.Errorf("%v, %v", fi, err)
	}
	if b, err := io.ReadAll(f); string(b) != "a long text" {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := os.ReadFile(w.in("etc", "app", "k")); string(b) != "short" {
		t.Errorf("%q, %v", b, err)
	}
}

// Nobody hangs when the mount is closed while the pod is away and files are open.
func TestCloseWhileAway(t *testing.T) {
	w := newWorld(t)
	w.write(filepath.Join(w.data, "f"), "text")
	f, err := os.Open(w.in("data", "f"))
	must(t, err)
	defer f.Close()
	w.cut(true)
	done := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(w.in("data", "f"))
		done <- err
	}()
	w.fs.Close()
	if err := <-done; err == nil {
		t.Error("read from a closed mount")
	}
	must(t, f.Close())
	<-w.fs.Gone()
}

// A process that is killed does not wait for a pod that is away, also when it got another signal before.
func TestInterrupted(t *testing.T) {
	const cat, shell = "ulimit -c 0; exec cat \"$0\"", "trap : USR1; read -r _ < \"$0\"; echo \"$?\""
	for name, tt := range map[string]struct {
		program string
		signals []syscall.Signal
	}{
		"killed":                {cat, []syscall.Signal{syscall.SIGKILL}},
		"terminated":            {cat, []syscall.Signal{syscall.SIGTERM}},
		"dumped":                {cat, []syscall.Signal{syscall.SIGQUIT}},
		"killed after a signal": {shell, []syscall.Signal{syscall.SIGUSR1, syscall.SIGKILL}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.write(filepath.Join(w.data, "f"), "text")
			w.cut(true)
			asked := make(chan struct{}, 100)
			w.mu.Lock()
			w.asked = asked
			w.mu.Unlock()
			cmd := exec.Command("bash", "-c", tt.program, w.in("data", "f"))
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			must(t, cmd.Start())
			<-asked // it waits
			start := time.Now()
			for _, s := range tt.signals {
				must(t, cmd.Process.Signal(s))
				time.Sleep(2 * killPoll) // until the signal has come
			}
			_ = cmd.Wait()
			if d := time.Since(start); d > patience/2 || out.Len() > 0 {
				t.Errorf("the process ended after %v: %s", d, out.String())
			}
		})
	}
}

// held is a stream that holds a client's requests of one kind until it is let go, and tells of requests to close a handle.
type held struct {
	net.Conn
	kind        byte
	came, going chan struct{}
	closed      chan struct{}
}

func (w *world) hold(kind byte) held {
	w.t.Helper()
	h := held{kind: kind, came: make(chan struct{}, 10), going: make(chan struct{}), closed: make(chan struct{}, 10)}
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser {
		h := h
		h.Conn = c
		return h
	}
	w.mu.Unlock()
	w.cut(false)
	return h
}

func (h held) Write(p []byte) (int, error) {
	if len(p) > 4 && p[4] == h.kind {
		h.came <- struct{}{}
		<-h.going
	}
	if len(p) > 4 && p[4] == 4 { // CLOSE
		h.closed <- struct{}{}
	}
	return h.Conn.Write(p)
}

// A signal that does not end a program ends none of its operations, which are carried out: what it would be told of the second time is wrong.
func TestSignals(t *testing.T) {
	w := newWorld(t)
	h := w.hold(14) // MKDIR
	tid, done := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- syscall.Gettid()
		done <- syscall.Mkdir(w.in("data", "d"), 0o755)
	}()
	thread := <-tid
	<-h.came
	for range 3 {
		must(t, syscall.Tgkill(os.Getpid(), thread, syscall.SIGURG))
		time.Sleep(20 * time.Millisecond) // until it has come
	}
	close(h.going)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// unanswered is a stream that breaks before the answer to a client's first request of one kind.
type unanswered struct {
	net.Conn
	kind byte
	came *atomic.Bool
}

func (s unanswered) Write(p []byte) (int, error) {
	if len(p) > 4 && p[4] == s.kind {
		s.came.Store(true)
	}
	return s.Conn.Write(p)
}

func (s unanswered) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.came.Load() {
		return 0, errors.Join(io.ErrUnexpectedEOF, s.Close())
	}
	return n, err
}

// Who makes a file that must not be there is not told that it was, because of the attempt whose answer was lost.
func TestExclusiveAndLost(t *testing.T) {
	w := newWorld(t)
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser {
		w.wrap = nil
		return unanswered{c, 3, new(atomic.Bool)} // OPEN
	}
	w.mu.Unlock()
	w.cut(false)
	if _, err := os.OpenFile(w.in("data", "lock"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, want EIO", err)
	}
	if _, err := os.Stat(filepath.Join(w.data, "lock")); err != nil {
		t.Errorf("it was not made, and this test tests nothing: %v", err)
	}
}

// A file is closed, as far as one of its descriptors is, while it is opened again at another pod.
func TestClosedWhileLost(t *testing.T) {
	w := newWorld(t)
	f, err := os.Create(w.in("data", "f"))
	must(t, err)
	defer f.Close()
	done := make(chan error, 1)
	go func() {
		var err error
		for range 200 {
			fd, failed := syscall.Dup(int(f.Fd()))
			err = errors.Join(err, failed, syscall.Close(fd))
		}
		done <- err
	}()
	for range 20 {
		w.cut(false)
		_, err := f.WriteAt([]byte("x"), 0)
		must(t, err)
	}
	must(t, <-done)
}

// A handle that comes when the program that asked for it has been killed is closed.
func TestKilledWhileOpening(t *testing.T) {
	for name, tt := range map[string]struct {
		kind byte
		cmd  []string
	}{
		"open": {3, []string{"cat", "f"}}, "create": {3, []string{"touch", "new"}}, "opendir": {11, []string{"ls", "."}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.write(filepath.Join(w.data, "f"), "text")
			h := w.hold(tt.kind)
			cmd := exec.Command(tt.cmd[0], w.in("data", tt.cmd[1]))
			must(t, cmd.Start())
			<-h.came
			must(t, cmd.Process.Kill())
			_ = cmd.Wait()
			close(h.going)
			select {
			case <-h.closed:
			case <-time.After(patience):
				t.Error("it stays open")
			}
		})
	}
}

func TestDoomed(t *testing.T) {
	for name, tt := range map[string]struct {
		status string
		want   bool
	}{
		"nothing":           {"Name:\tcat\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n", false},
		"SIGKILL":           {"SigPnd:\t0000000000000100\n", true},
		"of all threads":    {"ShdPnd:\t0000000000000100\n", true},
		"SIGCHLD":           {"ShdPnd:\t0000000000010000\n", false},
		"SIGQUIT":           {"ShdPnd:\t0000000000000004\n", true},
		"SIGQUIT, caught":   {"ShdPnd:\t0000000000000004\nSigCgt:\t0000000000000004\n", false},
		"SIGQUIT, blocked":  {"ShdPnd:\t0000000000000004\nSigBlk:\t0000000000000004\n", false},
		"SIGINT, caught":    {"ShdPnd:\t0000000000000002\nSigCgt:\t0000000000000002\n", false},
		"nothing of it all": {"", false},
	} {
		if got := doomed([]byte(tt.status)); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A file that is gone gives an error, and at once: while it is read by whoever has it open it is there, until that pod is replaced.
func TestVanished(t *testing.T) {
	w := newWorld(t)
	big := noise(8 << 20)
	must(t, os.WriteFile(filepath.Join(w.data, "big"), big, 0o644))
	f, err := os.Open(w.in("data", "big"))
	must(t, err)
	defer f.Close()
	p := make([]byte, 64<<10)
	_, err = io.ReadFull(f, p)
	must(t, err)
	must(t, os.Remove(filepath.Join(w.data, "big")))
	if _, err := f.ReadAt(p, 4<<20); err != nil || !bytes.Equal(p, big[4<<20:][:len(p)]) {
		t.Errorf("open, and deleted in the pod: %v", err)
	}
	time.Sleep(cacheTime + 100*time.Millisecond) // until the kernel asks again
	if fi, err := f.Stat(); err != nil || fi.Size() != int64(len(big)) {
		t.Errorf("open, and deleted in the pod: %v, %v", fi, err)
	}
	w.cut(false)
	start := time.Now()
	if _, err := f.ReadAt(p, 7<<20); !errors.Is(err, syscall.ENOENT) || time.Since(start) > patience/2 {
		t.Errorf("gone with its pod: %v after %s, want ENOENT", err, time.Since(start))
	}
	w.write(w.in("data", "f"), "the mount lives")
}

// Many mounts leave nothing behind.
func TestNoLeaks(t *testing.T) {
	w := newWorld(t)
	w.write(filepath.Join(w.data, "f"), "text")
	round := func() {
		t.Helper()
		point := t.TempDir()
		m, err := Mount(t.Context(), Config{Point: point, Source: "shop/web", Dial: w.dial})
		must(t, err)
		if b, err := os.ReadFile(filepath.Join(point, "data", "f")); string(b) != "text" {
			t.Errorf("%q, %v", b, err)
		}
		m.Close()
		<-m.Gone()
	}
	count := func() (goroutines, descriptors, processes int, mounts string) {
		fds, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		children, err := filepath.Glob("/proc/self/task/*/children")
		must(t, err)
		for _, c := range children {
			b, _ := os.ReadFile(c) // of a thread that has ended meanwhile there are none
			processes += len(strings.Fields(string(b)))
		}
		b, err := os.ReadFile("/proc/self/mounts")
		must(t, err)
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "fuse.doppel") && strings.Contains(line, filepath.Dir(w.point)) {
				mounts += line
			}
		}
		return runtime.NumGoroutine(), len(fds), processes, mounts
	}
	round()
	g, fds, ps, mounts := count()
	for range 50 {
		round()
	}
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) { // the servers' ends of the streams
		g2, fds2, ps2, mounts2 := count()
		if g2 <= g+2 && fds2 <= fds && ps2 <= ps && mounts2 == mounts {
			break
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("before: %d goroutines, %d descriptors, %d processes, mounts\n%s\nafter: %d, %d, %d,\n%s", g, fds, ps, mounts, g2, fds2, ps2, mounts2)
		}
	}
}

// A walk asks for each directory, and not for each file.
func TestWalk(t *testing.T) {
	w := newWorld(t)
	want := 0
	for i := range 10 {
		must(t, os.Mkdir(filepath.Join(w.data, fmt.Sprint(i)), 0o755))
		for j := range 250 {
			w.write(filepath.Join(w.data, fmt.Sprint(i), fmt.Sprint(j)), "")
			want++
		}
	}
	var names []string
	must(t, filepath.WalkDir(w.in("data"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, p)
		}
		return err
	}))
	slices.Sort(names)
	if len(slices.Compact(names)) != want {
		t.Errorf("%d files, want %d", len(names), want)
	}
	for _, n := range names {
		if _, err := os.Lstat(n); err != nil {
			t.Fatal(err)
		}
	}
}

// counted is a stream that counts a client's requests of one kind, and lets each wait.
type counted struct {
	net.Conn
	kind  byte
	n     *atomic.Int64
	pause time.Duration
}

func (s counted) Write(p []byte) (int, error) {
	if len(p) > 4 && p[4] == s.kind {
		s.n.Add(1)
		time.Sleep(s.pause)
	}
	return s.Conn.Write(p)
}

// A directory whose list takes longer to come than names are believed is asked for once, and not for each of its names.
func TestSlowList(t *testing.T) {
	w := newWorld(t)
	for i := range 8 {
		w.write(filepath.Join(w.data, fmt.Sprint(i)), "")
	}
	var n atomic.Int64
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser { return counted{c, 11, &n, cacheTime + 100*time.Millisecond} } // OPENDIR
	w.mu.Unlock()
	w.cut(false)
	names, err := os.ReadDir(w.in("data"))
	must(t, err)
	for _, e := range names {
		_, err := os.Lstat(w.in("data", e.Name()))
		must(t, err)
	}
	if len(names) != 8 || n.Load() > 2 {
		t.Errorf("%d names, %d lists", len(names), n.Load())
	}
}

// Whoever wants a directory's list while it is on its way waits for that one.
func TestListShared(t *testing.T) {
	w := newWorld(t)
	w.write(filepath.Join(w.data, "f"), "")
	var n atomic.Int64
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser { return counted{c, 11, &n, 500 * time.Millisecond} } // OPENDIR
	w.mu.Unlock()
	w.cut(false)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if names, err := os.ReadDir(w.in("data")); err != nil || len(names) != 1 {
				t.Errorf("%v, %v", names, err)
			}
		})
	}
	all.Wait()
	if n.Load() > 2 { // one may come when the first has just been answered
		t.Errorf("%d lists", n.Load())
	}
}

// A large directory is listed only after as many names as that takes answers; and what is remembered is bounded.
func TestLargeDirectory(t *testing.T) {
	list := func(l *listings, dir string, n int, name string) {
		fis := make([]fs.FileInfo, n)
		for i := range fis {
			fis[i] = named{name: fmt.Sprint(i, name)}
		}
		q, _, _ := l.ask(dir)
		l.answer(q, fis, nil)
	}
	for n, want := range map[int]int{2: 1, maxPage: 1, 2*maxPage - 1: 1, 5 * maxPage: 5} {
		var l listings
		list(&l, "/d", n, "")
		if _, known, _ := l.find("/d", "f"); !known {
			t.Errorf("of %d: the list is not remembered", n)
		}
		for range 2 {
			l.changed("/d")
			for i := range want + 1 {
				if _, known, now := l.find("/d", "f"); known || now != (i == want) {
					t.Errorf("of %d: at name %d it is listed: %v", n, i, now)
				}
			}
			list(&l, "/d", n, "")
		}
	}
	var l listings
	for i := range maxListings {
		list(&l, fmt.Sprint("/", i), 4, strings.Repeat("x", maxListed/100))
		if l.size > maxListed {
			t.Fatalf("%d bytes", l.size)
		}
	}
	if len(l.dirs) == 0 {
		t.Error("nothing is remembered")
	}
	for d := range l.dirs {
		l.changed(d)
	}
	if l.size != 0 {
		t.Errorf("%d bytes of nothing", l.size)
	}
}

// What is changed while a directory is listed is not forgotten because of the list.
func TestChangedWhileListed(t *testing.T) {
	var l listings
	q, _, _ := l.ask("/a")
	other, _, _ := l.ask("/b")
	l.changed("/a")
	if again, mine, old := l.ask("/a"); again != q || mine || !old {
		t.Errorf("who asks after the change: %v, %v", mine, old)
	}
	if again, mine, old := l.ask("/b"); again != other || mine || old {
		t.Errorf("who asks for another directory: %v, %v", mine, old)
	}
	l.answer(q, nil, nil)
	l.answer(other, nil, nil)
	if q.names != nil {
		t.Errorf("a list of before: %v", q.names)
	}
	if other.names == nil {
		t.Error("another directory's list is not taken")
	}
	if _, known, _ := l.find("/a", "f"); known {
		t.Error("a list of before is remembered")
	}
}

// Who appends overwrites nothing of what the app appends meanwhile.
func TestAppend(t *testing.T) {
	w := newWorld(t)
	log := filepath.Join(w.data, "log")
	want := "app\n"
	w.write(log, want)
	f, err := os.OpenFile(w.in("data", "log"), os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	created, err := os.OpenFile(w.in("data", "new"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	must(t, err)
	for i := range 5 {
		line := fmt.Sprintf("mine %d\n", i)
		for _, f := range []*os.File{f, created} {
			_, err = f.WriteString(line)
			must(t, err)
			must(t, f.Sync())
		}
		app, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND, 0)
		must(t, err)
		_, err = app.WriteString("app\n")
		must(t, errors.Join(err, app.Close()))
		want += line + "app\n"
	}
	big := noise(3 << 20) // of which one write was put together, or several
	_, err = f.Write(big)
	must(t, errors.Join(err, f.Close(), created.Close()))
	if b, err := os.ReadFile(log); err != nil || !bytes.Equal(b, append([]byte(want), big...)) {
		t.Errorf("%d bytes, %v: %.200q", len(b), err, b)
	}
	if b, err := os.ReadFile(filepath.Join(w.data, "new")); err != nil || string(b) != "mine 0\nmine 1\nmine 2\nmine 3\nmine 4\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// ordered notes what is written, in the order in which that is done, and takes its time with all but the last.
type ordered struct {
	sftp.FileWriter
	last string
	mu   *sync.Mutex
	got  *[]string
}

func (o ordered) Filewrite(q *sftp.Request) (io.WriterAt, error) {
	_, err := o.FileWriter.Filewrite(q)
	return o, err
}

func (o ordered) WriteAt(p []byte, _ int64) (int, error) {
	if string(p) != o.last {
		time.Sleep(200 * time.Millisecond)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	*o.got = append(*o.got, string(p))
	return len(p), nil
}

// What is written through two open files of one comes to be in that order where it matters, and else at once.
func TestWrittenThroughTwo(t *testing.T) {
	for name, tt := range map[string]struct {
		flags [2]int
		offs  [2]int64
		want  []string
	}{
		"same place":   {want: []string{"first", "second"}},
		"overlap":      {offs: [2]int64{0, 4}, want: []string{"first", "second"}},
		"beside":       {offs: [2]int64{0, 5}, want: []string{"second", "first"}},
		"append":       {flags: [2]int{os.O_APPEND, os.O_APPEND}, want: []string{"first", "second"}},
		"append after": {flags: [2]int{0, os.O_APPEND}, want: []string{"first", "second"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			var mu sync.Mutex
			var got []string
			w.mu.Lock()
			w.wrap = func(c net.Conn) io.ReadWriteCloser {
				_ = c.Close()
				here, there := net.Pipe()
				h := sftp.InMemHandler()
				h.FilePut = ordered{h.FilePut, "second", &mu, &got}
				s := sftp.NewRequestServer(there, h)
				go func() { _ = s.Serve() }()
				return here
			}
			w.mu.Unlock()
			w.cut(false)
			var files []*os.File
			for _, flags := range tt.flags {
				f, err := os.OpenFile(w.in("f"), os.O_WRONLY|os.O_CREATE|flags, 0o644)
				must(t, err)
				defer f.Close()
				files = append(files, f)
			}
			for i, text := range []string{"first", "second"} {
				_, err := syscall.Pwrite(int(files[i].Fd()), []byte(text), tt.offs[i])
				must(t, err)
			}
			for _, f := range files {
				must(t, f.Sync())
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

// What was to be appended when the stream was lost is not appended again, and whoever appends is told.
func TestAppendLost(t *testing.T) {
	w := newWorld(t)
	w.write(filepath.Join(w.data, "log"), "app\n")
	h := w.hold(6) // WRITE
	f, err := os.OpenFile(w.in("data", "log"), os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = f.WriteString("mine\n")
	must(t, err)
	<-h.came
	w.mu.Lock()
	w.wrap = nil
	w.mu.Unlock()
	w.cut(false)
	close(h.going)
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, want EIO", err)
	}
	_, err = f.WriteString("more\n")
	must(t, errors.Join(err, f.Close()))
	if b, err := os.ReadFile(filepath.Join(w.data, "log")); err != nil || string(b) != "app\nmore\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// refusing refuses chmod(2), and counts it.
type refusing struct {
	sftp.FileCmder
	err error
	n   *atomic.Int64
}

func (r refusing) Filecmd(q *sftp.Request) error {
	if q.Method == "Setstat" {
		r.n.Add(1)
		return r.err
	}
	return r.FileCmder.Filecmd(q)
}

// What is made on a volume that knows no permissions is made, and nobody is told otherwise.
func TestVolumeWithoutPermissions(t *testing.T) {
	for _, refused := range []syscall.Errno{syscall.EPERM, syscall.EACCES, syscall.ENOTSUP} {
		w := newWorld(t)
		var n atomic.Int64
		w.mu.Lock()
		w.wrap = func(c net.Conn) io.ReadWriteCloser {
			_ = c.Close()
			here, there := net.Pipe()
			h := sftp.InMemHandler() // its files are 0644, its directories 0755
			h.FileCmd = refusing{h.FileCmd, refused, &n}
			s := sftp.NewRequestServer(there, h)
			go func() { _ = s.Serve() }()
			return here
		}
		w.mu.Unlock()
		w.cut(false)
		must(t, os.WriteFile(w.in("f"), []byte("text"), 0o600))
		must(t, os.Mkdir(w.in("d"), 0o700))
		if n.Load() != 2 {
			t.Errorf("%v: permissions were given %d times", refused, n.Load())
		}
		must(t, os.WriteFile(w.in("g"), []byte("text"), 0o644))
		must(t, os.Mkdir(w.in("e"), 0o755))
		if n.Load() != 2 {
			t.Errorf("%v: permissions were given although they were right", refused)
		}
		if fi, err := os.Stat(w.in("f")); err != nil || fi.Mode() != 0o644 {
			t.Errorf("%v: %v, %v", refused, fi, err)
		}
	}
}

// A file that the app replaces is whole for whoever has it open, and whoever opens it then reads the new one.
func TestReplacedWhileOpen(t *testing.T) {
	for name, replaced := range map[string]string{"shorter": "short", "longer": strings.Repeat("a longer text ", 10_000)} {
		for _, wait := range []time.Duration{0, cacheTime + 100*time.Millisecond} { // while the kernel believes what it knows, and when it asks again
			t.Run(fmt.Sprint(name, " after ", wait), func(t *testing.T) {
				w := newWorld(t)
				old := strings.Repeat("the old text ", 1000)
				w.write(filepath.Join(w.data, "f"), old)
				f, err := os.Open(w.in("data", "f"))
				must(t, err)
				defer f.Close()
				w.write(filepath.Join(w.data, "tmp"), replaced)
				must(t, os.Rename(filepath.Join(w.data, "tmp"), filepath.Join(w.data, "f")))
				time.Sleep(wait)
				if b, err := os.ReadFile(w.in("data", "f")); err != nil || string(b) != replaced {
					t.Errorf("the new one: %d bytes, %v", len(b), err)
				}
				if fi, err := f.Stat(); err != nil || fi.Size() != int64(len(old)) {
					t.Errorf("the old one: %v, %v", fi, err)
				}
				if b, err := io.ReadAll(f); err != nil || string(b) != old {
					t.Errorf("the old one: %d bytes, %v", len(b), err)
				}
				if fi, err := os.Stat(w.in("data", "f")); err != nil || fi.Size() != int64(len(replaced)) {
					t.Errorf("the new one: %v, %v", fi, err)
				}
			})
		}
	}
}

// What was read ahead of a file does not outlive a change of it that is seen.
func TestChangedWhileReadAhead(t *testing.T) {
	w := newWorld(t)
	const size = 8 << 20
	w.write(filepath.Join(w.data, "f"), strings.Repeat("a", size))
	f, err := os.Open(w.in("data", "f"))
	must(t, err)
	defer f.Close()
	_, err = io.ReadFull(f, make([]byte, 2<<20)) // in order: what comes next is on its way
	must(t, err)
	w.write(filepath.Join(w.data, "f"), strings.Repeat("b", size+1))
	time.Sleep(cacheTime + 100*time.Millisecond) // until the kernel asks again
	if fi, err := f.Stat(); err != nil || fi.Size() != size+1 {
		t.Errorf("%v, %v", fi, err)
	}
	b := make([]byte, 64<<10)
	for off := int64(2 << 20); off < 6<<20; off += 1 << 20 {
		if _, err := f.ReadAt(b, off); err != nil || bytes.Contains(b, []byte("a")) {
			t.Errorf("at %d: of before, %v", off, err)
		}
	}
}

// A file that was deleted, or renamed, is changed by whoever has it open.
func TestOpenWithoutName(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"deleted", "kept"} {
		f, err := os.OpenFile(w.in("data", name), os.O_RDWR|os.O_CREATE, 0o644)
		must(t, err)
		defer f.Close()
		_, err = f.WriteString("a text")
		must(t, err)
		if name == "deleted" {
			must(t, os.Remove(w.in("data", name)))
		}
		now := []syscall.Timeval{{Sec: 1}, {Sec: 1}}
		must(t, errors.Join(f.Truncate(2), f.Chmod(0o600), syscall.Futimes(int(f.Fd()), now)))
		if fi, err := f.Stat(); err != nil || fi.Size() != 2 || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
}

// The times of a link are not those of what it leads to.
func TestTimesOfLink(t *testing.T) {
	w := newWorld(t)
	w.write(filepath.Join(w.data, "f"), "text")
	must(t, os.Symlink("f", filepath.Join(w.data, "link")))
	before, err := os.Stat(filepath.Join(w.data, "f"))
	must(t, err)
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, w.in("data", "link"), []unix.Timespec{{Sec: 1}, {Sec: 1}}, unix.AT_SYMLINK_NOFOLLOW))
	after, err := os.Stat(filepath.Join(w.data, "f"))
	must(t, err)
	if !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("%v, before %v", after.ModTime(), before.ModTime())
	}
}

// When the stream is lost a file is opened again under the name that it has then, and not at all if it has none.
func TestRenamedAndLost(t *testing.T) {
	w := newWorld(t)
	open := func(name string) *os.File {
		f, err := os.OpenFile(w.in("data", name), os.O_RDWR|os.O_CREATE, 0o644)
		must(t, err)
		t.Cleanup(func() { _ = f.Close() })
		_, err = f.WriteString("text")
		must(t, errors.Join(err, f.Sync()))
		return f
	}
	renamed, deleted := open("f"), open("g")
	must(t, os.Rename(w.in("data", "f"), w.in("data", "f2")))
	must(t, os.Remove(w.in("data", "g")))
	w.write(filepath.Join(w.data, "f"), "others'")
	w.write(filepath.Join(w.data, "g"), "others'")
	w.cut(false)
	_, err := renamed.WriteAt([]byte("TEXT"), 0)
	must(t, errors.Join(err, renamed.Sync()))
	_, err = deleted.WriteAt([]byte("TEXT"), 0)
	if err = errors.Join(err, deleted.Sync()); !errors.Is(err, syscall.ESTALE) {
		t.Errorf("%v, want ESTALE", err)
	}
	for name, want := range map[string]string{"f": "others'", "f2": "TEXT", "g": "others'"} {
		if b, err := os.ReadFile(filepath.Join(w.data, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}
