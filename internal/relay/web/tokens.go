package web

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// maxTokens is how many API tokens a person may have.
const maxTokens = 100

func tokenView(t store.Token) relayapi.Token {
	v := relayapi.Token{Name: t.Data, Created: t.Created, Expires: t.Expires}
	if !t.Used.IsZero() {
		v.Used = &t.Used
	}
	return v
}

// addToken makes a token with which a program may do what the person may, but for making tokens.
func (s *Site) addToken(w http.ResponseWriter, r *http.Request) {
	var req relayapi.AddTokenRequest
	if !s.read(w, r, &req) {
		return
	}
	m := meOf(r)
	all, err := s.cfg.Store.Tokens(r.Context(), store.API, "", m.ID)
	if err != nil {
		s.broken(w, r, err)
		return
	}
	switch req.Name = strings.TrimSpace(req.Name); {
	case req.Name == "" || len(req.Name) > 100:
		s.refuse(w, http.StatusBadRequest, "the token needs a name of at most 100 characters")
		return
	case req.For <= 0 || req.For > relayapi.MaxTokenLife:
		s.refuse(w, http.StatusBadRequest, "a token counts for some time, and for no more than a year")
		return
	case named(all, req.Name) != nil:
		s.refuse(w, http.StatusConflict, "you have a token of that name; choose another")
		return
	case len(all) >= maxTokens:
		s.refuse(w, http.StatusForbidden, "you have too many tokens")
		return
	}
	token, err := s.cfg.Store.AddTokenBy(r.Context(), m.Token, store.Token{Kind: store.API, Person: m.ID, Data: req.Name}, req.For)
	if errors.Is(err, store.ErrNotFound) {
		s.refuse(w, http.StatusUnauthorized, loggedOut)
		return
	}
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.audit(r, m.Email, "API token made", req.Name)
	now := time.Now()
	s.answer(w, relayapi.Token{Name: req.Name, Token: token, Created: now, Expires: now.Add(req.For)})
}

func named(all []store.Token, name string) *store.Token {
	for i, t := range all {
		if t.Data == name {
			return &all[i]
		}
	}
	return nil
}

func (s *Site) listTokens(w http.ResponseWriter, r *http.Request) {
	all, err := s.cfg.Store.Tokens(r.Context(), store.API, "", meOf(r).ID)
	if err != nil {
		s.broken(w, r, err)
		return
	}
	out := relayapi.TokenList{Tokens: []relayapi.Token{}}
	for _, t := range all {
		out.Tokens = append(out.Tokens, tokenView(t))
	}
	s.answer(w, out)
}

func (s *Site) deleteToken(w http.ResponseWriter, r *http.Request) {
	var req relayapi.DeleteTokenRequest
	if !s.read(w, r, &req) {
		return
	}
	m := meOf(r)
	all, err := s.cfg.Store.Tokens(r.Context(), store.API, "", m.ID)
	if err != nil {
		s.broken(w, r, err)
		return
	}
	t := named(all, req.Name)
	if t == nil {
		s.refuse(w, http.StatusNotFound, "you have no token of that name")
		return
	}
	if err := s.cfg.Store.Revoke(r.Context(), t.Hash); err != nil {
		s.broken(w, r, err)
		return
	}
	s.audit(r, m.Email, "API token deleted", req.Name)
	s.answer(w, struct{}{})
}
