package sftpd

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/pkg/sftp"
)

// The library has an error's text sent to the client. It gets the bare error number, whose text is the same everywhere, so that the client
// can turn it back, and no path of this process is told.
func bare(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		return no
	}
	if errors.Is(err, os.ErrClosed) {
		return syscall.EBADF
	}
	return syscall.EACCES // os.Root says no to what leads out of it
}

// writable finds a place that may be changed.
func (s *server) writable(p string) (place, error) {
	at, err := s.tree.find(p)
	if errors.Is(err, syscall.ENOENT) { // a new name in a directory above volumes
		if above, err2 := s.tree.find(path.Dir(p)); err2 == nil && above.vol == nil {
			err = syscall.EROFS
		}
	}
	switch {
	case err != nil:
		return at, err
	case at.vol == nil || at.vol.ReadOnly:
		return at, syscall.EROFS
	}
	return at, nil
}

// file is an open file or directory; it counts until it is closed.
type file struct {
	*os.File
	s        *server
	id       uint64
	readOnly bool // its volume is
	end      bool // what is written goes to its end (O_APPEND)
}

func (f *file) Close() error {
	f.s.mu.Lock()
	delete(f.s.open, f)
	f.s.mu.Unlock()
	return bare(f.File.Close())
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	return n, bare(err)
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if f.end { // wherever the client believes it to be: the app writes there too
		n, err := f.File.Write(p)
		return n, bare(err)
	}
	n, err := f.File.WriteAt(p, off)
	return n, bare(err)
}

// openAt opens a regular file or a directory. Nothing else: opening a FIFO waits, and opening a device may do things.
func (s *server) openAt(at place, flags int, perm os.FileMode) (*file, error) {
	s.mu.Lock()
	s.opens++
	f := &file{s: s, id: s.opens, readOnly: at.vol == nil || at.vol.ReadOnly, end: flags&os.O_APPEND != 0}
	full := len(s.open) >= MaxHandles
	if !full {
		s.open[f] = struct{}{}
	}
	s.mu.Unlock()
	if full {
		return nil, syscall.EMFILE
	}
	opened, err := at.open(flags|syscall.O_NONBLOCK, perm)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.open, f)
		return nil, bare(err)
	}
	f.File = opened
	return f, nil
}

// mark has requests for an open file found. Where a client asks for one (fstat(2)), the library has the path of the request asked for with which it was
// opened, whatever is there now: so it gets, behind a byte that no name has, the file's number. The library does these requests one after the other.
func (f *file) mark(r *sftp.Request) { r.Filepath += "\x00" + strconv.FormatUint(f.id, 10) }

// opened returns the open file that a request is for, or nil.
func (s *server) opened(p string) *file {
	_, number, _ := strings.Cut(p, "\x00")
	id, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := range s.open {
		if f.id == id && f.File != nil {
			return f
		}
	}
	return nil
}

func (p place) open(flags int, perm os.FileMode) (*os.File, error) {
	var f *os.File
	var err error
	switch {
	case p.vol == nil:
		return nil, syscall.EISDIR
	case p.vol.root == nil:
		f, err = os.OpenFile(p.vol.Dir, flags, perm)
	default:
		// Looked at before, because opening alone has effects, and after, because it may be another one by then.
		if fi, err := p.vol.root.Stat(p.rel); err == nil && !fi.Mode().IsRegular() && !fi.IsDir() {
			return nil, syscall.EOPNOTSUPP
		}
		f, err = p.vol.root.OpenFile(p.rel, flags, perm)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() && !fi.IsDir() {
		err = syscall.EOPNOTSUPP
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Fileread implements sftp.FileReader.
func (s *server) Fileread(r *sftp.Request) (io.ReaderAt, error) {
	at, err := s.tree.look(r.Filepath)
	if err != nil {
		return nil, err
	}
	f, err := s.openAt(at, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	f.mark(r)
	return f, nil
}

// Filewrite implements sftp.FileWriter.
func (s *server) Filewrite(r *sftp.Request) (io.WriterAt, error) { return s.OpenFile(r) }

// OpenFile implements sftp.OpenFileWriter.
func (s *server) OpenFile(r *sftp.Request) (sftp.WriterAtReaderAt, error) {
	at, err := s.writable(r.Filepath)
	if err != nil {
		return nil, err
	}
	want := r.Pflags()
	flags := os.O_WRONLY
	if want.Read {
		flags = os.O_RDWR
	}
	if want.Append {
		flags |= os.O_APPEND
	}
	if want.Creat {
		flags |= os.O_CREATE
	}
	if want.Trunc {
		flags |= os.O_TRUNC
	}
	if want.Excl {
		flags |= os.O_EXCL
	}
	perm := os.FileMode(0o600) // until the client says what it shall be
	// The library does not tell which attributes come with an open. Of their combinations the permissions alone have four bytes.
	if len(r.Attrs) == 4 {
		perm = os.FileMode(binary.BigEndian.Uint32(r.Attrs)).Perm()
	}
	f, err := s.openAt(at, flags, perm)
	if err != nil {
		return nil, err
	}
	f.mark(r)
	return f, nil
}

// Filecmd implements sftp.FileCmder.
func (s *server) Filecmd(r *sftp.Request) error {
	switch r.Method {
	case "Symlink": // here the file is the target, a text, and the target the file
		at, err := s.changeable(r.Target)
		if err != nil {
			return err
		}
		return bare(at.vol.root.Symlink(r.Filepath, at.rel))
	case "Rename": // which version 3 of the protocol does not let replace anything
		to, err := s.changeable(r.Target)
		if err != nil {
			return err
		}
		if _, err := to.vol.root.Lstat(to.rel); err == nil {
			return syscall.EEXIST
		}
		return s.PosixRename(r)
	case "Setstat":
		return s.setstat(r)
	}
	at, err := s.changeable(r.Filepath)
	if err != nil {
		return err
	}
	switch r.Method {
	case "Mkdir":
		return bare(at.vol.root.Mkdir(at.rel, 0o755))
	case "Remove", "Rmdir":
		return s.remove(at, r.Method == "Rmdir")
	case "Link":
		to, err := s.changeable(r.Target)
		switch {
		case err != nil:
			return err
		case to.vol != at.vol:
			return syscall.EXDEV
		}
		return bare(at.vol.root.Link(at.rel, to.rel))
	}
	return sftp.ErrSSHFxOpUnsupported
}

// changeable finds a name in a directory that may be changed: not a volume itself, which is a mount point for the app.
func (s *server) changeable(p string) (place, error) {
	at, err := s.writable(p)
	if err == nil && (at.top() || len(s.tree.children(p)) > 0) {
		err = syscall.EBUSY
	}
	return at, err
}

// PosixRename implements sftp.PosixRenameFileCmder: as rename(2).
func (s *server) PosixRename(r *sftp.Request) error {
	from, err := s.changeable(r.Filepath)
	if err != nil {
		return err
	}
	to, err := s.changeable(r.Target)
	switch {
	case err != nil:
		return err
	case from.vol != to.vol:
		return syscall.EXDEV
	}
	return bare(from.vol.root.Rename(from.rel, to.rel))
}

// remove is unlink(2) or rmdir(2), which os.Root has in one.
func (s *server) remove(at place, dir bool) error {
	fi, err := at.vol.root.Lstat(at.rel)
	switch {
	case err != nil:
		return bare(err)
	case dir && !fi.IsDir():
		return syscall.ENOTDIR
	case !dir && fi.IsDir():
		return syscall.EISDIR
	}
	return bare(at.vol.root.Remove(at.rel))
}

func (s *server) setstat(r *sftp.Request) error {
	want, attrs := r.AttrFlags(), r.Attributes()
	if f := s.opened(r.Filepath); f != nil {
		switch {
		case f.readOnly:
			return syscall.EROFS
		case attrs == nil:
			return syscall.EINVAL
		}
		return bare(f.set(want, attrs))
	}
	at, err := s.writable(r.Filepath)
	switch {
	case err != nil:
		return err
	case attrs == nil: // cut short
		return syscall.EINVAL
	}
	if want.UidGid {
		fi, err := s.tree.stat(r.Filepath, true)
		if err == nil {
			err = keeps(fi, attrs)
		}
		if err != nil {
			return bare(err)
		}
		want.UidGid = false
	}
	if want.Size || at.vol.root == nil {
		f, err := s.openAt(at, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		return bare(f.set(want, attrs))
	}
	if want.Permissions {
		fi, err := at.vol.root.Stat(at.rel)
		if err == nil {
			err = at.vol.root.Chmod(at.rel, permissions(fi, attrs))
		}
		if err != nil {
			return bare(err)
		}
	}
	if want.Acmodtime {
		return bare(at.vol.root.Chtimes(at.rel, attrs.AccessTime(), attrs.ModTime()))
	}
	return nil
}

// set changes what a client wants changed of an open file.
func (f *file) set(want sftp.FileAttrFlags, attrs *sftp.FileStat) error {
	fi, err := f.Stat()
	if err == nil && want.UidGid {
		err = keeps(fi, attrs)
	}
	if err == nil && want.Size {
		err = f.Truncate(int64(attrs.Size))
	}
	if err == nil && want.Permissions {
		err = f.Chmod(permissions(fi, attrs))
	}
	if err == nil && want.Acmodtime {
		err = syscall.Futimes(int(f.Fd()), []syscall.Timeval{syscall.NsecToTimeval(attrs.AccessTime().UnixNano()), syscall.NsecToTimeval(attrs.ModTime().UnixNano())})
	}
	return err
}

// keeps refuses other owners: files are those of the app.
func keeps(fi fs.FileInfo, attrs *sftp.FileStat) error {
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || st.Uid != attrs.UID || st.Gid != attrs.GID {
		return syscall.EPERM
	}
	return nil
}

// permissions are those that a client gives. A directory keeps the bit that it has of the one above, as the volumes of an fsGroup.
func permissions(fi fs.FileInfo, attrs *sftp.FileStat) os.FileMode {
	mode := attrs.FileMode().Perm()
	if fi.IsDir() {
		mode |= fi.Mode() & os.ModeSetgid
	}
	return mode
}

// Filelist implements sftp.FileLister.
func (s *server) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	if r.Method == "Stat" {
		return s.one(r.Filepath, true)
	}
	at, err := s.tree.look(r.Filepath)
	if err != nil {
		return nil, err
	}
	l := &listing{}
	for _, name := range s.tree.children(r.Filepath) {
		fi, err := s.tree.stat(path.Join(r.Filepath, name), false)
		if err != nil {
			return nil, bare(err)
		}
		l.first = append(l.first, fi)
	}
	if at.vol != nil {
		l.f, err = s.openAt(at, os.O_RDONLY|syscall.O_DIRECTORY, 0)
		if err != nil && (len(l.first) == 0 || !errors.Is(err, fs.ErrNotExist)) {
			return nil, err
		}
	}
	return l, nil
}

// Lstat implements sftp.LstatFileLister.
func (s *server) Lstat(r *sftp.Request) (sftp.ListerAt, error) { return s.one(r.Filepath, false) }

func (s *server) one(p string, follow bool) (sftp.ListerAt, error) {
	var f *file
	if follow {
		f = s.opened(p)
	}
	var fi fs.FileInfo
	var err error
	if f != nil {
		fi, err = f.Stat()
	} else {
		fi, err = s.tree.stat(p, follow)
	}
	if err != nil {
		return nil, bare(err)
	}
	return &listing{first: []fs.FileInfo{fi}}, nil
}

// Readlink implements sftp.ReadlinkFileLister.
func (s *server) Readlink(p string) (string, error) {
	at, err := s.tree.look(p)
	if err != nil {
		return "", err
	}
	if at.vol == nil || at.vol.root == nil {
		return "", syscall.EINVAL
	}
	to, err := at.vol.root.Readlink(at.rel)
	return to, bare(err)
}

// RealPath implements sftp.RealPathFileLister: a path is what it is, "" the root.
func (s *server) RealPath(p string) (string, error) { return path.Join("/", p), nil }

// listing is read once, from the beginning to the end.
type listing struct {
	f *file // nil: none

	mu sync.Mutex
	// guarded by mu
	first []fs.FileInfo // and their names hide those in f
	begun bool
	next  []fs.FileInfo // read, and not given yet
}

func (l *listing) ListAt(out []fs.FileInfo, _ int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.begun {
		l.begun, l.next = true, slices.Clone(l.first)
	}
	for len(l.next) == 0 {
		if l.f == nil {
			return 0, io.EOF
		}
		fis, err := l.f.Readdir(len(out))
		l.next = slices.DeleteFunc(fis, func(fi fs.FileInfo) bool {
			return slices.ContainsFunc(l.first, func(hides fs.FileInfo) bool { return hides.Name() == fi.Name() })
		})
		if len(l.next) == 0 && err != nil {
			return 0, bare(err)
		}
	}
	n := copy(out, l.next[:fit(l.next)])
	l.next = l.next[n:]
	return n, nil
}

// fit is how many entries a packet has room for: each has its name, a line as ls(1) has it, which ends in the name, and attributes.
func fit(fis []fs.FileInfo) int {
	const rest = 4 + 4 + 128 + 32 // lengths, the line without the name, attributes
	const most = 120 << 10        // sshfs gives a connection up that brings more than 128 KiB at once
	size := 0
	for i, fi := range fis {
		if size += rest + 2*len(fi.Name()); size > most {
			return i
		}
	}
	return len(fis)
}

func (l *listing) Close() error {
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}
