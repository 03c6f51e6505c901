package flow

import (
	"errors"
	"io"
)

// Watcher gets a copy of what is read from a stream. It must not wait, nor keep the bytes.
type Watcher interface {
	// Seen is called with what was read, until it returns false: nobody is interested any more.
	Seen(p []byte) bool
	// Ended is called once if somebody still is: after EOF with nil, else with the reason for which no more can be read.
	Ended(err error)
}

// Tee returns a stream that is s and tells w what is read from it. When w is not interested any more, s is read in its fastest way again.
func Tee(s Stream, w Watcher) Stream { return &tee{Stream: s, w: w} }

type tee struct {
	Stream
	w Watcher // of one reader at a time; nil: not interested any more
}

// Over is the stream's own.
func (t *tee) Over() bool { return Over(t.Stream) }

// Read implements io.Reader.
func (t *tee) Read(p []byte) (int, error) {
	n, err := t.Stream.Read(p)
	if n > 0 {
		t.seen(p[:n])
	}
	if err != nil {
		t.ended(err)
	}
	return n, err
}

func (t *tee) seen(p []byte) {
	if t.w != nil && !t.w.Seen(p) {
		t.w = nil
	}
}

func (t *tee) ended(err error) {
	if t.w != nil {
		if errors.Is(err, io.EOF) {
			err = nil
		}
		t.w.Ended(err)
		t.w = nil
	}
}

// errUnwatched ends a copy through a teeWriter, to go on without it.
var errUnwatched = errors.New("nobody is interested any more")

// WriteTo copies to a stream until EOF.
func (t *tee) WriteTo(w io.Writer) (n int64, err error) {
	if t.w != nil {
		n, err = copyTo(&teeWriter{t, w}, t.Stream)
		if !errors.Is(err, errUnwatched) {
			t.ended(err)
			return n, err
		}
	}
	var m int64
	if dst, ok := w.(Stream); ok {
		m, err = Copy(dst, t.Stream)
	} else {
		m, err = copyTo(w, t.Stream)
	}
	return n + m, err
}

// copyTo copies from src to a writer until EOF.
func copyTo(w io.Writer, src Stream) (int64, error) {
	if s, ok := src.(io.WriterTo); ok {
		return s.WriteTo(w)
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{src}, buf[:streamSize])
}

// teeWriter passes on what is written and then shows it.
type teeWriter struct {
	t *tee
	w io.Writer
}

// Write implements io.Writer.
func (t *teeWriter) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.t.seen(p[:n])
	if err == nil && t.t.w == nil {
		err = errUnwatched
	}
	return n, err
}
