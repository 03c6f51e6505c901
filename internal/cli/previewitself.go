package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// chance is whether there can be a link that nobody has asked for.
type chance int

const (
	noChance     chance = iota // there is no relay, or its user is not logged in there: nothing is said
	notJoined                  // the cluster is not joined to its relay now
	ingressAsked               // nobody has said yet where requests enter the cluster, and nobody is asked
	canLink
)

// chance looks at what is known of the cluster's relay, and the login there, if there is one.
func (p *previewFlags) chance(r localapi.RelayResult, login relayclient.Login, loggedIn bool) chance {
	switch {
	case r.URL == "" || !loggedIn:
		return noChance
	case r.Cluster == "" || r.Problem != "":
		if len(login.Ingresses) == 0 { // who has never made a link misses none
			return noChance
		}
		return notJoined
	case p.known(login.Ingresses[r.Cluster]).Host == "":
		return ingressAsked
	}
	return canLink
}

// byItself makes a link for an intercept of which nobody has said whether it shall have one: for its user's team alone, if they are logged in at the
// cluster's relay and nothing has to be asked. The intercept waits for previewPatience at most, and goes on without a link if there is none.
func (p *previewFlags) byItself(ctx context.Context, a *app, req localapi.InterceptRequest) (*localapi.Preview, *made) {
	logins, err := a.logins()
	if err != nil || len(logins.All()) == 0 || !slices.ContainsFunc(req.Ports, func(p string) bool { return !strings.HasSuffix(strings.ToLower(p), "/udp") }) {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, previewPatience)
	defer cancel()
	var r localapi.RelayResult
	if err := a.client.Call(ctx, localapi.MethodRelay, localapi.RelayRequest{Choice: req.Choice}, &r, nil); err != nil || r.URL == "" {
		return nil, nil // the intercept itself says what is wrong
	}
	url, err := relayclient.URL(r.URL)
	if err != nil {
		return nil, nil
	}
	login, ok := logins.At(url)
	later := "make one later with: doppel preview create " + req.Name
	switch p.chance(r, login, ok) {
	case noChance:
		return nil, nil
	case notJoined:
		a.noLink(uerr.New(uerr.Cluster, later, "the cluster is not joined to its relay %s: %s", r.URL, r.Problem))
		return nil, nil
	case ingressAsked:
		return nil, &made{hint: "your team can see it through a link: doppel preview create " + req.Name}
	case canLink:
	}
	in := p.known(login.Ingresses[r.Cluster])
	create := relayapi.CreatePreviewRequest{Cluster: r.Cluster, Name: req.Name, Namespace: cmp.Or(req.Namespace, r.Namespace), Workload: cmp.Or(req.Workload, req.Name)}
	client, err := relayclient.New(login)
	var m *made
	if err == nil {
		m, err = p.create(ctx, client, in, create)
	}
	switch {
	case ctx.Err() != nil:
		a.noLink(uerr.New(uerr.Cluster, later, "the relay %s did not answer within %s", r.URL, previewPatience))
		return nil, nil
	case err != nil:
		e := uerr.From(err)
		if e.Kind != uerr.Denied { // then it says how to log in again
			e.Hint = later
		}
		a.noLink(e)
		return nil, nil
	case m.Public || len(m.Shared) > 0: // what was shown to others once is not shown to them again unasked
		return nil, &made{hint: fmt.Sprintf("its link of before is seen by %s; to show it there again: doppel preview create %s", audience(m.Preview), req.Name)}
	}
	m.byItself = true
	return &localapi.Preview{ID: m.ID, Ingress: in}, m
}

// noLink says why there is no link.
func (a *app) noLink(e *uerr.Error) {
	fmt.Fprintf(a.Err, "doppel: warning: no preview link: %s\ndoppel: hint: %s\n", oneLine(e.Msg), oneLine(e.Hint))
}
