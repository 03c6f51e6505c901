package mount

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pkg/sftp"
)

// A link that whoever writes in the pod has made leads nowhere but to what is mounted.
func TestLinksThatLeadOut(t *testing.T) {
	w := newWorld(t)
	bashrc := filepath.Join(t.TempDir(), "bashrc")
	w.write(bashrc, "mine")
	rel, err := filepath.Rel(w.in("data"), bashrc)
	must(t, err)
	must(t, os.Symlink("/", filepath.Join(w.data, "up")))
	for name, to := range map[string]string{"relative": rel, "absolute": "/" + rel, "by another": "up/" + rel, "far": strings.Repeat("../", 100) + bashrc[1:]} {
		must(t, os.Symlink(to, filepath.Join(w.data, name)))
		if b, err := os.ReadFile(w.in("data", name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: read %q, %v", name, b, err)
		}
		if err := os.WriteFile(w.in("data", name), []byte("theirs"), 0o600); err == nil {
			t.Errorf("%s: written", name)
		}
	}
	if b, err := os.ReadFile(bashrc); err != nil || string(b) != "mine" {
		t.Errorf("a file of the laptop is %q now, %v", b, err)
	}
}

// liar is a file server whose names lead elsewhere.
type liar struct{ fs.FileInfo }

func (liar) Fileread(*sftp.Request) (io.ReaderAt, error) { return strings.NewReader("theirs"), nil }
func (l liar) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	if r.Method != "List" {
		return names{named{l.FileInfo, "root", fs.ModeDir | 0o755}}, nil
	}
	if r.Filepath != "/" {
		return names{}, nil
	}
	out := names{named{l.FileInfo, "..", fs.ModeDir | 0o755}, named{l.FileInfo, "suid", 0o755 | fs.ModeSetuid}, named{l.FileInfo, "device", fs.ModeDevice | 0o666}}
	for _, name := range []string{"../outside", "../../" + copyMark, "/outside", "a/../../outside", ""} {
		out = append(out, named{l.FileInfo, name, 0o644})
	}
	return out, nil
}

type named struct {
	fs.FileInfo
	name string
	mode fs.FileMode
}

func (n named) Name() string      { return n.name }
func (n named) Mode() fs.FileMode { return n.mode }
func (n named) IsDir() bool       { return n.mode.IsDir() }

type names []named

func (n names) ListAt(to []fs.FileInfo, off int64) (int, error) {
	if off >= int64(len(n)) {
		return 0, io.EOF
	}
	i := 0
	for ; i < len(to) && int(off)+i < len(n); i++ {
		to[i] = n[int(off)+i]
	}
	return i, nil
}

// What a file server says that its names are, a copy stays where it was asked for, and makes nothing but plain files of the user.
func TestCopyFromLiar(t *testing.T) {
	fi, err := os.Stat("copy.go")
	must(t, err)
	dir := t.TempDir()
	point := filepath.Join(dir, "copy")
	must(t, os.Mkdir(point, 0o700))
	err = Copy(t.Context(), Config{Point: point, Source: "shop/web", Dial: func(context.Context) (io.ReadWriteCloser, error) {
		here, there := net.Pipe()
		l := liar{fi}
		s := sftp.NewRequestServer(there, sftp.Handlers{FileGet: l, FileList: l})
		go func() { _ = s.Serve() }()
		return here, nil
	}})
	t.Log(err)
	names, err := os.ReadDir(dir)
	must(t, err)
	if len(names) != 1 {
		t.Errorf("beside the copy: %v", names)
	}
	must(t, filepath.Walk(point, func(name string, fi fs.FileInfo, err error) error {
		if err == nil && (fi.Mode()&^fs.ModePerm)&^fs.ModeDir != 0 {
			t.Errorf("%s: %v", name, fi.Mode())
		}
		return err
	}))
}

// A file server that says that all is well, and nothing else, ends no process: what it was asked for is not there.
func TestNothingToSay(t *testing.T) {
	w := newWorld(t)
	must(t, os.WriteFile(filepath.Join(w.data, "f"), []byte("x"), 0o600))
	f, err := os.Open(w.in("data", "f"))
	must(t, err)
	defer f.Close()
	w.cut(false)
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser {
		_ = c.Close()
		return answers(t, slices.Concat([]byte{2, 0}, bytes.Repeat(allIsWell, 1000)))
	}
	w.mu.Unlock()
	for what, do := range map[string]func() error{
		"stat":     func() error { _, err := os.Stat(w.in("data", "g")); return err },
		"open":     func() error { _, err := os.ReadFile(w.in("data", "g")); return err },
		"read":     func() error { _, err := io.ReadAll(f); return err },
		"statfs":   func() error { return syscall.Statfs(w.point, new(syscall.Statfs_t)) },
		"readlink": func() error { _, err := os.Readlink(w.in("data", "l")); return err },
	} {
		if err := do(); err == nil {
			t.Errorf("%s is done", what)
		}
	}
	point := t.TempDir()
	if err := Copy(t.Context(), Config{Point: point, Source: "x", Dial: w.dial}); err != nil {
		t.Log(err)
	}
	w.mu.Lock()
	w.wrap = nil
	w.mu.Unlock()
	w.cut(false)
}

// allIsWell is a record for answers: STATUS, OK.
var allIsWell = []byte("\x65\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")

// answers are those of a file server, made of any bytes: to each request the next record, under the request's number.
func answers(t *testing.T, data []byte) io.ReadWriteCloser {
	here, there := net.Pipe()
	done := make(chan struct{})
	t.Cleanup(func() { _ = here.Close(); <-done })
	go func() {
		defer close(done)
		defer there.Close()
		for {
			var head [9]byte // length, type, number
			if _, err := io.ReadFull(there, head[:]); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, there, int64(binary.BigEndian.Uint32(head[:]))-5); err != nil || len(data) < 2 {
				return
			}
			typ, n := data[0], min(int(data[1])*2, len(data)-2)
			body := slices.Concat(head[5:], data[2:2+n])
			if head[4] == 1 { // INIT
				typ, body = 2, slices.Concat([]byte{0, 0, 0, 3}, data[2:2+n])
			}
			data = data[2+n:]
			if _, err := there.Write(slices.Concat(binary.BigEndian.AppendUint32(nil, uint32(1+len(body))), []byte{typ}, body)); err != nil {
				return
			}
		}
	}()
	return here
}

// FuzzAnswers: whatever a file server answers, this process lives, and writes nowhere but below the point.
func FuzzAnswers(f *testing.F) {
	const status, handle, content, list, attrs = 101, 102, 103, 104, 105
	record := func(typ byte, parts ...string) string {
		body := strings.Join(parts, "")
		if len(body)%2 != 0 {
			body += "\x00"
		}
		return string([]byte{typ, byte(len(body) / 2)}) + body
	}
	text := func(s string) string { return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s }
	mode := func(m string) string { return "\x00\x00\x00\x04\x00\x00" + m }
	init, dir, file, link, end := record(2, text("posix-rename@openssh.com"), text("1")), mode("\x41\xff"), mode("\x81\xa4"), mode("\xa1\xff"), record(status, "\x00\x00\x00\x01", text("EOF"), text(""))
	root := init + record(attrs, dir) + record(handle, text("h"))
	f.Add([]byte(root + record(list, "\x00\x00\x00\x02", text("f"), text(""), file, text("l"), text(""), link) + end + record(status, "\x00\x00\x00\x00", text(""), text("")) +
		record(handle, text("f")) + record(content, text("contents")) + end + end + record(list, "\x00\x00\x00\x01", text("../../x"), text(""), file)))
	f.Add([]byte(root + record(list, "\xff\xff\xff\xff", text("../f"))))
	f.Add([]byte(init + record(attrs, "\x00\x00\x00\x0f\xff")))
	f.Add([]byte(record(2, "\x00\x00\x00\xffx")))
	f.Add(slices.Concat([]byte(init), bytes.Repeat(allIsWell, 30)))
	dirOf := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		point, err := os.MkdirTemp(dirOf, "")
		must(t, err)
		defer os.RemoveAll(point)
		copyTo := filepath.Join(point, "copy")
		must(t, os.Mkdir(copyTo, 0o700))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_ = Copy(ctx, Config{Point: copyTo, Source: "x", Dial: func(context.Context) (io.ReadWriteCloser, error) { return answers(t, data), nil }})
		if ctx.Err() != nil {
			t.Error("it does not end")
		}
		if names, err := os.ReadDir(point); err != nil || len(names) != 1 {
			t.Errorf("beside the copy: %v, %v", names, err)
		}
		here := answers(t, data)
		if c, err := sftp.NewClientPipe(here, here); err == nil { // the other operations of a mount
			for _, do := range []func(){
				func() { _, _ = c.Lstat("/f") }, func() { _, _ = c.StatVFS("/") }, func() { _, _ = c.ReadLink("/l") }, func() { _ = c.PosixRename("/a", "/b") },
				func() {
					if h, err := something(c.OpenFile("/f", os.O_RDWR)); err == nil {
						_, _ = h.ReadAt(make([]byte, 100_000), 0)
						_, _ = h.WriteAt(make([]byte, 100_000), 0)
						_, _ = h.Stat()
						_ = h.Close()
					}
				},
			} {
				do()
			}
			_ = c.Close()
		}
	})
}
