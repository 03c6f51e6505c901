package rootd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/osdns"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// sendTimeout bounds a write to a peer that does not read.
const sendTimeout = 5 * time.Second

// pingSendTimeout bounds writes that are of no use later.
const pingSendTimeout = 50 * time.Millisecond

// session is one connection. Its requests run one after another.
type session struct {
	srv  *Server
	conn *net.UnixConn
	peer peer

	leaving bool // guarded by srv.mu: the connection has ended, its network is being removed

	pinger sync.Once
	wg     sync.WaitGroup
	wmu    sync.Mutex // one packet, and its deadline, at a time

	mu       sync.Mutex
	lastPong time.Time // guarded by mu
	told     uint64    // guarded by mu: Seq of the newest state that the peer was told
}

func newSession(srv *Server, c *net.UnixConn, p peer) *session {
	return &session{srv: srv, conn: c, peer: p}
}

// refuse says why and closes.
func (ss *session) refuse(err error) {
	if err != nil {
		_ = ss.send(rootapi.Message{Op: rootapi.OpReply, Error: uerr.From(err)}, nil)
	}
	ss.conn.Close()
}

func (ss *session) send(m rootapi.Message, f *os.File) error {
	return ss.sendWithin(sendTimeout, m, f)
}

func (ss *session) sendWithin(d time.Duration, m rootapi.Message, f *os.File) error {
	ss.wmu.Lock()
	defer ss.wmu.Unlock()
	if err := ss.conn.SetWriteDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	return rootapi.Send(ss.conn, m, f)
}

// run answers requests until the peer is gone or sends what is no message.
func (ss *session) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer ss.wg.Wait()
	defer cancel()
	buf := make([]byte, rootapi.MaxPacket)
	for {
		m, _, err := rootapi.Receive(ss.conn, buf, false)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			return
		}
		if err == nil {
			err = ss.handle(ctx, m)
		} else {
			ss.refuse(uerr.Wrap(err, uerr.Usage, "", "message refused"))
		}
		if err != nil {
			ss.srv.log.Warn("connection ended", "uid", ss.peer.uid, "pid", ss.peer.pid, "err", err)
			return
		}
	}
}

// handle answers one message; an error ends the connection.
func (ss *session) handle(ctx context.Context, m rootapi.Message) error {
	if m.Op == rootapi.OpPong {
		ss.pong()
		return nil
	}
	reply := rootapi.Message{ID: m.ID, Op: rootapi.OpReply}
	var f *os.File
	var err error
	switch m.Op {
	case rootapi.OpSetNetwork, rootapi.OpAdoptNetwork:
		var st rootapi.State
		st, f, err = ss.setNetwork(ctx, *m.Network, m.Op == rootapi.OpAdoptNetwork)
		reply.State = &st
	case rootapi.OpMarkedSocket:
		f, err = osdns.MarkedSocket(m.Socket)
	case rootapi.OpVersion:
		v := ss.srv.version()
		reply.Version = &v
	case rootapi.OpLogLevel:
		err = ss.srv.setLevel(ss, m.Level, m.Seconds)
	case rootapi.OpQuit:
		return ss.quit(reply, m.IfIdle)
	case rootapi.OpReply, rootapi.OpPing, rootapi.OpPong, rootapi.OpChanged:
		return uerr.New(uerr.Usage, "", "unexpected %q", m.Op)
	}
	if f != nil {
		defer f.Close() // the peer's copy is the one that counts
	}
	if err != nil {
		reply = rootapi.Message{ID: m.ID, Op: rootapi.OpReply, Error: uerr.From(err)}
		ss.srv.log.Warn("request refused", "op", string(m.Op), "uid", ss.peer.uid, "err", err)
	}
	return ss.send(reply, f)
}

func (ss *session) setNetwork(ctx context.Context, n rootapi.Network, adopt bool) (rootapi.State, *os.File, error) {
	first := !ss.srv.isOwner(ss)
	if err := ss.srv.own(ctx, ss); err != nil {
		return rootapi.State{}, nil, err
	}
	st, f, err := ss.srv.engine.set(n, ss.peer.uid, adopt)
	if err != nil {
		if first {
			ss.srv.disown(ss)
		}
		return rootapi.State{}, nil, err
	}
	if n.IsZero() {
		ss.srv.disown(ss)
		return st, nil, nil
	}
	ss.knows(st)
	ss.pong() // whoever asks lives
	ss.pinger.Do(func() { ss.wg.Go(func() { ss.ping(ctx) }) })
	return st, f, nil
}

// quit removes everything, answers, and ends the server.
func (ss *session) quit(reply rootapi.Message, ifIdle bool) error {
	err := ss.srv.mayQuit(ss, ifIdle)
	if err == nil {
		err = ss.srv.engine.clear()
	}
	if err != nil {
		reply.Error = uerr.From(err)
		return ss.send(reply, nil)
	}
	ss.srv.log.Info("told to quit", "uid", ss.peer.uid)
	err = ss.send(reply, nil)
	ss.srv.mu.Lock()
	ss.srv.quit()
	ss.srv.mu.Unlock()
	return err
}

// pong notes a sign of life.
func (ss *session) pong() {
	ss.mu.Lock()
	ss.lastPong = time.Now()
	ss.mu.Unlock()
	if ss.srv.isOwner(ss) {
		ss.srv.engine.suspend(false)
	}
}

// ping asks the peer every PingEvery whether it lives. A stopped process reads nothing, so its socket fills up in the end; that is no error.
// Silence has a timer of its own: a sign of life that came just after a ping would be judged a ping later than it has to be.
func (ss *session) ping(ctx context.Context) {
	tick := time.NewTicker(ss.srv.cfg.PingEvery)
	defer tick.Stop()
	silent := time.NewTimer(ss.srv.cfg.PingTimeout)
	defer silent.Stop()
	for id := uint64(1); ; {
		select {
		case <-ctx.Done():
			return
		case <-silent.C:
			left := ss.left()
			if left <= 0 {
				left = ss.srv.cfg.PingTimeout
				if ss.srv.isOwner(ss) {
					ss.srv.engine.suspend(true)
				}
			}
			silent.Reset(left)
			continue
		case <-tick.C:
		}
		if !ss.srv.isOwner(ss) {
			continue
		}
		ss.tell()
		id++
		err := ss.sendWithin(pingSendTimeout, rootapi.Message{ID: id, Op: rootapi.OpPing}, nil)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return // the reader sees it too
		}
	}
}

// left is how much longer the peer may say nothing.
func (ss *session) left() time.Duration {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.srv.cfg.PingTimeout - time.Since(ss.lastPong)
}

// tell sends the peer the state in force and says whether that is another one than it knew. A peer that does not read is told with a later ping.
func (ss *session) tell() (changed bool) {
	st := ss.srv.engine.inForce()
	ss.mu.Lock()
	changed = st.Seq > ss.told
	ss.mu.Unlock()
	if !changed || !ss.srv.isOwner(ss) {
		return false
	}
	err := ss.sendWithin(pingSendTimeout, rootapi.Message{Op: rootapi.OpChanged, State: &st}, nil)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	if err != nil {
		ss.srv.log.Warn("owner not told of a change", "err", err)
	}
	ss.knows(st)
	return true
}

// knows notes that the peer was told of a state.
func (ss *session) knows(st rootapi.State) {
	ss.mu.Lock()
	ss.told = max(ss.told, st.Seq)
	ss.mu.Unlock()
}
