// Package agent owns the traffic-agent: it stands in front of an app's ports and decides per connection whether app or laptop answers.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/httproute"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// Config is what an agent needs; every field but PodIP, Environ and ResolvConf is required.
type Config struct {
	Agent     *agentcfg.Config
	Pod       string
	Namespace string
	// PodIP is asked when the app does not listen on 127.0.0.1.
	PodIP string
	// Environ is what Environ returned: the apps' variables are in it.
	Environ []string
	// ResolvConf names the pod's resolvers; default /etc/resolv.conf.
	ResolvConf string
	// Token returns the current projected service account token.
	Token func() (string, error)
	Log   *slog.Logger
	// Level is Log's, changed on the manager's word; nil: it is not.
	Level *xlog.Level
}

// Agent is one pod's traffic-agent.
type Agent struct {
	cfg   Config
	table table
	up    *uplink
	ports []*port
	udp   []*udpPort

	active atomic.Int64    // connections being served
	gone   context.Context // ends when the apps have stopped to listen in a drain
	end    context.CancelFunc
	copies copies // for wiretaps
	http2  *httproute.Budget
}

// http2Memory is what HTTP/2 connections may store for clients and servers that do not read: a quarter of the agent's limit of memory, as it is
// by default (inject.Config.Resources), since the collector lets garbage be as much again.
const http2Memory = 64 << 20

// New validates the configuration; it does not listen yet.
func New(cfg Config) (*Agent, error) {
	if cfg.Agent == nil || cfg.Pod == "" || cfg.Namespace == "" || cfg.Token == nil || cfg.Log == nil {
		return nil, errors.New("agent: incomplete configuration")
	}
	cfg.ResolvConf = cmp.Or(cfg.ResolvConf, resolvConf)
	a := &Agent{cfg: cfg, http2: httproute.NewBudget(http2Memory)}
	a.gone, a.end = context.WithCancel(context.Background())
	a.table.init()
	up, err := newUplink(cfg, &a.table)
	if err != nil {
		return nil, err
	}
	a.up = up
	return a, nil
}

// Run serves until ctx ends and then drains: it goes on as long as the app listens or connections are open.
// Kubernetes bounds the drain with the pod's grace period.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.listen(); err != nil {
		return err
	}
	g := lifecycle.New(context.WithoutCancel(ctx), a.cfg.Log)
	for _, p := range a.ports {
		g.Go("port "+strconv.Itoa(int(p.cfg.ContainerPort)), func(ctx context.Context) error { return p.serve(ctx, a) })
		if p.probes != nil {
			g.Go("probes "+strconv.Itoa(int(p.cfg.ContainerPort)), func(ctx context.Context) error { return p.serveProbes(ctx, a) })
		}
	}
	for _, p := range a.udp {
		g.Go("udp port "+strconv.Itoa(int(p.cfg.ContainerPort)), func(ctx context.Context) error { return p.serve(ctx, a) })
	}
	g.Go("uplink", a.up.run)
	g.Go("health", a.serveHealth)
	g.Go("drain", func(gctx context.Context) error {
		select {
		case <-ctx.Done():
			a.drain(gctx)
			g.Stop()
		case <-gctx.Done():
		}
		return nil
	})
	return g.Wait()
}

// sidecarDrain is how long the agent goes on in front of a native sidecar: for as long as clients may still be sent to the pod.
const sidecarDrain = 5 * time.Second

// drain returns when the app no longer listens and the last connection has ended.
func (a *Agent) drain(ctx context.Context) {
	a.cfg.Log.Info("draining", "connections", a.active.Load())
	start := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if a.gone.Err() == nil && !a.appListens(time.Since(start)) {
			a.end() // of connections that are idle
		}
		if a.gone.Err() != nil && a.active.Load() == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// appListens says whether some app has yet to stop listening. A native sidecar does so only after the agent has ended (KEP-753), and where
// a stand-in is the laptop listens.
func (a *Agent) appListens(draining time.Duration) bool {
	for _, p := range a.cfg.Agent.Ports {
		if p.Sidecar && draining > sidecarDrain {
			continue
		}
		if a.cfg.Agent.StandsIn(p.Container) {
			if draining < agentcfg.StandInDrain {
				return true
			}
			continue
		}
		if listening(p.Protocol, p.ContainerPort) {
			return true
		}
	}
	return false
}

// listen opens every listener before anything is served, so that a port that cannot be had fails the start.
func (a *Agent) listen() error {
	for _, pc := range a.cfg.Agent.Ports {
		if pc.Protocol == "UDP" {
			p, err := listenUDP(pc, a.cfg.PodIP)
			if err != nil {
				return fmt.Errorf("UDP port %d: %w", pc.ContainerPort, err)
			}
			a.udp = append(a.udp, p)
			continue
		}
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", pc.AgentPort))
		if err != nil {
			return fmt.Errorf("port %d: %w", pc.ContainerPort, err)
		}
		p := &port{cfg: pc, listener: l.(*net.TCPListener), podIP: a.cfg.PodIP}
		if pc.ProbePort != 0 {
			if p.probes, err = net.Listen("tcp", fmt.Sprintf(":%d", pc.ProbePort)); err != nil {
				return fmt.Errorf("probe port of %d: %w", pc.ContainerPort, err)
			}
		}
		a.ports = append(a.ports, p)
	}
	return nil
}

// healthTimeout bounds each step of a request at the health port, and the pause before the next one.
const healthTimeout = 5 * time.Second

// readyGrace is how long a fresh pod waits for the manager's table before it takes traffic without one.
const readyGrace = 3 * time.Second

func (a *Agent) serveHealth(ctx context.Context) error {
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", a.cfg.Agent.HealthPort))
	if err != nil {
		return err
	}
	started := time.Now()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !a.table.known() && time.Since(started) < readyGrace {
			http.Error(w, "waiting for the manager's table", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /metrics", a.serveMetrics)
	mux.Handle("GET "+agentcfg.CallPath, tunnel.UpgradeHandler(a.up.answer))
	for _, p := range a.ports { // TCP probes of redirected ports
		mux.HandleFunc("GET "+agentcfg.AppPath(p.cfg.ContainerPort), func(w http.ResponseWriter, r *http.Request) {
			c, err := p.dialApp(r.Context())
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			_ = c.Close()
		})
	}
	// Any pod reaches it, and none of them holds a connection by saying nothing.
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: healthTimeout, ReadTimeout: healthTimeout, WriteTimeout: healthTimeout, IdleTimeout: healthTimeout}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
