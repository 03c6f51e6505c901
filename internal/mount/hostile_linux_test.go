package mount

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
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

// boundless is a file server whose directories have no end: neither their lists nor how deep they are.
type boundless struct {
	fs.FileInfo
	deep  bool
	lists *atomic.Int64
}

func (boundless) Fileread(*sftp.Request) (io.ReaderAt, error) { return strings.NewReader("x"), nil }
func (b boundless) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	if r.Method != "List" {
		if r.Filepath != "/" && r.Filepath != "/d" {
			return nil, fs.ErrNotExist
		}
		return names{named{b.FileInfo, path.Base(r.Filepath), fs.ModeDir | 0o755}}, nil
	}
	b.lists.Add(1)
	if b.deep {
		return names{named{b.FileInfo, "d", fs.ModeDir | 0o755}}, nil
	}
	return b, nil
}

func (b boundless) ListAt(to []fs.FileInfo, off int64) (int, error) {
	for i := range to {
		to[i] = named{b.FileInfo, fmt.Sprint("f", off+int64(i)), fs.ModeSocket | 0o644}
	}
	return len(to), nil
}

func (b boundless) dial(context.Context) (io.ReadWriteCloser, error) {
	here, there := net.Pipe()
	s := sftp.NewRequestServer(there, sftp.Handlers{FileGet: b, FileList: b})
	go func() { _ = s.Serve() }()
	return here, nil
}

// A list without end is broken off, and its directory is not listed for the sake of a name.
func TestListWithoutEnd(t *testing.T) {
	fi, err := os.Stat("copy.go")
	must(t, err)
	w := newWorld(t)
	b := boundless{fi, false, new(atomic.Int64)}
	w.mu.Lock()
	w.wrap = func(c net.Conn) io.ReadWriteCloser {
		_ = c.Close()
		here, _ := b.dial(t.Context())
		return here
	}
	w.mu.Unlock()
	w.cut(false)
	if names, err := os.ReadDir(w.in("d")); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("%d names, %v, want EFBIG", len(names), err)
	}
	before := b.lists.Load()
	for i := range 5 {
		if _, err := os.Stat(w.in("d", fmt.Sprint(i))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v", err)
		}
	}
	if n := b.lists.Load(); before != 1 || n != before {
		t.Errorf("%d lists, and %d for the sake of names", before, n-before)
	}
}

// A copy ends, and says what it lacks: of lists without end, of directories that are deep without end, and of too much of all.
func TestCopyBounds(t *testing.T) {
	fi, err := os.Stat("copy.go")
	must(t, err)
	for name, tt := range map[string]struct {
		deep bool
		most int
		want string
	}{
		"list": {false, maxCopied, "file too large"},
		"deep": {true, maxCopied, "100 directories deep"},
		"many": {true, 7, "files and directories"},
	} {
		t.Run(name, func(t *testing.T) {
			here, err := boundless{fi, tt.deep, new(atomic.Int64)}.dial(t.Context())
			must(t, err)
			c, err := sftp.NewClientPipe(here, here)
			must(t, err)
			defer c.Close()
			root, err := os.OpenRoot(t.TempDir())
			must(t, err)
			defer root.Close()
			tr := tree{ctx: t.Context(), c: c, root: root, most: tt.most}
			must(t, tr.copy("/", 0))
			if tr.left.Files != 1 || !strings.Contains(tr.left.Error(), tt.want) {
				t.Errorf("%v, want %s", &tr.left, tt.want)
			}
		})
	}
}

// An answer with more names than ours has is refused before the library makes anything of it; all others pass, in whatever pieces they come.
func TestTooManyNames(t *testing.T) {
	packet := func(typ byte, body ...byte) []byte {
		return slices.Concat(binary.BigEndian.AppendUint32(nil, uint32(len(body)+1)), []byte{typ}, body)
	}
	names := func(n uint32) []byte { return packet(104, binary.BigEndian.AppendUint32([]byte{0, 0, 0, 1}, n)...) }
	well := slices.Concat(packet(2, 0, 0, 0, 3), packet(103, bytes.Repeat([]byte{255}, 5000)...), []byte{0, 0, 0, 0}, names(maxPage), packet(104), packet(101, 0, 0, 0, 1, 0, 0, 0, 1))
	for name, r := range map[string]func(io.Reader) io.Reader{"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "halves": iotest.HalfReader} {
		if b, err := io.ReadAll(&checked{Reader: r(bytes.NewReader(well))}); err != nil || !bytes.Equal(b, well) {
			t.Errorf("%s: %d bytes of %d, %v", name, len(b), len(well), err)
		}
		if _, err := io.ReadAll(&checked{Reader: r(bytes.NewReader(slices.Concat(well, names(maxPage+1))))}); !errors.Is(err, errTooManyNames) {
			t.Errorf("%s: %v", name, err)
		}
	}
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
