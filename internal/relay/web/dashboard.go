package web

import (
	"net/http"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

func (s *Site) dashboardRoutes(mux *http.ServeMux) {
	for pattern, page := range map[string]http.HandlerFunc{
		"GET /{$}": s.dashboard, "GET /people": s.people, "GET /previews/{preview}": s.previewPage, "GET /clusters/{cluster}": s.clusterPage, "GET /laptops/{laptop}": s.laptopPage,
	} {
		s.live.Handle(pattern, s.private(page))
		mux.Handle(pattern, s.live)
	}
	mux.HandleFunc("GET /events", s.events)
	s.peopleRoutes(mux)
	s.previewRoutes(mux)
	s.clusterRoutes(mux)
	mux.Handle("POST /laptops/{laptop}/intercept", s.private(s.wish))
	mux.Handle("POST /laptops/{laptop}/end", s.private(s.endWish))
	mux.Handle("GET /", s.public(s.missing))
}

// dashboard is what a person sees first.
type dashboard struct {
	Previews []relayapi.Preview
	Clusters []clusterHealth
	Laptops  []laptopView
}

func (s *Site) dashboard(w http.ResponseWriter, r *http.Request) {
	s.dashboardAgain(w, r, http.StatusOK, "")
}

// dashboardAgain shows the page, with what was wrong with a form on it.
func (s *Site) dashboardAgain(w http.ResponseWriter, r *http.Request, status int, problem string) {
	m := meOf(r)
	previews, err := s.cfg.Store.Previews(r.Context(), m.ID)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	var d dashboard
	for _, p := range previews {
		v, err := s.view(r.Context(), p, m)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		d.Previews = append(d.Previews, v)
	}
	clusters, err := s.cfg.Store.Clusters(r.Context(), m.ID)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	for _, c := range clusters {
		d.Clusters = append(d.Clusters, s.health(c))
	}
	if d.Laptops, err = s.laptops(r.Context(), m, clusters); err != nil {
		s.fail(w, r, err)
		return
	}
	s.render(w, r, status, "dashboard.html", "Previews", d, problem)
}
