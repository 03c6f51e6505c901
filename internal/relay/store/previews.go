package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// Cluster is a cluster whose traffic-manager may join.
type Cluster struct {
	ID, Team, Name string
	Created        time.Time
}

// Preview is a domain under which an intercept is seen.
type Preview struct {
	ID        string // what the intercept is found by; known to those who may see the intercept
	Host      string // label of its domain
	Cluster   string
	Owner     string // person
	Name      string // of the intercept
	Namespace string
	Workload  string
	Authority string // Host header for the cluster's ingress; "": the preview's own
	Propagate string // header of tracing that carries the ID as well: "baggage", "tracestate" or ""
	Created   time.Time
	Public    bool
	Expires   time.Time // when it is no longer public; zero: never
	Password  string    // its hash; "": none is asked for

	// of the cluster and the owner
	Team, ClusterName, OwnerEmail string
}

// Open says whether everybody who has the link may see it now.
func (p Preview) Open(now time.Time) bool {
	return p.Public && (p.Expires.IsZero() || now.Before(p.Expires))
}

func scanCluster(r row) (c Cluster, err error) {
	var created int64
	err = r.Scan(&c.ID, &c.Team, &c.Name, &created)
	c.Created = timeOf(created)
	return c, err
}

// AddCluster makes a cluster known.
func (s *Store) AddCluster(ctx context.Context, team, name string) (Cluster, error) {
	c := Cluster{ID: secret.ID(), Team: team, Name: name, Created: time.Now()}
	err := s.change(ctx, func(tx *sql.Tx) error {
		var n int
		if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM clusters WHERE team = $1 AND name = $2", team, name).Scan(&n); err != nil {
			return err
		}
		if n > 0 {
			return ErrTaken
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO clusters (id, team, name, created) VALUES ($1, $2, $3, $4)", c.ID, c.Team, c.Name, millis(c.Created))
		return err
	})
	return c, s.told(err)
}

// Cluster finds a cluster.
func (s *Store) Cluster(ctx context.Context, id string) (Cluster, error) {
	return found(scanCluster(s.db.QueryRowContext(ctx, "SELECT id, team, name, created FROM clusters WHERE id = $1", id)))
}

// Clusters are those that a person may see.
func (s *Store) Clusters(ctx context.Context, person string) ([]Cluster, error) {
	return query(ctx, s.db, scanCluster, `SELECT clusters.id, clusters.team, clusters.name, clusters.created FROM clusters
		JOIN members ON members.team = clusters.team WHERE members.person = $1 ORDER BY clusters.name`, person)
}

// DeleteCluster forgets a cluster, its tokens and previews.
func (s *Store) DeleteCluster(ctx context.Context, id string) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE kind = $1 AND subject = $2", Link, id); err != nil {
			return err
		}
		return one(tx.ExecContext(ctx, "DELETE FROM clusters WHERE id = $1", id))
	})
}

const previewSelect = `SELECT previews.id, previews.host, previews.cluster, previews.owner, previews.name, previews.namespace, previews.workload, previews.authority, previews.propagate,
	previews.created, previews.public, previews.expires, previews.password, clusters.team, clusters.name, people.email
	FROM previews JOIN clusters ON clusters.id = previews.cluster JOIN people ON people.id = previews.owner `

func scanPreview(r row) (p Preview, err error) {
	var created, expires int64
	err = r.Scan(&p.ID, &p.Host, &p.Cluster, &p.Owner, &p.Name, &p.Namespace, &p.Workload, &p.Authority, &p.Propagate, &created, &p.Public, &expires, &p.Password,
		&p.Team, &p.ClusterName, &p.OwnerEmail)
	p.Created, p.Expires = timeOf(created), timeOf(expires)
	return p, err
}

// AddPreview makes a preview with an ID and a host of its own. The preview that its owner made last of the same intercept is the same
// one: a link that was given away goes on to work.
func (s *Store) AddPreview(ctx context.Context, p Preview) (_ Preview, made bool, err error) {
	host := ""
	err = s.change(ctx, func(tx *sql.Tx) error {
		old, err := found(scanPreview(tx.QueryRowContext(ctx, previewSelect+"WHERE previews.owner = $1 AND previews.cluster = $2 AND previews.namespace = $3 AND previews.name = $4",
			p.Owner, p.Cluster, p.Namespace, p.Name)))
		if err == nil {
			host = old.Host
			_, err = tx.ExecContext(ctx, "UPDATE previews SET workload = $2, authority = $3, propagate = $4 WHERE id = $1", old.ID, p.Workload, p.Authority, p.Propagate)
			return err
		}
		if !errors.Is(err, ErrNotFound) {
			return err
		}
		host, made = secret.Label(), true
		_, err = tx.ExecContext(ctx, `INSERT INTO previews (id, host, cluster, owner, name, namespace, workload, authority, propagate, created) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`,
			secret.ID(), host, p.Cluster, p.Owner, p.Name, p.Namespace, p.Workload, p.Authority, p.Propagate, millis(time.Now()))
		return err
	})
	if err != nil {
		return p, false, err
	}
	p, err = s.PreviewByHost(ctx, host)
	return p, made, err
}

// PreviewByHost finds a preview by the label of its domain.
func (s *Store) PreviewByHost(ctx context.Context, host string) (Preview, error) {
	return found(scanPreview(s.db.QueryRowContext(ctx, previewSelect+"WHERE previews.host = $1", host)))
}

// Previews are those of the clusters that a person may see; the newest come first.
func (s *Store) Previews(ctx context.Context, person string) ([]Preview, error) {
	return query(ctx, s.db, scanPreview, previewSelect+"JOIN members ON members.team = clusters.team WHERE members.person = $1 ORDER BY previews.created DESC, previews.host", person)
}

// Publish makes a preview public until a time (zero: for good), for those who know the password whose hash is given ("": nobody has to; nil: the one
// that it has stays), or not public. Visits of those who knew the last password end.
func (s *Store) Publish(ctx context.Context, id string, public bool, expires time.Time, password *string) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		return one(tx.ExecContext(ctx, "UPDATE previews SET public = $2, expires = $3, password = COALESCE($4, password) WHERE id = $1", id, public, millis(expires), password))
	})
}

// DeletePreview forgets a preview, who may visit it, and who did.
func (s *Store) DeletePreview(ctx context.Context, id string) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE kind IN ($2, $3) AND subject = $1", id, Visit, Ticket); err != nil {
			return err
		}
		return one(tx.ExecContext(ctx, "DELETE FROM previews WHERE id = $1", id))
	})
}

// Share lets the person with an e-mail address see a preview; remove takes that back.
func (s *Store) Share(ctx context.Context, preview, email string, remove bool) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM shares WHERE preview = $1 AND email = $2", preview, Email(email))
		if err == nil && !remove {
			_, err = tx.ExecContext(ctx, "INSERT INTO shares (preview, email) VALUES ($1, $2)", preview, Email(email))
		}
		return err
	})
}

// Shares are the e-mail addresses that a preview is shared with.
func (s *Store) Shares(ctx context.Context, preview string) ([]string, error) {
	return query(ctx, s.db, func(r row) (e string, err error) { return e, r.Scan(&e) }, "SELECT email FROM shares WHERE preview = $1 ORDER BY email", preview)
}

// SharedWith says whether a preview is shared with an e-mail address.
func (s *Store) SharedWith(ctx context.Context, preview, email string) (bool, error) {
	var n int
	err := s.db.QueryRowContext(ctx, "SELECT COUNT(*) FROM shares WHERE preview = $1 AND email = $2", preview, Email(email)).Scan(&n)
	return n > 0, err
}
