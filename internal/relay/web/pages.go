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
	v := previewView{May: may}
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
	req := relayapi.PublishRequest{Public: true, Password: r.PostFormValue("password")}
	if d := r.PostFormValue("for"); d != "" {
		if req.For, err = time.ParseDuration(d); err != nil || req.For <= 0 {
			s.previewAgain(w, r, p, true, http.StatusBadRequest, "That is no time for which it can be published.")
			return
		}
	}
	if len(req.Password) > secret.MaxPassword {
		s.previewAgain(w, r, p, true, http.StatusBadRequest, "The password is too long.")
		return
	}
	if err := s.publish(r, p, req); err != nil {
		s.denied(w, r, err)
		return
	}
	http.Redirect(w, r, pageOf(p), http.StatusSeeOther)
}

func (s *Site) unpublishByPage(w http.ResponseWriter, r *http.Request) {
	s.changeByPage(w, r, pageOf, func(p store.Preview) error { return s.publish(r, p, relayapi.PublishRequest{}) })
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
