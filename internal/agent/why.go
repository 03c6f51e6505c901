package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
)

// maxPath is how much of a path is remembered.
const maxPath = 256

// decisions remembers where the last connections and requests of each port have gone, for people who ask why. It knows nothing of ports without
// intercepts, and forgets with the last one.
type decisions struct {
	mu sync.Mutex
	// guarded by mu
	of map[control.Port]*decided // of those that are intercepted or wiretapped
}

// keep begins with the ports of a new table, and forgets the others.
func (d *decisions) keep(t control.Table) {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.of
	d.of = map[control.Port]*decided{}
	for _, i := range t.Items {
		p := control.Port{Protocol: i.Protocol, Number: i.ContainerPort}
		if d.of[p] = old[p]; d.of[p] == nil {
			d.of[p] = &decided{}
		}
	}
}

// decided is a ring.
type decided struct {
	ring [control.MaxDecisions]control.Decision
	n    int // how many there have been
}

// note remembers one. The head is nil for what is no HTTP request.
func (d *decisions) note(p agentcfg.Port, client netip.AddrPort, h match.Head, taker, why string) {
	x := control.Decision{At: time.Now(), Port: control.Port{Protocol: p.Protocol, Number: p.ContainerPort}, Client: client, Taker: taker, Why: why}
	if h != nil {
		x.Method, x.Path = h.Method(), h.Path()
		if len(x.Path) > maxPath {
			x.Path = x.Path[:maxPath] + "…"
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.of[x.Port]; r != nil {
		r.ring[r.n%len(r.ring)] = x
		r.n++
	}
}

// errAway is why nothing is offered to a laptop.
var errAway = errors.New("the laptop does not answer at the moment")

// notTaken is why the app has got what a laptop was to have.
func notTaken(err error) string {
	switch {
	case errors.Is(err, errNoManager):
		return "the agent had no connection to the traffic-manager"
	case errors.Is(err, context.DeadlineExceeded):
		return "the laptop did not take it within " + acceptTimeout.String()
	}
	return err.Error()
}

// instead is why the app has got a request that a laptop was to have; "": none was. The refusals are by intercept.
func (t taken) instead(h match.Head, refusals *sync.Map) string {
	for _, e := range t.intercepts {
		err, refused := refusals.Load(e.intercept)
		if e.away {
			err = errAway
		}
		if (e.away || refused) && e.match.Match(h) {
			return notTaken(err.(error))
		}
	}
	return ""
}

// last returns the last n of a port, the oldest first.
func (d *decisions) last(p control.Port, n int) []control.Decision {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.of[p]
	if r == nil {
		return nil
	}
	var out []control.Decision
	for i := max(r.n-min(n, len(r.ring)), 0); i < r.n; i++ {
		out = append(out, r.ring[i%len(r.ring)])
	}
	return out
}

// why answers control.ManagerWhy.
func (u *uplink) why(body []byte) (any, error) {
	var ask control.AskWhy
	if err := json.Unmarshal(body, &ask); err != nil {
		return nil, err
	}
	out := control.Why{Ports: []control.PortRules{}}
	for _, p := range ask.Ports {
		r := u.table.lookup(p.Protocol, p.Number).explain(ask.Request)
		r.Port = p
		out.Ports = append(out.Ports, r)
		out.Decisions = append(out.Decisions, u.decisions.last(p, ask.Last)...)
	}
	return out, nil
}

// explain tries the rules of a port on a request, if there is one.
func (t taken) explain(r *control.Request) control.PortRules {
	out := control.PortRules{Rules: []control.Rule{}}
	add := func(e engagement, wiretap bool) (takes bool) {
		rule := control.Rule{Intercept: e.intercept, Match: e.match.Rule(), Wiretap: wiretap, Away: e.away}
		if r != nil {
			rule.Unmet = e.match.Unmet(r)
		}
		out.Rules = append(out.Rules, rule)
		return r != nil && rule.Unmet == ""
	}
	decided := false
	for _, e := range t.intercepts {
		if add(e, false) && !decided {
			out.Taker, decided = e.to(), true
		}
	}
	for _, e := range t.wiretaps {
		add(e, true)
	}
	return out
}
