package web

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/preview"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

func (s *Site) accountRoutes(mux *http.ServeMux) {
	mux.Handle("GET /login", s.public(s.loginPage))
	if s.oidc != nil {
		s.oidcRoutes(mux)
	}
	mux.Handle("POST /logout", s.private(s.logout))
	mux.Handle("GET /setup", s.public(s.joinPage(store.Setup)))
	mux.Handle("GET /invite", s.public(s.joinPage(store.Invite)))
	mux.Handle("POST /join", s.private(s.joinTeam))
	mux.Handle("GET /account", s.private(s.accountPage))
	mux.Handle("POST /account/end", s.private(s.endLogin))
}

// SetupURL returns a new link with which the first admin is made, or "" if there is one. Those that were returned before count, too: another relay on the
// same database may have printed one. All end when one of them is used.
func (s *Site) SetupURL(ctx context.Context) (string, error) {
	empty, err := s.cfg.Store.Empty(ctx)
	if err != nil || !empty {
		return "", err
	}
	token, err := s.cfg.Store.AddToken(ctx, store.Token{Kind: store.Setup}, setupLife)
	return s.link("/setup", url.Values{"token": {token}}), err
}

func (s *Site) link(path string, query url.Values) string { return pageURL(s.cfg.Base, path, query) }

// pageURL is where a page of the relay at base is.
func pageURL(base *url.URL, path string, query url.Values) string {
	u := base.JoinPath(path)
	u.RawQuery = query.Encode()
	return u.String()
}

// loginForm is what the login page shows again.
type loginForm struct{ Email, Next string }

func (s *Site) loginPage(w http.ResponseWriter, r *http.Request) {
	next := preview.LocalPath(r.FormValue("next"))
	if meOf(r) != nil {
		http.Redirect(w, r, next, http.StatusSeeOther)
		return
	}
	s.render(w, r, http.StatusOK, "login.html", "Log in", loginForm{Next: next}, "")
}

// loggedIn gives the browser a login of its own, whatever it had before.
func (s *Site) loggedIn(w http.ResponseWriter, r *http.Request, p store.Person, next string) {
	if m := meOf(r); m != nil {
		if err := s.cfg.Store.Revoke(r.Context(), m.Token); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	token, err := s.cfg.Store.AddLogin(r.Context(), store.Token{Kind: store.Web, Person: p.ID, Data: r.UserAgent()}, webLife, p.Password)
	if errors.Is(err, store.ErrNotFound) {
		s.refused(r, p.Email, "changed meanwhile")
		s.render(w, r, http.StatusUnauthorized, "message.html", "Not logged in", "The account was changed meanwhile. Log in again.", "")
		return
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.audit(r, p.Email, "login", "browser")
	http.SetCookie(w, cookie(token, webLife))
	if strings.HasPrefix(next, "/visit?") { // and from there to a preview
		s.leave(w, r, next)
		return
	}
	http.Redirect(w, r, next, http.StatusSeeOther)
}

func cookie(value string, life time.Duration) *http.Cookie {
	c := &http.Cookie{Name: loginCookie, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, MaxAge: int(life.Seconds())}
	if life <= 0 {
		c.MaxAge = -1
	}
	return c
}

// logout ends the login, and with it the visits and open requests that it led to.
func (s *Site) logout(w http.ResponseWriter, r *http.Request) {
	m := meOf(r)
	if err := s.cfg.Store.Revoke(r.Context(), m.Token); err != nil {
		s.fail(w, r, err)
		return
	}
	s.audit(r, m.Email, "logout", "browser")
	http.SetCookie(w, cookie("", 0))
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// joinForm is what the page for a new account shows again.
type joinForm struct {
	Kind, Token, Email, Name, Team string
	First                          bool
	Named                          bool   // the relay is told the team's name by whoever runs it
	LogIn                          string // leads back here, for those who have an account
}

func newJoinForm(kind store.Kind, token string) joinForm {
	back := "/" + string(kind) + "?" + url.Values{"token": {token}}.Encode()
	return joinForm{Kind: string(kind), Token: token, First: kind == store.Setup, LogIn: "/login?" + url.Values{"next": {back}}.Encode()}
}

// joinPage is where a setup or invitation link leads.
func (s *Site) joinPage(kind store.Kind) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f := newJoinForm(kind, r.FormValue("token"))
		if s.oidc != nil && s.oidc.cfg.Team != "" {
			f.Team, f.Named = s.oidc.cfg.Team, true
		}
		if meOf(r) != nil && kind == store.Invite {
			s.joinTeamPage(w, r)
			return
		}
		if _, err := s.cfg.Store.Token(r.Context(), kind, f.Token); errors.Is(err, store.ErrNotFound) {
			s.deadLink(w, r)
			return
		} else if err != nil {
			s.fail(w, r, err)
			return
		}
		s.render(w, r, http.StatusOK, "join.html", "Make an account", f, "")
	}
}

func (s *Site) deadLink(w http.ResponseWriter, r *http.Request) {
	s.render(w, r, http.StatusNotFound, "message.html", "This link does not work", "It was used already, or it is too old. Ask for a new one.", "")
}

// teamInvitation is what the page shows to somebody who is logged in and has an invitation.
type teamInvitation struct {
	store.Team
	Token string
	Role  store.Role
}

// invitation is the one that a request of somebody who is logged in has; or it has answered why it brings them nothing, and is not used up.
func (s *Site) invitation(w http.ResponseWriter, r *http.Request) (v teamInvitation, hash string, ok bool) {
	v.Token = r.FormValue("token")
	t, err := s.cfg.Store.Token(r.Context(), store.Invite, v.Token)
	if err == nil {
		v.Team, err = s.cfg.Store.Team(r.Context(), t.Subject)
	}
	if errors.Is(err, store.ErrNotFound) {
		s.deadLink(w, r)
		return v, "", false
	}
	if err != nil {
		s.fail(w, r, err)
		return v, "", false
	}
	v.Role = store.Role(t.Data)
	for _, has := range meOf(r).Teams {
		if has.Team.ID == v.ID && (has.Role == v.Role || has.Role == store.Admin) {
			s.render(w, r, http.StatusOK, "message.html", "You are in "+v.Name, "You are "+string(has.Role)+" of "+v.Name+" already. The link goes on to count for somebody else.", "")
			return v, "", false
		}
	}
	return v, t.Hash, true
}

func (s *Site) joinTeamPage(w http.ResponseWriter, r *http.Request) {
	if v, _, ok := s.invitation(w, r); ok {
		s.render(w, r, http.StatusOK, "team.html", "Join "+v.Name, v, "")
	}
}

// joinTeam gives somebody who has an account a place in a team, by an invitation.
func (s *Site) joinTeam(w http.ResponseWriter, r *http.Request) {
	v, hash, ok := s.invitation(w, r)
	if !ok {
		return
	}
	m := meOf(r)
	switch err := s.cfg.Store.Join(r.Context(), v.ID, m.ID, v.Role, hash); {
	case errors.Is(err, store.ErrNotFound): // somebody else was sooner
		s.deadLink(w, r)
	case err != nil:
		s.fail(w, r, err)
	default:
		s.audit(r, m.Email, "joined a team", string(v.Role)+" of "+v.Name)
		http.Redirect(w, r, "/", http.StatusSeeOther)
	}
}

// join makes an account by a setup or invitation link.
func (s *Site) join(kind store.Kind) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f := newJoinForm(kind, r.PostFormValue("token"))
		f.Email, f.Name, f.Team = store.Email(r.PostFormValue("email")), strings.TrimSpace(r.PostFormValue("name")), strings.TrimSpace(r.PostFormValue("team"))
		again := func(status int, problem string) { s.render(w, r, status, "join.html", "Make an account", f, problem) }
		t, err := s.cfg.Store.Token(r.Context(), kind, f.Token)
		if errors.Is(err, store.ErrNotFound) {
			s.deadLink(w, r)
			return
		}
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if !isAddress(f.Email) {
			again(http.StatusBadRequest, "That is not an e-mail address.")
			return
		}
		hash, ok := s.newPassword(w, r, again)
		if !ok {
			return
		}
		p := store.Person{Email: f.Email, Name: cmp.Or(f.Name, f.Email), Password: hash}
		if f.First {
			p, err = s.cfg.Store.First(r.Context(), p, cmp.Or(f.Team, "team"), t.Hash)
		} else {
			p, err = s.cfg.Store.AddPerson(r.Context(), p, t.Subject, store.Role(t.Data), t.Hash)
		}
		switch {
		case errors.Is(err, store.ErrTeamTaken):
			again(http.StatusConflict, sentence(err))
			return
		case errors.Is(err, store.ErrTaken):
			problem := "There is an account with that e-mail address."
			if !f.First {
				problem += " If it is yours, log in first, and then open this link again."
			}
			again(http.StatusConflict, problem)
			return
		case err != nil:
			s.fail(w, r, err)
			return
		}
		s.audit(r, p.Email, "account made", "by "+string(kind)+" link")
		s.loggedIn(w, r, p, "/")
	}
}
