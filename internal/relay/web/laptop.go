package web

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

func (s *Site) laptopRoutes(mux *http.ServeMux) {
	mux.Handle("GET "+relayapi.PathAuthorize, s.private(s.authorizePage))
	mux.Handle("POST "+relayapi.PathAuthorize, s.private(s.authorize))
	mux.HandleFunc("POST "+relayapi.PathLogin, s.laptopLogin)
	mux.Handle("POST "+relayapi.PathLogout, s.laptop(s.laptopLogout))
}

// authorization is a laptop that wants to be logged in: its browser has brought these.
type authorization struct{ Port, Challenge, State, Host string }

// readAuthorization checks it; the port alone says where the answer goes: to this machine's loopback.
func readAuthorization(v url.Values) (authorization, error) {
	a := authorization{Port: v.Get("port"), Challenge: v.Get("challenge"), State: v.Get("state"), Host: v.Get("host")}
	n, err := strconv.ParseUint(a.Port, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != a.Port {
		return a, errors.New("the port is not one")
	}
	if len(a.Challenge) != len(secret.Challenge("")) {
		return a, errors.New("the challenge is not one")
	}
	if a.State == "" || len(a.State) > 128 || len(a.Host) > 128 {
		return a, errors.New("state or host is too long, or missing")
	}
	return a, nil
}

// toLaptop lets the form's answer lead to the laptop's own listener: browsers apply form-action to redirects as well.
func toLaptop(w http.ResponseWriter) {
	w.Header().Set("Content-Security-Policy", policy+"'self' http://127.0.0.1:*")
}

func (s *Site) authorizePage(w http.ResponseWriter, r *http.Request) {
	a, err := readAuthorization(r.URL.Query())
	if err != nil {
		s.render(w, r, http.StatusBadRequest, "message.html", "This link does not work", fmt.Sprintf("Start again with doppel login (%v).", err), "")
		return
	}
	toLaptop(w)
	s.render(w, r, http.StatusOK, "authorize.html", "Log a laptop in", a, "")
}

// authorize sends the laptop a code, through the browser, that is worth nothing without the laptop's verifier.
func (s *Site) authorize(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		s.missing(w, r)
		return
	}
	a, err := readAuthorization(r.PostForm)
	if err != nil {
		s.missing(w, r)
		return
	}
	m := meOf(r)
	code, err := s.cfg.Store.AddTokenBy(r.Context(), m.Token, store.Token{Kind: store.Code, Person: m.ID, Subject: a.Challenge, Data: a.Host}, codeLife)
	if err != nil {
		s.ended(w, r, err)
		return
	}
	toLaptop(w)
	http.Redirect(w, r, "http://127.0.0.1:"+a.Port+"/?"+url.Values{"code": {code}, "state": {a.State}}.Encode(), http.StatusSeeOther)
}

// laptopLogin exchanges the code for the laptop's token. A code that comes with a wrong verifier is used up.
func (s *Site) laptopLogin(w http.ResponseWriter, r *http.Request) {
	var req relayapi.LoginRequest
	if !s.read(w, r, &req) {
		return
	}
	if !s.logins.allow(r.Context(), "code "+networkOf(r), addressBurst, addressEvery) {
		s.refuse(w, http.StatusTooManyRequests, "too many attempts; wait a little")
		return
	}
	t, err := s.cfg.Store.Token(r.Context(), store.Code, req.Code)
	if err == nil && !secret.Equal(t.Subject, secret.Challenge(req.Verifier)) {
		if err = s.cfg.Store.Revoke(r.Context(), t.Hash); err == nil {
			err = store.ErrNotFound
		}
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		s.refuse(w, http.StatusUnauthorized, "the code is not valid, or no longer")
	case err != nil:
		s.broken(w, r, err)
	default:
		s.laptopLoggedIn(w, r, t, t.Data)
	}
}

// laptopLoggedIn gives a laptop its token, for one that counts once.
func (s *Site) laptopLoggedIn(w http.ResponseWriter, r *http.Request, by store.Token, host string) {
	token, err := s.cfg.Store.Exchange(r.Context(), by.Hash, store.Token{Kind: store.Laptop, Person: by.Person, Data: host}, laptopLife)
	var made store.Token
	if err == nil {
		made, err = s.cfg.Store.Token(r.Context(), store.Laptop, token)
	}
	var m *me
	if err == nil {
		m, err = s.who(r.Context(), store.Laptop, token)
	}
	if errors.Is(err, store.ErrNotFound) || err == nil && m == nil { // it was used already, or all that the person has was taken away meanwhile
		s.refuse(w, http.StatusUnauthorized, loggedOut)
		return
	}
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.audit(r, m.Email, "login", "laptop "+host)
	s.answer(w, relayapi.LoginResult{Token: token, Expires: made.Expires, Who: whoOf(m)})
}

func whoOf(m *me) relayapi.Who {
	w := relayapi.Who{Email: m.Email, Name: m.Name, Teams: []string{}}
	for _, t := range m.Teams {
		w.Teams = append(w.Teams, t.Team.Name)
	}
	return w
}

func (s *Site) laptopLogout(w http.ResponseWriter, r *http.Request) {
	m := meOf(r)
	if err := s.cfg.Store.Revoke(r.Context(), m.Token); err != nil {
		s.broken(w, r, err)
		return
	}
	s.audit(r, m.Email, "logout", "laptop")
	s.answer(w, struct{}{})
}
