package agent

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// startUDP is start with a UDP port in front of an app that answers "app:" and the datagram.
func startUDP(t *testing.T, appHost string) (w *world, port agentcfg.Port) {
	t.Helper()
	t.Parallel()
	appConn, err := net.ListenPacket("udp", appHost+":0")
	if err != nil {
		t.Fatal(err)
	}
	go answer(appConn, "app:")
	w = &world{t: t, app: newApp(t, sayApp), mgr: newManager(t), done: make(chan error, 1), podIP: appHost}
	port = agentcfg.Port{
		Protocol: "UDP", ContainerPort: uint16(appConn.LocalAddr().(*net.UDPAddr).Port), Container: "app", AgentPort: freePort(t), Way: agentcfg.ByName, Name: "dns",
	}
	w.cfg = &agentcfg.Config{Managers: []string{w.mgr.addr()}, ManagerKey: w.mgr.id.Fingerprint(), HealthPort: freePort(t), Ports: []agentcfg.Port{port}}
	w.run()
	t.Cleanup(func() { _ = appConn.Close() }) // before the agent is waited for, which drains until the app has ended
	return w, port
}

func answer(c net.PacketConn, who string) {
	for b := make([]byte, maxDatagram); ; {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(append([]byte(who), b[:n]...), from)
	}
}

// client is one client address.
func (w *world) client(port agentcfg.Port) net.Conn {
	w.t.Helper()
	c, err := net.Dial("udp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port.AgentPort))))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// asks sends a datagram until it is answered, as a client of UDP does.
func (w *world) asks(c net.Conn, text string) string {
	w.t.Helper()
	var got string
	b := make([]byte, maxDatagram)
	w.until("an answer to "+text, func() bool {
		_, _ = c.Write([]byte(text))
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Read(b)
		got = string(b[:n])
		return err == nil
	})
	for { // answers to the same question, asked again
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		if _, err := c.Read(b); errors.Is(err, os.ErrDeadlineExceeded) {
			return got
		}
	}
}

// laptopUDP answers every datagram of every flow.
func laptopUDP(r *mux.Request, _ wire.InterceptHeader) {
	st, err := r.Accept(nil)
	if err != nil {
		return
	}
	for b := make([]byte, maxDatagram); ; {
		n, err := st.ReadPacket(b)
		if err != nil {
			return
		}
		if err := st.WritePacket(append([]byte("laptop:"), b[:n]...)); err != nil {
			return
		}
	}
}

// A conversation that waits holds no memory for a datagram.
var _, _ flow.PacketSource = (*clientSide)(nil), (*packetsCopy)(nil)

// The conversation of one client address changes sides with the intercept; datagrams stay what they are.
func TestUDP(t *testing.T) {
	w, port := startUDP(t, "127.0.0.1")
	entry := control.TableEntry{Intercept: "uid-1", Protocol: "UDP", ContainerPort: port.ContainerPort}
	var header atomic.Pointer[wire.InterceptHeader]
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) { header.Store(&h); laptopUDP(r, h) })
	s := w.mgr.up()
	c, other := w.client(port), w.client(port)
	if got := w.asks(c, "a"); got != "app:a" {
		t.Errorf("without an intercept %q", got)
	}
	w.tableOf(s, entry)
	for _, text := range []string{"b", "", strings.Repeat("x", 20000)} {
		if got := w.asks(c, text); got != "laptop:"+text {
			t.Errorf("with an intercept %.20q", got)
		}
	}
	if h := header.Load(); h.Proto != wire.ProtoUDP || h.Port != port.ContainerPort || h.Src.String() != c.LocalAddr().String() {
		t.Errorf("the laptop was told %+v", h)
	}
	if got := w.asks(other, "c"); got != "laptop:c" {
		t.Errorf("another client: %q", got)
	}
	w.tableOf(s)
	if got := w.asks(c, "d"); got != "app:d" {
		t.Errorf("after the intercept %q", got)
	}
	w.tableOf(s, entry)
	w.mgr.down()
	w.until("the app answers without a manager", func() bool { return w.asks(c, "e") == "app:e" })
}

// What the local process refuses goes to the app, the first datagram included, and the laptop is asked again later.
func TestUDPRefused(t *testing.T) {
	w, port := startUDP(t, "127.0.0.1")
	var refusals atomic.Int32
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if refusals.Add(1) > 1 {
			laptopUDP(r, h)
			return
		}
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		_, _ = st.ReadPacket(make([]byte, 100))
		st.ResetCode(wire.CodeOf(syscall.ECONNREFUSED))
	})
	s := w.mgr.up()
	w.tableOf(s, control.TableEntry{Intercept: "uid-1", Protocol: "UDP", ContainerPort: port.ContainerPort})
	c := w.client(port)
	_, _ = c.Write([]byte("once"))
	_ = c.SetReadDeadline(time.Now().Add(deadline))
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "app:once" {
		t.Errorf("%q, %v", b[:n], err)
	}
	if got := w.asks(w.client(port), "soon"); got != "app:soon" {
		t.Errorf("another client, soon after: %q", got)
	}
	w.until("the laptop is asked again", func() bool { return w.asks(c, "later") == "laptop:later" })
}

// An app that is bound to the pod's own address is asked there.
func TestUDPOnPodIP(t *testing.T) {
	w, port := startUDP(t, "127.0.0.2")
	w.mgr.up()
	if got := w.asks(w.client(port), "a"); got != "app:a" {
		t.Errorf("%q", got)
	}
}

// bareUDP is a UDP port that nobody serves.
func bareUDP(t *testing.T) (*udpPort, *Agent) {
	t.Helper()
	p, err := listenUDP(agentcfg.Port{Protocol: "UDP"}, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.conn.Close() })
	a := &Agent{}
	a.table.init()
	return p, a
}

// stranger is the i-th of many clients.
func stranger(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), 9)
}

// When there are too many clients, whoever has been idle longest makes room, both directions counted.
func TestUDPMakesRoom(t *testing.T) {
	p, a := bareUDP(t)
	var talks []*talk
	for i := range maxTalks {
		one, _ := p.talk(t.Context(), a, stranger(i))
		talks = append(talks, one)
	}
	if again, fresh := p.talk(t.Context(), a, stranger(0)); again != talks[0] || fresh {
		t.Error("a client that goes on has a new conversation")
	}
	if err := p.side(talks[1], nil).WritePacket([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if one, fresh := p.talk(t.Context(), a, stranger(maxTalks+i)); one == nil || !fresh {
			t.Error("a new client is not served")
		}
	}
	for i, one := range talks {
		if ended := one.ctx.Err() != nil; ended != (i == 2 || i == 3) {
			t.Errorf("conversation %d: ended %t", i, ended)
		}
	}
	if len(p.talks) != maxTalks || p.idle.asked.Len()+p.idle.talking.Len() != maxTalks {
		t.Errorf("%d conversations, %d in order", len(p.talks), p.idle.asked.Len()+p.idle.talking.Len())
	}
	for i := range 2 * maxTalks {
		p.talk(t.Context(), a, stranger(2*maxTalks+i))
	}
	if p.running != 2*maxTalks {
		t.Errorf("%d run, though none ends", p.running)
	}
	if talks[0].ctx.Err() != nil {
		t.Error("who asks once has ended what others say to each other")
	}
	for _, one := range talks {
		p.forget(one)
	}
	if one, _ := p.talk(t.Context(), a, stranger(0)); one == nil || p.running != maxTalks+1 {
		t.Errorf("%d run after others have ended", p.running)
	}
}

// New clients are served while others have asked all the questions that there is room for.
func TestUDPManyClients(t *testing.T) {
	w, port := startUDP(t, "127.0.0.1")
	w.mgr.up()
	for i := range maxTalks {
		w.agent.udp[0].talk(t.Context(), w.agent, stranger(i))
	}
	if got := w.asks(w.client(port), "a"); got != "app:a" {
		t.Errorf("%q", got)
	}
}

// A question and its answer are soon forgotten, a conversation is not.
func TestUDPQuestion(t *testing.T) {
	for name, tt := range map[string]struct {
		came, answers int
		ends          bool
	}{
		"unanswered": {1, 0, true}, "answered": {1, 1, true}, "asked twice": {2, 0, false}, "answered twice": {1, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			p, a := bareUDP(t)
			synctest.Test(t, func(t *testing.T) {
				one, _ := p.talk(t.Context(), a, stranger(0))
				for range tt.came - 1 {
					time.Sleep(questionIdle / 4)
					p.talk(t.Context(), a, stranger(0))
				}
				for range tt.answers {
					time.Sleep(questionIdle / 4)
					_ = p.side(one, nil).WritePacket([]byte("answer"))
				}
				time.Sleep(questionIdle - time.Nanosecond)
				synctest.Wait()
				if one.ctx.Err() != nil {
					t.Error("ended too soon")
				}
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				if ended := one.ctx.Err() != nil; ended != tt.ends {
					t.Errorf("ended %t", ended)
				}
				if _, fresh := p.talk(t.Context(), a, stranger(0)); fresh != tt.ends {
					t.Errorf("the next datagram: a new conversation %t", fresh)
				}
			})
		})
	}
}
