package web

import (
	"errors"
	"net/http"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

func (s *Site) previewRoutes(mux *http.ServeMux) {
	mux.Handle("POST /previews/{preview}/publish", s.private(s.publishByPage))
	mux.Handle("POST /previews/{preview}/unpublish", s.private(s.unpublishByPage))
	mux.Handle("POST /previews/{preview}/share", s.private(s.shareByPage))
	mux.Handle("POST /previews/{preview}/delete", s.private(s.deleteByPage))
}

// shownVisits is how many visits a preview's page lists.
const shownVisits = 100

// previewView is a preview's page.
type previewView struct {
	relayapi.Preview
	May    bool            // change it, and see who visits it
	Locked bool            // it has a password, if its time is over, too
	Visits []store.Visited // the newest first
}

func (s *Site) previewPage(w http.ResponseWriter, r *http.Request) {
	p, err := s.changeable(r.Context(), meOf(r), r.PathValue("preview"))
	if err != nil && !errors.Is(err, errMayNot) {
		s.denied(w, r, err)
		return
	}
	s.previewAgain(w, r, p, err == nil, http.StatusOK, "")
}

// previewAgain shows a preview's page, with what was wrong with a form on it.
func (s *Site) previewAgain(w http.ResponseWriter, r *http.Request, p store.Preview, may bool, status int, problem string) {
	v := previewView{May: may, Locked: p.Password != ""}
	var err error
	if v.Preview, err = s.view(r.Context(), p, meOf(r)); err == nil && may {
		v.Visits, err = s.cfg.Store.Visits(r.Context(), p.ID, shownVisits)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.render(w, r, status, "preview.html", p.Name, v, problem)
}

// changeByPage does something with a preview, if the person may, and leads to a page.
func (s *Site) changeByPage(w http.ResponseWriter, r *http.Request, to func(p store.Preview) string, fn func(p store.Preview) error) {
	p, err := s.changeable(r.Context(), meOf(r), r.PathValue("preview"))
	if err == nil {
		err = fn(p)
	}
	if err != nil {
		s.denied(w, r, err)
		return
	}
	http.Redirect(w, r, to(p), http.StatusSeeOther)
}

func pageOf(p store.Preview) string { return "/previews/" + p.Host }

func (s *Site) publishByPage(w http.ResponseWriter, r *http.Request) {
	p, err := s.changeable(r.Context(), meOf(r), r.PathValue("preview"))
	if err != nil {
		s.denied(w, r, err)
		return
	}
	until, ok := publishedUntil(p, r.PostFormValue("for"), time.Now())
	if !ok {
		s.previewAgain(w, r, p, true, http.StatusBadRequest, "That is no time for which it can be published.")
		return
	}
	password := r.PostFormValue("password")
	if len(password) > secret.MaxPassword {
		s.previewAgain(w, r, p, true, http.StatusBadRequest, "The password is too long.")
		return
	}
	// A page may be older than the password: who was not shown that there is one has not taken it away.
	keep := r.PostFormValue("keep") == "true" || r.PostFormValue("locked") != "true"
	if err := s.publish(r, p, until, password, keep); err != nil {
		s.denied(w, r, err)
		return
	}
	http.Redirect(w, r, pageOf(p), http.StatusSeeOther)
}

// publishedUntil is the end that a form asks for: a time from now on, "same" for the one that it has, or "" for none.
func publishedUntil(p store.Preview, asked string, now time.Time) (until time.Time, ok bool) {
	switch asked {
	case "":
		return time.Time{}, true
	case "same":
		return p.Expires, p.Open(now)
	}
	d, err := time.ParseDuration(asked)
	return now.Add(d), err == nil && d > 0
}

func (s *Site) unpublishByPage(w http.ResponseWriter, r *http.Request) {
	s.changeByPage(w, r, pageOf, func(p store.Preview) error { return s.unpublish(r, p) })
}

// shareByPage lets the person with an e-mail address see a preview, or no longer.
func (s *Site) shareByPage(w http.ResponseWriter, r *http.Request) {
	p, err := s.changeable(r.Context(), meOf(r), r.PathValue("preview"))
	if err != nil {
		s.denied(w, r, err)
		return
	}
	req := relayapi.ShareRequest{Email: r.PostFormValue("email"), Remove: r.PostFormValue("remove") == "true"}
	if !isAddress(req.Email) {
		s.previewAgain(w, r, p, true, http.StatusBadRequest, "That is not an e-mail address.")
		return
	}
	if err := s.share(r, p, req); errors.Is(err, errNoAccount) {
		s.previewAgain(w, r, p, true, http.StatusConflict, sentence(err))
		return
	} else if err != nil {
		s.denied(w, r, err)
		return
	}
	http.Redirect(w, r, pageOf(p), http.StatusSeeOther)
}

func (s *Site) deleteByPage(w http.ResponseWriter, r *http.Request) {
	s.changeByPage(w, r, func(store.Preview) string { return "/" }, func(p store.Preview) error { return s.remove(r, p) })
}
