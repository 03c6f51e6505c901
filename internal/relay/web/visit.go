package web

import (
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/access"
	"github.com/doppel-dev/doppel/internal/relay/preview"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

func (s *Site) visitRoutes(mux *http.ServeMux) {
	mux.Handle("GET /visit", s.public(s.visit))
	mux.Handle("POST /visit", s.public(s.visitByPassword))
}

// visiting is a browser on its way to a preview: what the preview's host has sent along.
type visiting struct{ Host, To, State string }

func readVisiting(r *http.Request) visiting {
	return visiting{relayapi.Label(r.FormValue("host")), preview.LocalPath(r.FormValue("to")), r.FormValue("state")}
}

// visit sends a browser back to a preview with a ticket, if the person may see it. What is private, and what does not exist, looks the same
// to those who may not.
func (s *Site) visit(w http.ResponseWriter, r *http.Request) {
	v, m := readVisiting(r), meOf(r)
	p, err := s.cfg.Store.PreviewByHost(r.Context(), v.Host)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		s.fail(w, r, err)
		return
	}
	known := err == nil
	if known && m != nil {
		may, err := s.access.May(r.Context(), p, access.Visitor{Person: m.Person})
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if may {
			s.ticket(w, r, p, v, store.Token{Person: m.ID, Parent: m.Token}, "")
			return
		}
	}
	switch {
	case known && p.Open(time.Now()) && p.Password == "": // published while the browser was on its way
		s.ticket(w, r, p, v, store.Token{}, "")
	case known && p.Open(time.Now()):
		s.render(w, r, http.StatusOK, "password.html", "A password is needed", v, "")
	case m == nil:
		http.Redirect(w, r, "/login?"+url.Values{"next": {r.URL.RequestURI()}}.Encode(), http.StatusSeeOther)
	default:
		s.missing(w, r)
	}
}

// visitByPassword is for previews that are published with a password.
func (s *Site) visitByPassword(w http.ResponseWriter, r *http.Request) {
	v := readVisiting(r)
	if !s.logins.login(r.Context(), networkOf(r), "preview "+v.Host) {
		w.Header().Set("Retry-After", "20")
		s.render(w, r, http.StatusTooManyRequests, "password.html", "A password is needed", v, tooMany)
		return
	}
	p, err := s.cfg.Store.PreviewByHost(r.Context(), v.Host)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		s.fail(w, r, err)
		return
	}
	if !p.Open(time.Now()) {
		s.missing(w, r)
		return
	}
	right, err := s.cfg.Passwords.Verify(r.Context(), r.PostFormValue("password"), p.Password)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if !right {
		s.render(w, r, http.StatusUnauthorized, "password.html", "A password is needed", v, "That is not the password.")
		return
	}
	s.ticket(w, r, p, v, store.Token{}, p.Password)
}

// ticket sends the browser back to the preview, which takes the ticket from the browser that has the state only.
func (s *Site) ticket(w http.ResponseWriter, r *http.Request, p store.Preview, v visiting, t store.Token, password string) {
	if len(v.State) != len(secret.Hash("")) { // not from a preview's host
		s.missing(w, r)
		return
	}
	t.Kind, t.Subject, t.Data = store.Ticket, p.ID, v.State+" "+password
	ticket, err := s.cfg.Store.AddToken(r.Context(), t, ticketLife)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.leave(w, r, preview.TicketURL(s.cfg.Base, p.Host, ticket, v.To))
}
