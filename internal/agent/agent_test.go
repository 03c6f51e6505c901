package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAppAnswersWithoutIntercept(t *testing.T) {
	w := start(t, false)
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered before the agent knows any table", got)
	}
	w.intercept(w.mgr.up(), "")
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered", got)
	}
	w.mgr.mu.Lock()
	defer w.mgr.mu.Unlock()
	if h := w.mgr.hellos[0]; h.Role != wire.RoleAgent || h.Token != "token" || h.Pod != "web-1" || h.Namespace != "shop" {
		t.Errorf("the agent said %+v", h)
	}
}

func TestLaptopAnswersWithIntercept(t *testing.T) {
	w := start(t, false)
	heads := make(chan wire.InterceptHeader, 1)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		heads <- h
		laptop(r, h)
	})
	w.intercept(w.mgr.up(), "uid-1")
	c := w.dial(w.cfg.Ports[0].AgentPort)
	defer c.Close()
	if got := name(t, c); got != "laptop" {
		t.Errorf("%s answered", got)
	}
	h := <-heads
	want := wire.InterceptHeader{
		Intercept: "uid-1", Proto: syscall.IPPROTO_TCP, Src: addrPort(c.LocalAddr()), Dst: addrPort(c.RemoteAddr()), Port: w.app.port(),
	}
	if h != want {
		t.Errorf("the manager was told %+v, want %+v", h, want)
	}
}

func TestRefusedFlowGoesToTheApp(t *testing.T) {
	w := start(t, false)
	w.mgr.set(func(r *mux.Request, _ wire.InterceptHeader) { _ = r.Reject(wire.CodeRefused, "connection refused") })
	w.intercept(w.mgr.up(), "uid-1")
	for range 3 { // a refusal is an answer: it makes nobody suspect
		if got := w.ask(); got != "app" {
			t.Errorf("%s answered", got)
		}
	}
	w.mgr.set(laptop)
	if got := w.ask(); got != "laptop" {
		t.Errorf("%s answered after the refusals", got)
	}
}

// A manager that does not answer costs the first connection a second and no other anything, until it answers a ping.
func TestSilentManager(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	w.mgr.up()
	held := w.hold()
	w.intercept(w.mgr.up(), "uid-1")
	if got := w.ask(); got != "laptop" {
		t.Fatalf("%s answered", got)
	}

	line := <-held
	line.hold()
	begin := time.Now()
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered while the manager is silent", got)
	}
	if d := time.Since(begin); d < acceptTimeout || d > acceptTimeout+2*time.Second {
		t.Errorf("the first connection waited %s, want %s", d, acceptTimeout)
	}
	begin = time.Now()
	for range 5 {
		if got := w.ask(); got != "app" {
			t.Errorf("%s answered a suspect's connection", got)
		}
	}
	if d := time.Since(begin); d > acceptTimeout {
		t.Errorf("five connections waited %s behind a suspect", d)
	}
	line.release()
	w.until("the laptop answers again after the ping", func() bool { return w.ask() == "laptop" })
}

// One that was not trusted and ends its session, as when its node was cut off and is back, is not trusted before there is another session: what its
// laptops have of connections may not have ended yet.
func TestSilentManagerEnds(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	w.mgr.up()
	held := w.hold()
	w.intercept(w.mgr.up(), "uid-1")
	line, up := <-held, w.agent.up
	t.Cleanup(line.release)
	session := up.link.Session()
	line.hold()
	if got := w.ask(); got != "app" || !up.silent() {
		t.Fatalf("%s answered while the manager is silent, which is said to be %v", got, up.silent())
	}
	_ = w.mgr.l.Close()
	_ = line.Conn.Close() // not line's own Close: that would let its answer to the ping pass
	w.until("the session has ended", func() bool { return session.Err() != nil })
	up.probe(session)
	if !up.silent() {
		t.Error("the manager is trusted though its session has ended")
	}
	w.mgr.listen(w.mgr.addr())
	w.mgr.up()
	w.until("the laptop answers", func() bool { return w.ask() == "laptop" })
	if up.doubt(session); up.silent() {
		t.Error("the manager is doubted for a session before this one")
	}
}

func TestManagerGone(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	w.intercept(w.mgr.up(), "uid-1")
	if got := w.ask(); got != "laptop" {
		t.Fatalf("%s answered", got)
	}
	open := w.dial(w.cfg.Ports[0].AgentPort)
	defer open.Close()
	if got := name(t, open); got != "laptop" {
		t.Fatalf("%s answered", got)
	}
	w.mgr.down()
	if _, err := io.ReadAll(open); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a flow that the laptop had accepted ended with %v, want a reset", err)
	}
	begin := time.Now()
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered without a manager", got)
	}
	if d := time.Since(begin); d > acceptTimeout/2 {
		t.Errorf("it took %s", d)
	}
	// The manager comes back: the intercept that it told before is in force at once, until it says otherwise.
	w.mgr.listen(w.mgr.addr())
	s := w.mgr.up()
	w.until("the laptop answers", func() bool { return w.ask() == "laptop" })
	w.intercept(s, "")
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered after the intercept's end", got)
	}
}

// call is what a manager begins with that calls an agent.
func (w *world) call() net.Conn {
	w.t.Helper()
	c, err := tunnel.Upgrade(w.t.Context(), &http.Transport{DisableKeepAlives: true}, fmt.Sprintf("http://127.0.0.1:%d%s", w.cfg.HealthPort, agentcfg.CallPath))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// A manager that the agent cannot reach calls it; whoever has another key is not answered, and keeps nobody from answering.
func TestManagerCalls(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	w.intercept(w.mgr.up(), "uid-1")
	w.mgr.down()
	w.until("the app answers", func() bool { return w.ask() == "app" })

	stranger := newManager(t)
	stranger.serve(w.call())
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered after a stranger's call", got)
	}
	select {
	case <-stranger.sessions:
		t.Error("a stranger was answered")
	default:
	}

	go w.mgr.serve(w.call())
	s := w.mgr.up()
	w.until("the laptop answers", func() bool { return w.ask() == "laptop" })
	w.mgr.serve(w.call()) // one too many: the tunnel that is up stays
	if got := w.ask(); got != "laptop" || s.Err() != nil {
		t.Errorf("%s answered after another call, the tunnel's error is %v", got, s.Err())
	}
}

// Those who call and say nothing keep the manager's call away neither before nor after it, however many they are.
func TestSilentCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id, err := tunnel.NewIdentity("traffic-manager")
		if err != nil {
			t.Fatal(err)
		}
		u, err := newUplink(Config{
			Agent: &agentcfg.Config{ManagerKey: id.Fingerprint()}, Token: func() (string, error) { return "token", nil }, Log: slog.New(slog.DiscardHandler),
		}, new(table))
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		defer wg.Wait()
		call := func() net.Conn {
			here, there := net.Pipe()
			wg.Go(func() { u.answer(there) })
			synctest.Wait()
			return here
		}
		silent := func() {
			for range 2 * maxCallers {
				call()
			}
		}
		began := time.Now()
		silent()
		if n := u.callers.all.Len(); n != maxCallers {
			t.Errorf("%d callers wait", n)
		}
		looks := make(chan struct{}) // at the token, for as long as it likes
		c := call()
		wg.Go(func() {
			s, _, err := tunnel.Server(t.Context(), c, tunnel.ServerConfig{Identity: id, Authorize: func(context.Context, wire.Hello, string) (wire.HelloReply, error) {
				<-looks
				return wire.HelloReply{}, nil
			}})
			if err != nil {
				t.Errorf("the manager gets %v", err)
				return
			}
			_ = s.Close()
		})
		synctest.Wait()
		silent()
		close(looks)
		select {
		case a := <-u.calls:
			_ = a.s.Close()
		case <-time.After(2 * callTimeout):
			t.Error("the manager is not answered")
		}
		if d := time.Since(began); d >= callTimeout {
			t.Errorf("the manager is answered after %s", d)
		}
	})
}

// A manager that does not want the agent, or is another than expected, harms nothing.
func TestManagerRefuses(t *testing.T) {
	for name, change := range map[string]func(*world){
		"denied": func(w *world) {
			w.mgr.mu.Lock()
			defer w.mgr.mu.Unlock()
			w.mgr.refuse = &mux.RejectError{Code: wire.CodeDenied, Msg: "the agent's token is not valid"}
		},
		"another key": func(w *world) {
			id, err := tunnel.NewIdentity("other")
			if err != nil {
				t.Fatal(err)
			}
			w.mgr.id = id
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t, false)
			w.mgr.up()
			w.mgr.down()
			change(w)
			w.mgr.listen(w.mgr.addr())
			w.until("it was refused twice", func() bool {
				w.mgr.mu.Lock()
				defer w.mgr.mu.Unlock()
				return len(w.mgr.hellos) > 2 || name == "another key"
			})
			if got := w.ask(); got != "app" {
				t.Errorf("%s answered", got)
			}
			select {
			case err := <-w.done:
				t.Errorf("the agent ended: %v", err)
				w.done <- err
			default:
			}
		})
	}
}

// Connections that run when the table changes go on with whom they began.
func TestTableChangesWhileConnectionsAreOpen(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	s := w.mgr.up()
	w.intercept(s, "")
	toApp := w.dial(w.cfg.Ports[0].AgentPort)
	defer toApp.Close()
	if got := name(t, toApp); got != "app" {
		t.Fatalf("%s answered", got)
	}
	w.intercept(s, "uid-1")
	toLaptop := w.dial(w.cfg.Ports[0].AgentPort)
	defer toLaptop.Close()
	if got := name(t, toLaptop); got != "laptop" {
		t.Fatalf("%s answered", got)
	}
	w.intercept(s, "uid-1") // the same again
	w.intercept(s, "")
	for who, c := range map[string]*net.TCPConn{"app": toApp, "laptop": toLaptop} {
		if got := sayAndEnd(t, c, "hello"); got != "hellobye from "+who {
			t.Errorf("connection to the %s: %q", who, got)
		}
	}
}

// sayAndEnd sends text and FIN and returns everything that comes back.
func sayAndEnd(t *testing.T, c *net.TCPConn, text string) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// An intercept's connections have a while to end after it, an intercept's that stays are left alone.
func TestLeaveGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tab table
		tab.init()
		entry := func(uid string, port uint16) control.TableEntry {
			return control.TableEntry{Intercept: uid, Protocol: "TCP", ContainerPort: port}
		}
		set := func(es ...control.TableEntry) { tab.set(control.Table{Items: es}, slog.New(slog.DiscardHandler)) }
		lookup := func(protocol string, port uint16) engagement {
			es := tab.lookup(protocol, port).intercepts
			if len(es) == 0 {
				return engagement{}
			}
			return es[0]
		}
		set(entry("a", 1), entry("a", 4), entry("b", 2), entry("c", 3))
		a, b := lookup("TCP", 1), lookup("TCP", 2)
		set(entry("a", 1), entry("a", 4), entry("c", 2)) // b ended, c moved to its port
		if lookup("TCP", 1).ctx != a.ctx || lookup("TCP", 4).ctx != a.ctx {
			t.Error("an intercept that stays was begun anew")
		}
		if now := lookup("TCP", 2); now.intercept != "c" {
			t.Errorf("port 2 belongs to %+v", now)
		}
		if len(tab.lookup("UDP", 1).intercepts) > 0 {
			t.Error("UDP is not TCP")
		}
		time.Sleep(leaveGrace - time.Millisecond)
		synctest.Wait()
		if b.ctx.Err() != nil {
			t.Error("connections of the ended intercept were cut early")
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if b.ctx.Err() == nil {
			t.Error("connections of the ended intercept go on for ever")
		}
		if a.ctx.Err() != nil {
			t.Error("connections of an intercept that stays were cut")
		}
	})
}

func TestHalfCloseAndManyBytes(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	s := w.mgr.up()
	body := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	for _, who := range []string{"app", "laptop"} {
		w.intercept(s, map[string]string{"app": "", "laptop": "uid-1"}[who])
		c := w.dial(w.cfg.Ports[0].AgentPort)
		if got := name1(t, c); got != who {
			t.Errorf("%s answered, want %s", got, who)
		}
		sent := make(chan error, 1)
		go func() {
			_, err := io.WriteString(c, body)
			sent <- errors.Join(err, c.CloseWrite())
		}()
		got, err := io.ReadAll(c)
		if err != nil || <-sent != nil {
			t.Fatalf("%s: %v", who, err)
		}
		if string(got) != body+"bye from "+who {
			t.Errorf("%s: %d bytes came back, want %d", who, len(got), len(body))
		}
		_ = c.Close()
	}
}

// What the laptop refuses after it got bytes is not replayed; what it never accepted loses not a byte.
func TestClientSpeaksFirst(t *testing.T) {
	w := start(t, false)
	w.mgr.set(func(r *mux.Request, _ wire.InterceptHeader) { _ = r.Reject(wire.CodeRefused, "") })
	w.intercept(w.mgr.up(), "uid-1")
	c := w.dial(w.cfg.Ports[0].AgentPort)
	defer c.Close()
	if got := sayAndEnd(t, c, "first words"); got != "app\nfirst wordsbye from app" {
		t.Errorf("got %q", got)
	}
}

// A port without an app behind it looks closed as far as that is possible after the handshake.
func TestAppDown(t *testing.T) {
	w := start(t, true)
	w.mgr.set(laptop)
	s := w.mgr.up()
	w.intercept(s, "")
	probe := agentcfg.AppPath(w.app.port())
	if got := w.status(probe); got != http.StatusOK {
		t.Errorf("TCP probe: %d while the app listens", got)
	}
	w.app.close()
	for _, port := range []uint16{w.cfg.Ports[0].AgentPort, w.cfg.Ports[0].ProbePort} {
		c := w.dial(port)
		_ = c.SetDeadline(time.Now().Add(deadline))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("port %d: %v, want a reset", port, err)
		}
		_ = c.Close()
	}
	if got := w.status(probe); got != http.StatusServiceUnavailable {
		t.Errorf("TCP probe: %d while the app is down", got)
	}
	if got := w.status(agentcfg.AppPath(1)); got != http.StatusNotFound {
		t.Errorf("TCP probe of a port that is not the agent's: %d", got)
	}
	w.intercept(s, "uid-1") // nothing listens on the app's port, and the laptop answers all the same
	if got := w.ask(); got != "laptop" {
		t.Errorf("%s answered", got)
	}
}

func TestProbesAlwaysAskTheApp(t *testing.T) {
	w := start(t, true)
	w.mgr.set(laptop)
	w.intercept(w.mgr.up(), "uid-1")
	if got := w.ask(); got != "laptop" {
		t.Fatalf("%s answered", got)
	}
	c := w.dial(w.cfg.Ports[0].ProbePort)
	defer c.Close()
	if got := name(t, c); got != "app" {
		t.Errorf("%s answered a probe", got)
	}
}

// After SIGTERM the agent goes on until the app has stopped listening and the last connection is done.
func TestDrain(t *testing.T) {
	w := start(t, false)
	w.mgr.set(laptop)
	s := w.mgr.up()
	w.intercept(s, "uid-1")
	c := w.dial(w.cfg.Ports[0].AgentPort)
	defer c.Close()
	if got := name1(t, c); got != "laptop" {
		t.Fatalf("%s answered", got)
	}
	w.stop()
	if got := w.ask(); got != "laptop" {
		t.Errorf("%s answered a new connection while the app still listens", got)
	}
	w.intercept(s, "")
	if got := w.ask(); got != "app" {
		t.Errorf("%s answered while draining", got)
	}
	w.app.close()
	select {
	case err := <-w.done:
		t.Fatalf("the agent ended with a connection open: %v", err)
	case <-time.After(300 * time.Millisecond): // three looks of drain
	}
	if got := sayAndEnd(t, c, "last words"); got != "last wordsbye from laptop" {
		t.Errorf("got %q", got)
	}
	if err := w.wait(); err != nil {
		t.Errorf("drained with %v", err)
	}
}

// A native sidecar stops listening only after the agent has ended: it must not be waited for.
func TestDrainOfSidecar(t *testing.T) {
	a := &Agent{cfg: Config{Agent: &agentcfg.Config{Ports: []agentcfg.Port{{Protocol: "TCP", ContainerPort: newApp(t, sayApp).port(), Sidecar: true}}}}}
	if !a.appListens(0) {
		t.Error("ended before clients know of the pod's end")
	}
	if a.appListens(sidecarDrain + time.Second) {
		t.Error("waits for a sidecar that waits for the agent")
	}
	a.cfg.Agent.Ports[0] = agentcfg.Port{Protocol: "TCP", ContainerPort: 1, Container: "app"} // nobody listens
	if a.appListens(0) {
		t.Error("waits for an app that has ended")
	}
	a.cfg.Agent.StandIns = []string{"app"}
	if !a.appListens(0) || a.appListens(sidecarDrain+time.Second) {
		t.Error("in front of a stand-in it ends before clients know of the pod's end, or does not end")
	}
	a.cfg.Agent.Ports[0] = agentcfg.Port{Protocol: "TCP", ContainerPort: newApp(t, sayApp).port()}
	if !a.appListens(time.Hour) {
		t.Error("an ordinary app is not waited for")
	}
}

func TestReadiness(t *testing.T) {
	t.Run("with a table", func(t *testing.T) {
		w := start(t, false)
		s := w.mgr.up()
		if got := w.status("/readyz"); got != http.StatusServiceUnavailable {
			t.Errorf("%d before the table", got)
		}
		w.intercept(s, "")
		if got := w.status("/readyz"); got != http.StatusOK {
			t.Errorf("%d with the table", got)
		}
	})
	t.Run("without a manager", func(t *testing.T) {
		begin := time.Now()
		w := start(t, false)
		w.mgr.down()
		w.until("the pod is ready", func() bool { return w.status("/readyz") == http.StatusOK })
		if d := time.Since(begin); d < readyGrace || d > readyGrace+2*time.Second {
			t.Errorf("ready after %s, want %s", d, readyGrace)
		}
	})
}

func TestUnknownRequestsOfTheManager(t *testing.T) {
	w := start(t, false)
	s := w.mgr.up()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := tunnel.Control(ctx, s, "manager/reboot", struct{}{}, nil); err == nil {
		t.Error("an unknown method was answered")
	}
	if err := tunnel.Control(ctx, s, control.ManagerIntercepts, "not a table", nil); err == nil {
		t.Error("a malformed table was taken")
	}
	if got := w.status("/readyz"); got != http.StatusServiceUnavailable {
		t.Errorf("%d after a malformed table", got)
	}
}

// A condition that this agent does not know must not be left out of a rule, which would take more without it.
func TestNewerRule(t *testing.T) {
	w := start(t, false)
	s := w.mgr.up()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	port := w.cfg.Ports[0].ContainerPort
	items := fmt.Sprintf(`{"items":[
		{"intercept":"in-1","protocol":"TCP","containerPort":%d,"match":{"headers":[{"name":"x-user","op":"equal","value":"ada"}],"cookies":["b"]},"color":"blue"},
		{"intercept":"in-2","protocol":"TCP","containerPort":%d,"match":{"path":{"op":"suffix","value":"/x"}}}]}`, port, port)
	if err := tunnel.Control(ctx, s, control.ManagerIntercepts, json.RawMessage(items), nil); err != nil {
		t.Fatal(err)
	}
	var why control.Why
	if err := tunnel.Control(ctx, s, control.ManagerWhy, control.AskWhy{Ports: []control.Port{{Protocol: "TCP", Number: port}}}, &why); err != nil {
		t.Fatal(err)
	}
	if len(why.Ports) != 1 || len(why.Ports[0].Rules) != 0 {
		t.Errorf("rules in force: %+v", why.Ports)
	}
	w.until("the manager is told", func() bool { return slices.Contains(w.mgr.noted(), newerRule) })
}

func TestMetrics(t *testing.T) {
	w := start(t, false)
	if got := w.status("/metrics"); got != http.StatusOK {
		t.Fatal(got)
	}
	defer http.DefaultClient.CloseIdleConnections()
	r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", w.cfg.HealthPort))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil || !regexp.MustCompile(`(?m)^# TYPE go_goroutines gauge\ngo_goroutines [1-9]\d*$`).Match(text) || !strings.Contains(string(text), "\ndoppel_agent_rules 0\n") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestPortInUse(t *testing.T) {
	a := newApp(t, sayApp)
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := uint16(l.Addr().(*net.TCPAddr).Port)
	for name, change := range map[string]func(*agentcfg.Config){
		"agent port":  func(c *agentcfg.Config) { c.Ports[0].AgentPort = busy },
		"probe port":  func(c *agentcfg.Config) { c.Ports[0].ProbePort = busy },
		"health port": func(c *agentcfg.Config) { c.HealthPort = busy },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &agentcfg.Config{Managers: []string{"127.0.0.1:1"}, ManagerKey: "k", HealthPort: freePort(t), Ports: []agentcfg.Port{
				{Protocol: "TCP", ContainerPort: a.port(), AgentPort: freePort(t), ProbePort: freePort(t), Way: agentcfg.ByRedirect},
				{Protocol: "UDP", ContainerPort: 53, AgentPort: freePort(t), Way: agentcfg.ByRedirect},
			}}
			change(cfg)
			ag, err := New(Config{Agent: cfg, Pod: "p", Namespace: "n", Token: func() (string, error) { return "", errors.New("no token yet") }, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			if err := ag.Run(t.Context()); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("Run: %v", err)
			}
		})
	}
}

func TestNewRefusesIncompleteConfiguration(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("an empty configuration was accepted")
	}
}
