package tunnel_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// keeper is a server that keeps tunnels which lost their connection.
type keeper struct {
	id *tunnel.Identity

	mu   sync.Mutex
	kept map[string]*mux.Session
	dead []*mux.Session
	wg   sync.WaitGroup
}

func newKeeper(t *testing.T) *keeper {
	t.Helper()
	return &keeper{id: newIdentity(t), kept: map[string]*mux.Session{}}
}

func (k *keeper) find(id string) *mux.Session {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.kept[id]
}

// connect makes a connection to the server, which echoes streams.
func (k *keeper) connect(ctx context.Context, old *mux.Session) (*mux.Session, *muxtest.Link, error) {
	l := muxtest.NewLink(muxtest.Config{})
	known := make(chan struct{}) // the server has the session where find looks for it
	k.wg.Go(func() {
		s, _, err := tunnel.Server(context.Background(), l.B, tunnel.ServerConfig{
			Identity: k.id, Authorize: allow, Resume: grace, Find: k.find, Mux: mux.Config{KeepAlive: -1},
		})
		if err != nil || k.find(s.ID()) == s {
			close(known)
			return
		}
		k.mu.Lock()
		k.kept[s.ID()] = s
		k.mu.Unlock()
		close(known)
		_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{TCP: func(r *mux.Request, _ wire.FlowHeader) {
			if st, err := r.Accept(nil); err == nil {
				_, _ = io.Copy(st, st)
				_ = st.Close()
			}
		}})
	})
	s, _, err := tunnel.Client(ctx, l.A, tunnel.ClientConfig{
		Peer: k.id.Fingerprint(), Resume: old, Hello: wire.Hello{Role: wire.RoleLaptop}, Mux: mux.Config{KeepAlive: -1},
	})
	if err == nil {
		<-known
	}
	return s, l, err
}

// kill is what the end of its process does to a server; another takes its place.
func (k *keeper) kill() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.kept {
		s.Drop(errors.New("killed"))
		k.dead = append(k.dead, s)
	}
	clear(k.kept)
}

// close ends all that is left.
func (k *keeper) close() {
	k.kill()
	for _, s := range k.dead {
		_ = s.Close()
	}
	k.wg.Wait()
}

const grace = 30 * time.Second

// say sends a word on an echo stream and waits for it.
func say(t *testing.T, st *mux.Stream, word string) {
	t.Helper()
	if _, err := io.WriteString(st, word); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(word))
	if _, err := io.ReadFull(st, b); string(b) != word || err != nil {
		t.Fatalf("%q %v", b, err)
	}
}

// TestLinkResumes: a lost connection is replaced, and the tunnel with its flows goes on, served by the same Serve; a server that has
// forgotten the tunnel ends it at once.
func TestLinkResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		var mu sync.Mutex
		var last *muxtest.Link
		var refuse error
		var ups, downs, serves, dials atomic.Int64
		l := tunnel.NewLink(tunnel.LinkConfig{
			Dial: func(ctx context.Context, old *mux.Session) (*mux.Session, wire.HelloReply, error) {
				mu.Lock()
				dials.Add(1)
				err := refuse
				mu.Unlock()
				if err != nil {
					return nil, wire.HelloReply{}, err
				}
				s, link, err := k.connect(ctx, old)
				mu.Lock()
				last = link
				mu.Unlock()
				return s, wire.HelloReply{}, err
			},
			OnUp:   func(*mux.Session, wire.HelloReply) { ups.Add(1) },
			OnDown: func(error) { downs.Add(1) },
			Serve: func(ctx context.Context, s *mux.Session) error {
				serves.Add(1)
				return tunnel.Serve(ctx, s, tunnel.Handlers{})
			},
		})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		s, err := l.Wait(ctx)
		if err != nil {
			t.Fatal(err)
		}
		st, err := tunnel.DialTCP(ctx, s, somewhere, somewhere)
		if err != nil {
			t.Fatal(err)
		}
		say(t, st, "one")

		// Cut, and away for a while.
		mu.Lock()
		refuse = errors.New("no route")
		mu.Unlock()
		last.Cut()
		synctest.Wait()
		if l.Session() != nil {
			t.Error("a session without connection is offered")
		}
		time.Sleep(20 * time.Second)
		mu.Lock()
		refuse = nil
		mu.Unlock()
		if again, err := l.Wait(ctx); err != nil || again != s {
			t.Fatal(again, err)
		}
		say(t, st, "two")

		// A silent hole is found by Check within the time for a ping.
		synctest.Wait()
		last.BlackHole()
		l.Check()
		start := time.Now()
		say(t, st, "three")
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %s", took)
		}
		// Check finds a connection that is well, and leaves it. While the link still dials (the other end uses a connection before the
		// dial returns) Check would ask for another.
		synctest.Wait()
		before := dials.Load()
		l.Check()
		time.Sleep(5 * time.Second)
		if dials.Load() != before {
			t.Error("a connection that answers was replaced")
		}
		if serves.Load() != 1 || ups.Load() != 3 || downs.Load() != 2 {
			t.Errorf("served %d times, %d ups, %d downs", serves.Load(), ups.Load(), downs.Load())
		}

		// A server that knows nothing of the tunnel: its flows end, at once.
		start = time.Now()
		k.kill()
		if _, err := st.Read(make([]byte, 1)); !errors.Is(err, mux.ErrSession) {
			t.Error(err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %s", took)
		}
		if again, err := l.Wait(ctx); err != nil || again == s {
			t.Fatal(again, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		k.close()
	})
}

// TestCheckHurries: neither a dial that hangs nor a pause delays what Check asks for.
func TestCheckHurries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		var hang atomic.Bool
		hang.Store(true)
		l := tunnel.NewLink(tunnel.LinkConfig{Dial: func(ctx context.Context, old *mux.Session) (*mux.Session, wire.HelloReply, error) {
			if hang.Load() {
				<-ctx.Done()
				return nil, wire.HelloReply{}, ctx.Err()
			}
			s, _, err := k.connect(ctx, old)
			return s, wire.HelloReply{}, err
		}})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		time.Sleep(time.Minute)
		hang.Store(false)
		start := time.Now()
		l.Check()
		if _, err := l.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("took %s", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		k.close()
	})
}

// TestResumeRefused: what the server does not have, or what nobody kept, begins anew.
func TestResumeRefused(t *testing.T) {
	k := newKeeper(t)
	s, _, err := k.connect(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := k.connect(t.Context(), s)
	if err != nil || other != s {
		t.Fatal(other, err)
	}
	k.kill()
	fresh, _, err := k.connect(t.Context(), s)
	if err != nil || fresh == s || fresh.ID() == s.ID() {
		t.Fatal(fresh, err)
	}
	for _, s := range []*mux.Session{s, fresh} {
		_ = s.Close()
	}
	k.close()
}
