package agent

import (
	"context"
	"sync"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// maxNotes bounds what the manager is told on a tunnel: a few things of each port.
const maxNotes = 64

// notes are what the manager is told about ports: each once on a tunnel, as a new one may lead to another manager.
type notes struct {
	mu sync.Mutex
	// guarded by mu
	on   *mux.Session
	told map[control.Note]bool // without what others have said, of whom each may say something else: the first stands for all
}

// note tells the manager something about a port that people should know who intercept it, with what others have said about it.
func (a *Agent) note(p *port, text, said string) {
	n := control.Note{Port: control.Port{Protocol: p.cfg.Protocol, Number: p.cfg.ContainerPort}, Text: text}
	if s := a.up.link.Session(); s != nil {
		a.up.tell(s, n, said)
	}
}

// tell sends a note by a tunnel.
func (u *uplink) tell(s *mux.Session, n control.Note, said string) {
	if !u.notes.isNew(s, n) {
		return
	}
	n.Text += said
	u.cfg.Log.Warn("not split", "port", n.Port.Number, "why", n.Text)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
		defer cancel()
		if err := tunnel.Control(ctx, s, control.AgentNote, n, nil); err != nil {
			u.cfg.Log.Debug("manager not told", "err", err)
		}
	}()
}

func (t *notes) isNew(s *mux.Session, n control.Note) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.on != s {
		t.on, t.told = s, map[control.Note]bool{}
	}
	if t.told[n] || len(t.told) >= maxNotes {
		return false
	}
	t.told[n] = true
	return true
}
