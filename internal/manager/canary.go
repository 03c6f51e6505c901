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
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// canaryTimeout bounds one connection, and proofTimeout the time in which all for an intercept are begun, or restartedTimeout if pods were restarted for it:
	// kube-proxy needs three seconds for its rules on a node whose processors are busy. Later tries through a service end with that time.
	canaryTimeout    = 700 * time.Millisecond
	proofTimeout     = time.Second
	restartedTimeout = 5 * time.Second
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
	what    string    // the pods that it is about, and their agents' connections
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
	return r.m.proven(w, taken, since, r.patience(in.UID))
}

// patience is how long a proof for an intercept may take.
func (r *interceptReconciler) patience(uid types.UID) time.Duration {
	if re, ok := r.restarted[uid]; ok && !re.done {
		return restartedTimeout
	}
	return proofTimeout
}

// proven says what a proof that began at a time or later has shown, and whether there has been one. It begins another if that is due, if pods are others, or
// after a while.
func (m *Manager) proven(w *workload, taken []inject.Taken, since time.Time, patience time.Duration) (problem string, known bool) {
	direct := m.agents.targets(w, taken)
	if len(direct) == 0 {
		return "", true
	}
	var what strings.Builder
	for _, t := range direct {
		fmt.Fprintf(&what, "%s %p %s\n", t.at[0].pod, t.at[0], t.addr)
	}
	m.proofs.mu.Lock()
	defer m.proofs.mu.Unlock()
	p := m.proofs.getLocked(w.key, fmt.Sprint(taken))
	if !p.running && (p.what != what.String() || p.began.Before(since) || time.Since(p.began) > activePoll) {
		p.running, p.what, p.began = true, what.String(), time.Now()
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
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
				return c.Protocol == string(t.Protocol) && c.ContainerPort == t.ContainerPort
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

// prove makes the connections, to each pod first and then through services, and says what is wrong with one of them. Datagrams are sent through services
// only: where a pod's redirect is gone its app would get them.
func (m *Manager) prove(ctx context.Context, w *workload, taken []inject.Taken, direct []target) string {
	problems := make([]string, len(direct))
	slots := make(chan struct{}, manyCanaries)
	var wg sync.WaitGroup
	for i, t := range direct {
		if t.port.Protocol == string(corev1.ProtocolUDP) {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			if ctx.Err() == nil {
				problems[i] = explain(t, m.agents.canary(context.WithoutCancel(ctx), t)) // one that was cut off would show nothing
			}
			<-slots
		})
	}
	wg.Wait()
	if problem := cmp.Or(problems...); problem != "" {
		return problem
	}
	began := time.Now()
	for _, p := range taken {
		for _, sp := range p.Services {
			var at []*agentConn
			for _, d := range direct {
				if d.port == portOf(p) {
					at = append(at, d.at...)
				}
			}
			if problem := m.proveService(ctx, began, w.key.Namespace, sp, target{port: portOf(p), at: at}); problem != "" {
				return problem
			}
		}
	}
	return ""
}

// proveService makes a connection through a service that leads to nothing but the agents, and again while kube-proxy does not know of the pods yet.
func (m *Manager) proveService(ctx context.Context, began time.Time, ns string, sp inject.ServicePort, t target) string {
	var svc corev1.Service
	if m.ctrl.GetClient().Get(ctx, client.ObjectKey{Namespace: ns, Name: sp.Service}, &svc) != nil {
		return ""
	}
	ip, err := netip.ParseAddr(svc.Spec.ClusterIP)
	if err != nil || len(svc.Spec.Selector) == 0 { // headless
		return ""
	}
	t.addr, t.where = netip.AddrPortFrom(ip, uint16(sp.Port)), fmt.Sprintf("service %s, port %d", sp.Service, sp.Port)
	err = errUnknown
	for alone, tried := false, false; ; {
		if slices.ContainsFunc(t.at, func(c *agentConn) bool { return c.mux.Err() != nil }) {
			return "" // it cannot be told, and its next connection is proven anew
		}
		if !alone || t.port.Protocol == string(corev1.ProtocolUDP) { // by TCP the app would not notice a connection of ours that came to it
			others, ending := m.besides(ctx, ns, svc.Spec.Selector, t.at)
			if others || ending && time.Since(began) >= proofTimeout {
				return ""
			}
			alone = !ending
		}
		if alone {
			try := ctx
			if !tried {
				try = context.WithoutCancel(ctx)
			}
			if e := m.agents.canary(try, t); !tried || !over(ctx) { // one that was cut off shows nothing
				err = e
			}
			tried = true
		}
		if rejected, ok := errors.AsType[*mux.RejectError](err); err == nil || ok && rejected.Code != wire.CodeBusy { // an agent that does not know of such
			return ""
		}
		select {
		case <-ctx.Done():
			return explain(t, err)
		case <-time.After(proofPause):
		}
	}
}

// over says whether the time of ctx is over, also in the moment before it knows of that itself: a socket with its deadline may be sooner.
func over(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

// besides are the pods of a service other than those of agents: whether some run, and whether some that ran are ending.
func (m *Manager) besides(ctx context.Context, ns string, selector map[string]string, at []*agentConn) (others, ending bool) {
	var pods corev1.PodList
	if m.ctrl.GetAPIReader().List(ctx, &pods, client.InNamespace(ns), client.MatchingLabels(selector)) != nil {
		return true, false
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		if p.Status.Phase != corev1.PodRunning || slices.ContainsFunc(at, func(c *agentConn) bool { return c.pod == p.UID }) {
			continue
		}
		others, ending = others || p.DeletionTimestamp == nil, ending || p.DeletionTimestamp != nil
	}
	return others, ending
}

var (
	errElsewhere = errors.New("something else answers")
	errUnknown   = errors.New("the agent could not be told")
)

// explain says what it means that a canary has failed. What is not known is no problem: agents may be older than the manager, or go away.
func explain(t target, err error) string {
	one, all, takes := "a connection", "connections", "accepts"
	if t.port.Protocol == string(corev1.ProtocolUDP) {
		one, all, takes = "a datagram", "datagrams", "answers"
	}
	switch {
	case err == nil || errors.Is(err, errUnknown):
		return ""
	case errors.Is(err, errElsewhere):
		return all + " to " + t.where + " do not reach a traffic-agent, something else " + takes + " them: the pods may need a restart"
	case errors.Is(err, syscall.ECONNREFUSED):
		return all + " to " + t.where + " are refused, although a traffic-agent listens"
	}
	return one + " of the traffic-manager's to " + t.where + " is not answered: a NetworkPolicy may keep it out, and others with it"
}

// canary makes a connection that is announced to the agents, and says nothing on it. By UDP it is a datagram without content, again until it is answered.
func (a *agents) canary(ctx context.Context, t target) error {
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	nonce, method, network := rand.Text(), control.ManagerCanary, "tcp"
	if t.port.Protocol == string(corev1.ProtocolUDP) {
		method, network = control.ManagerCanaryUDP, "udp"
	}
	d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
		source, err := bind(rc, t.addr)
		if err != nil {
			return errors.Join(errUnknown, err)
		}
		for _, c := range t.at {
			if err := tunnel.Control(ctx, c.mux, method, control.Canary{Port: t.port, Source: source, Nonce: nonce}, nil); err != nil {
				return errors.Join(errUnknown, err)
			}
		}
		return nil
	}}
	c, err := d.DialContext(ctx, network, t.addr.String())
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if network == "udp" {
		return hearUDP(c, nonce, deadline)
	}
	_ = c.SetReadDeadline(deadline)
	got := make([]byte, len(nonce))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != nonce {
		return errElsewhere
	}
	return nil
}

// hearUDP sends datagrams without content until one is answered.
func hearUDP(c net.Conn, nonce string, deadline time.Time) error {
	got := make([]byte, len(nonce)+1)
	for {
		if _, err := c.Write(nil); err != nil {
			return err
		}
		wait := time.Now().Add(proofPause)
		if wait.After(deadline) {
			wait = deadline
		}
		_ = c.SetReadDeadline(wait)
		n, err := c.Read(got)
		switch {
		case err == nil && string(got[:n]) != nonce:
			return errElsewhere
		case err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || !time.Now().Before(deadline):
			return err
		}
	}
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
