package mount

import (
	"bytes"
	"context"
	"errors"
	"io"
	iofs "io/fs"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pkg/sftp"
)

// file is an open file. It outlives the connection to its server: with the next one it is opened again by the path that it has then.
type file struct {
	m        *FS
	path     string // when it was opened
	readOnly bool
	appends  bool
	size     atomic.Int64 // as far as is known
	r        *reader
	w        *behind

	n *node // constant after it was opened

	mu sync.Mutex
	// guarded by mu
	flags  int // for the next time that it is opened
	handle *sftp.File
	gen    int // of the client that handle is of
	closed bool
}

func newFile(m *FS, n *node, p string, flags int) *file {
	f := &file{m: m, n: n, path: p, flags: flags, readOnly: flags&syscall.O_ACCMODE == syscall.O_RDONLY}
	f.r = &reader{room: m.reads, at: f.readAt}
	if f.appends = flags&os.O_APPEND != 0; f.appends { // in the order in which it was written
		f.w = &behind{writer: newWriter(m.writes, 1, f.append)}
	} else {
		f.w = &behind{writer: newWriter(m.writes, maxFlying, f.writeAt)}
	}
	return f
}

// behind is a writer that can be asked without taking what it has to tell to whoever closes the file.
type behind struct {
	*writer
	mu   sync.Mutex
	lost error // guarded by mu
}

// settle waits for what was written, and keeps an error for whoever wrote.
func (b *behind) settle() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.drain(); err != nil {
		b.lost = err
	}
	return b.lost
}

// finish waits for what was written, and tells an error once.
func (b *behind) finish() error {
	err := b.settle()
	b.mu.Lock()
	b.lost = nil
	b.mu.Unlock()
	return err
}

// open opens the file at the server, or returns the handle that there is.
func (f *file) open(c *sftp.Client, gen int) (*sftp.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return nil, syscall.EBADF
	case f.handle != nil && f.gen == gen:
		return f.handle, nil
	}
	p, err := f.name()
	if err != nil {
		return nil, err
	}
	h, err := something(c.OpenFile(p, f.flags))
	if err != nil {
		return nil, err
	}
	f.handle, f.gen = h, gen
	f.flags &^= os.O_TRUNC | os.O_CREATE | os.O_EXCL // that is done
	return h, nil
}

// name is the path under which the file is found now.
func (f *file) name() (string, error) {
	switch {
	case f.n == nil: // it is being made
		return f.path, nil
	case f.n.deleted():
		return "", syscall.ESTALE
	}
	return f.n.path(), nil
}

// changed is called after the file was changed.
func (f *file) changed() {
	if p, err := f.name(); err == nil {
		f.m.known.changed(path.Dir(p))
	}
}

func (f *file) use(ctx context.Context, do func(*sftp.File) error) error {
	return f.m.remote.againGen(ctx, func(c *sftp.Client, gen int) error {
		h, err := f.open(c, gen)
		if err != nil {
			return err
		}
		err = do(h)
		if errors.Is(err, os.ErrClosed) { // by us, and not the connection
			return syscall.EBADF
		}
		return err
	})
}

// openNow opens the file; with O_EXCL once, as the file that the first attempt has made is in the way of the next.
func (f *file) openNow(ctx context.Context) error {
	do := f.m.remote.againGen
	if f.flags&os.O_EXCL != 0 {
		do = f.m.remote.onceGen
	}
	return do(ctx, func(c *sftp.Client, gen int) error {
		_, err := f.open(c, gen)
		return err
	})
}

func (f *file) stat(ctx context.Context) (iofs.FileInfo, error) {
	found := make(chan iofs.FileInfo, 2)
	err := f.use(ctx, func(h *sftp.File) error {
		fi, err := something(h.Stat())
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

// another says whether two handles that one path has led to are of different files.
func (f *file) another(ctx context.Context, old *file) bool {
	before, err := old.stat(ctx)
	if err != nil {
		return false
	}
	now, err := f.stat(ctx)
	if err != nil || alike(before, now) {
		return false
	}
	after, err := old.stat(ctx)
	return err == nil && alike(before, after) && !alike(now, after)
}

// readAt is io.ReaderAt at the server.
func (f *file) readAt(p []byte, off int64) (int, error) {
	n, end := 0, false
	err := f.use(context.Background(), func(h *sftp.File) error {
		var err error
		n = 0
		for n < len(p) && err == nil {
			var m int
			m, err = h.ReadAt(p[n:min(len(p), n+maxData)], off+int64(n))
			n += m
		}
		if end = errors.Is(err, io.EOF); end {
			return nil
		}
		return err
	})
	if err == nil && end {
		err = io.EOF
	}
	return n, err
}

func (f *file) writeAt(p []byte, off int64) error {
	return f.use(context.Background(), func(h *sftp.File) error {
		_, err := h.WriteAt(p, off)
		return err
	})
}

// append writes at the end of the file, wherever off is, and once: when the stream is lost nobody knows whether it has been done.
func (f *file) append(p []byte, off int64) error {
	var tried atomic.Bool
	return f.use(context.Background(), func(h *sftp.File) error {
		if tried.Swap(true) {
			return errNothing
		}
		_, err := h.WriteAt(p, off)
		return err
	})
}

// Read implements fs.FileReader.
func (f *file) Read(ctx context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	found := make(chan *view, 1)
	err := interruptible(ctx, func() error {
		if err := f.n.drain(context.Background()); err != nil {
			return err
		}
		v, err := f.r.read(off, len(dest), f.size.Load())
		if err == nil {
			found <- v
		}
		return err
	})
	if err != nil {
		return nil, number(err)
	}
	return <-found, 0
}

// Write implements fs.FileWriter.
func (f *file) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	f.n.forget()
	if err := f.n.order(ctx, f, span{off, len(data)}); err != nil {
		return 0, number(err)
	}
	n, well := f.w.take(data, off)
	var err error
	if !well {
		mine := bytes.Clone(data[n:]) // data is the kernel's again after EINTR
		err = interruptible(ctx, func() error { return f.w.write(mine, off+int64(n)) })
	}
	f.changed()
	if err != nil {
		return 0, number(err)
	}
	return uint32(len(data)), 0
}

// Flush implements fs.FileFlusher: close(2) tells what of the file was not written.
func (f *file) Flush(ctx context.Context) syscall.Errno {
	if f.readOnly {
		return 0
	}
	err := interruptible(ctx, f.w.finish)
	f.changed()
	return number(err)
}

// Fsync implements fs.FileFsyncer. The protocol of version 3 cannot ask the pod to write to its disk; what is written has arrived there.
func (f *file) Fsync(ctx context.Context, _ uint32) syscall.Errno {
	return number(interruptible(ctx, f.w.finish))
}

// Release implements fs.FileReleaser.
func (f *file) Release(context.Context) syscall.Errno {
	_ = f.w.finish()
	f.n.remove(f)
	f.release()
	return 0
}

func (f *file) release() {
	f.r.forget(true)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	if f.handle != nil {
		_ = f.handle.Close()
	}
}
