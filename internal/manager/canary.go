package manager

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

const (
	// canaryTimeout bounds one connection, and proofTimeout all that are made for an intercept.
	canaryTimeout = 700 * time.Millisecond
	proofTimeout  = 1500 * time.Millisecond
	// proofPause is between two tries of a connection through a service.
	proofPause = 100 * time.Millisecond
	// manyCanaries are under way at once for an intercept.
	manyCanaries = 16
)

// proofs are what the manager's own connections have shown about ports of workloads: that what clients send arrives at the agents. Agents alone cannot know it:
// a redirect may be gone, a network policy in the way, a service may lead elsewhere. Neither the app nor the laptop notices.
type proofs struct {
	mu sync.Mutex
	// guarded by mu
	of map[workloadKey]map[string]*proof // by ports
}

func newProofs() *proofs { return &proofs{of: map[workloadKey]map[string]*proof{}} }

// proof is what is known about some ports of a workload. Their intercepts share it.
type proof struct {
	running bool
	what    string    // the pods that it is about
	began   time.Time // the last one
	asOf    time.Time // when that began whose outcome is known; zero: there is none yet
	problem string    // why not all arrives
}

// target is a connection that should arrive at one of some agents.
type target struct {
	port  control.Port
	addr  netip.AddrPort
	at    []*agentConn
	where string // in words
}

// proven says what a proof for an intercept has shown, and whether there has been one: one that began after the intercept was there, if it is not active yet.
func (r *interceptReconciler) proven(in *v1alpha1.Intercept, w *workload, taken []inject.Taken) (problem string, known bool) {
	since := r.seen[in.UID]
	if in.Status.State == v1alpha1.InterceptActive {
		since = time.Time{}
	}
	return r.m.proven(w, taken, since)
}

// proven says what a proof that began at a time or later has shown, and whether there has been one. It begins another if that is due, if pods are others, or
// after a while.
func (m *Manager) proven(w *workload, taken []inject.Taken, since time.Time) (problem string, known bool) {
	direct := m.agents.targets(w, taken)
	if len(direct) == 0 {
		return "", true
	}
	var what strings.Builder
	for _, t := range direct {
		fmt.Fprintf(&what, "%s %s\n", t.at[0].pod, t.addr)
	}
	m.proofs.mu.Lock()
	defer m.proofs.mu.Unlock()
	p := m.proofs.getLocked(w.key, fmt.Sprint(taken))
	if !p.running && (p.what != what.String() || p.began.Before(since) || time.Since(p.began) > activePoll) {
		p.running, p.what, p.began = true, what.String(), time.Now()
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), proofTimeout)
			defer cancel()
			problem := m.prove(ctx, w, taken, direct)
			m.proofs.mu.Lock()
			p.running, p.asOf, p.problem = false, p.began, problem
			m.proofs.mu.Unlock()
			m.wake(w.key)
		}()
	}
	return p.problem, !p.asOf.IsZero() && !p.asOf.Before(since)
}

func (p *proofs) getLocked(w workloadKey, ports string) *proof {
	if p.of[w] == nil {
		p.of[w] = map[string]*proof{}
	}
	if p.of[w][ports] == nil {
		p.of[w][ports] = &proof{}
	}
	return p.of[w][ports]
}

// forget forgets what is known about a workload.
func (p *proofs) forget(w workloadKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.of, w)
}

// targets are the agents of pods that clients reach, by port.
func (a *agents) targets(w *workload, taken []inject.Taken) []target {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []target
	for i := range w.pods {
		p := &w.pods[i]
		conn, cfg := a.byPod[p.UID], agentOf(p)
		ip, err := netip.ParseAddr(p.Status.PodIP)
		if conn == nil || conn.mux == nil || cfg == nil || err != nil || p.DeletionTimestamp != nil || !ready(p) {
			continue
		}
		for _, t := range taken {
			i := slices.IndexFunc(cfg.Ports, func(c agentcfg.Port) bool {
				return c.Protocol == string(t.Protocol) && c.Protocol == string(corev1.ProtocolTCP) && c.ContainerPort == t.ContainerPort
			})
			if i < 0 {
				continue
			}
			port := t.ContainerPort
			if cfg.Ports[i].Way == agentcfg.ByName {
				port = cfg.Ports[i].AgentPort
			}
			out = append(out, target{portOf(t), netip.AddrPortFrom(ip, port), []*agentConn{conn}, fmt.Sprintf("port %d of pod %s", t.ContainerPort, p.Name)})
		}
	}
	return out
}

// prove makes the connections, to each pod first and then through services, and says what is wrong with one of them.
func (m *Manager) prove(ctx context.Context, w *workload, taken []inject.Taken, direct []target) string {
	problems := make([]string, len(direct))
	slots := make(chan struct{}, manyCanaries)
	var wg sync.WaitGroup
	for i, t := range direct {
		slots <- struct{}{}
		wg.Go(func() {
			problems[i] = explain(t, m.agents.canary(ctx, t))
			<-slots
		})
	}
	wg.Wait()
	if problem := cmp.Or(problems...); problem != "" {
		return problem
	}
	for _, p := range taken {
		for _, t := range m.throughServices(ctx, w, p, direct) {
			err := m.agents.canary(ctx, t)
			for err != nil && ctx.Err() == nil { // kube-proxy may not know of the pods yet
				select {
				case <-ctx.Done():
				case <-time.After(proofPause):
					if e := m.agents.canary(ctx, t); ctx.Err() == nil {
						err = e
					}
				}
			}
			if problem := explain(t, err); problem != "" {
				return problem
			}
		}
	}
	return ""
}

// throughServices are the services of a port that lead to nothing but the agents.
func (m *Manager) throughServices(ctx context.Context, w *workload, p inject.Taken, direct []target) []target {
	var out []target
	for _, sp := range p.Services {
		var svc corev1.Service
		if p.Protocol != corev1.ProtocolTCP || m.ctrl.GetClient().Get(ctx, client.ObjectKey{Namespace: w.key.Namespace, Name: sp.Service}, &svc) != nil {
			continue
		}
		ip, err := netip.ParseAddr(svc.Spec.ClusterIP)
		if err != nil || len(svc.Spec.Selector) == 0 { // headless
			continue
		}
		t := target{port: portOf(p), addr: netip.AddrPortFrom(ip, uint16(sp.Port)), where: fmt.Sprintf("service %s, port %d", sp.Service, sp.Port)}
		for _, d := range direct {
			if d.port == t.port {
				t.at = append(t.at, d.at...)
			}
		}
		var pods corev1.PodList
		if m.ctrl.GetAPIReader().List(ctx, &pods, client.InNamespace(w.key.Namespace), client.MatchingLabels(svc.Spec.Selector)) != nil {
			continue
		}
		others := slices.ContainsFunc(pods.Items, func(p corev1.Pod) bool {
			return p.Status.Phase == corev1.PodRunning && !slices.ContainsFunc(t.at, func(c *agentConn) bool { return c.pod == p.UID })
		})
		if !others {
			out = append(out, t)
		}
	}
	return out
}

var (
	errElsewhere = errors.New("something else answers")
	errUnknown   = errors.New("the agent could not be told")
)

// explain says what it means that a canary has failed. What is not known is no problem: agents may be older than the manager, or go away.
func explain(t target, err error) string {
	switch {
	case err == nil || errors.Is(err, errUnknown):
		return ""
	case errors.Is(err, errElsewhere):
		return "connections to " + t.where + " do not reach a traffic-agent, something else accepts them: the pods may need a restart"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connections to " + t.where + " are refused, although a traffic-agent listens"
	}
	return "a connection of the traffic-manager's to " + t.where + " is not answered: a NetworkPolicy may keep it out, and others with it"
}

// canary makes a connection that is announced to the agents, and says nothing on it.
func (a *agents) canary(ctx context.Context, t target) error {
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	nonce := rand.Text()
	d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
		source, err := bind(rc, t.addr)
		if err != nil {
			return errors.Join(errUnknown, err)
		}
		for _, c := range t.at {
			if err := tunnel.Control(ctx, c.mux, control.ManagerCanary, control.Canary{Port: t.port, Source: source, Nonce: nonce}, nil); err != nil {
				return errors.Join(errUnknown, err)
			}
		}
		return nil
	}}
	c, err := d.DialContext(ctx, "tcp", t.addr.String())
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	_ = c.SetReadDeadline(deadline)
	got := make([]byte, len(nonce))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != nonce {
		return errElsewhere
	}
	return nil
}

// bind gives a socket the address that connections to dst come from, and a port.
func bind(rc syscall.RawConn, dst netip.AddrPort) (source netip.AddrPort, err error) {
	u, err := net.Dial("udp", dst.String()) // sends nothing
	if err != nil {
		return source, err
	}
	ip := u.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	_ = u.Close()
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: ip.As16()}
	if ip.Is4() {
		sa = &unix.SockaddrInet4{Addr: ip.As4()}
	}
	cerr := rc.Control(func(fd uintptr) {
		if err = unix.Bind(int(fd), sa); err == nil {
			sa, err = unix.Getsockname(int(fd))
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return source, err
	}
	port := 0
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		port = sa.Port
	case *unix.SockaddrInet6:
		port = sa.Port
	}
	return netip.AddrPortFrom(ip, uint16(port)), nil
}
