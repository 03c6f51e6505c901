package web

import (
	"errors"
	"net/http"
	"strings"

	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

func (s *Site) clusterRoutes(mux *http.ServeMux) {
	mux.Handle("POST /clusters", s.private(s.addClusterByPage))
	mux.Handle("POST /clusters/{cluster}/token", s.private(s.renewClusterToken))
	mux.Handle("POST /clusters/{cluster}/delete", s.private(s.deleteCluster))
}

// health is a cluster with what its traffic-manager has told last.
func (s *Site) health(c store.Cluster) clusterHealth {
	st, ok := s.cfg.Links.State(c.ID)
	return clusterHealth{Cluster: c, State: st, Connected: ok}
}

type clusterHealth struct {
	store.Cluster
	links.State
	Connected bool
}

// clusterView is a cluster's page.
type clusterView struct {
	clusterHealth
	TeamName string
	Admin    bool
}

// cluster finds the cluster that a request is about, if the person is in its team; errNotAdmin says that they are no admin.
func (s *Site) cluster(r *http.Request) (store.Cluster, store.Team, error) {
	c, err := s.cfg.Store.Cluster(r.Context(), r.PathValue("cluster"))
	if err != nil {
		return c, store.Team{}, err
	}
	t, err := meOf(r).administer(c.Team)
	return c, t, err
}

func (s *Site) clusterPage(w http.ResponseWriter, r *http.Request) {
	c, t, err := s.cluster(r)
	if err != nil && !errors.Is(err, errNotAdmin) {
		s.denied(w, r, err)
		return
	}
	s.render(w, r, http.StatusOK, "cluster.html", c.Name, clusterView{s.health(c), t.Name, err == nil}, "")
}

// errClusterName says what a cluster may be called.
var errClusterName = errors.New("the cluster needs a name of at most 100 characters")

func isClusterName(s string) bool { return s != "" && len(s) <= 100 }

// addClusterByPage makes a cluster known and shows how it joins, once.
func (s *Site) addClusterByPage(w http.ResponseWriter, r *http.Request) {
	t, err := meOf(r).administer(r.PostFormValue("team"))
	if err != nil {
		s.denied(w, r, err)
		return
	}
	name := strings.TrimSpace(r.PostFormValue("name"))
	if !isClusterName(name) {
		s.dashboardAgain(w, r, http.StatusBadRequest, sentence(errClusterName))
		return
	}
	c, token, err := s.newCluster(r, t, name)
	switch {
	case errors.Is(err, store.ErrTaken):
		s.dashboardAgain(w, r, http.StatusConflict, "The team "+t.Name+" has a cluster of that name.")
	case err != nil:
		s.fail(w, r, err)
	default:
		text := "Its traffic-manager joins with this token, which is not shown again. If it is in another namespace than doppel, " +
			"put that one into the first command, and give the second --manager-namespace."
		if s.cfg.CA == "" {
			text += " If not everybody knows the authority of this relay's certificate, put --from-file=ca.crt=FILE before --dry-run."
		}
		s.render(w, r, http.StatusOK, "issued.html", c.Name+" is known", issued{
			text, relayapi.SecretCommand("doppel", token, s.cfg.CA) + "\ndoppel helm upgrade --set relay.url=" + s.cfg.Base.String(), "/clusters/" + c.ID,
		}, "")
	}
}

// renewClusterToken ends the tokens that a cluster has, and its links, and shows a new one.
func (s *Site) renewClusterToken(w http.ResponseWriter, r *http.Request) {
	c, _, err := s.cluster(r)
	if err != nil {
		s.denied(w, r, err)
		return
	}
	token, err := s.cfg.Store.ReplaceTokens(r.Context(), store.Token{Kind: store.Link, Subject: c.ID}, 0)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.audit(r, meOf(r).Email, "cluster's token renewed", c.Name)
	s.render(w, r, http.StatusOK, "issued.html", "New token for "+c.Name, issued{
		"The token before does not count any more. Give the cluster this one; it is not shown again. If its traffic-manager is in another namespace than doppel, put that one into the command.",
		`kubectl patch secret doppel-relay --namespace=doppel --patch='{"stringData":{"token":"` + token + `"}}'`, "/clusters/" + c.ID,
	}, "")
}

func (s *Site) deleteCluster(w http.ResponseWriter, r *http.Request) {
	c, _, err := s.cluster(r)
	if err == nil {
		err = s.cfg.Store.DeleteCluster(r.Context(), c.ID)
	}
	if err != nil {
		s.denied(w, r, err)
		return
	}
	s.audit(r, meOf(r).Email, "cluster deleted", c.Name)
	http.Redirect(w, r, "/", http.StatusSeeOther)
}
