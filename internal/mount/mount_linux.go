package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// FS is a mounted file system.
type FS struct {
	remote *remote
	known  listings
	reads  *room
	writes *room
	large  chan struct{} // see pages
	point  string
	log    *slog.Logger

	stop  context.CancelFunc
	guard *guard
	gone  chan struct{}
}

// Mount mounts the files on cfg.Point. The server has to answer first.
func Mount(ctx context.Context, cfg Config) (*FS, error) {
	if cfg.Point == "" || cfg.Source == "" || cfg.Dial == nil {
		return nil, errors.New("mount: incomplete configuration")
	}
	if cfg.Budget == 0 {
		cfg.Budget = DefaultBudget
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	closed, stop := context.WithCancel(context.Background())
	m := &FS{
		remote: &remote{dial: cfg.Dial, stop: closed}, stop: stop,
		reads: newRoom(cfg.Budget), writes: newRoom(cfg.Budget), large: make(chan struct{}, 1), point: cfg.Point, log: cfg.Log,
		gone: make(chan struct{}),
	}
	if _, _, err := m.remote.get(ctx); err != nil {
		stop()
		return nil, fmt.Errorf("reach the file server: %w", err)
	}
	if err := canMount(); err != nil {
		stop()
		return nil, fmt.Errorf("%w: %w", ErrNoFUSE, err)
	}
	timeout := cacheTime
	var options []string
	if cfg.ReadOnly {
		options = []string{"ro"}
	}
	server, err := fs.Mount(cfg.Point, &node{m: m}, &fs.Options{
		EntryTimeout: &timeout, AttrTimeout: &timeout, NullPermissions: true,
		MountOptions: fuse.MountOptions{
			Options:  options,
			MaxWrite: maxRequest, MaxReadAhead: maxRequest, MaxBackground: 64, DisableXAttrs: true, FsName: cfg.Source, Name: "doppel",
		},
	})
	if err != nil {
		stop()
		return nil, fmt.Errorf("mount on %s: %w", cfg.Point, err)
	}
	go func() {
		defer close(m.gone)
		server.Wait()
	}()
	if m.guard, err = startGuard(cfg.Point); err != nil {
		stop()
		return nil, errors.Join(err, unmount(cfg.Point))
	}
	return m, nil
}

// maxRequest is what the kernel reads or writes at once, at most.
const maxRequest = 1 << 20

// Close unmounts. Whoever has files open there gets errors, ENOTCONN, from then on.
func (m *FS) Close() {
	m.stop()
	m.guard.end()
}

// Gone is closed when the file system is no longer mounted and nobody has files open there, whoever unmounted it.
func (m *FS) Gone() <-chan struct{} { return m.gone }

// owner is whose the files are here: the user's, whoever they are in the pod.
var owner = fuse.Owner{Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}

// seconds is a time as the protocol has it.
func seconds(t time.Time) uint64 { return uint64(max(0, t.Unix())) }
