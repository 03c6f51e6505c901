package agent

import (
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// canaryLife is how long a connection that the manager has announced may take to come.
	canaryLife = 5 * time.Second
	// maxCanaries bounds those that are announced at once.
	maxCanaries = 1000
)

// canaries are the connections that the manager makes to see whether they arrive here. The app and the laptop see nothing of them. The zero value is
// ready.
type canaries struct {
	some atomic.Int32 // how many there are: usually none, and connections need not wait for the lock

	mu sync.Mutex
	// guarded by mu
	nonces map[canaryKey]string
}

type canaryKey struct {
	udp    bool
	port   uint16
	source netip.AddrPort
}

// expect takes the manager's announcement.
func (c *canaries) expect(body []byte, udp bool) (any, error) {
	var m control.Canary
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, err
	}
	k := canaryKey{udp, m.Port.Number, m.Source}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.nonces) >= maxCanaries {
		return nil, &mux.RejectError{Code: wire.CodeBusy, Msg: "too many canaries"}
	}
	if c.nonces == nil {
		c.nonces = map[canaryKey]string{}
	}
	if _, again := c.nonces[k]; !again {
		c.some.Add(1)
	}
	c.nonces[k] = m.Nonce
	time.AfterFunc(canaryLife, func() { c.take(k) })
	return struct{}{}, nil
}

// take returns what a connection is to be answered with, if it is one of the manager's.
func (c *canaries) take(k canaryKey) (nonce string, ok bool) {
	if c.some.Load() == 0 {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if nonce, ok = c.nonces[k]; ok {
		delete(c.nonces, k)
		c.some.Add(-1)
	}
	return nonce, ok
}

// swallow answers a connection that is the manager's, and ends it.
func (c *canaries) swallow(port uint16, conn *net.TCPConn) bool {
	nonce, ok := c.take(canaryKey{false, port, addrPort(conn.RemoteAddr())})
	if ok {
		_, _ = io.WriteString(conn, nonce)
		_ = conn.Close()
	}
	return ok
}

// swallowPacket answers a datagram that is the manager's. More of them may follow: it stays announced.
func (c *canaries) swallowPacket(port uint16, conn *net.UDPConn, from netip.AddrPort) bool {
	if c.some.Load() == 0 {
		return false
	}
	c.mu.Lock()
	nonce, ok := c.nonces[canaryKey{true, port, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())}]
	c.mu.Unlock()
	if ok {
		_, _ = conn.WriteToUDPAddrPort([]byte(nonce), from) // the manager asks again
	}
	return ok
}
