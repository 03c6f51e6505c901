package web

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"github.com/doppel-dev/doppel/internal/relay/preview"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// passwordRoutes are for accounts that have passwords, and no identity provider.
func (s *Site) passwordRoutes(mux *http.ServeMux) {
	mux.Handle("POST /login", s.public(s.loginByPassword))
	mux.Handle("POST /setup", s.public(s.join(store.Setup)))
	mux.Handle("POST /invite", s.public(s.join(store.Invite)))
	mux.Handle("POST /account/password", s.private(s.changePassword))
	mux.Handle("GET /reset", s.public(s.resetPage))
	mux.Handle("POST /reset", s.public(s.reset))
}

func (s *Site) loginByPassword(w http.ResponseWriter, r *http.Request) {
	f := loginForm{store.Email(r.PostFormValue("email")), preview.LocalPath(r.PostFormValue("next"))}
	if !s.logins.login(r.Context(), networkOf(r), f.Email) {
		w.Header().Set("Retry-After", "20")
		s.render(w, r, http.StatusTooManyRequests, "login.html", "Log in", f, tooMany)
		return
	}
	p, err := s.cfg.Store.PersonByEmail(r.Context(), f.Email)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		s.fail(w, r, err)
		return
	}
	right, err := s.cfg.Passwords.Verify(r.Context(), r.PostFormValue("password"), p.Password)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if !right || p.Disabled { // as slow for an account that is not there
		s.refused(r, f.Email, "password")
		s.render(w, r, http.StatusUnauthorized, "login.html", "Log in", f, "This e-mail address and password do not belong together.")
		return
	}
	s.loggedIn(w, r, p, f.Next)
}

// newPassword is the hash of the password that a form gives an account; or it has answered why there is none, by again if the password is at fault.
func (s *Site) newPassword(w http.ResponseWriter, r *http.Request, again func(status int, problem string)) (hash string, ok bool) {
	password := r.PostFormValue("password")
	if err := secret.CheckPassword(password); err != nil {
		again(http.StatusBadRequest, sentence(err))
		return "", false
	}
	hash, err := s.cfg.Passwords.Hash(r.Context(), password)
	if err != nil {
		s.fail(w, r, err)
		return "", false
	}
	return hash, true
}

// changePassword takes the one of now as well: who found a browser that is logged in does not get the account.
func (s *Site) changePassword(w http.ResponseWriter, r *http.Request) {
	m, again := meOf(r), s.accountAgain(w, r)
	if !s.logins.login(r.Context(), networkOf(r), m.Email) {
		w.Header().Set("Retry-After", "20")
		again(http.StatusTooManyRequests, tooMany)
		return
	}
	right, err := s.cfg.Passwords.Verify(r.Context(), r.PostFormValue("current"), m.Password)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if !right {
		s.refused(r, m.Email, "password, to change it")
		again(http.StatusForbidden, "That is not your password.")
		return
	}
	if hash, ok := s.newPassword(w, r, again); ok {
		s.passwordIs(w, r, m.Person, hash, "password changed")
	}
}

// passwordIs gives an account its new password, and the browser a login of its own: all others have ended.
func (s *Site) passwordIs(w http.ResponseWriter, r *http.Request, p store.Person, hash, did string) {
	err := s.cfg.Store.SetPassword(r.Context(), p.ID, p.Password, hash)
	if errors.Is(err, store.ErrNotFound) {
		s.render(w, r, http.StatusConflict, "message.html", "The password is not changed", "It was changed by somebody else meanwhile.", "")
		return
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	p.Password = hash
	s.audit(r, p.Email, did, "")
	s.loggedIn(w, r, p, "/")
}

// ErrDisabled says of an account that it is.
var ErrDisabled = errors.New("the account is disabled: a relay administrator or one of its team's administrators enables it on the page People")

// AddReset makes a link with which a person gives their account another password, once, within a day.
func AddReset(ctx context.Context, st *store.Store, base *url.URL, email string) (string, error) {
	p, err := st.PersonByEmail(ctx, store.Email(email))
	if err != nil {
		return "", err
	}
	if p.Disabled {
		return "", ErrDisabled
	}
	token, err := st.AddToken(ctx, store.Token{Kind: store.Reset, Person: p.ID}, resetLife)
	return pageURL(base, "/reset", url.Values{"token": {token}}), err
}

// resetForm is what the page for another password shows.
type resetForm struct{ Token, Email string }

// resetOf is the form for the token that a request has; or it has answered that there is none.
func (s *Site) resetOf(w http.ResponseWriter, r *http.Request) (f resetForm, p store.Person, ok bool) {
	f.Token = r.FormValue("token")
	t, err := s.cfg.Store.Token(r.Context(), store.Reset, f.Token)
	if err == nil {
		p, err = s.cfg.Store.Person(r.Context(), t.Person)
	}
	if errors.Is(err, store.ErrNotFound) {
		s.deadLink(w, r)
	} else if err != nil {
		s.fail(w, r, err)
	}
	f.Email = p.Email
	return f, p, err == nil
}

const resetTitle = "Choose another password"

func (s *Site) resetPage(w http.ResponseWriter, r *http.Request) {
	if f, _, ok := s.resetOf(w, r); ok {
		s.render(w, r, http.StatusOK, "reset.html", resetTitle, f, "")
	}
}

func (s *Site) reset(w http.ResponseWriter, r *http.Request) {
	f, p, ok := s.resetOf(w, r)
	if !ok {
		return
	}
	hash, ok := s.newPassword(w, r, func(status int, problem string) { s.render(w, r, status, "reset.html", resetTitle, f, problem) })
	if !ok {
		return
	}
	switch _, err := s.cfg.Store.Redeem(r.Context(), store.Reset, f.Token); {
	case errors.Is(err, store.ErrNotFound): // somebody else was sooner
		s.deadLink(w, r)
	case err != nil:
		s.fail(w, r, err)
	default:
		s.passwordIs(w, r, p, hash, "password reset")
	}
}
