package mount

import (
	"context"
	"errors"
	"hash/fnv"
	iofs "io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// node is a file, directory or link. It has no state of the server but what is open: its path says what it is.
type node struct {
	fs.Inode
	m *FS

	mu sync.Mutex
	// guarded by mu
	open    []*file
	seen    stamp     // what is in the kernel's page cache
	since   time.Time // when an open found that first
	settled bool      // it was read from settleTime after that on
	last    stamp     // what was found last while it was open
}

// settleTime is when the second is over in which a file was changed that has just been seen.
const settleTime = 2 * time.Second

// stamp changes with a file's contents, as far as its times tell.
type stamp struct {
	size, mtime int64
}

// generation makes nodes distinct whose paths were the same.
var generation atomic.Uint64

func (n *node) path() string { return "/" + n.Path(nil) }

func (n *node) childPath(name string) string { return path.Join(n.path(), name) }

// number turns an error into what the kernel is told.
func number(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if no, ok := toErrno(err).(syscall.Errno); ok { //nolint:errorlint // it is nothing else
		return no
	}
	return syscall.EIO
}

// fill fills in attributes; the number of the file is made of its path, so that programs that remember it (git) find it again.
func fill(out *fuse.Attr, p string, fi iofs.FileInfo) {
	h := fnv.New64a()
	_, _ = h.Write([]byte(p))
	out.Ino, out.Owner, out.Nlink = h.Sum64(), owner, 1
	out.Mode = fileMode(fi.Mode())
	out.Size = uint64(max(0, fi.Size()))
	out.Blocks, out.Blksize = (out.Size+511)/512, 4096
	out.Mtime, out.Ctime, out.Atime = seconds(fi.ModTime()), seconds(fi.ModTime()), seconds(fi.ModTime())
	if st, ok := fi.Sys().(*sftp.FileStat); ok {
		out.Atime = uint64(st.Atime)
	}
}

// fileMode is a mode as stat(2) has it.
func fileMode(m os.FileMode) uint32 {
	out := uint32(m.Perm())
	switch m.Type() {
	case 0:
		out |= syscall.S_IFREG
	case os.ModeDir:
		out |= syscall.S_IFDIR
	case os.ModeSymlink:
		out |= syscall.S_IFLNK
	case os.ModeNamedPipe:
		out |= syscall.S_IFIFO
	case os.ModeSocket:
		out |= syscall.S_IFSOCK
	case os.ModeDevice:
		out |= syscall.S_IFBLK
	default:
		out |= syscall.S_IFCHR
	}
	return out
}

// child is the node of a name that was found.
func (n *node) child(ctx context.Context, name string, fi iofs.FileInfo, out *fuse.EntryOut) *fs.Inode {
	c, p := n.GetChild(name), n.childPath(name)
	same := c != nil && c.StableAttr().Mode == fileMode(fi.Mode())&syscall.S_IFMT
	if same {
		same, fi = c.Operations().(*node).is(ctx, p, fi)
	}
	fill(&out.Attr, p, fi)
	if same {
		return c
	}
	return n.NewInode(ctx, &node{m: n.m}, fs.StableAttr{Mode: out.Mode & syscall.S_IFMT, Ino: out.Ino, Gen: generation.Add(1)})
}

// is says whether what was found at a path is what is open as this node, and not a file that has taken its name: who has the other open shall not be told
// that it is as long as this one. It also returns the newest of what was found. A file that changes just now is the same, or else is told from it the
// next time.
func (n *node) is(ctx context.Context, p string, fi iofs.FileInfo) (bool, iofs.FileInfo) {
	f := n.anyOpen()
	if f == nil {
		return true, fi
	}
	before, err := f.stat(ctx)
	if err != nil || alike(before, fi) {
		return true, fi
	}
	now, err := n.m.lstat(ctx, p) // what was found may be a moment old
	if err != nil {
		return true, fi
	}
	after, err := f.stat(ctx)
	return err != nil || !alike(before, after) || alike(now, after), now
}

// alike says whether two files may be one: the protocol has no numbers of files.
func alike(a, b iofs.FileInfo) bool {
	return a.Size() == b.Size() && a.Mode() == b.Mode() && a.ModTime().Equal(b.ModTime())
}

// settle has what was written to the child of that name arrive, so that its size is right.
func (n *node) settle(ctx context.Context, name string) {
	if c := n.GetChild(name); c != nil {
		_ = c.Operations().(*node).drain(ctx)
	}
}

// drain waits for what was written through any open file of the node.
func (n *node) drain(ctx context.Context) error {
	n.mu.Lock()
	files := slices.Clone(n.open)
	n.mu.Unlock()
	if len(files) == 0 {
		return nil
	}
	return interruptible(ctx, func() error {
		var first error
		for _, f := range files {
			if err := f.w.settle(); err != nil && first == nil {
				first = err
			}
		}
		return first
	})
}

// order waits for what was written through other open files of the node to where f writes now: the server may do both in any order, and the first one
// again when the stream is lost. What of it comes to nothing is told to whoever wrote it.
func (n *node) order(ctx context.Context, f *file, s span) error {
	n.mu.Lock()
	others := slices.DeleteFunc(slices.Clone(n.open), func(o *file) bool { return o == f || o.readOnly })
	n.mu.Unlock()
	if len(others) == 0 {
		return nil
	}
	return interruptible(ctx, func() error {
		for _, o := range others {
			where := &s
			if f.appends || o.appends { // wherever the end is
				where = nil
			}
			if o.w.holds(where) {
				_ = o.w.settle()
			}
		}
		return nil
	})
}

// Lookup implements fs.NodeLookuper.
func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	dir := n.path()
	n.settle(ctx, name)
	fi, known, list := n.m.known.find(dir, name)
	if list {
		if _, names, errno := n.list(ctx, dir); errno == 0 && names != nil {
			fi, known = names[name], true
		}
	}
	if !known || fi == nil && strings.HasPrefix(name, "..") { // which the server may know though it is in no list
		var err error
		if fi, err = n.m.lstat(ctx, path.Join(dir, name)); errors.Is(err, syscall.ENOENT) {
			fi = nil
		} else if err != nil {
			return nil, number(err)
		}
	}
	if fi == nil {
		return nil, syscall.ENOENT
	}
	return n.child(ctx, name, fi, out), 0
}

func (m *FS) lstat(ctx context.Context, p string) (iofs.FileInfo, error) {
	found := make(chan iofs.FileInfo, 2)
	err := m.remote.again(ctx, func(c *sftp.Client) error {
		fi, err := something(c.Lstat(p))
		if err == nil {
			found <- fi
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return <-found, nil
}

// list asks for a whole directory, or waits with whoever has asked, and remembers it. By their names the files are given only if nothing was changed
// there meanwhile.
func (n *node) list(ctx context.Context, dir string) ([]iofs.FileInfo, map[string]iofs.FileInfo, syscall.Errno) {
	for {
		q, mine, old := n.m.known.ask(dir)
		if mine {
			go n.m.list(q)
		}
		if err := interruptible(ctx, func() error { <-q.done; return nil }); err != nil {
			return nil, nil, number(err)
		}
		if !old {
			return q.fis, q.names, number(q.err)
		}
	}
}

// list gets the answer to a question, whoever of those that wait for it is killed meanwhile.
func (m *FS) list(q *question) {
	var fis []iofs.FileInfo
	err := m.remote.again(context.Background(), func(c *sftp.Client) (err error) {
		fis, _, err = readDir(context.Background(), c, q.dir, maxPages, m.large)
		return err
	})
	if errors.Is(err, syscall.EFBIG) {
		m.log.Warn("a directory has too many names to be listed", "path", q.dir)
	}
	m.known.answer(q, fis, err)
}

// Readdir implements fs.NodeReaddirer.
func (n *node) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	dir := n.path()
	for name := range n.Children() {
		n.settle(ctx, name)
	}
	fis, _, errno := n.list(ctx, dir)
	if errno != 0 {
		return nil, errno
	}
	entries := make([]fuse.DirEntry, len(fis))
	for i, fi := range fis {
		entries[i] = fuse.DirEntry{Name: fi.Name(), Mode: fileMode(fi.Mode())}
	}
	return fs.NewListDirStream(entries), 0
}

// Getattr implements fs.NodeGetattrer.
func (n *node) Getattr(ctx context.Context, fh fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	_ = n.drain(ctx)
	f, ok := fh.(*file)
	if !ok {
		f = n.anyOpen()
	}
	return n.attr(ctx, f, &out.Attr)
}

// attr asks for attributes: of an open file by its handle, as another one may have its name by now.
func (n *node) attr(ctx context.Context, f *file, out *fuse.Attr) syscall.Errno {
	p := n.path()
	var fi iofs.FileInfo
	err := error(syscall.EBADF)
	if f != nil {
		fi, err = f.stat(ctx)
	}
	if errors.Is(err, syscall.EBADF) { // not open, or closed meanwhile by whoever had it open
		fi, err = n.named(ctx, p)
	}
	if err != nil {
		return number(err)
	}
	n.noticed(fi)
	fill(out, p, fi)
	if !n.IsRoot() {
		out.Ino = n.StableAttr().Ino // without a name too
	}
	return 0
}

// named is what has the node's name.
func (n *node) named(ctx context.Context, p string) (iofs.FileInfo, error) {
	if n.deleted() {
		return nil, syscall.ESTALE
	}
	if fi, known, _ := n.m.known.find(path.Dir(p), path.Base(p)); known && fi != nil {
		return fi, nil
	}
	return n.m.lstat(ctx, p)
}

func (n *node) deleted() bool {
	_, parent := n.Parent()
	return parent == nil && !n.IsRoot()
}

func (n *node) anyOpen() *file {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.open) == 0 {
		return nil
	}
	return n.open[0]
}

// changed is called around what changes a name in the directory.
func (n *node) changed() { n.m.known.changed(n.path()) }

// Setattr implements fs.NodeSetattrer.
func (n *node) Setattr(ctx context.Context, fh fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if err := n.drain(ctx); err != nil {
		return number(err)
	}
	f := n.through(fh)
	if f == nil && n.deleted() {
		return syscall.ESTALE
	}
	p := n.path()
	dir := path.Dir(p)
	n.m.known.changed(dir)
	defer n.m.known.changed(dir)
	if uid, ok := in.GetUID(); ok && uid != owner.Uid {
		return syscall.EPERM // they are whose they are in the pod
	}
	if gid, ok := in.GetGID(); ok && gid != owner.Gid {
		return syscall.EPERM
	}
	change := func(byPath func(*sftp.Client) error, open func(*sftp.File) error) error {
		if f != nil {
			return f.use(ctx, open)
		}
		return n.m.remote.again(ctx, byPath)
	}
	if size, ok := in.GetSize(); ok {
		size := int64(size)
		err := change(func(c *sftp.Client) error { return c.Truncate(p, size) }, func(h *sftp.File) error { return h.Truncate(size) })
		if err != nil {
			return number(err)
		}
		n.forget()
	}
	if mode, ok := in.GetMode(); ok {
		mode := os.FileMode(mode).Perm()
		err := change(func(c *sftp.Client) error { return c.Chmod(p, mode) }, func(h *sftp.File) error { return h.Chmod(mode) })
		if err != nil {
			return number(err)
		}
	}
	mtime, okM := in.GetMTime()
	atime, okA := in.GetATime()
	// The protocol has no way to those of a link itself, nor the library to those of a file without a name.
	if (okM || okA) && n.StableAttr().Mode != syscall.S_IFLNK && !n.deleted() {
		var now fuse.Attr
		if errno := n.attr(ctx, n.anyOpen(), &now); errno != 0 {
			return errno
		}
		if !okM {
			mtime = time.Unix(int64(now.Mtime), 0)
		}
		if !okA {
			atime = time.Unix(int64(now.Atime), 0)
		}
		if err := n.m.remote.again(ctx, func(c *sftp.Client) error { return c.Chtimes(p, atime, mtime) }); err != nil {
			return number(err)
		}
	}
	n.m.known.changed(dir)
	return n.attr(ctx, n.anyOpen(), &out.Attr)
}

// through is the open file by which the node is changed: that which the kernel names, or any if the file has no name any more.
func (n *node) through(fh fs.FileHandle) *file {
	if f, ok := fh.(*file); ok {
		return f
	}
	if n.deleted() {
		return n.anyOpen()
	}
	return nil
}

// forget drops what was read ahead of the node.
func (n *node) forget() {
	n.mu.Lock()
	files := slices.Clone(n.open)
	n.mu.Unlock()
	for _, f := range files {
		f.r.forget(false)
	}
}

// noticed drops what was read ahead of the node if the file has changed since: the kernel, which has noticed too, asks for it again.
func (n *node) noticed(fi iofs.FileInfo) {
	now := stamp{size: fi.Size(), mtime: fi.ModTime().Unix()}
	n.mu.Lock()
	changed := now != n.last
	n.last = now
	files := slices.Clone(n.open)
	n.mu.Unlock()
	for _, f := range files {
		f.size.Store(now.size)
		if changed {
			f.r.forget(false)
		}
	}
}

// made looks at a name that has just been made.
func (n *node) made(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	fi, err := n.m.lstat(ctx, n.childPath(name))
	if err != nil {
		return nil, number(err)
	}
	return n.child(ctx, name, fi, out), 0
}

// permit looks at a name that has just been made, and gives it its permissions unless it has them. Some volumes refuse that (CIFS, blobfuse): it is
// there all the same, and whoever made it would not believe it if they were told so.
func (n *node) permit(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	p, want := n.childPath(name), os.FileMode(mode).Perm()
	fi, err := n.m.lstat(ctx, p)
	if err != nil {
		return nil, number(err)
	}
	if fi.Mode().Perm() != want {
		err = n.m.remote.again(ctx, func(c *sftp.Client) error { return c.Chmod(p, want) })
		switch {
		case err == nil:
			fi = permitted{fi, fi.Mode()&^os.ModePerm | want}
		case !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EACCES) && !errors.Is(err, syscall.ENOTSUP):
			return nil, number(err)
		}
	}
	return n.child(ctx, name, fi, out), 0
}

// permitted is a file after chmod(2).
type permitted struct {
	iofs.FileInfo
	mode os.FileMode
}

func (p permitted) Mode() os.FileMode { return p.mode }

// Mkdir implements fs.NodeMkdirer.
func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	defer n.changed()
	p := n.childPath(name)
	if err := n.m.remote.once(ctx, func(c *sftp.Client) error { return c.Mkdir(p) }); err != nil {
		return nil, number(err)
	}
	return n.permit(ctx, name, mode, out)
}

// Unlink implements fs.NodeUnlinker.
func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	defer n.changed()
	p := n.childPath(name)
	return number(n.m.remote.once(ctx, func(c *sftp.Client) error { return c.Remove(p) }))
}

// Rmdir implements fs.NodeRmdirer.
func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	defer n.changed()
	p := n.childPath(name)
	return number(n.m.remote.once(ctx, func(c *sftp.Client) error { return c.RemoveDirectory(p) }))
}

// Rename implements fs.NodeRenamer.
func (n *node) Rename(ctx context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	target := to.(*node)
	defer n.changed()
	defer target.changed()
	from, dest := n.childPath(name), target.childPath(newName)
	defer n.m.known.changed(from, dest) // directories, maybe
	n.settle(ctx, name)
	switch flags {
	case 0:
		return number(n.m.remote.once(ctx, func(c *sftp.Client) error { return c.PosixRename(from, dest) }))
	case unix.RENAME_NOREPLACE:
		return number(n.m.remote.once(ctx, func(c *sftp.Client) error { return c.Rename(from, dest) }))
	}
	return syscall.EINVAL
}

// Link implements fs.NodeLinker.
func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	defer n.changed()
	from, to := target.(*node).path(), n.childPath(name)
	if err := n.m.remote.once(ctx, func(c *sftp.Client) error { return c.Link(from, to) }); err != nil {
		return nil, number(err)
	}
	return n.made(ctx, name, out)
}

// Symlink implements fs.NodeSymlinker. A target below the mount point is one of the app's paths.
func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	defer n.changed()
	if rest, ok := strings.CutPrefix(target, n.m.point); ok && strings.HasPrefix(rest, "/") {
		target = rest
	}
	to := n.childPath(name)
	if err := n.m.remote.once(ctx, func(c *sftp.Client) error { return c.Symlink(target, to) }); err != nil {
		return nil, number(err)
	}
	return n.made(ctx, name, out)
}

// Readlink implements fs.NodeReadlinker.
func (n *node) Readlink(ctx context.Context) ([]byte, syscall.Errno) {
	p := n.path()
	found := make(chan string, 2)
	err := n.m.remote.again(ctx, func(c *sftp.Client) error {
		to, err := c.ReadLink(p)
		if err == nil {
			found <- to
		}
		return err
	})
	if err != nil {
		return nil, number(err)
	}
	to := confine(n.m.point, p, <-found)
	if first, _, _ := strings.Cut(to, "/"); !path.IsAbs(to) && n.m.known.lacks(path.Dir(p), first) {
		n.m.known.changed(path.Dir(p)) // as when the kubelet has just put new contents of a ConfigMap beside the old ones
	}
	return []byte(to), 0
}

// Statfs implements fs.NodeStatfser.
func (n *node) Statfs(ctx context.Context, out *fuse.StatfsOut) syscall.Errno {
	p := n.path()
	found := make(chan *sftp.StatVFS, 2)
	err := n.m.remote.again(ctx, func(c *sftp.Client) error {
		st, err := something(c.StatVFS(p))
		if err == nil {
			found <- st
		}
		return err
	})
	if err != nil {
		return number(err)
	}
	st := <-found
	out.Blocks, out.Bfree, out.Bavail, out.Files, out.Ffree = st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree
	out.Bsize, out.Frsize, out.NameLen = uint32(st.Bsize), uint32(st.Frsize), uint32(st.Namemax)
	return 0
}

// Open implements fs.NodeOpener.
func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f := newFile(n.m, n, n.path(), int(flags)&(syscall.O_ACCMODE|syscall.O_TRUNC|syscall.O_APPEND))
	if err := n.drain(ctx); err != nil {
		return nil, 0, number(err)
	}
	if err := f.openNow(ctx); err != nil {
		go f.release() // when a handle comes for which nobody waits any more
		return nil, 0, number(err)
	}
	if flags&syscall.O_TRUNC != 0 {
		n.m.known.changed(path.Dir(f.path))
	}
	var out uint32
	if flags&syscall.O_ACCMODE == syscall.O_RDONLY {
		out |= fuse.FOPEN_NOFLUSH
	}
	var now fuse.Attr
	other := n.anyOpen()
	if other != nil && f.another(ctx, other) {
		go f.release()
		n.m.known.changed(path.Dir(f.path))
		return nil, 0, syscall.ESTALE // so that the kernel looks the name up again
	}
	if n.attr(ctx, other, &now) == 0 {
		f.size.Store(int64(now.Size))
		if n.unchanged(now) {
			out |= fuse.FOPEN_KEEP_CACHE
		} else {
			n.forget() // what others have read ahead may be of before
		}
	}
	n.add(f)
	return f, out, 0
}

// unchanged says whether what the kernel has of the file is what is in it. Times are in seconds, of the pod's clock: what was changed in one of them may
// be changed once more in it. So what the kernel has is read again once when the second is over for certain, by the laptop's clock alone.
func (n *node) unchanged(now fuse.Attr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := stamp{int64(now.Size), int64(now.Mtime)}
	switch {
	case s != n.seen || n.since.IsZero():
		n.seen, n.since, n.settled = s, time.Now(), false
	case n.settled:
		return true
	default:
		n.settled = time.Since(n.since) >= settleTime
	}
	return false
}

// Create implements fs.NodeCreater.
func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n.changed()
	defer n.changed()
	f := newFile(n.m, nil, n.childPath(name), int(flags)&(syscall.O_ACCMODE|syscall.O_TRUNC|syscall.O_EXCL|syscall.O_APPEND)|os.O_CREATE)
	if err := f.openNow(ctx); err != nil {
		go f.release() // when a handle comes for which nobody waits any more
		return nil, nil, 0, number(err)
	}
	in, errno := n.permit(ctx, name, mode, out)
	if errno != 0 {
		go f.release() // which may wait for the server
		return nil, nil, 0, errno
	}
	f.n = in.Operations().(*node)
	f.n.add(f)
	return in, f, 0, 0
}

func (n *node) add(f *file) {
	n.mu.Lock()
	n.open = append(n.open, f)
	n.mu.Unlock()
}

func (n *node) remove(f *file) {
	n.mu.Lock()
	n.open = slices.DeleteFunc(n.open, func(o *file) bool { return o == f })
	n.mu.Unlock()
}
