package agent

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// deadline bounds every wait of a test.
const deadline = 20 * time.Second

// world is a pod in one process: an app, the agent in front of it, and a manager. Its parts end with the test.
type world struct {
	t     testing.TB
	app   *app
	mgr   *manager
	cfg   *agentcfg.Config
	podIP string   // 127.0.0.1
	env   []string // of the agent
	conf  string   // its resolv.conf
	agent *Agent
	stop  context.CancelFunc // SIGTERM
	done  chan error         // Run's result
}

// start runs an agent in front of the app; redirect gives it a probe port as well.
func start(t *testing.T, redirect bool) *world {
	t.Helper()
	return startBefore(t, newApp(t, sayApp), redirect)
}

// startBefore runs an agent in front of an app.
func startBefore(t *testing.T, a *app, redirect bool) *world {
	t.Helper()
	return startTLS(t, a, redirect, nil)
}

// startTLS runs an agent in front of an app whose TLS it may end.
func startTLS(t *testing.T, a *app, redirect bool, ends *agentcfg.TLS) *world {
	t.Helper()
	t.Parallel()
	w := &world{t: t, app: a, mgr: newManager(t), done: make(chan error, 1)}
	w.cfg = portConfig(t, w)
	w.cfg.Ports[0].TLS = ends
	if p := &w.cfg.Ports[0]; redirect {
		p.Way, p.ProbePort = agentcfg.ByRedirect, freePort(t)
	}
	w.run()
	return w
}

// startResolving runs an agent whose pod has a resolv.conf.
func startResolving(t *testing.T, conf string) *world {
	t.Helper()
	w := &world{t: t, app: newApp(t, sayApp), mgr: newManager(t), done: make(chan error, 1), conf: conf}
	w.cfg = portConfig(t, w)
	w.run()
	return w
}

// portConfig is the configuration of an agent with one TCP port, the app's.
func portConfig(t testing.TB, w *world) *agentcfg.Config {
	t.Helper()
	p := agentcfg.Port{Protocol: "TCP", ContainerPort: w.app.port(), Container: "app", AgentPort: freePort(t), Way: agentcfg.ByName, Name: "http"}
	// The first address answers nobody, as the manager's name in a pod without the cluster's DNS.
	return &agentcfg.Config{Managers: []string{"127.0.0.1:1", w.mgr.addr()}, ManagerKey: w.mgr.id.Fingerprint(), HealthPort: freePort(t), Ports: []agentcfg.Port{p}}
}

func (w *world) run() {
	w.t.Helper()
	if err := w.cfg.Validate(); err != nil {
		w.t.Fatal(err)
	}
	a, err := New(Config{
		Agent: w.cfg, Pod: "web-1", Namespace: "shop", PodIP: cmp.Or(w.podIP, "127.0.0.1"), Environ: w.env, ResolvConf: w.conf,
		Token: func() (string, error) { return "token", nil }, Log: slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent = a
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	go func() { w.done <- a.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		w.app.close()
		if err := w.wait(); err != nil {
			w.t.Errorf("agent ended with %v", err)
		}
	})
}

// wait waits until the agent has ended; it may be called again.
func (w *world) wait() error {
	w.t.Helper()
	select {
	case err := <-w.done:
		w.done <- err
		return err
	case <-time.After(deadline):
		w.t.Fatal("the agent does not end")
		return nil
	}
}

// ask opens a connection to the agent and returns who answered.
func (w *world) ask() string {
	w.t.Helper()
	c := w.dial(w.cfg.Ports[0].AgentPort)
	defer c.Close()
	return name(w.t, c)
}

// name reads the first line that the other side says without being asked.
func name(t testing.TB, c net.Conn) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(deadline))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatalf("nobody answers: %v", err)
	}
	return strings.TrimSpace(line)
}

func (w *world) dial(port uint16) *net.TCPConn {
	w.t.Helper()
	var c net.Conn
	var err error
	w.until("the agent listens", func() bool {
		c, err = net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		return err == nil
	})
	return c.(*net.TCPConn)
}

// until polls a condition.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(deadline); !ok(); {
		if time.Now().After(end) {
			w.t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // polling, not synchronisation
	}
}

func (w *world) status(path string) int {
	w.t.Helper()
	var code int
	w.until("the health port answers", func() bool {
		r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", w.cfg.HealthPort, path))
		if err != nil {
			return false
		}
		code = r.StatusCode
		_ = r.Body.Close()
		return true
	})
	http.DefaultClient.CloseIdleConnections()
	return code
}

// app is what stands behind the agent: it says "app" and then echoes.
type app struct {
	l     net.Listener
	conns sync.WaitGroup
}

func newApp(t testing.TB, serve func(*net.TCPConn)) *app {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &app{l: l}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.conns.Go(func() { serve(c.(*net.TCPConn)) })
		}
	}()
	t.Cleanup(a.close)
	return a
}

func (a *app) port() uint16 { return uint16(a.l.Addr().(*net.TCPAddr).Port) }
func (a *app) close()       { _ = a.l.Close() }

func sayApp(c *net.TCPConn) { serve(c, "app") }

// serve says who it is, echoes until the client's FIN, and says "bye".
func serve(c halfCloser, who string) {
	defer c.Close()
	if _, err := io.WriteString(c, who+"\n"); err != nil {
		return
	}
	if _, err := io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}); err != nil {
		return
	}
	_, _ = io.WriteString(c, "bye from "+who)
	_ = c.CloseWrite()
}

type halfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// portsGiven counts the ports of freePort; where it begins is another place in each process.
var portsGiven atomic.Uint32

func init() { portsGiven.Store(rand.Uint32N(20_000)) }

// freePort is a port for an agent to listen on: none that the kernel gives to others meanwhile (ip(7), ip_local_port_range), and none twice.
func freePort(t testing.TB) uint16 {
	t.Helper()
	for range 100 {
		port := uint16(10_000 + portsGiven.Add(1)%20_000)
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// manager is the other end of the agent's tunnel; take plays the laptop.
type manager struct {
	t  testing.TB
	id *tunnel.Identity
	l  net.Listener

	mu sync.Mutex
	// guarded by mu
	take     func(*mux.Request, wire.InterceptHeader)
	refuse   error
	hellos   []wire.Hello
	session  *mux.Session
	sessions chan *mux.Session
	notes    []string // guarded by mu
}

func (m *manager) noted() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.notes)
}

func newManager(t testing.TB) *manager {
	t.Helper()
	id, err := tunnel.NewIdentity("traffic-manager")
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, id: id, sessions: make(chan *mux.Session, 100)}
	m.listen("127.0.0.1:0")
	t.Cleanup(m.down)
	return m
}

func (m *manager) addr() string { return m.l.Addr().String() }

func (m *manager) listen(addr string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		m.t.Fatal(err)
	}
	m.l = l
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go m.serve(c)
		}
	}()
}

func (m *manager) serve(c net.Conn) {
	s, _, err := tunnel.Server(context.Background(), c, tunnel.ServerConfig{
		Identity: m.id,
		Authorize: func(_ context.Context, h wire.Hello, _ string) (wire.HelloReply, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.hellos = append(m.hellos, h)
			return wire.HelloReply{}, m.refuse
		},
	})
	if err != nil {
		return
	}
	m.mu.Lock()
	m.session = s
	m.mu.Unlock()
	m.sessions <- s
	_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{Intercept: func(r *mux.Request, h wire.InterceptHeader) {
		m.mu.Lock()
		take := m.take
		m.mu.Unlock()
		take(r, h)
	}, Control: func(_ context.Context, method string, body []byte) (any, error) {
		var n control.Note
		if err := json.Unmarshal(body, &n); err != nil || method != control.AgentNote {
			return nil, errors.Join(err, errors.New(method))
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.notes = append(m.notes, n.Text)
		return struct{}{}, nil
	}})
}

// up waits for the agent's next tunnel.
func (m *manager) up() *mux.Session {
	m.t.Helper()
	select {
	case s := <-m.sessions:
		return s
	case <-time.After(deadline):
		m.t.Fatal("the agent does not connect")
		return nil
	}
}

func (m *manager) set(take func(*mux.Request, wire.InterceptHeader)) {
	m.mu.Lock()
	m.take = take
	m.mu.Unlock()
}

// intercept tells the agent a table with an intercept of the port ("" for none) and returns when it has acknowledged.
func (w *world) intercept(s *mux.Session, uid string) {
	w.t.Helper()
	if uid == "" {
		w.table(s)
		return
	}
	w.table(s, control.TableEntry{Intercept: uid})
}

// table tells the agent the intercepts of its port.
func (w *world) table(s *mux.Session, entries ...control.TableEntry) {
	w.t.Helper()
	for i := range entries {
		entries[i].Protocol, entries[i].ContainerPort = "TCP", w.cfg.Ports[0].ContainerPort
	}
	w.tableOf(s, entries...)
}

// tableOf tells the agent intercepts of any port, and returns when it has acknowledged.
func (w *world) tableOf(s *mux.Session, entries ...control.TableEntry) {
	w.t.Helper()
	w.tell(s, control.Table{Items: append([]control.TableEntry{}, entries...)})
}

// tell is tableOf with all that a table may say.
func (w *world) tell(s *mux.Session, t control.Table) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := tunnel.Control(ctx, s, control.ManagerIntercepts, t, nil); err != nil {
		w.t.Fatal(err)
	}
}

// down ends the manager without a word.
func (m *manager) down() {
	_ = m.l.Close()
	m.mu.Lock()
	s := m.session
	m.mu.Unlock()
	if s != nil {
		_ = s.Close()
	}
}

// laptop accepts every flow and says who it is.
func laptop(r *mux.Request, _ wire.InterceptHeader) {
	st, err := r.Accept(nil)
	if err != nil {
		return
	}
	serve(st, "laptop")
}

// hold has the manager behind a connection that can be held up, from its next one on.
func (w *world) hold() <-chan *stall {
	w.t.Helper()
	w.mgr.down()
	held := make(chan *stall, 1)
	l, err := net.Listen("tcp", w.mgr.addr())
	if err != nil {
		w.t.Fatal(err)
	}
	w.mgr.l = l
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		open := make(chan struct{})
		close(open)
		s := &stall{Conn: c, gate: open}
		held <- s
		w.mgr.serve(s)
	}()
	return held
}

// stall is a connection whose bytes from the manager to the agent can be held up, as on a dead network.
type stall struct {
	net.Conn
	mu     sync.Mutex
	closed bool
	gate   chan struct{} // closed while bytes may pass
}

func (s *stall) Write(p []byte) (int, error) {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	<-gate
	return s.Conn.Write(p)
}

func (s *stall) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.gate = make(chan struct{})
	}
}

func (s *stall) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.gate:
	default:
		close(s.gate)
	}
}

// Close lets blocked writers go.
func (s *stall) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.release()
	return s.Conn.Close()
}

// name1 is name without reading ahead.
func name1(t *testing.T, c net.Conn) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(deadline))
	var b bytes.Buffer
	for p := make([]byte, 1); ; {
		if _, err := c.Read(p); err != nil {
			t.Fatal(err)
		}
		if p[0] == '\n' {
			return b.String()
		}
		b.WriteByte(p[0])
	}
}
