package web

import (
	"errors"
	"net/http"
	"net/url"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

func (s *Site) peopleRoutes(mux *http.ServeMux) {
	mux.Handle("POST /people/invite", s.private(s.invite))
	mux.Handle("POST /people/uninvite", s.private(s.uninvite))
	mux.Handle("POST /people/role", s.private(s.changeRole))
	mux.Handle("POST /people/disable", s.private(s.disable))
}

// teamView is a team for one of its people.
type teamView struct {
	store.Team
	Admin   bool // the person who looks is one
	Members []store.TeamMember
	Invites []store.Token // for admins
}

// peopleView is the page People.
type peopleView struct {
	Teams    []teamView
	Teamless []store.Person // for admins of any team
}

func (s *Site) people(w http.ResponseWriter, r *http.Request) {
	s.peopleAgain(w, r, http.StatusOK, "")
}

// peopleAgain shows the page, with what was wrong with a form on it.
func (s *Site) peopleAgain(w http.ResponseWriter, r *http.Request, status int, problem string) {
	var view peopleView
	for _, t := range meOf(r).Teams {
		v := teamView{Team: t.Team, Admin: t.Role == store.Admin}
		var err error
		if v.Members, err = s.cfg.Store.Members(r.Context(), t.Team.ID); err == nil && v.Admin {
			v.Invites, err = s.cfg.Store.Tokens(r.Context(), store.Invite, t.Team.ID, "")
		}
		if err != nil {
			s.fail(w, r, err)
			return
		}
		view.Teams = append(view.Teams, v)
	}
	if len(meOf(r).Admins()) > 0 {
		var err error
		if view.Teamless, err = s.cfg.Store.Teamless(r.Context()); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	s.render(w, r, status, "people.html", "People", view, problem)
}

// errNotAdmin says that a person is in a team, but no admin of it.
var errNotAdmin = errors.New("only admins of the team may do that")

// administer finds a team of the person, if they are an admin of it.
func (m *me) administer(team string) (store.Team, error) {
	for _, t := range m.Teams {
		switch {
		case t.Team.ID != team:
		case t.Role == store.Admin:
			return t.Team, nil
		default:
			return t.Team, errNotAdmin
		}
	}
	return store.Team{}, store.ErrNotFound
}

// denied answers for what could not be done on a page.
func (s *Site) denied(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.Is(err, store.ErrNotFound):
		s.missing(w, r)
	case errors.Is(err, errNotAdmin), errors.Is(err, errMayNot):
		s.render(w, r, http.StatusForbidden, "message.html", "Not allowed", sentence(err), "")
	case errors.Is(err, errSeveral):
		s.render(w, r, http.StatusConflict, "message.html", "Which one?", sentence(err), "")
	default:
		s.fail(w, r, err)
	}
}

// issued is a secret that is shown once.
type issued struct{ Text, Secret, Back string }

// invite makes a link with which one person makes an account in a team.
func (s *Site) invite(w http.ResponseWriter, r *http.Request) {
	m, role := meOf(r), store.Role(r.PostFormValue("role"))
	t, err := m.administer(r.PostFormValue("team"))
	if err != nil {
		s.denied(w, r, err)
		return
	}
	if role != store.Member && role != store.Admin {
		s.peopleAgain(w, r, http.StatusBadRequest, "There is no such role.")
		return
	}
	token, err := s.cfg.Store.AddTokenBy(r.Context(), m.Token, store.Token{Kind: store.Invite, Person: m.ID, Subject: t.ID, Data: string(role)}, inviteLife)
	if err != nil {
		s.ended(w, r, err)
		return
	}
	s.audit(r, m.Email, "invited", string(role)+" of "+t.Name)
	s.render(w, r, http.StatusOK, "issued.html", "Invitation", issued{
		"Give this link to one person. It makes them " + string(role) + " of " + t.Name + ", counts once and for a week, and is not shown again.",
		s.link("/invite", url.Values{"token": {token}}), "/people",
	}, "")
}

// uninvite takes an invitation back.
func (s *Site) uninvite(w http.ResponseWriter, r *http.Request) {
	m := meOf(r)
	t, err := s.cfg.Store.TokenByHash(r.Context(), store.Invite, r.PostFormValue("invitation"))
	var of store.Team
	if err == nil {
		of, err = m.administer(t.Subject)
	}
	if err == nil {
		err = s.cfg.Store.Revoke(r.Context(), t.Hash)
	}
	if err != nil {
		s.denied(w, r, err)
		return
	}
	s.audit(r, m.Email, "invitation taken back", t.Data+" of "+of.Name)
	http.Redirect(w, r, "/people", http.StatusSeeOther)
}

// member finds a person of a team that the person who asks is an admin of.
func (s *Site) member(r *http.Request) (store.Team, store.TeamMember, error) {
	t, err := meOf(r).administer(r.PostFormValue("team"))
	if err != nil {
		return t, store.TeamMember{}, err
	}
	all, err := s.cfg.Store.Members(r.Context(), t.ID)
	if err != nil {
		return t, store.TeamMember{}, err
	}
	for _, p := range all {
		if p.ID == r.PostFormValue("person") {
			return t, p, nil
		}
	}
	return t, store.TeamMember{}, store.ErrNotFound
}

// changeRole gives a person of a team another role in it, or takes them out.
func (s *Site) changeRole(w http.ResponseWriter, r *http.Request) {
	t, p, err := s.member(r)
	if err != nil {
		s.denied(w, r, err)
		return
	}
	role, did := store.Role(r.PostFormValue("role")), ""
	switch role {
	case store.Member, store.Admin:
		did = "role changed"
	case "out":
		role, did = "", "taken out of team"
	default:
		s.peopleAgain(w, r, http.StatusBadRequest, "There is no such role.")
		return
	}
	err = s.cfg.Store.SetMember(r.Context(), t.ID, p.ID, role)
	s.personChanged(w, r, err, did, p.Email+" "+string(role)+" of "+t.Name)
}

// account finds whose account a form is about: a person's of a team that the person who asks is an admin of, or of none, which takes an admin of any.
func (s *Site) account(r *http.Request) (store.Person, error) {
	if r.PostFormValue("team") != "" {
		_, p, err := s.member(r)
		return p.Person, err
	}
	if len(meOf(r).Admins()) == 0 {
		return store.Person{}, errNotAdmin
	}
	all, err := s.cfg.Store.Teamless(r.Context())
	if err != nil {
		return store.Person{}, err
	}
	for _, p := range all {
		if p.ID == r.PostFormValue("person") {
			return p, nil
		}
	}
	return store.Person{}, store.ErrNotFound
}

// disable ends an account's logins, or lets it log in again. An account is everywhere the same: it takes an admin of all its teams.
func (s *Site) disable(w http.ResponseWriter, r *http.Request) {
	p, err := s.account(r)
	if err != nil {
		s.denied(w, r, err)
		return
	}
	teams, err := s.cfg.Store.Memberships(r.Context(), p.ID)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	for _, t := range teams {
		if _, err := meOf(r).administer(t.Team.ID); err != nil {
			s.peopleAgain(w, r, http.StatusForbidden, "They are in another team too, of which you are no admin. You can take them out of yours.")
			return
		}
	}
	disabled, did := r.PostFormValue("disabled") == "true", "account enabled"
	if disabled {
		did = "account disabled"
	}
	s.personChanged(w, r, s.cfg.Store.SetDisabled(r.Context(), p.ID, disabled), did, p.Email)
}

func (s *Site) personChanged(w http.ResponseWriter, r *http.Request, err error, did, detail string) {
	switch {
	case errors.Is(err, store.ErrLastAdmin):
		s.peopleAgain(w, r, http.StatusConflict, sentence(err)+" Make somebody else an admin first.")
	case err != nil:
		s.denied(w, r, err)
	default:
		s.audit(r, meOf(r).Email, did, detail)
		http.Redirect(w, r, "/people", http.StatusSeeOther)
	}
}
