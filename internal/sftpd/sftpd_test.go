package sftpd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pkg/sftp"
)

// secret is in a file outside of everything that is exported.
const secret = "not for the laptop"

// world is an app's volumes, and what is beside them.
type world struct {
	t       *testing.T
	dir     string // /data
	outside string
	exports []Export
}

func newWorld(t *testing.T) *world {
	t.Helper()
	base := t.TempDir()
	w := &world{t: t, dir: filepath.Join(base, "data"), outside: filepath.Join(base, "outside")}
	config, cache, one := filepath.Join(base, "config"), filepath.Join(base, "cache"), filepath.Join(base, "one")
	for _, d := range []string{w.dir, w.outside, config, cache} {
		must(t, os.Mkdir(d, 0o755))
	}
	w.write(filepath.Join(w.outside, "secret"), secret)
	w.write(filepath.Join(w.dir, "a"), "in a")
	w.write(filepath.Join(cache, "c"), "in c")
	w.write(one, "one file")
	must(t, os.Mkdir(filepath.Join(w.dir, "sub"), 0o755))
	w.write(filepath.Join(w.dir, "sub", "b"), "in b")
	// As the kubelet writes a ConfigMap.
	must(t, os.Mkdir(filepath.Join(config, "..2026_1"), 0o755))
	w.write(filepath.Join(config, "..2026_1", "key"), "value 1")
	must(t, os.Symlink("..2026_1", filepath.Join(config, "..data")))
	must(t, os.Symlink("..data/key", filepath.Join(config, "key")))
	w.exports = []Export{
		{Path: "/data", Dir: w.dir},
		{Path: "/data/cache", Dir: cache},
		{Path: "/etc/app", Dir: config, ReadOnly: true},
		{Path: "/etc/one.conf", Dir: one},
	}
	return w
}

func (w *world) write(name, text string) {
	w.t.Helper()
	must(w.t, os.WriteFile(name, []byte(text), 0o644))
}

func (w *world) client() *sftp.Client {
	w.t.Helper()
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(there, w.exports, slog.New(slog.DiscardHandler)) }()
	c, err := sftp.NewClientPipe(here, here)
	must(w.t, err)
	w.t.Cleanup(func() {
		_ = c.Close()
		if err := <-done; err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			w.t.Errorf("Serve: %v", err)
		}
	})
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(c *sftp.Client, name string) (string, error) {
	f, err := c.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	return string(b), err
}

func TestReads(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	for name, want := range map[string]string{
		"/data/a": "in a", "/data/sub/b": "in b", "/data/cache/c": "in c", "/etc/app/key": "value 1", "/etc/one.conf": "one file",
		"/data/../etc/./app/../one.conf": "one file",
	} {
		if got, err := read(c, name); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
	}
	for dir, want := range map[string]string{
		"/": "data/ etc/", "/etc": "app/ one.conf", "/data": "a cache/ sub/", "/data/cache": "c", "/etc/app": "..2026_1/ ..data key",
	} {
		fis, err := c.ReadDir(dir)
		var names []string
		for _, fi := range fis {
			if fi.IsDir() {
				names = append(names, fi.Name()+"/")
			} else {
				names = append(names, fi.Name())
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", dir, got, err, want)
		}
	}
	if to, err := c.ReadLink("/etc/app/key"); err != nil || to != "..data/key" {
		t.Errorf("link: %q, %v", to, err)
	}
	if fi, err := c.Stat("/etc/app/key"); err != nil || fi.Size() != 7 || !fi.Mode().IsRegular() {
		t.Errorf("stat: %v, %v", fi, err)
	}
	if fi, err := c.Lstat("/etc/app/key"); err != nil || fi.Mode().Type() != fs.ModeSymlink {
		t.Errorf("lstat: %v, %v", fi, err)
	}
	if st, err := c.StatVFS("/data"); err != nil || st.TotalSpace() == 0 {
		t.Errorf("statvfs: %+v, %v", st, err)
	}
	for _, name := range []string{"/etc/passwd", "/proc/self/environ", "/data/none", "/datax", "/etc/one.conf/x", w.dir} {
		if _, err := c.Stat(name); err == nil {
			t.Errorf("%s is there", name)
		}
	}
}

// An open file is asked for what it is, whatever has taken its path.
func TestStatOfOpenFile(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	f, err := c.Open("/data/a")
	must(t, err)
	must(t, os.Remove(filepath.Join(w.dir, "a")))
	for range 2 {
		if fi, err := f.Stat(); err != nil || fi.Size() != int64(len("in a")) {
			t.Errorf("%v, %v", fi, err)
		}
		w.write(filepath.Join(w.dir, "a"), "another file")
	}
	other, err := c.Open("/data/a")
	must(t, err)
	defer other.Close()
	for what, stat := range map[string]func() (fs.FileInfo, error){
		"lstat": func() (fs.FileInfo, error) { return c.Lstat("/data/a") },
		"stat":  func() (fs.FileInfo, error) { return c.Stat("/data/a") },
		"fstat": other.Stat,
	} {
		if fi, err := stat(); err != nil || fi.Size() != int64(len("another file")) {
			t.Errorf("%s: %v, %v", what, fi, err)
		}
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != int64(len("in a")) {
		t.Errorf("beside another of its path: %v, %v", fi, err)
	}
	must(t, f.Close())
	if fi, err := c.Stat("/data/a"); err != nil || fi.Size() != int64(len("another file")) {
		t.Errorf("%v, %v", fi, err)
	}
}

// An open file is changed, whatever has taken its path.
func TestSetstatOfOpenFile(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	f, err := c.OpenFile("/data/a", os.O_RDWR)
	must(t, err)
	defer f.Close()
	must(t, os.Remove(filepath.Join(w.dir, "a")))
	for range 2 { // without a path, and when another has it
		must(t, f.Truncate(2))
		must(t, f.Chmod(0o600))
		if fi, err := f.Stat(); err != nil || fi.Size() != 2 || fi.Mode() != 0o600 {
			t.Errorf("%v, %v", fi, err)
		}
		w.write(filepath.Join(w.dir, "a"), "another file")
	}
	if fi, err := os.Stat(filepath.Join(w.dir, "a")); err != nil || fi.Size() != int64(len("another file")) || fi.Mode() != 0o644 {
		t.Errorf("%v, %v", fi, err)
	}
}

// The update of a ConfigMap is seen.
func TestAtomicUpdate(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	config := w.exports[2].Dir
	must(t, os.Mkdir(filepath.Join(config, "..2026_2"), 0o755))
	w.write(filepath.Join(config, "..2026_2", "key"), "value 2")
	must(t, os.Symlink("..2026_2", filepath.Join(config, "..tmp")))
	must(t, os.Rename(filepath.Join(config, "..tmp"), filepath.Join(config, "..data")))
	if got, err := read(c, "/etc/app/key"); err != nil || got != "value 2" {
		t.Errorf("%q, %v", got, err)
	}

	// Who found the old contents gets the new ones when those are gone, and nothing else, whatever ..data says.
	old := "/etc/app/..2026_1/key"
	if got, err := read(c, old); err != nil || got != "value 1" {
		t.Errorf("%q, %v", got, err)
	}
	must(t, os.RemoveAll(filepath.Join(config, "..2026_1")))
	if got, err := read(c, old); err != nil || got != "value 2" {
		t.Errorf("%q, %v", got, err)
	}
	if fi, err := c.Lstat("/etc/app/..2026_1"); err != nil || !fi.IsDir() {
		t.Errorf("%v, %v", fi, err)
	}
	if fis, err := c.ReadDir("/etc/app/..2026_1"); err != nil || len(fis) != 1 {
		t.Errorf("%v, %v", fis, err)
	}
	if _, err := c.Lstat("/etc/app/..2026_1/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, to := range []string{"..", "../" + filepath.Base(w.outside), w.outside, "..gone", "..data"} {
		must(t, os.Remove(filepath.Join(config, "..data")))
		must(t, os.Symlink(to, filepath.Join(config, "..data")))
		for _, name := range []string{old, "/etc/app/..2026_1/secret", "/etc/app/..2026_1"} {
			if got, err := read(c, name); err == nil {
				t.Errorf("..data -> %s: %s is %q", to, name, got)
			}
			if fi, err := c.Stat(name); err == nil {
				t.Errorf("..data -> %s: %s is %v", to, name, fi)
			}
		}
	}

	// Nothing is written where it was not said to be.
	must(t, os.Mkdir(filepath.Join(w.dir, "..new"), 0o755))
	must(t, os.Symlink("..new", filepath.Join(w.dir, "..data")))
	if _, err := c.Lstat("/data/..old"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := c.Create("/data/..old/f"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := c.Rename("/data/a", "/data/..b"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "..b")); err != nil {
		t.Error(err)
	}
}

func TestWrites(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	odd := "/data/\xff\x01 odd\nname"
	f, err := c.OpenFile(odd, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	must(t, err)
	big := make([]byte, 1<<20)
	for i := range big {
		big[i] = byte(rand.Uint32())
	}
	_, err = f.WriteAt(big, 5)
	must(t, err)
	must(t, f.Truncate(1<<19))
	must(t, f.Chmod(0o4640)) // the set-user-id bit is not taken
	must(t, c.Chtimes(odd, time.Unix(1e9, 0), time.Unix(1e9, 0)))
	got := make([]byte, 1<<19-5)
	_, err = f.ReadAt(got, 5)
	must(t, err)
	must(t, f.Close())
	fi, err := os.Stat(filepath.Join(w.dir, odd[len("/data/"):]))
	must(t, err)
	if !bytes.Equal(got, big[:len(got)]) || fi.Size() != 1<<19 || fi.Mode() != 0o640 || fi.ModTime().Unix() != 1e9 {
		t.Errorf("%v", fi)
	}
	must(t, c.Mkdir("/data/new"))
	must(t, c.PosixRename(odd, "/data/new/x"))
	must(t, c.Symlink("x", "/data/new/s"))
	must(t, c.Link("/data/new/x", "/data/new/y"))
	if s, err := read(c, "/data/new/s"); err != nil || len(s) != 1<<19 {
		t.Errorf("%d, %v", len(s), err)
	}
	if err := c.Rename("/data/a", "/data/new/x"); err == nil {
		t.Error("a rename replaced a file; version 3 of SFTP does not")
	}
	must(t, c.PosixRename("/data/a", "/data/new/x"))
	if err := c.RemoveDirectory("/data/new"); err == nil || !strings.Contains(err.Error(), syscall.ENOTEMPTY.Error()) {
		t.Errorf("rmdir of a full directory: %v", err)
	}
	for _, n := range []string{"x", "s", "y"} {
		must(t, c.Remove("/data/new/"+n))
	}
	must(t, c.RemoveDirectory("/data/new"))
	f, err = c.OpenFile("/etc/one.conf", os.O_WRONLY|os.O_TRUNC)
	must(t, err)
	must(t, f.Close())
}

// A directory stays one whose files are its group's, as the kubelet makes the volumes of a pod with an fsGroup.
func TestGroupOfDirectory(t *testing.T) {
	w := newWorld(t)
	must(t, os.Chmod(w.dir, 0o770|os.ModeSetgid))
	c := w.client()
	must(t, c.Mkdir("/data/new"))
	must(t, c.Chmod("/data/new", 0o750))
	if fi, err := os.Stat(filepath.Join(w.dir, "new")); err != nil || fi.Mode() != fs.ModeDir|fs.ModeSetgid|0o750 {
		t.Errorf("%v, %v", fi, err)
	}
}

// Who appends writes behind what the app has written meanwhile.
func TestAppend(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	for name, flags := range map[string]int{"write": os.O_WRONLY, "read and write": os.O_RDWR} {
		w.write(filepath.Join(w.dir, "log"), "app 1\n")
		f, err := c.OpenFile("/data/log", flags|os.O_APPEND)
		must(t, err)
		w.write(filepath.Join(w.dir, "log"), "app 1\napp 2\n")
		for _, line := range []string{"mine 1\n", "mine 2\n"} {
			_, err = f.WriteAt([]byte(line), 6)
			must(t, err)
		}
		must(t, f.Close())
		if got, err := os.ReadFile(filepath.Join(w.dir, "log")); err != nil || string(got) != "app 1\napp 2\nmine 1\nmine 2\n" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t)
	must(t, syscall.Mkfifo(filepath.Join(w.dir, "fifo"), 0o666))
	c := w.client()
	create := func(name string) func() error {
		return func() error {
			f, err := c.OpenFile(name, os.O_WRONLY|os.O_CREATE)
			if err == nil {
				_ = f.Close()
			}
			return err
		}
	}
	for name, tt := range map[string]struct {
		do   func() error
		want syscall.Errno
	}{
		"write, read-only":   {create("/etc/app/new"), syscall.EROFS},
		"mkdir, read-only":   {func() error { return c.Mkdir("/etc/app/new") }, syscall.EROFS},
		"remove, read-only":  {func() error { return c.Remove("/etc/app/key") }, syscall.EROFS},
		"chmod, read-only":   {func() error { return c.Chmod("/etc/app/key", 0o777) }, syscall.EROFS},
		"rename, read-only":  {func() error { return c.PosixRename("/etc/app/key", "/etc/app/k") }, syscall.EROFS},
		"into read-only":     {func() error { return c.PosixRename("/data/a", "/etc/app/k") }, syscall.EROFS},
		"above volumes":      {create("/new"), syscall.EROFS},
		"above volumes, dir": {func() error { return c.Mkdir("/etc/new") }, syscall.EROFS},
		"a volume itself":    {func() error { return c.RemoveDirectory("/data/cache") }, syscall.EBUSY},
		"rename a volume":    {func() error { return c.PosixRename("/data/cache", "/data/x") }, syscall.EBUSY},
		"replace a file":     {func() error { return c.Remove("/etc/one.conf") }, syscall.EBUSY},
		"across volumes":     {func() error { return c.PosixRename("/data/a", "/data/cache/a") }, syscall.EXDEV},
		"link across":        {func() error { return c.Link("/data/a", "/data/cache/a") }, syscall.EXDEV},
		"chmod, read-only, open": {func() error {
			f, err := c.Open("/etc/app/key")
			must(t, err)
			defer f.Close()
			return f.Chmod(0o777)
		}, syscall.EROFS},
		"owner":            {func() error { return c.Chown("/data/a", 12345, 12345) }, syscall.EPERM},
		"open a directory": {create("/data/sub"), syscall.EISDIR},
		"read a FIFO":      {func() error { _, err := c.Open("/data/fifo"); return err }, syscall.EOPNOTSUPP},
		"write a FIFO":     {create("/data/fifo"), syscall.EOPNOTSUPP},
		"list a file":      {func() error { _, err := c.ReadDir("/data/a"); return err }, syscall.ENOTDIR},
		"link of a file":   {func() error { _, err := c.ReadLink("/data/a"); return err }, syscall.EINVAL},
		"long":             {create("/data/" + strings.Repeat("x", 256)), syscall.ENAMETOOLONG},
		"longer":           {create("/data/" + strings.Repeat("x/", 2048)), syscall.ENAMETOOLONG},
	} {
		t.Run(name, func(t *testing.T) {
			// The library makes two codes into errors of its own.
			ok := map[syscall.Errno]error{syscall.ENOENT: fs.ErrNotExist, syscall.EPERM: fs.ErrPermission}[tt.want]
			if err := tt.do(); err == nil || !strings.Contains(err.Error(), tt.want.Error()) && (ok == nil || !errors.Is(err, ok)) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}

// What a client asks for by way of symbolic links stays within a volume, also when somebody exchanges directories for links meanwhile.
func TestConfined(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	for name, to := range map[string]string{
		"absolute": filepath.Join(w.outside, "secret"), "relative": "../outside/secret", "dir": "../outside", "up": "..", "root": "/",
		"chain": "up/outside/secret", "proc": "/proc/self/root" + w.outside + "/secret",
	} {
		must(t, c.Symlink(to, "/data/"+name))
	}
	for _, name := range []string{"absolute", "relative", "dir/secret", "up/outside/secret", "root/etc/passwd", "chain", "proc"} {
		if got, err := read(c, "/data/"+name); err == nil {
			t.Errorf("%s: read %q", name, got)
		}
		if fi, err := c.Stat("/data/" + name); err == nil {
			t.Errorf("%s: %v", name, fi)
		}
		if f, err := c.OpenFile("/data/"+name, os.O_WRONLY|os.O_TRUNC); err == nil {
			_ = f.Close()
			t.Errorf("%s: opened to be written", name)
		}
		_ = c.Chmod("/data/"+name, 0o777)
		_ = c.Chtimes("/data/"+name, time.Unix(1, 0), time.Unix(1, 0))
	}
	for _, dir := range []string{"dir", "up", "root"} {
		if fis, err := c.ReadDir("/data/" + dir); err == nil {
			t.Errorf("%s: %d entries", dir, len(fis))
		}
		if err := c.Mkdir("/data/" + dir + "/made"); err == nil {
			t.Errorf("%s: made a directory", dir)
		}
	}
	_ = c.PosixRename("/data/a", "/data/dir/a")
	_ = c.Link("/data/absolute", "/data/hard")

	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { // sub is by turns a directory and a link that leads out
		sub, aside := filepath.Join(w.dir, "sub"), filepath.Join(w.dir, "aside")
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Rename(sub, aside)
				_ = os.Symlink(w.outside, sub)
				_ = os.Remove(sub)
				_ = os.Rename(aside, sub)
			}
		}
	})
	for range 2000 {
		if got, err := read(c, "/data/sub/secret"); err == nil {
			t.Fatalf("read %q", got)
		}
		_ = c.Remove("/data/sub/secret")
		_ = c.Chmod("/data/sub/secret", 0)
	}
	close(stop)
	wg.Wait()
	fi, err := os.Stat(filepath.Join(w.outside, "secret"))
	must(t, err)
	got, err := os.ReadFile(filepath.Join(w.outside, "secret"))
	if err != nil || string(got) != secret || fi.Mode() != 0o644 || fi.ModTime().Unix() == 1 {
		t.Errorf("%q, %v: %v", got, err, fi)
	}
	if names, _ := os.ReadDir(w.outside); len(names) != 1 {
		t.Errorf("outside: %v", names)
	}
}

func TestHandlesAreBounded(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	var files []*sftp.File
	for range MaxHandles {
		f, err := c.Open("/data/a")
		must(t, err)
		files = append(files, f)
	}
	if _, err := c.Open("/data/a"); err == nil || !strings.Contains(err.Error(), syscall.EMFILE.Error()) {
		t.Errorf("%v", err)
	}
	for _, f := range files {
		must(t, f.Close())
	}
	if _, err := read(c, "/data/a"); err != nil {
		t.Error(err)
	}
}

// A large directory comes whole, and each name once.
func TestLargeDirectory(t *testing.T) {
	w := newWorld(t)
	for i := range 1234 { // names so long that a packet does not take maxList of them
		w.write(filepath.Join(w.dir, "sub", fmt.Sprintf("%0255d", i)), "")
	}
	fis, err := w.client().ReadDir("/data/sub")
	names := map[string]bool{}
	for _, fi := range fis {
		names[fi.Name()] = true
	}
	if err != nil || len(fis) != 1235 || len(names) != 1235 {
		t.Errorf("%d, %d, %v", len(fis), len(names), err)
	}
}

// FuzzServe: whatever a client sends, the server lives and what is outside stays as it is.
func FuzzServe(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x05\x01\x00\x00\x00\x03"))                                                          // INIT
	f.Add([]byte("\x00\x00\x00\x0f\x03\x00\x00\x00\x01\x00\x00\x00\x02/a\x00\x00\x00\x01"))                        // OPEN, cut short
	f.Add([]byte("\x00\x00\x00\x0b\x07\x00\x00\x00\x01\x00\x00\x00\x02/a"))                                        // LSTAT
	f.Add([]byte("\x00\x00\x00\x11\x05\x00\x00\x00\x01\x00\x00\x00\x011\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff")) // READ
	f.Add([]byte("\x00\x00\x00\x10\xc8\x00\x00\x00\x01\x00\x00\x00\x03abc\x00\x00\x00\x00"))                       // EXTENDED
	f.Add([]byte("\x00\x00\x00\x13\x09\x00\x00\x00\x01\x00\x00\x00\x02/a\x00\x00\x00\x04\x00\x00\x01\xff"))        // SETSTAT
	dir := f.TempDir()
	vol := filepath.Join(dir, "vol")
	if err := errors.Join(os.Mkdir(vol, 0o755), os.WriteFile(filepath.Join(dir, "secret"), []byte(secret), 0o644), os.Symlink("../secret", filepath.Join(vol, "link"))); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		here, there := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- Serve(there, []Export{{Path: "/a", Dir: vol}}, slog.New(slog.DiscardHandler)) }()
		go func() { _, _ = io.Copy(io.Discard, here) }()
		_, _ = here.Write(in)
		_ = here.Close()
		<-done
		if got, err := os.ReadFile(filepath.Join(dir, "secret")); err != nil || string(got) != secret {
			t.Fatalf("%q, %v", got, err)
		}
	})
}

// A client may say with an open what a new file's permissions are, as sshfs and sftp do.
func TestOpenWithPermissions(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o022))
	w := newWorld(t)
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(there, w.exports, slog.New(slog.DiscardHandler)) }()
	const path, flags = "/data/new", 0x2 | 0x4 | 0x8 // write, append, create: bits that stand for attributes elsewhere
	open := binary.BigEndian.AppendUint32([]byte{3, 0, 0, 0, 1}, uint32(len(path)))
	open = binary.BigEndian.AppendUint32(append(open, path...), flags)
	open = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(open, 0x4), 0o100644)
	for _, packet := range [][]byte{{1, 0, 0, 0, 3}, open} {
		_, err := here.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(packet))), packet...))
		must(t, err)
		var n [4]byte
		_, err = io.ReadFull(here, n[:])
		must(t, err)
		_, err = io.CopyN(io.Discard, here, int64(binary.BigEndian.Uint32(n[:])))
		must(t, err)
	}
	if fi, err := os.Stat(filepath.Join(w.dir, "new")); err != nil || fi.Mode() != 0o644 {
		t.Errorf("%v, %v", fi, err)
	}
	must(t, here.Close())
	<-done
}
