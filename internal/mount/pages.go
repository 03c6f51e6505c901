package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"syscall"

	"github.com/pkg/sftp"
)

const (
	// maxPage is how many names one answer may have. Our server sends no more (sftpd.maxList); a hostile one could send twenty times as many.
	maxPage = 1000
	// maxPages is how many answers a directory's list may take, of up to a quarter of a MiB: it is in memory as a whole.
	maxPages = 170
	// fewPages is how many answers a list may take beside any others; one with more has none of its like beside it.
	fewPages = 8
	// leastPages is how many answers each list takes: the handle, names and the end.
	leastPages = 3
)

// pages is the context of one list. The library asks for Done once with each request, until the end of the list, and keeps all that it gets.
type pages struct {
	context.Context
	most  int
	large chan struct{} // holds one list with more than fewPages; nil: there are no others
	n     int           // requests
}

// over is closed.
var over = func() <-chan struct{} { c := make(chan struct{}); close(c); return c }()

func (p *pages) Done() <-chan struct{} {
	if p.n++; p.n == fewPages+1 && p.large != nil {
		p.large <- struct{}{}
	}
	if p.n > p.most {
		return over
	}
	return p.Context.Done()
}

func (p *pages) Err() error {
	if err := p.Context.Err(); err != nil || p.n <= p.most {
		return err
	}
	return syscall.EFBIG
}

// readDir lists a directory, and says how many answers that took: EFBIG if it would be more than most. The server's handle is closed in any case.
func readDir(ctx context.Context, c *sftp.Client, dir string, most int, large chan struct{}) ([]fs.FileInfo, int, error) {
	p := &pages{Context: ctx, most: most, large: large}
	fis, err := c.ReadDirContext(p, dir)
	if p.n > fewPages && large != nil {
		<-large
	}
	for _, fi := range fis {
		if st, ok := fi.Sys().(*sftp.FileStat); ok {
			st.Extended = nil // of any size, and of no use
		}
	}
	return fis, p.n, err
}

// checked is what comes from a file server, as long as no answer has more than maxPage names.
type checked struct {
	io.Reader
	head []byte // of a packet: length, type, number, names
	skip int    // what comes of it yet
}

var errTooManyNames = errors.New("the file server sends too many names at once")

func (c *checked) Read(p []byte) (int, error) {
	const header, name = 13, 104
	n, err := c.Reader.Read(p)
	for b := p[:n]; len(b) > 0; {
		if c.skip > 0 {
			k := min(c.skip, len(b))
			c.skip, b = c.skip-k, b[k:]
			continue
		}
		c.head, b = append(c.head, b[0]), b[1:]
		if len(c.head) < 4 {
			continue
		}
		size := 4 + int(binary.BigEndian.Uint32(c.head))
		switch {
		case len(c.head) < min(header, size):
			continue
		case len(c.head) == header && c.head[4] == name && binary.BigEndian.Uint32(c.head[9:]) > maxPage:
			return 0, errTooManyNames
		}
		c.skip, c.head = size-len(c.head), c.head[:0]
	}
	return n, err
}
