package rootd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/osdns"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// maxConns bounds the connections at a time; a user daemon needs one.
const maxConns = 64

// ownGrace is how long a new owner waits for the old one's connection to end.
const ownGrace = 300 * time.Millisecond

// Server is a doppel-rootd. Use New.
type Server struct {
	cfg    Config
	log    *slog.Logger
	engine *engine

	mu       sync.Mutex
	owner    *session              // guarded by mu: whose network it is
	freed    chan struct{}         // guarded by mu: closed when owner has ceased to be it
	sessions map[*session]struct{} // guarded by mu; nil when stopping
	quit     context.CancelFunc    // guarded by mu
}

// New checks cfg; Run starts the server.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "", "doppel-rootd")
	}
	return &Server{cfg: cfg, log: cfg.Log, sessions: map[*session]struct{}{}}, nil
}

// Run serves until ctx ends or a client says quit. Ended by ctx, it takes the DNS capture away and leaves the device and its routes to the
// user daemon that holds it, which may be adopted by the next rootd; ended by quit, it removes everything.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l, cleanup, err := listen(ctx, s.cfg)
	if err != nil {
		return err
	}
	defer cleanup()
	s.engine = newEngine(s.log, s.cfg)
	s.mu.Lock()
	s.quit = cancel
	s.mu.Unlock()

	g := lifecycle.New(ctx, s.log)
	g.Go("watcher", func(ctx context.Context) error {
		if err := osdns.Watch(ctx, s.recheck, s.cfg.ResolvConf, osdns.UplinkConf); err != nil {
			// Without it all works until the laptop moves to another network.
			s.log.Warn("changes of the network are not seen", "err", err)
		}
		return nil
	})
	g.Go("listener", func(ctx context.Context) error { return s.accept(ctx, g, l) })
	stop := context.AfterFunc(g.Context(), func() { s.shutdown(l) })
	defer stop()
	s.log.Info("listening", "socket", s.cfg.Socket, "version", buildinfo.Version)
	err = g.Wait()
	s.shutdown(l)
	return errors.Join(err, s.engine.release())
}

// recheck follows a change of the machine's network and tells the owner.
func (s *Server) recheck() {
	s.engine.recheck()
	s.mu.Lock()
	owner := s.owner
	s.mu.Unlock()
	changed := owner != nil && owner.tell()
	s.log.Debug("network rechecked", "changed", changed)
}

func (s *Server) accept(ctx context.Context, g *lifecycle.Group, l *net.UnixListener) error {
	for {
		c, err := lifecycle.Accept(l.AcceptUnix)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		if ss := s.admit(c); ss != nil {
			g.Go("session", func(ctx context.Context) error {
				defer s.leave(ss)
				ss.run(ctx)
				return nil
			})
		}
	}
}

// admit makes a session of a connection whose peer is allowed, or closes it.
func (s *Server) admit(c *net.UnixConn) *session {
	p, err := peerOf(c)
	if err == nil {
		err = s.cfg.allowed(p)
	}
	ss := newSession(s, c, p)
	s.mu.Lock()
	if err == nil && len(s.sessions) >= maxConns {
		err = uerr.New(uerr.Conflict, "end other doppel processes", "more than %d connections", maxConns)
	}
	admitted := err == nil && s.sessions != nil
	if admitted {
		s.sessions[ss] = struct{}{}
	}
	s.mu.Unlock()
	if !admitted {
		s.log.Warn("connection refused", "uid", p.uid, "pid", p.pid, "err", err)
		ss.refuse(err)
		return nil
	}
	return ss
}

// leave removes all that the session had, unless this process is going to leave it to the next one.
func (s *Server) leave(ss *session) {
	ss.conn.Close()
	s.mu.Lock()
	owned := s.owner == ss && s.sessions != nil
	ss.leaving = owned
	delete(s.sessions, ss)
	s.mu.Unlock()
	if !owned {
		return
	}
	if err := s.engine.clear(); err != nil {
		s.log.Error("network not removed", "err", err)
	}
	s.disown(ss) // only now may another begin
}

// own makes ss the owner, unless there is one. It waits for one that is about to leave: a user daemon that was killed and started again may
// be here before the end of the old one's connection was noticed.
func (s *Server) own(ctx context.Context, ss *session) error {
	grace := time.After(ownGrace)
	for {
		s.mu.Lock()
		owner, freed := s.owner, s.freed
		if owner == nil {
			s.owner, s.freed = ss, make(chan struct{})
		}
		leaving := owner != nil && owner.leaving
		s.mu.Unlock()
		if owner == nil || owner == ss {
			return nil
		}
		if leaving {
			grace = nil // clearing ends by itself
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-grace:
			return taken(owner.peer, ss.peer)
		}
	}
}

// taken says to whoever asks who has the network, and what they can do about it: their own doppel quit reaches neither another user's daemon nor one
// of theirs that was started with another XDG_RUNTIME_DIR.
func taken(owner, asks peer) error {
	if owner.uid == asks.uid {
		hint := fmt.Sprintf("use it where it was started (with another XDG_RUNTIME_DIR), or end it with: kill %d", owner.pid)
		return uerr.New(uerr.Conflict, hint, "another user daemon of yours (process %d) is connected already", owner.pid)
	}
	hint := fmt.Sprintf("ask them to quit, or end their user daemon with: sudo kill %d", owner.pid)
	return uerr.New(uerr.Conflict, hint, "user %d (process %d) is connected already", owner.uid, owner.pid)
}

// disown makes ss no longer the owner, if it is.
func (s *Server) disown(ss *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner == ss {
		s.owner = nil
		close(s.freed)
	}
}

func (s *Server) isOwner(ss *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owner == ss
}

// mayQuit lets the owner, root, and anybody allowed while there is no owner end the server; a service is ended by the system only.
func (s *Server) mayQuit(ss *session, ifIdle bool) error {
	if s.cfg.Service {
		return uerr.New(uerr.Denied, "stop it with: sudo systemctl stop doppel-rootd", "doppel-rootd is a service of the system")
	}
	s.mu.Lock()
	busy := s.owner != nil
	s.mu.Unlock()
	if ifIdle && busy {
		return uerr.New(uerr.Conflict, "", "a network is set")
	}
	return s.mayChange(ss)
}

// mayChange is for the owner, root, and anybody allowed while there is no owner.
func (s *Server) mayChange(ss *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner == nil || s.owner.peer.uid == ss.peer.uid || ss.peer.uid == 0 {
		return nil
	}
	return uerr.New(uerr.Denied, "ask them to do it, or wait until they have quit", "user %d is connected", s.owner.peer.uid)
}

// setLevel changes the log level, a service's too.
func (s *Server) setLevel(ss *session, level string, seconds int) error {
	if err := s.mayChange(ss); err != nil {
		return err
	}
	if s.cfg.Level == nil {
		return uerr.New(uerr.Usage, "", "this doppel-rootd has a fixed log level")
	}
	if err := s.cfg.Level.Change(level, time.Duration(seconds)*time.Second); err != nil {
		return uerr.Wrap(err, uerr.Usage, "", "change the log level")
	}
	s.log.Info("log level changed", "uid", ss.peer.uid, "loglevel", level)
	return nil
}

func (s *Server) shutdown(l *net.UnixListener) {
	l.Close()
	s.mu.Lock()
	all := s.sessions
	s.sessions = nil
	s.mu.Unlock()
	for ss := range all {
		ss.conn.Close()
	}
}

func (s *Server) version() rootapi.Version {
	return rootapi.Version{Program: buildinfo.String(), Protocol: rootapi.Protocol, PID: os.Getpid(), Service: s.cfg.Service}
}
