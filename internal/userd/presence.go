package userd

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// machine is what relays may see and ask of this machine: connections to clusters that are joined to them, and nothing of others.
type machine struct{ d *Daemon }

func (d *Daemon) newPresence() *relayclient.Presence {
	host, err := os.Hostname()
	if err != nil {
		host = "a laptop"
	}
	return relayclient.NewPresence(relayclient.PresenceConfig{Logins: d.cfg.Logins, Machine: machine{d}, Host: host, Log: d.log})
}

// relayOf is the relay that a session's cluster is joined to, and what that knows it as.
func (s *session) relayOf() (url, cluster string) {
	s.intercepts.mu.Lock()
	defer s.intercepts.mu.Unlock()
	r := s.intercepts.relay
	if r == nil || r.Cluster == "" {
		return "", ""
	}
	url, err := relayclient.URL(r.URL)
	if err != nil {
		return "", ""
	}
	return url, r.Cluster
}

// Connections implements relayclient.Machine.
func (m machine) Connections(relay string) []relayapi.Connection {
	out := []relayapi.Connection{}
	for _, s := range m.d.all() {
		if url, cluster := s.relayOf(); url == relay {
			out = append(out, relayapi.Connection{Name: s.cfg.name, Cluster: cluster, Namespace: s.cluster.Namespace})
		}
	}
	return out
}

// session finds a connection of a relay's.
func (m machine) session(relay, name string) (*session, error) {
	all := slices.DeleteFunc(m.d.all(), func(s *session) bool {
		url, _ := s.relayOf()
		return s.cfg.name != name || url != relay
	})
	if len(all) == 0 {
		return nil, uerr.New(uerr.NotConnected, "connect the laptop with: doppel connect", "the laptop is not connected as %q to a cluster of this relay", name)
	}
	return all[0], nil
}

// Workloads implements relayclient.Machine.
func (m machine) Workloads(ctx context.Context, relay string, req relayapi.WorkloadsRequest) (relayapi.Workloads, error) {
	out := relayapi.Workloads{Workloads: []string{}}
	s, err := m.session(relay, req.Connection)
	if err != nil {
		return out, err
	}
	list, err := s.list(ctx, localapi.ListRequest{Namespace: req.Namespace})
	for _, w := range list.Workloads {
		out.Workloads = append(out.Workloads, w.Kind+"/"+w.Name)
	}
	return out, err
}

// Intercept implements relayclient.Machine.
func (m machine) Intercept(ctx context.Context, relay string, w relayapi.Wish, progress func(string)) (end func(context.Context) error, err error) {
	s, err := m.session(relay, w.Connection)
	if err != nil {
		return nil, err
	}
	_, err = s.intercepts.create(ctx, wished(w), func(format string, args ...any) { progress(fmt.Sprintf(format, args...)) })
	if err != nil {
		return nil, err
	}
	return s.intercepts.ending(w.Name()), nil
}

// wished is an intercept as a relay's page may wish for it: to a port of the loopback, without files, and without taking anything from anybody.
func wished(w relayapi.Wish) localapi.InterceptRequest {
	req := localapi.InterceptRequest{
		Name: w.Name(), Workload: w.Workload, Namespace: w.Namespace, Address: loopback.String(), Ports: []string{fmt.Sprint(w.Local)}, Mount: localapi.MountRequest{None: true},
	}
	if w.Port != "" {
		req.Ports[0] += ":" + w.Port
	}
	if w.Header != "" {
		req.Match.Headers = []match.Header{{Name: w.Header, Text: match.Text{Op: match.Equal, Value: w.Value}}}
	}
	return req
}

// relays is what there is to tell of relays, for status.
func (d *Daemon) relays() (out []localapi.RelayState) {
	if d.presence == nil {
		return nil
	}
	for _, at := range d.presence.At() {
		r := localapi.RelayState{URL: at.URL, Joined: at.Joined, Problem: at.Problem, Permission: string(at.Permission)}
		for _, w := range at.Waiting {
			r.Waiting = append(r.Waiting, w.String())
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b localapi.RelayState) int { return cmp.Compare(a.URL, b.URL) })
	return out
}
