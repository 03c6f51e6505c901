package mux

import (
	"errors"
	"net"
)

// Errors of sessions that are to go on over another connection.
var (
	// ErrNotResumable means that the session cannot go on: it has ended, was not made for it, or has been taken over meanwhile.
	ErrNotResumable = errors.New("session cannot be resumed")
	errReplaced     = errors.New("replaced by another connection")
)

// ID returns Config.ID.
func (s *Session) ID() string { return s.cfg.ID }

// Down is closed when the connection that carries the session now is lost; the session then waits for another, or has ended
// (Done). After a resumption there is another channel.
func (s *Session) Down() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.down
}

// Why returns what the last connection was lost of, or what the session ended of; nil while all is well.
func (s *Session) Why() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return s.why
}

// Drop gives up the connection of the moment, because of err. A session that is not resumable ends.
func (s *Session) Drop(err error) {
	if s.cfg.Resume == 0 {
		s.terminate(err, nil)
		return
	}
	s.c.drop(err)
}

// suspend notes that a connection was lost. The session ends if no other comes in time.
func (s *Session) suspend(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.why != nil {
		return
	}
	s.why = err
	close(s.down)
	s.grace = s.afterGrace(err)
}

// Handover is a session without connection that is about to get another.
type Handover struct {
	s        *Session
	epoch    uint64
	received uint64
}

// Detach gives up the connection, if there is one, for another.
func (s *Session) Detach() (Handover, error) {
	if s.cfg.Resume == 0 {
		return Handover{}, ErrNotResumable
	}
	n, epoch, ok := s.c.detach(errReplaced)
	if !ok {
		return Handover{}, ErrNotResumable
	}
	return Handover{s: s, epoch: epoch, received: n}, nil
}

// Received returns how many bytes this end has received: the peer goes on from there.
func (h Handover) Received() uint64 { return h.received }

// Keeps says whether the session can go on with a peer that has received so many bytes.
func (h Handover) Keeps(peerReceived uint64) bool { return h.s.c.keeps(peerReceived) }

// Attach lets the session go on over conn, which it owns from now on, with a peer that has received so many bytes.
func (h Handover) Attach(conn net.Conn, peerReceived uint64) error {
	s := h.s
	s.mu.Lock()
	if s.err != nil || s.why == nil || !s.c.attach(conn, h.epoch, peerReceived) {
		s.mu.Unlock()
		return ErrNotResumable
	}
	s.grace.Stop()
	s.why, s.down = nil, make(chan struct{})
	s.path.reset()
	s.mu.Unlock()
	s.w.resume()
	if s.cfg.KeepAlive > 0 {
		s.probe()
	}
	return nil
}
