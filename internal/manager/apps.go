package manager

import (
	"context"
	"errors"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// appsOf are the containers whose environment and files the agents of a workload are to have: those of the ports that are taken, and those
// that intercepts without a port are of.
func appsOf(gs []engagement, taken []inject.Taken) []string {
	var out []string
	for _, t := range taken {
		out = append(out, t.Container)
	}
	for _, g := range gs {
		if !g.Ending {
			out = append(out, g.Shown)
		}
	}
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(name string) bool { return name == "" })
}

// shown finds an agent for the environment and the files of a session's intercept. That object is the permission: the API server let the
// session's user create it in the workload's namespace.
func (a *agents) shown(session, intercept types.UID) (*agentConn, engagement, error) {
	g, ok := a.m.engaged.get(intercept)
	if !ok || g.Session != session || g.Shown == "" {
		return nil, g, &mux.RejectError{Code: wire.CodeNotFound, Msg: "no such intercept"}
	}
	c := a.serving(g, func(c *agentConn) bool { return c.cfg != nil && c.cfg.Shows(g.Shown) })
	if c == nil && a.serving(g, nil) != nil {
		return nil, g, &mux.RejectError{Code: wire.CodeNotFound, Msg: "the traffic-agents in the pods of " + g.Workload.Name + " do not have what is in container " + g.Shown}
	}
	if c == nil {
		return nil, g, &mux.RejectError{Code: wire.CodeUnreachable, Msg: "no pod of " + g.Workload.Name + " has an agent that is connected"}
	}
	return c, g, nil
}

// environment is what the container of an intercept has, but for what the administrator keeps from laptops. It is passed on and never logged.
func (a *agents) environment(ctx context.Context, session, intercept types.UID) (control.Environment, error) {
	var out control.Environment
	c, g, err := a.shown(session, intercept)
	if err != nil {
		return out, err
	}
	if err := tunnel.Control(ctx, c.mux, control.ManagerEnvironment, control.AskEnvironment{Container: g.Shown}, &out); err != nil {
		return out, err
	}
	_, out.Pod, _ = strings.Cut(c.podName, "/")
	out.Hidden = hiddenVariables(a.m.cfg.HiddenVariables)
	for _, name := range out.Hidden {
		delete(out.Variables, name)
	}
	return out, nil
}

// hiddenVariables are the names in the administrator's list.
func hiddenVariables(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
}

// files joins a laptop with the file server in a pod.
func (a *agents) files(session types.UID, r *mux.Request, intercept string) {
	c, _, err := a.shown(session, types.UID(intercept))
	if err == nil {
		ctx, cancel := context.WithTimeout(r.Context(), dialTimeout)
		var out *mux.Stream
		out, _, err = c.mux.Open(ctx, wire.AppendFiles(nil, intercept))
		cancel()
		if err == nil {
			in, err := r.Accept(nil)
			if err != nil {
				out.Reset()
				return
			}
			_ = tunnel.Join(wire.ProtoTCP, in, out) // how it ended is between its two ends
			return
		}
	}
	code := wire.CodeOf(err)
	var re *mux.RejectError
	if errors.As(err, &re) {
		code = re.Code
	}
	_ = r.Reject(code, err.Error())
}
