package web

import (
	"context"
	"net/http"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

// maxLoginName is how much of what a browser calls itself is shown, in bytes.
const maxLoginName = 120

// loginView is a login, or a token for programs, on its person's page.
type loginView struct {
	store.Token
	Name string // what the browser or the laptop calls itself, or the person the token
	Here bool   // it is the one that looks
}

func (s *Site) accountPage(w http.ResponseWriter, r *http.Request) {
	s.accountAgain(w, r)(http.StatusOK, "")
}

// accountAgain shows the page, with what was wrong with a form on it.
func (s *Site) accountAgain(w http.ResponseWriter, r *http.Request) func(status int, problem string) {
	return func(status int, problem string) {
		logins, err := s.loginsOf(r.Context(), meOf(r))
		if err != nil {
			s.fail(w, r, err)
			return
		}
		s.render(w, r, status, "account.html", "Your account", logins, problem)
	}
}

// loginsOf are the logins of a person's laptops, then of their browsers, and then the tokens for programs, which outlive the laptop that has made them.
func (s *Site) loginsOf(ctx context.Context, m *me) ([]loginView, error) {
	var out []loginView
	for _, kind := range []store.Kind{store.Laptop, store.Web, store.API} {
		all, err := s.cfg.Store.Tokens(ctx, kind, "", m.ID)
		if err != nil {
			return nil, err
		}
		for _, t := range all {
			out = append(out, loginView{t, t.Data[:min(len(t.Data), maxLoginName)], t.Hash == m.Token})
		}
	}
	return out, nil
}

// endLogin ends a login of the person's, of a laptop that was lost perhaps, or a token for programs.
func (s *Site) endLogin(w http.ResponseWriter, r *http.Request) {
	m := meOf(r)
	logins, err := s.loginsOf(r.Context(), m)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	for _, l := range logins {
		if l.Hash != r.PostFormValue("login") {
			continue
		}
		if err := s.cfg.Store.Revoke(r.Context(), l.Hash); err != nil {
			s.fail(w, r, err)
			return
		}
		switch l.Kind {
		case store.API:
			s.audit(r, m.Email, "API token deleted", l.Name)
		case store.Laptop:
			s.audit(r, m.Email, "login ended", "laptop "+l.Name)
		default:
			s.audit(r, m.Email, "login ended", "browser "+l.Name)
		}
		break // what is not there, or not any more, has ended
	}
	http.Redirect(w, r, "/account", http.StatusSeeOther)
}
