package web

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/mail"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

func (s *Site) apiRoutes(mux *http.ServeMux) {
	mux.Handle("POST "+relayapi.PathWho, s.api(func(w http.ResponseWriter, r *http.Request) { s.answer(w, whoOf(meOf(r))) }))
	mux.Handle("POST "+relayapi.PathAddToken, s.laptop(s.addToken))
	mux.Handle("POST "+relayapi.PathListTokens, s.laptop(s.listTokens))
	mux.Handle("POST "+relayapi.PathDeleteToken, s.laptop(s.deleteToken))
	mux.Handle("POST "+relayapi.PathAddCluster, s.api(s.addCluster))
	mux.Handle("POST "+relayapi.PathCreatePreview, s.api(s.createPreview))
	mux.Handle("POST "+relayapi.PathListPreviews, s.api(s.listPreviews))
	mux.Handle("POST "+relayapi.PathPublishPreview, s.api(s.publishPreview))
	mux.Handle("POST "+relayapi.PathDeletePreview, s.api(s.deletePreview))
	mux.Handle("POST "+relayapi.PathSharePreview, s.api(s.sharePreview))
}

// api is for laptops and programs, which show their token; cookies count for nothing.
func (s *Site) api(fn http.HandlerFunc) http.Handler { return s.bearer(fn, store.Laptop, store.API) }

// laptop is for laptops alone: a program's token makes no others, and ends none.
func (s *Site) laptop(fn http.HandlerFunc) http.Handler { return s.bearer(fn, store.Laptop) }

// loggedOut is what those are told whose token does not count.
const loggedOut = "not logged in, or no longer"

func (s *Site) bearer(fn http.HandlerFunc, kinds ...store.Kind) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		var m *me
		var err error
		for _, kind := range kinds {
			if m == nil && err == nil && ok {
				m, err = s.who(r.Context(), kind, token)
			}
		}
		switch {
		case err != nil:
			s.broken(w, r, err)
		case m == nil:
			s.refuse(w, http.StatusUnauthorized, loggedOut)
		default:
			fn(w, r.WithContext(context.WithValue(r.Context(), meKey{}, m)))
		}
	})
}

func (s *Site) read(w http.ResponseWriter, r *http.Request, v any) bool {
	d := json.NewDecoder(r.Body)
	if err := d.Decode(v); err != nil {
		s.refuse(w, http.StatusBadRequest, "the request is not what was expected: "+err.Error())
		return false
	}
	return true
}

func (s *Site) answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the laptop may have gone
}

func (s *Site) refuse(w http.ResponseWriter, status int, why string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(relayapi.Problem{Error: why}) // as above
}

func (s *Site) broken(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, secret.ErrBusy) {
		w.Header().Set("Retry-After", "5")
		s.refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	s.cfg.Log.Error("request failed", "path", r.URL.Path, "err", err)
	s.refuse(w, http.StatusInternalServerError, "the relay has a problem of its own")
}

// team is the one that is meant: by name, or the only one in which the person has the role.
func team(m *me, name string, role store.Role) (store.Team, string) {
	var found []store.Team
	for _, t := range m.Teams {
		if (name == "" || t.Team.Name == name) && (role != store.Admin || t.Role == store.Admin) {
			found = append(found, t.Team)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], ""
	case len(found) > 1:
		return store.Team{}, "you are in several teams: say which"
	case role == store.Admin:
		return store.Team{}, errNotAdmin.Error()
	}
	return store.Team{}, "you are in no such team"
}

func (s *Site) addCluster(w http.ResponseWriter, r *http.Request) {
	var req relayapi.AddClusterRequest
	if !s.read(w, r, &req) {
		return
	}
	t, problem := team(meOf(r), req.Team, store.Admin)
	if problem != "" {
		s.refuse(w, http.StatusForbidden, problem)
		return
	}
	if req.Name = strings.TrimSpace(req.Name); !isClusterName(req.Name) {
		s.refuse(w, http.StatusBadRequest, errClusterName.Error())
		return
	}
	c, token, err := s.newCluster(r, t, req.Name)
	switch {
	case errors.Is(err, store.ErrTaken):
		s.refuse(w, http.StatusConflict, "the team has a cluster of that name; choose another")
	case err != nil:
		s.broken(w, r, err)
	default:
		s.answer(w, relayapi.AddClusterResult{ID: c.ID, Name: c.Name, Token: token})
	}
}

// newCluster makes a cluster known and returns its first token.
func (s *Site) newCluster(r *http.Request, t store.Team, name string) (store.Cluster, string, error) {
	c, err := s.cfg.Store.AddCluster(r.Context(), t.ID, name)
	if err != nil {
		return c, "", err
	}
	token, err := s.cfg.Store.AddToken(r.Context(), store.Token{Kind: store.Link, Subject: c.ID}, 0)
	if err == nil {
		s.audit(r, meOf(r).Email, "cluster added", name)
	}
	return c, token, err
}

func (s *Site) createPreview(w http.ResponseWriter, r *http.Request) {
	var req relayapi.CreatePreviewRequest
	if !s.read(w, r, &req) {
		return
	}
	m := meOf(r)
	c, err := s.cfg.Store.Cluster(r.Context(), req.Cluster)
	role := store.Role("")
	if err == nil {
		role, err = s.cfg.Store.RoleOf(r.Context(), c.Team, m.ID)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		s.broken(w, r, err)
		return
	}
	if role == "" {
		s.refuse(w, http.StatusNotFound, "there is no such cluster, or you are not in its team")
		return
	}
	if len(req.Name)+len(req.Namespace)+len(req.Workload)+len(req.Authority) > 1024 || strings.ContainsAny(req.Authority, " /\\\r\n") {
		s.refuse(w, http.StatusBadRequest, "a name is too long, or the host is none")
		return
	}
	if p := req.Propagate; p != "" && p != match.Baggage && p != match.TraceState {
		s.refuse(w, http.StatusBadRequest, "a preview's ID is carried by baggage or tracestate")
		return
	}
	p, made, err := s.cfg.Store.AddPreview(r.Context(), store.Preview{
		Cluster: c.ID, Owner: m.ID, Name: req.Name, Namespace: req.Namespace, Workload: req.Workload, Authority: req.Authority, Propagate: req.Propagate,
	})
	if err != nil {
		s.broken(w, r, err)
		return
	}
	if made {
		s.audit(r, m.Email, "preview created", p.Host)
	}
	v, err := s.view(r.Context(), p, m)
	if err != nil {
		s.broken(w, r, err)
		return
	}
	v.New = made
	s.answer(w, v)
}

func (s *Site) answerPreview(w http.ResponseWriter, r *http.Request, p store.Preview) {
	v, err := s.view(r.Context(), p, meOf(r))
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.answer(w, v)
}

// urlOf is a preview's link.
func (s *Site) urlOf(p store.Preview) string {
	u := *s.cfg.Base
	u.Host, u.Path = p.Host+"."+s.cfg.Base.Host, "/"
	return u.String()
}

// view is a preview for people and laptops.
func (s *Site) view(ctx context.Context, p store.Preview, m *me) (relayapi.Preview, error) {
	shared, err := s.cfg.Store.Shares(ctx, p.ID)
	v := relayapi.Preview{
		URL: s.urlOf(p), Host: p.Host, Name: p.Name, Cluster: p.ClusterName, Namespace: p.Namespace, Workload: p.Workload,
		Owner: p.OwnerEmail, Mine: p.Owner == m.ID, State: s.state(p), Public: p.Open(time.Now()), Shared: shared, Created: p.Created,
	}
	if v.Mine {
		v.ID = p.ID
	}
	if v.Public {
		v.Password = p.Password != ""
		if !p.Expires.IsZero() {
			v.Expires = &p.Expires
		}
	}
	return v, err
}

// state says whether there is something to be seen.
func (s *Site) state(p store.Preview) string {
	c, ok := s.cfg.Links.State(p.Cluster)
	if !ok {
		return "cluster away"
	}
	for _, l := range c.Previews {
		switch {
		case l.ID != p.ID:
		case l.Laptop:
			return "active"
		default:
			return "laptop away"
		}
	}
	return "not intercepted"
}

func (s *Site) listPreviews(w http.ResponseWriter, r *http.Request) {
	all, err := s.cfg.Store.Previews(r.Context(), meOf(r).ID)
	out := relayapi.PreviewList{Previews: []relayapi.Preview{}}
	for _, p := range all {
		var v relayapi.Preview
		if v, err = s.view(r.Context(), p, meOf(r)); err != nil {
			break
		}
		out.Previews = append(out.Previews, v)
	}
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.answer(w, out)
}

// errMayNot says that a person may see a preview, but not change it.
var errMayNot = errors.New("only the preview's owner and admins of the team may do that")

// errSeveral says that a name does not tell which preview is meant: one person's intercepts may have the same in several namespaces and clusters.
var errSeveral = errors.New("several of your previews have that name; say which one by its link")

// changeable finds a preview by its label, or by the name of the person's intercept, if the person may change it.
func (s *Site) changeable(ctx context.Context, m *me, name string) (store.Preview, error) {
	all, err := s.cfg.Store.Previews(ctx, m.ID)
	if err != nil {
		return store.Preview{}, err
	}
	p, err := s.meant(all, m, name)
	if err != nil {
		return p, err
	}
	may, err := s.access.MayChange(ctx, p, m.ID)
	if err == nil && !may {
		err = errMayNot
	}
	return p, err
}

// meant is the preview that a person calls by a name: a label comes before the name of an intercept.
func (s *Site) meant(all []store.Preview, m *me, name string) (store.Preview, error) {
	label := relayapi.Label(name)
	var named []store.Preview
	for _, p := range all {
		if p.Host == label {
			return p, nil
		}
		if p.Owner == m.ID && p.Name == name {
			named = append(named, p)
		}
	}
	switch len(named) {
	case 0:
		return store.Preview{}, store.ErrNotFound
	case 1:
		return named[0], nil
	}
	var which []string
	for _, p := range named {
		which = append(which, s.urlOf(p)+" (in "+p.Namespace+" of "+p.ClusterName+")")
	}
	return store.Preview{}, fmt.Errorf("%w: %s", errSeveral, strings.Join(which, ", "))
}

// change does something with a preview, for a laptop.
func (s *Site) change(w http.ResponseWriter, r *http.Request, name string, fn func(p store.Preview) error) {
	p, err := s.changeable(r.Context(), meOf(r), name)
	if err == nil {
		err = fn(p)
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		s.refuse(w, http.StatusNotFound, "there is no such preview")
	case errors.Is(err, errMayNot):
		s.refuse(w, http.StatusForbidden, err.Error())
	case errors.Is(err, errNoAccount), errors.Is(err, errSeveral):
		s.refuse(w, http.StatusConflict, err.Error())
	case err != nil:
		s.broken(w, r, err)
	}
	if err != nil {
		return
	}
	if p, err = s.cfg.Store.PreviewByHost(r.Context(), p.Host); errors.Is(err, store.ErrNotFound) { // it was deleted
		s.answer(w, struct{}{})
		return
	}
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.answerPreview(w, r, p)
}

func (s *Site) publishPreview(w http.ResponseWriter, r *http.Request) {
	var req relayapi.PublishRequest
	if !s.read(w, r, &req) {
		return
	}
	if len(req.Password) > secret.MaxPassword || req.For < 0 {
		s.refuse(w, http.StatusBadRequest, "the password is too long, or the time below zero")
		return
	}
	s.change(w, r, req.Preview, func(p store.Preview) error {
		if !req.Public {
			return s.unpublish(r, p)
		}
		var until time.Time
		if req.For > 0 {
			until = time.Now().Add(req.For)
		}
		return s.publish(r, p, until, req.Password, !req.NoPassword)
	})
}

// publish makes a preview public until a time (zero: until that is taken back), with another password if one is given, and else with the one that it
// has, if that is to be kept.
func (s *Site) publish(r *http.Request, p store.Preview, until time.Time, password string, keep bool) error {
	var hash *string
	switch {
	case password != "":
		h, err := s.cfg.Passwords.Hash(r.Context(), password)
		if err != nil {
			return err
		}
		hash = &h
	case !keep:
		hash = new(string)
	}
	err := s.cfg.Store.Publish(r.Context(), p.ID, true, until, hash)
	if err == nil {
		s.audit(r, meOf(r).Email, "preview published", p.Host)
	}
	return err
}

// unpublish ends that; the password is forgotten.
func (s *Site) unpublish(r *http.Request, p store.Preview) error {
	err := s.cfg.Store.Publish(r.Context(), p.ID, false, time.Time{}, new(string))
	if err == nil {
		s.audit(r, meOf(r).Email, "preview unpublished", p.Host)
	}
	return err
}

func (s *Site) deletePreview(w http.ResponseWriter, r *http.Request) {
	var req relayapi.PreviewRequest
	if !s.read(w, r, &req) {
		return
	}
	s.change(w, r, req.Preview, func(p store.Preview) error { return s.remove(r, p) })
}

func (s *Site) remove(r *http.Request, p store.Preview) error {
	err := s.cfg.Store.DeletePreview(r.Context(), p.ID)
	if err == nil {
		s.audit(r, meOf(r).Email, "preview deleted", p.Host)
	}
	return err
}

func (s *Site) sharePreview(w http.ResponseWriter, r *http.Request) {
	var req relayapi.ShareRequest
	if !s.read(w, r, &req) {
		return
	}
	if !isAddress(req.Email) {
		s.refuse(w, http.StatusBadRequest, "that is not an e-mail address")
		return
	}
	s.change(w, r, req.Preview, func(p store.Preview) error { return s.share(r, p, req) })
}

// errNoAccount says that a preview is not shared with an address. Where accounts have passwords nobody proves theirs, so that whoever is invited to any team
// could take one that is shared with.
var errNoAccount = errors.New("nobody has an account here with that e-mail address; invite them first")

// share lets the person with an e-mail address see a preview, or no longer.
func (s *Site) share(r *http.Request, p store.Preview, req relayapi.ShareRequest) error {
	if s.oidc == nil && !req.Remove {
		if _, err := s.cfg.Store.PersonByEmail(r.Context(), req.Email); errors.Is(err, store.ErrNotFound) {
			return errNoAccount
		} else if err != nil {
			return err
		}
	}
	err := s.cfg.Store.Share(r.Context(), p.ID, req.Email, req.Remove)
	if err == nil {
		what := map[bool]string{false: "preview shared", true: "preview no longer shared"}[req.Remove]
		s.audit(r, meOf(r).Email, what, p.Host+" "+store.Email(req.Email))
	}
	return err
}

// isAddress says whether somebody may have an e-mail address: one alone, without a name.
func isAddress(s string) bool {
	a, err := mail.ParseAddress(s)
	return err == nil && a.Address == strings.TrimSpace(s) && len(s) <= 254
}
