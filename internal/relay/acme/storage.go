package acme

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

// under is where in the store's files account, certificates and keys are.
const under = "acme"

// storage keeps account and certificates in the relay's database, so that relays that share it share them, and one asks at a time.
type storage struct {
	store *store.Store

	mu sync.Mutex
	// guarded by mu
	held map[string]func(context.Context) error // by name: what gives the lock back
	busy int                                    // locks that are held or waited for
	free chan struct{}                          // closed when busy falls to 0; nil: nobody waits for that
}

var _ certmagic.Storage = (*storage)(nil)

// known translates the absence of a file into what certmagic knows.
func known(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return fs.ErrNotExist
	}
	return err
}

func name(key string) string {
	if key = strings.Trim(key, "/"); key != "" {
		return under + "/" + key
	}
	return under
}

// Store keeps a value.
func (s *storage) Store(ctx context.Context, key string, value []byte) error {
	return s.store.PutFile(ctx, name(key), value)
}

// Load finds a value.
func (s *storage) Load(ctx context.Context, key string) ([]byte, error) {
	value, _, err := s.store.File(ctx, name(key))
	return value, known(err)
}

// Delete removes a value, or all below a name.
func (s *storage) Delete(ctx context.Context, key string) error {
	return s.store.RemoveFiles(ctx, name(key))
}

// Exists says whether there is a value, or some below a name.
func (s *storage) Exists(ctx context.Context, key string) bool {
	_, err := s.Stat(ctx, key)
	return err == nil
}

// List are the names below one; not recursive: those one step below it. Accounts are not told: the library looks among them for an e-mail address of
// earlier, and takes the name of a directory for one ("default") while another certificate's is being made.
func (s *storage) List(ctx context.Context, path string, recursive bool) ([]string, error) {
	if strings.HasSuffix(path, "/users") {
		return nil, nil
	}
	all, err := s.store.Files(ctx, name(path))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range all {
		rest := strings.TrimPrefix(n, name(path)+"/")
		if !recursive {
			rest, _, _ = strings.Cut(rest, "/")
		}
		out = append(out, strings.TrimPrefix(strings.Trim(path, "/")+"/"+rest, "/"))
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// Stat is what is known of a value, or of a name below which there are some.
func (s *storage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	value, modified, err := s.store.File(ctx, name(key))
	if err == nil {
		return certmagic.KeyInfo{Key: key, Modified: modified, Size: int64(len(value)), IsTerminal: true}, nil
	}
	if errors.Is(err, store.ErrNotFound) {
		var all []string
		if all, err = s.store.Files(ctx, name(key)); err == nil && len(all) > 0 {
			return certmagic.KeyInfo{Key: key}, nil
		}
	}
	if err == nil {
		err = fs.ErrNotExist
	}
	return certmagic.KeyInfo{}, err
}

// Lock waits for a lock.
func (s *storage) Lock(ctx context.Context, key string) error {
	s.mu.Lock()
	s.busy++
	s.mu.Unlock()
	unlock, err := s.store.Lock(ctx, name(key))
	if err != nil {
		s.done()
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = map[string]func(context.Context) error{}
	}
	s.held[key] = unlock
	return nil
}

// Unlock gives a lock back, also for somebody whose time is over.
func (s *storage) Unlock(ctx context.Context, key string) error {
	s.mu.Lock()
	unlock := s.held[key]
	delete(s.held, key)
	s.mu.Unlock()
	if unlock == nil {
		return fs.ErrNotExist
	}
	defer s.done()
	return unlock(context.WithoutCancel(ctx))
}

func (s *storage) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy--; s.busy == 0 && s.free != nil {
		close(s.free)
		s.free = nil
	}
}

// wait waits until no lock is held: one that a relay takes along when it ends is lost to the others for some time.
func (s *storage) wait(d time.Duration) {
	s.mu.Lock()
	if s.busy == 0 {
		s.mu.Unlock()
		return
	}
	if s.free == nil {
		s.free = make(chan struct{})
	}
	free := s.free
	s.mu.Unlock()
	select {
	case <-free:
	case <-time.After(d):
	}
}
