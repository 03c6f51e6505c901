package mount

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pkg/sftp"
)

// patience is how long an operation waits for the file server, which is away while a pod is replaced.
const patience = 10 * time.Second

// killPoll is how often it is looked whether a program that waits, and got a signal, has been killed since: the kernel tells of one signal only.
const killPoll = 200 * time.Millisecond

// maxData is how much one read or write carries: the library takes packets of 256 KiB.
const maxData = 256<<10 - 1<<10

// remote is the file server of whichever pod answers now.
type remote struct {
	dial func(context.Context) (io.ReadWriteCloser, error)
	stop context.Context // done: the file system is closed

	mu sync.Mutex
	// guarded by mu
	client  *sftp.Client  // nil: none, or it broke
	dialled chan struct{} // closed when the attempt that is made now is over; nil: none
	gen     int           // counts clients
	err     error         // of the last attempt
}

// get returns the client, and its number.
func (r *remote) get(ctx context.Context) (*sftp.Client, int, error) {
	deadline := time.Now().Add(patience)
	for {
		r.mu.Lock()
		if r.stop.Err() != nil {
			r.mu.Unlock()
			return nil, 0, syscall.ENOTCONN
		}
		if r.client != nil {
			defer r.mu.Unlock()
			return r.client, r.gen, nil
		}
		if r.dialled == nil {
			r.dialled = make(chan struct{})
			go r.connect(r.dialled)
		}
		dialled, err := r.dialled, r.err
		r.mu.Unlock()
		waited := interruptible(ctx, func() error { return r.await(dialled, deadline) })
		switch {
		case waited == nil:
		case errors.Is(waited, syscall.EINTR) && !errors.Is(ctx.Err(), context.DeadlineExceeded):
			return nil, 0, syscall.EINTR
		case err != nil:
			return nil, 0, err
		default:
			return nil, 0, syscall.ETIMEDOUT
		}
	}
}

// await waits until an attempt to reach a server is over.
func (r *remote) await(dialled chan struct{}, deadline time.Time) error {
	late := time.NewTimer(time.Until(deadline))
	defer late.Stop()
	select {
	case <-dialled:
	case <-r.stop.Done():
	case <-late.C:
		return syscall.ETIMEDOUT
	}
	return nil
}

// connect makes one attempt. After one that failed it waits a moment, so that whoever wants the server tries at that pace.
func (r *remote) connect(dialled chan struct{}) {
	ctx, cancel := context.WithTimeout(r.stop, patience)
	defer cancel()
	var c *sftp.Client
	stream, err := r.dial(ctx)
	if err == nil {
		cut := context.AfterFunc(ctx, func() { _ = stream.Close() })
		c, err = sftp.NewClientPipe(&checked{Reader: stream}, stream, sftp.MaxPacketUnchecked(maxData), sftp.MaxConcurrentRequestsPerFile(64))
		if !cut() && err == nil {
			_ = c.Close()
			err = syscall.ETIMEDOUT
		}
	}
	if err != nil {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-r.stop.Done():
		}
	}
	r.mu.Lock()
	r.client, r.err, r.dialled = c, err, nil
	r.gen++
	r.mu.Unlock()
	close(dialled)
	if err != nil {
		return
	}
	ended := context.AfterFunc(r.stop, func() { _ = c.Close() })
	defer ended()
	_ = c.Wait()
	_ = c.Close()
	r.drop(c)
}

// lost says whether an error is no answer of the server. Then the client is of no use any more, and the next one is asked.
func (r *remote) lost(c *sftp.Client, err error) bool {
	if err == nil || errors.As(err, new(*sftp.StatusError)) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) ||
		errors.Is(err, io.EOF) || errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.EBADF) || errors.Is(err, syscall.ESTALE) ||
		errors.Is(err, syscall.EFBIG) {
		return false
	}
	r.drop(c)
	_ = c.Close()
	return true
}

func (r *remote) drop(c *sftp.Client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client == c {
		r.client = nil
	}
}

// once does something that must not be done twice. It returns an error number.
func (r *remote) once(ctx context.Context, do func(*sftp.Client) error) error {
	return r.onceGen(ctx, func(c *sftp.Client, _ int) error { return do(c) })
}

// onceGen is once, with the client's number.
func (r *remote) onceGen(ctx context.Context, do func(*sftp.Client, int) error) error {
	c, gen, err := r.get(ctx)
	if err == nil {
		err = interruptible(ctx, func() error { return do(c, gen) })
		if r.lost(c, err) {
			err = syscall.EIO // done or not: nobody knows
		}
	}
	return toErrno(err)
}

// again does something that may be done twice, until it gets an answer. It returns an error number.
func (r *remote) again(ctx context.Context, do func(*sftp.Client) error) error {
	return r.againGen(ctx, func(c *sftp.Client, _ int) error { return do(c) })
}

// againGen is again, with the client's number.
func (r *remote) againGen(ctx context.Context, do func(*sftp.Client, int) error) error {
	deadline := time.Now().Add(patience)
	for {
		c, gen, err := r.get(ctx)
		if err != nil {
			return toErrno(err)
		}
		err = interruptible(ctx, func() error { return do(c, gen) })
		if !r.lost(c, err) || time.Now().After(deadline) {
			return toErrno(err)
		}
	}
}

// interruptible returns when do does, or EINTR when ctx has ended and the program that waits is being killed: it must not wait for the network. Do has
// to put what it finds where nobody looks after an error.
func interruptible(ctx context.Context, do func() error) error {
	if ctx.Done() == nil {
		return do()
	}
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	for !dying(ctx) {
		select {
		case err := <-done:
			return err
		case <-time.After(killPoll):
		}
	}
	return syscall.EINTR
}

// errNothing is of a server that says that all is well and not what it was asked for, which the library passes on as nothing without an error.
var errNothing = &sftp.StatusError{Code: uint32(sftp.ErrSSHFxFailure)}

// something is v, or an error.
func something[T comparable](v T, err error) (T, error) {
	var nothing T
	if err == nil && v == nothing {
		err = errNothing
	}
	return v, err
}

// errnos are the error numbers by their texts, in which form they come from the server.
var errnos = sync.OnceValue(func() map[string]syscall.Errno {
	m := map[string]syscall.Errno{}
	for no := syscall.Errno(1); no < 134; no++ {
		m[no.Error()] = no
	}
	return m
})

// toErrno returns the error number that an error of the library stands for, or nil.
func toErrno(err error) error {
	if err == nil {
		return nil
	}
	var no syscall.Errno
	var st *sftp.StatusError
	switch {
	case errors.As(err, &no):
		return no
	case errors.Is(err, fs.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, fs.ErrPermission):
		return syscall.EACCES
	case errors.Is(err, sftp.ErrSSHFxOpUnsupported):
		return syscall.ENOTSUP
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	case errors.As(err, &st):
		// sftp: "TEXT" (CODE)
		_, text, _ := strings.Cut(st.Error(), " ")
		if q, err := strconv.QuotedPrefix(text); err == nil {
			text, _ = strconv.Unquote(q)
		}
		if no, ok := errnos()[text]; ok {
			return no
		}
	}
	return syscall.EIO
}
