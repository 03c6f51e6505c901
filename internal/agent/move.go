package agent

import (
	"cmp"
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/httproute"
	"github.com/doppel-dev/doppel/internal/mux"
)

// moveTimeout is how long a side that a connection is taken from has to end it, with what it may still have to say.
const moveTimeout = time.Second

// byRequests is the place of connections whose requests are looked at one by one. Other places are intercepts, and "", the app.
const byRequests = "*"

// place says where new connections go.
func (t taken) place() string {
	switch {
	case t.byRequest():
		return byRequests
	case len(t.intercepts) > 0 && !t.intercepts[0].away:
		return t.intercepts[0].intercept
	}
	return ""
}

// mover relays a client's connection that nobody splits by request, until the table has another place for it and the client begins an HTTP/1
// request: from there on it goes where a new connection would. Clients keep connections for minutes; without this an intercept would begin, and
// end, for each of them at a time of its own. A client that speaks HTTP/2 is asked to make another connection instead. What is neither stays
// where it is.
//
// A request is told from other bytes by two signs: the other side had the last word, and what comes now is the head of a request. An answer
// that is not complete yet (the client pipelines) is waited for. Where the other side answers before the whole request has come it is not known
// to have had the last word, and the connection stays.
//
// The end of a laptop's side, of its own or because its intercept has ended, is the client's only amid an exchange. Between two of them the client moves,
// without having to say anything: a request that is on its way just then would be lost with the connection.
type mover struct {
	p     *port
	table *table
	c     *net.TCPConn
	place string
	drain *httproute.Drainer // for HTTP/2
	until time.Time          // it stays, since a laptop has refused it

	answered atomic.Bool // the last word was not the client's
	away     atomic.Bool // new connections go elsewhere

	mu sync.Mutex
	// guarded by mu:
	moving    bool // the other side's end is not the client's
	ended     bool // it was, and the client knows
	http2     bool // the client speaks it
	exchanges httproute.Exchanges
	between   bool        // it was taken between two of them: what the other side has still to say is not for the client
	broken    bool        // nothing can be said to the client any more
	over      bool        // nor to the other side: its end is none in order (flow.Over)
	late      *time.Timer // of moveTimeout, once moving
}

// relay joins the client and its other side, which gets first what came before, until both directions ended or ctx ends. If the connection has
// to move it returns the bytes of the client that are for its next side, which may be none, but not nil; the old one is closed.
func (m *mover) relay(ctx context.Context, other flow.Stream, came []byte) (next []byte) {
	client := flow.FromTCP(m.c)
	reset := func() { client.Reset(); other.Reset() }
	stop := context.AfterFunc(ctx, func() {
		if !m.part(other) {
			reset()
		}
	})
	defer stop()
	m.answered.Store(len(came) == 0)
	if came != nil && m.tracks(other) {
		m.mu.Lock()
		m.exchanges.Resume()
		m.exchanges.Asked(came)
		m.mu.Unlock()
	}
	if len(came) > 0 {
		if _, err := other.Write(came); err != nil && !flow.Over(other) {
			reset()
			return nil
		}
	}
	m.drain = httproute.NewDrainer(client, other)
	defer m.drain.Stop()
	defer m.table.subscribe(m.changed)()
	m.changed() // since it was looked up
	if !m.until.IsZero() {
		defer time.AfterFunc(time.Until(m.until), m.changed).Stop()
	}
	down := make(chan error, 1)
	go func() { down <- m.down(client, other) }()
	next, err := m.up(client, other, came == nil)
	if next != nil {
		err := <-down
		if inTime := m.late.Stop(); m.cut(inTime && err != nil) {
			reset()
			return nil
		}
		_ = other.Close()                    // it has ended already
		_ = m.c.SetReadDeadline(time.Time{}) // of part
		return next
	}
	if err == nil {
		err = other.CloseWrite()
	}
	switch {
	case err == nil:
	case flow.Over(other): // it may have said something before
		m.mu.Lock()
		m.over = true
		m.mu.Unlock()
	default:
		reset()
	}
	if <-down == nil && err == nil {
		_, _ = client.Close(), other.Close()
	} else {
		reset()
	}
	return nil
}

// cut says that the other side, from which the client was taken, has ended amid an answer. failed is all that is known of it where nobody follows the exchanges.
func (m *mover) cut(failed bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.between && (failed || m.exchanges.Amid())
}

// tracks says whether the exchanges with the other side are followed: with a laptop. Nobody looks at what goes to and fro between the client and the app.
func (m *mover) tracks(other flow.Stream) bool {
	_, tunnel := other.(*mux.Stream)
	return tunnel
}

// changed looks up where new connections go. Of two calls at once the later has the last word.
func (m *mover) changed() {
	m.mu.Lock()
	defer m.mu.Unlock()
	away := m.table.lookup(m.p.cfg.Protocol, m.p.cfg.ContainerPort).place() != m.place
	m.away.Store(away)
	if away && m.http2 && !time.Now().Before(m.until) {
		go func() { _ = m.drain.Drain() }() // an error is found by whoever copies
	}
}

// takeLocked takes the client from its other side.
func (m *mover) takeLocked(other flow.Stream) {
	m.moving, m.between = true, m.exchanges.Between()
	m.late = time.AfterFunc(moveTimeout, other.Reset)
	_ = other.CloseWrite() // an error of it shows where its last words are read
}

// part takes the client from its other side, which is ending, if it lies between two exchanges or is being taken. Otherwise the end is the client's.
func (m *mover) part(other flow.Stream) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.partLocked(other)
}

func (m *mover) partLocked(other flow.Stream) bool {
	switch {
	case m.moving:
	case m.ended || m.broken || !m.exchanges.Between():
		m.ended = true
	default:
		m.takeLocked(other)
		_ = m.c.SetReadDeadline(time.Unix(1, 0)) // wakes up, who has read nothing then
	}
	return m.moving
}

// down copies what the other side says, and its end unless the client is taken from it.
func (m *mover) down(client, other flow.Stream) error {
	err := m.pass(client, other)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.moving || err != nil && m.partLocked(other) {
		return err
	}
	m.ended = true
	switch {
	case err != nil:
	case m.over:
		err = syscall.ECONNRESET
	default:
		err = client.CloseWrite()
	}
	if err != nil {
		client.Reset()
		other.Reset()
	}
	return err
}

// up copies what the client says, until it begins a request that is for another side. The kernel may copy what is not HTTP/2.
func (m *mover) up(client, other flow.Stream, first bool) (next []byte, err error) {
	var http2 bool
	var werr error
	tracks := m.tracks(other)
	_, err = flow.CopyWhile(other, client, func(p []byte) bool {
		if http2 = first && httproute.BeginsHTTP2(p); http2 {
			m.mu.Lock()
			m.http2 = true
			m.mu.Unlock()
			m.changed()
			werr = m.drain.Preface(p)
			return false
		}
		first = false
		if m.answered.Swap(false) && m.away.Load() && time.Now().After(m.until) && httproute.BeginsRequest(p) && m.leave(other) {
			next = slices.Clone(p)
		} else if tracks && m.asked(p) {
			next = slices.Clone(p)
		}
		return next == nil
	})
	if http2 {
		if err = werr; err == nil {
			_, err = flow.Copy(m.drain.Server(), client)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // of part
		next = []byte{}
	}
	return next, err
}

// leave takes the client from its other side, unless that has ended the connection already.
func (m *mover) leave(other flow.Stream) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.moving && !m.ended {
		m.takeLocked(other)
	}
	return m.moving
}

// asked follows what the client says, or says that it is for another side since it was taken from this one.
func (m *mover) asked(p []byte) (moving bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.moving {
		m.exchanges.Asked(p)
	}
	return m.moving
}

// pass copies what the other side says. The kernel may copy what an app says that is not HTTP/2.
func (m *mover) pass(client, other flow.Stream) error {
	if m.tracks(other) {
		_, err := flow.Copy(answering{m.drain.Client(), m}, other)
		return err
	}
	first, http2 := true, false
	var werr error
	said := func([]byte) bool {
		m.answered.Store(true)
		return true
	}
	_, err := flow.CopyWhile(client, other, func(p []byte) bool {
		if http2 = first && httproute.AnswersHTTP2(p); http2 {
			_, werr = m.drain.Client().Write(p)
		}
		first = false
		return said(p) && !http2
	})
	if http2 && werr == nil {
		_, werr = flow.CopyWhile(m.drain.Client(), other, said)
		return werr
	}
	return cmp.Or(werr, err)
}

// answering is the client as a laptop's answers are written to it.
type answering struct {
	flow.Stream
	m *mover
}

// seenLocked follows what is about to be written. nobody says that it is for nobody: the client was taken from the laptop before.
func (a answering) seenLocked(p []byte) (nobody bool) {
	if a.m.moving && a.m.between {
		return true
	}
	a.m.answered.Store(true)
	a.m.exchanges.Answered(p)
	return false
}

// Write implements flow.Stream.
func (a answering) Write(p []byte) (int, error) {
	a.m.mu.Lock()
	nobody := a.seenLocked(p)
	a.m.mu.Unlock()
	if nobody {
		return len(p), nil
	}
	n, err := a.Stream.Write(p)
	if err != nil {
		a.m.mu.Lock()
		a.m.broken = true
		a.m.mu.Unlock()
	}
	return n, err
}

// TryWrite is Write that never blocks, and may take less than all.
func (a answering) TryWrite(p []byte) (int, error) {
	if !a.m.mu.TryLock() {
		return 0, nil
	}
	defer a.m.mu.Unlock()
	if a.seenLocked(p) {
		return len(p), nil
	}
	n, err := a.Stream.(interface{ TryWrite(p []byte) (int, error) }).TryWrite(p)
	a.m.exchanges.Again(len(p) - n)
	a.m.broken = a.m.broken || err != nil
	return n, err
}
