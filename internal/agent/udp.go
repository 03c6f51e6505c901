package agent

import (
	"container/list"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// maxTalks bounds the clients of a UDP port that are remembered at once. Beyond it the one that is idle longest makes room.
	maxTalks = 4096
	// questionIdle ends a conversation of one datagram each way at most, as Linux does (nf_conntrack_udp_timeout): clients of DNS take a new port
	// for each question.
	questionIdle = 30 * time.Second
	// lookEvery is how often it is looked where the app listens.
	lookEvery = time.Second
	// talkQueue is how many datagrams of a client wait for the other side; more are lost, as in a full socket buffer.
	talkQueue = 64
	// keptDatagrams is how many datagrams that nobody has answered yet are kept for the app, should the laptop refuse them.
	keptDatagrams = 8
	// refusedPause is how long the app gets the datagrams, or the requests of an open connection, of an intercept whose laptop or local process
	// did not take some.
	refusedPause = 2 * time.Second
	// maxDatagram is the longest UDP payload (RFC 768: a length of 16 bits with the header of 8 bytes).
	maxDatagram = 65535 - 8
)

// udpPort is one UDP port of the app with the agent in front of it. Datagrams of one client address are one conversation, which changes sides
// with the next datagram after an intercept has begun or ended.
type udpPort struct {
	cfg   agentcfg.Port
	podIP string
	conn  *net.UDPConn

	mu sync.Mutex
	// guarded by mu:
	talks   map[netip.AddrPort]*talk // by client
	idle    order                    // of these
	running int                      // talks whose goroutine has yet to end, among them those that made room
	looked  time.Time                // when it was looked
	local   bool                     // whether the app listens on localhost
	refused map[string]time.Time     // by intercept: until when it gets nothing, and the app is asked instead

	copies     map[copyKey]*packetsCopy
	idleCopies order
	copying    int // as running
}

// talk is one client's conversation with the app or a laptop.
type talk struct {
	client netip.AddrPort
	to     string // intercept; "": the app
	in     chan []byte
	ctx    context.Context
	cancel context.CancelFunc

	use use // guarded by udpPort.mu
}

// order is which conversations are idle longest. It and what is in it are guarded by udpPort.mu.
type order struct {
	asked   list.List // of these the questions (see use.question), the one that is idle longest first
	talking list.List // and the others, so
}

// use is how much a conversation was used.
type use struct {
	place         *list.Element // in order.asked or talking; nil: it has ended
	came, answers int           // datagrams
	last          time.Time     // of one
	expiry        *time.Timer   // ends it if it is but a question
	end           func()
}

func listenUDP(cfg agentcfg.Port, podIP string) (*udpPort, error) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(cfg.AgentPort)})
	if err != nil {
		return nil, err
	}
	return &udpPort{cfg: cfg, podIP: podIP, conn: c, talks: map[netip.AddrPort]*talk{}, refused: map[string]time.Time{}, copies: map[copyKey]*packetsCopy{}}, nil
}

func (p *udpPort) serve(ctx context.Context, a *Agent) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = p.conn.Close() })
	defer stop()
	buf := make([]byte, maxDatagram)
	for {
		n, client, err := p.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if lifecycle.Passes(err) {
				time.Sleep(time.Millisecond) // what passes does not pass at once
				continue
			}
			return fmt.Errorf("read UDP on %s: %w", p.conn.LocalAddr(), err)
		}
		if a.up.canaries.swallowPacket(p.cfg.ContainerPort, p.conn, client) {
			continue
		}
		d := append([]byte(nil), buf[:n]...)
		p.copy(ctx, a, client, d, &wg)
		t, fresh := p.talk(ctx, a, client)
		if t == nil {
			continue
		}
		select {
		case t.in <- d:
		default:
		}
		if fresh {
			wg.Go(func() {
				defer p.forget(t)
				p.run(t, a)
			})
		}
	}
}

// talk returns the client's conversation with whoever is to have its next datagram.
func (p *udpPort) talk(ctx context.Context, a *Agent, client netip.AddrPort) (_ *talk, fresh bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	to, why := "", ""
	if es := a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort).intercepts; len(es) > 0 && es[len(es)-1].whole() {
		if to = es[len(es)-1].to(); to == "" {
			why = notTaken(errAway)
		}
	}
	if until, ok := p.refused[to]; ok {
		if time.Now().Before(until) {
			to, why = "", "the laptop refused others a moment ago"
		} else {
			delete(p.refused, to)
		}
	}
	t := p.talks[client]
	switch {
	case t != nil && t.to == to:
		t.use.came++
		p.idle.used(&t.use)
		return t, false
	case p.running >= 2*maxTalks: // they come faster than others end
		return nil, false
	case t != nil:
		p.removeLocked(t)
	case len(p.talks) >= maxTalks:
		p.idle.makeRoom()
	}
	t = &talk{client: client, to: to, in: make(chan []byte, talkQueue)}
	t.ctx, t.cancel = context.WithCancel(ctx)
	p.beginLocked(&p.idle, &t.use, func() { p.removeLocked(t) })
	p.talks[client] = t
	p.running++
	if why != "" {
		a.up.decisions.note(p.cfg, client, nil, "", why)
	}
	return t, true
}

// beginLocked notes the first datagram of a conversation, which end removes.
func (p *udpPort) beginLocked(o *order, u *use, end func()) {
	*u = use{came: 1, last: time.Now(), end: end}
	u.place, u.expiry = o.asked.PushBack(u), time.AfterFunc(questionIdle, func() { p.expire(u) })
}

// makeRoom ends the conversation that is idle longest, of those that are but questions if there are some: who asks only once must not end what
// others have to say to each other.
func (o *order) makeRoom() {
	first := o.asked.Front()
	if first == nil {
		first = o.talking.Front()
	}
	first.Value.(*use).end()
}

// question says whether no more than one datagram has come each way.
func (u *use) question() bool { return u.came <= 1 && u.answers <= 1 }

// used notes a datagram, one way or the other, that has been counted.
func (o *order) used(u *use) {
	u.last = time.Now()
	if u.place == nil {
		return
	}
	o.asked.Remove(u.place)
	o.talking.Remove(u.place)
	if u.question() {
		u.place = o.asked.PushBack(u)
	} else {
		u.place = o.talking.PushBack(u)
	}
}

// remove is for a conversation that ends; it may be called again.
func (o *order) remove(u *use) {
	if u.place == nil {
		return
	}
	u.expiry.Stop()
	o.asked.Remove(u.place)
	o.talking.Remove(u.place)
	u.place = nil
}

// removeLocked ends a conversation; it may be called again.
func (p *udpPort) removeLocked(t *talk) {
	t.cancel()
	p.idle.remove(&t.use)
	if p.talks[t.client] == t {
		delete(p.talks, t.client)
	}
}

// expire ends a conversation that is but a question. Others end as any flow without traffic does.
func (p *udpPort) expire(u *use) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u.place == nil || !u.question() {
		return
	}
	if left := questionIdle - time.Since(u.last); left > 0 {
		u.expiry.Reset(left)
		return
	}
	u.end()
}

// forget is called once its goroutine has nothing more to do.
func (p *udpPort) forget(t *talk) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.removeLocked(t)
	p.running--
}

// run carries a conversation until it is idle. What a laptop refuses goes to the app.
func (p *udpPort) run(t *talk, a *Agent) {
	var kept [][]byte
	if t.to != "" {
		side := p.side(t, nil)
		err := p.withLaptop(t, a, side)
		if err == nil || side.answered || t.ctx.Err() != nil {
			return
		}
		a.cfg.Log.Debug("laptop did not take the datagrams, the app gets them", "intercept", t.to, "err", err)
		a.up.decisions.note(p.cfg, t.client, nil, "", notTaken(err))
		kept = side.kept
		p.mu.Lock()
		p.refused[t.to] = time.Now().Add(refusedPause)
		t.to = ""
		p.mu.Unlock()
	}
	app, err := p.dialApp(t.ctx)
	if err != nil {
		a.cfg.Log.Debug("the app does not answer", "port", p.cfg.ContainerPort, "err", err)
		return
	}
	_ = flow.RelayPackets(p.side(t, kept), app, tunnel.UDPIdle) // as on any network: what is refused is lost
}

func (p *udpPort) withLaptop(t *talk, a *Agent, side *clientSide) error {
	ctx, cancel := context.WithTimeout(t.ctx, acceptTimeout)
	defer cancel()
	h := wire.InterceptHeader{Intercept: t.to, Proto: syscall.IPPROTO_UDP, Src: t.client, Port: p.cfg.ContainerPort}
	st, err := a.up.open(ctx, h)
	if err != nil {
		_ = side.Close()
		return err
	}
	a.up.decisions.note(p.cfg, t.client, nil, t.to, "")
	return flow.RelayPackets(side, st, tunnel.UDPIdle)
}

// dialApp makes a socket towards the app where it listens: on all addresses or localhost, else on the pod's address only.
func (p *udpPort) dialApp(ctx context.Context) (flow.Packets, error) {
	host := "127.0.0.1"
	if p.podIP != "" && !p.onLocalhost() {
		host = p.podIP
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", net.JoinHostPort(host, fmt.Sprint(p.cfg.ContainerPort)))
	if err != nil {
		return nil, err
	}
	return flow.FromUDP(c.(*net.UDPConn)), nil
}

// onLocalhost says whether the app listens on localhost. That is not looked at for each client: it takes a look at all sockets of the pod.
func (p *udpPort) onLocalhost() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); now.Sub(p.looked) >= lookEvery {
		p.looked, p.local = now, onLoopback(p.cfg.ContainerPort)
	}
	return p.local
}

// clientSide is the client's end of a conversation, as long as one other end has it.
type clientSide struct {
	p    *udpPort
	t    *talk
	done chan struct{}
	once sync.Once

	first    [][]byte // to be read before what comes
	kept     [][]byte // read, while nothing has been answered
	answered bool
}

func (p *udpPort) side(t *talk, first [][]byte) *clientSide {
	return &clientSide{p: p, t: t, first: first, done: make(chan struct{})}
}

// ReadPacket implements flow.Packets.
func (s *clientSide) ReadPacket(b []byte) (n int, err error) {
	err = s.NextPacket(func(d []byte) error {
		n = copy(b, d)
		return nil
	})
	return n, err
}

// NextPacket implements flow.PacketSource: a conversation that is idle holds no buffer, and clients that take a new port for each question leave many.
func (s *clientSide) NextPacket(fn func([]byte) error) error {
	var d []byte
	if len(s.first) > 0 {
		d, s.first = s.first[0], s.first[1:]
	} else {
		select {
		case d = <-s.t.in:
		case <-s.done:
			return io.EOF
		case <-s.t.ctx.Done():
			return io.EOF
		}
	}
	s.p.mu.Lock()
	if !s.answered && len(s.kept) < keptDatagrams {
		s.kept = append(s.kept, d)
	}
	s.p.mu.Unlock()
	return fn(d)
}

// WritePacket implements flow.Packets.
func (s *clientSide) WritePacket(b []byte) error {
	s.p.mu.Lock()
	s.answered, s.kept = true, nil
	s.t.use.answers++
	s.p.idle.used(&s.t.use)
	s.p.mu.Unlock()
	_, err := s.p.conn.WriteToUDPAddrPort(b, s.t.client)
	return err
}

// Close implements flow.Packets.
func (s *clientSide) Close() error {
	s.once.Do(func() { close(s.done) })
	return nil
}
