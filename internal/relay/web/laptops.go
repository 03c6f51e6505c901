package web

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// workloadsTimeout bounds how long a page waits for a laptop that is to list workloads.
const workloadsTimeout = 3 * time.Second

// laptopView is a laptop for those who may know of it.
type laptopView struct {
	links.Laptop
	Owner    string
	Mine     bool
	Clusters []string // names of those that it is connected to, as far as the person may know
}

// laptops are those of a person, and those that are connected to a cluster which they share with its owner.
func (s *Site) laptops(ctx context.Context, m *me, clusters []store.Cluster) ([]laptopView, error) {
	var out []laptopView
	for _, l := range s.cfg.Laptops.All() {
		v := laptopView{Laptop: l, Owner: m.Email, Mine: l.Person == m.ID}
		for _, c := range clusters {
			if !slices.ContainsFunc(l.State.Connections, func(o relayapi.Connection) bool { return o.Cluster == c.ID }) {
				continue
			}
			role, err := s.cfg.Store.RoleOf(ctx, c.Team, l.Person) // what a laptop says of clusters that are not its owner's counts for nothing
			if err != nil {
				return nil, err
			}
			if role != "" {
				v.Clusters = append(v.Clusters, c.Name)
			}
		}
		if !v.Mine {
			if len(v.Clusters) == 0 {
				continue
			}
			p, err := s.cfg.Store.Person(ctx, l.Person)
			if err != nil {
				return nil, err
			}
			v.Owner = p.Email
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b laptopView) int { return cmp.Or(cmp.Compare(a.Owner, b.Owner), a.Since.Compare(b.Since)) })
	return out, nil
}

// laptopPage is a laptop of one's own.
type laptopPage struct {
	links.Laptop
	Asked     []links.Asked
	Wish      relayapi.Wish // what the form says
	Workloads []string      // that it may be about
	Problem   string        // why they are not known
}

// laptopPage shows a laptop, and the form that starts an intercept on it. Another person's is not there.
func (s *Site) laptopPage(w http.ResponseWriter, r *http.Request) {
	wish, _ := readWish(r) // as far as it is filled in
	s.laptopAgain(w, r, wish, http.StatusOK, "")
}

// readWish reads the form.
func readWish(r *http.Request) (relayapi.Wish, error) {
	local, err := strconv.ParseUint(r.FormValue("local"), 10, 16)
	text := func(name string) string { return strings.TrimSpace(r.FormValue(name)) }
	return relayapi.Wish{
		Connection: r.FormValue("connection"), Namespace: text("namespace"), Workload: text("workload"), Port: text("port"), Local: uint16(local),
		Header: text("header"), Value: r.FormValue("value"),
	}, err
}

func (s *Site) laptopAgain(w http.ResponseWriter, r *http.Request, wish relayapi.Wish, status int, problem string) {
	m := meOf(r)
	ctx, cancel := context.WithTimeout(r.Context(), workloadsTimeout)
	defer cancel()
	q := links.Question{Person: m.ID, Laptop: r.PathValue("laptop")}
	a, err := s.cfg.Laptops.Ask(ctx, q)
	if err != nil {
		s.laptopAway(w, r)
		return
	}
	l := a.Laptop
	v := laptopPage{Laptop: l, Asked: a.Asked, Wish: wish}
	for _, c := range l.State.Connections {
		if c.Name == wish.Connection || wish.Connection == "" {
			v.Wish.Connection, v.Wish.Namespace = c.Name, cmp.Or(wish.Namespace, c.Namespace)
			break
		}
	}
	if l.State.Permission == relayapi.Allowed && v.Wish.Connection != "" {
		q.Workloads = &relayapi.WorkloadsRequest{Connection: v.Wish.Connection, Namespace: v.Wish.Namespace}
		a, err := s.cfg.Laptops.Ask(ctx, q)
		v.Workloads = a.Workloads.Workloads
		if err != nil {
			v.Problem = "The laptop does not list the workloads: " + err.Error()
		}
	}
	s.render(w, r, status, "laptop.html", cmp.Or(l.State.Host, "Laptop"), v, problem)
}

// laptopAway is the same for what is not connected, another's, and nothing.
func (s *Site) laptopAway(w http.ResponseWriter, r *http.Request) {
	s.render(w, r, http.StatusNotFound, "message.html", "Not connected", "This laptop is not connected, or it is not yours. It is here while doppel is connected to a cluster of this relay, and logged in.", "")
}

// wish asks a laptop of one's own to start an intercept.
func (s *Site) wish(w http.ResponseWriter, r *http.Request) {
	wish, err := readWish(r)
	if err != nil {
		wish.Local = 0 // which Check has words for
	}
	if err := wish.Check(); err != nil {
		s.laptopAgain(w, r, wish, http.StatusBadRequest, sentence(err))
		return
	}
	id := r.PathValue("laptop")
	switch _, err := s.cfg.Laptops.Ask(r.Context(), links.Question{Person: meOf(r).ID, Laptop: id, Start: &wish}); {
	case errors.Is(err, links.ErrBusy):
		s.laptopAgain(w, r, wish, http.StatusTooManyRequests, sentence(err))
	case err != nil:
		s.laptopAway(w, r)
	default:
		s.audit(r, meOf(r).Email, "intercept asked for", wish.String())
		http.Redirect(w, r, "/laptops/"+id, http.StatusSeeOther)
	}
}

// endWish has a laptop of one's own end an intercept that was started here.
func (s *Site) endWish(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("laptop")
	n, _ := strconv.Atoi(r.FormValue("wish")) // 0 is none
	a, err := s.cfg.Laptops.Ask(r.Context(), links.Question{Person: meOf(r).ID, Laptop: id, End: n})
	switch {
	case errors.Is(err, links.ErrLaptopAway):
		s.laptopAway(w, r)
	case err != nil:
		s.laptopAgain(w, r, relayapi.Wish{}, http.StatusConflict, sentence(err))
	default:
		for _, o := range a.Asked {
			if o.ID == n {
				s.audit(r, meOf(r).Email, "intercept ended", o.Wish.String())
			}
		}
		http.Redirect(w, r, "/laptops/"+id, http.StatusSeeOther)
	}
}
