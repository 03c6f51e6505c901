package web

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"github.com/doppel-dev/doppel/internal/relay/preview"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// OIDC is an identity provider (OpenID Connect). With one there are no passwords.
type OIDC struct {
	Issuer       string // empty: there is none
	ClientID     string
	ClientSecret string // empty: a public client, which PKCE alone protects
	Name         string // what people call it
	// Team is the name of the team that everybody becomes a member of whom the provider lets in; empty: newcomers see what is shared with them,
	// and are invited to teams.
	Team string
}

// How long a person may take at the provider, and the provider for an answer.
const (
	oidcLife    = 10 * time.Minute
	oidcTimeout = 10 * time.Second
)

// oidcCookie binds a login that is under way to the browser that began it (RFC 9700, section 4.7).
const oidcCookie = "__Host-doppel-oidc"

// provider is an identity provider as far as it is known: it may be away when the relay starts.
type provider struct {
	cfg      OIDC
	redirect string
	client   *http.Client

	mu sync.Mutex
	// guarded by mu
	known *oidc.Provider
}

func (p *provider) get(ctx context.Context) (*oidc.Provider, *oauth2.Config, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known == nil {
		known, err := oidc.NewProvider(ctx, p.cfg.Issuer) // it keeps the client for its keys, and not ctx's end
		if err != nil {
			return nil, nil, err
		}
		p.known = known
	}
	return p.known, &oauth2.Config{
		ClientID: p.cfg.ClientID, ClientSecret: p.cfg.ClientSecret, Endpoint: p.known.Endpoint(), RedirectURL: p.redirect,
		Scopes: []string{oidc.ScopeOpenID, "email", "profile"},
	}, nil
}

// underWay is what the relay keeps of a login at the provider: nothing of it is the browser's to change.
type underWay struct {
	Nonce    string `json:"nonce"`
	Verifier string `json:"verifier"`
	Next     string `json:"next"`
	// Kind and Join are of a link that makes an account, with the name for a first team.
	Kind store.Kind `json:"kind,omitempty"`
	Join string     `json:"join,omitempty"`
	Team string     `json:"team,omitempty"`
}

func (s *Site) oidcRoutes(mux *http.ServeMux) {
	mux.Handle("POST /oidc", s.public(s.oidcStart))
	mux.Handle("GET /oidc/callback", s.public(s.oidcCallback))
}

// oidcStart sends the browser to the provider.
func (s *Site) oidcStart(w http.ResponseWriter, r *http.Request) {
	if !s.logins.allow(r.Context(), "oidc "+networkOf(r), addressBurst, addressEvery) {
		w.Header().Set("Retry-After", "10")
		s.render(w, r, http.StatusTooManyRequests, "message.html", "Not logged in", tooMany, "")
		return
	}
	ctx, cancel := context.WithTimeout(oidc.ClientContext(r.Context(), s.oidc.client), oidcTimeout)
	defer cancel()
	_, cfg, err := s.oidc.get(ctx)
	if err != nil {
		s.oidcAway(w, r, err)
		return
	}
	u := underWay{
		Nonce: secret.ID(), Verifier: oauth2.GenerateVerifier(), Next: preview.LocalPath(r.PostFormValue("next")),
		Join: r.PostFormValue("token"), Team: strings.TrimSpace(r.PostFormValue("team")),
	}
	if kind := store.Kind(r.PostFormValue("kind")); kind == store.Setup || kind == store.Invite {
		u.Kind = kind
	}
	data, err := json.Marshal(u)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	state, err := s.cfg.Store.AddToken(r.Context(), store.Token{Kind: store.OIDC, Data: string(data)}, oidcLife)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	c := cookie(state, oidcLife)
	c.Name = oidcCookie
	http.SetCookie(w, c)
	s.leave(w, r, cfg.AuthCodeURL(state, oidc.Nonce(u.Nonce), oauth2.S256ChallengeOption(u.Verifier)))
}

func (s *Site) oidcAway(w http.ResponseWriter, r *http.Request, err error) {
	s.cfg.Log.Error("identity provider does not answer as it should", "err", err)
	s.render(w, r, http.StatusBadGateway, "message.html", "Not logged in", s.oidc.cfg.Name+" does not answer as it should. Try again in a moment.", "")
}

// identity is who the provider says somebody is.
type identity struct {
	Subject  string `json:"sub"`
	Email    string `json:"email"`
	Verified bool   `json:"email_verified"`
	Name     string `json:"name"`
}

// oidcCallback is where the provider sends the browser back to.
func (s *Site) oidcCallback(w http.ResponseWriter, r *http.Request) {
	gone := cookie("", 0)
	gone.Name = oidcCookie
	http.SetCookie(w, gone)
	state := r.FormValue("state")
	c, err := r.Cookie(oidcCookie)
	if err != nil || !secret.Equal(c.Value, state) { // another browser began it: a login that somebody wants to foist on this one
		s.notLoggedIn(w, r, "The login was begun in another browser, or too long ago. Begin again.")
		return
	}
	t, err := s.cfg.Store.Redeem(r.Context(), store.OIDC, state)
	if errors.Is(err, store.ErrNotFound) {
		s.notLoggedIn(w, r, "The login took too long. Begin again.")
		return
	}
	var u underWay
	if err == nil {
		err = json.Unmarshal([]byte(t.Data), &u)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if problem := r.FormValue("error"); problem != "" {
		s.refused(r, "", "by the provider")
		s.notLoggedIn(w, r, s.oidc.cfg.Name+" did not let you in.")
		return
	}
	ctx, cancel := context.WithTimeout(oidc.ClientContext(r.Context(), s.oidc.client), oidcTimeout)
	defer cancel()
	id, err := s.oidc.identity(ctx, r.FormValue("code"), u)
	if err != nil {
		s.oidcAway(w, r, err)
		return
	}
	p, err := s.known(r.Context(), id, u)
	switch {
	case errors.Is(err, errUnverified):
		s.notLoggedIn(w, r, s.oidc.cfg.Name+" does not vouch for your e-mail address.")
	case errors.Is(err, errReassigned):
		s.refused(r, p.Email, "address of another's account")
		s.notLoggedIn(w, r, "The account here with the address "+p.Email+" belongs to somebody else at "+s.oidc.cfg.Name+". Ask there for another address.")
	case errors.Is(err, store.ErrNotFound):
		s.notLoggedIn(w, r, "The link that makes an account was used already, or it is too old. Ask for a new one.")
	case errors.Is(err, errNoTeam):
		s.cfg.Log.Warn("newcomer not let in: the team of -oidc-team is not there", "team", s.oidc.cfg.Team)
		s.notLoggedIn(w, r, "The relay is not set up yet. Try again later.")
	case errors.Is(err, store.ErrTeamTaken):
		s.notLoggedIn(w, r, sentence(err))
	case err != nil:
		s.fail(w, r, err)
	case p.Disabled:
		s.refused(r, p.Email, "disabled")
		s.notLoggedIn(w, r, "Your account is disabled.")
	default:
		s.loggedIn(w, r, p, u.Next)
	}
}

func (s *Site) notLoggedIn(w http.ResponseWriter, r *http.Request, why string) {
	s.render(w, r, http.StatusForbidden, "message.html", "Not logged in", why, "")
}

// identity changes the code into who somebody is: the ID token's signature, issuer, audience, expiry and nonce have to be right.
func (p *provider) identity(ctx context.Context, code string, u underWay) (identity, error) {
	known, cfg, err := p.get(ctx)
	if err != nil {
		return identity{}, err
	}
	tok, err := cfg.Exchange(ctx, code, oauth2.VerifierOption(u.Verifier))
	if err != nil {
		return identity{}, fmt.Errorf("exchange the code: %w", err)
	}
	raw, ok := tok.Extra("id_token").(string)
	if !ok {
		return identity{}, errors.New("the answer has no ID token")
	}
	it, err := known.Verifier(&oidc.Config{ClientID: p.cfg.ClientID}).Verify(ctx, raw)
	if err != nil {
		return identity{}, fmt.Errorf("ID token: %w", err)
	}
	if !secret.Equal(it.Nonce, u.Nonce) {
		return identity{}, errors.New("ID token: the nonce is another login's")
	}
	var id identity
	if err := it.Claims(&id); err != nil || id.Email != "" {
		return id, err
	}
	info, err := known.UserInfo(ctx, cfg.TokenSource(ctx, tok)) // some providers tell the address there only
	if err != nil {
		return id, fmt.Errorf("user info: %w", err)
	}
	if info.Subject != id.Subject { // OpenID Connect Core 1.0, section 5.3.2
		return id, errors.New("user info: of another subject")
	}
	return id, info.Claims(&id)
}

// errUnverified says that the provider has not looked whether the e-mail address is the person's.
var errUnverified = errors.New("the e-mail address is not verified")

// errReassigned says that the account with the e-mail address is another identity's: addresses are given to others, issuer and subject are not.
var errReassigned = errors.New("the e-mail address was another person's")

// errNoTeam says that there is no team yet of the name that newcomers' is to have.
var errNoTeam = errors.New("the team is not there")

// known finds the account of an identity, or makes one. An account is first found by the e-mail address, if the provider vouches for it, and
// by issuer and subject from then on, whatever becomes of the address (OpenID Connect Core 1.0, section 5.7).
func (s *Site) known(ctx context.Context, id identity, u underWay) (store.Person, error) {
	p, err := s.cfg.Store.PersonByIdentity(ctx, s.oidc.cfg.Issuer, id.Subject)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return p, err
	}
	isNew := err != nil
	if isNew {
		if !id.Verified || id.Email == "" {
			return p, errUnverified
		}
		if p, err = s.cfg.Store.PersonByEmail(ctx, id.Email); err == nil {
			taken, err := s.cfg.Store.HasIdentity(ctx, s.oidc.cfg.Issuer, p.ID)
			if err == nil && taken {
				err = errReassigned
			}
			if err != nil {
				return p, err
			}
		}
	}
	if p.Disabled || err != nil && !errors.Is(err, store.ErrNotFound) { // who is not let in uses no link up
		return p, err
	}
	if err != nil {
		p = store.Person{Email: id.Email, Name: cmp.Or(id.Name, id.Email)}
	}
	team, role, link := "", store.Member, ""
	switch {
	case u.Kind != "" && u.Join != "":
		t, terr := s.cfg.Store.Token(ctx, u.Kind, u.Join)
		if terr != nil {
			return p, terr
		}
		team, role, link = t.Subject, store.Role(t.Data), t.Hash
	case s.oidc.cfg.Team != "" && isNew:
		t, terr := s.cfg.Store.TeamByName(ctx, s.oidc.cfg.Team)
		if errors.Is(terr, store.ErrNotFound) { // who got an account now would never be in it
			return p, errNoTeam
		}
		if terr != nil {
			return p, terr
		}
		team = t.ID
	}
	switch {
	case link != "" && u.Kind == store.Setup:
		p, err = s.cfg.Store.First(ctx, p, cmp.Or(s.oidc.cfg.Team, u.Team, "team"), link)
	case p.ID == "":
		p, err = s.cfg.Store.AddPerson(ctx, p, team, role, link)
	case team != "":
		err = s.cfg.Store.Join(ctx, team, p.ID, role, link)
	}
	if err == nil && isNew {
		err = s.cfg.Store.AddIdentity(ctx, s.oidc.cfg.Issuer, id.Subject, p.ID)
	}
	return p, err
}
