// Package sftpd owns the agent's file server: an app's volumes by the SFTP protocol (draft-ietf-secsh-filexfer-02), and nothing beside them.
package sftpd

import (
	"cmp"
	"errors"
	"io"
	"log/slog"
	"slices"
	"sync"

	"github.com/pkg/sftp"
)

// MaxHandles is how many files and directories a client may have open at once.
const MaxHandles = 1024

// maxData is the longest answer to a read; what a client asks for beyond it comes in a second one.
const maxData = 256<<10 - 1<<10 // the library takes packets of 256 KiB

// maxList is how many entries of a directory are sent at once, as far as they fit: each packet takes a round trip. A laptop takes no more (mount.maxPage).
const maxList = 1000

func init() { sftp.MaxFilelist = maxList }

// Serve serves exports on one stream until its client hangs up. It closes the stream. One that cannot be opened is there, says why, and is logged.
func Serve(stream io.ReadWriteCloser, exports []Export, log *slog.Logger) error {
	s := &server{open: map[*file]struct{}{}}
	defer s.close()
	for _, e := range exports {
		v := openVolume(e)
		if v.err != nil {
			log.Warn("volume not served", "path", e.Path, "err", v.err)
		}
		s.tree.volumes = append(s.tree.volumes, v)
	}
	slices.SortFunc(s.tree.volumes, func(a, b *volume) int { return cmp.Compare(len(b.Path), len(a.Path)) })
	rs := sftp.NewRequestServer(stream, sftp.Handlers{FileGet: s, FilePut: s, FileCmd: s, FileList: s},
		sftp.WithRSMaxTxPacket(maxData), sftp.WithRSAllocator())
	err := rs.Serve()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, stream.Close())
}

// server answers the requests of one client.
type server struct {
	tree tree

	mu sync.Mutex
	// guarded by mu
	open  map[*file]struct{} // also those that are about to be
	opens uint64             // so far
}

func (s *server) close() {
	for _, v := range s.tree.volumes {
		if v.root != nil {
			_ = v.root.Close()
		}
	}
}
