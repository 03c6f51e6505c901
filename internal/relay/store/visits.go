package store

import (
	"context"
	"database/sql"
	"time"
)

// Visited is one request of a visitor.
type Visited struct {
	Preview string
	At      time.Time
	Who     string // e-mail address; "": somebody with the link
	Address string
	Method  string
	Path    string // without the query, which may hold secrets
	Status  int    // 0: it was cut
	Latency time.Duration
}

// AddVisits stores visits.
func (s *Store) AddVisits(ctx context.Context, all []Visited) error {
	return s.told(s.tx(ctx, func(tx *sql.Tx) error {
		stmt, err := tx.PrepareContext(ctx, `INSERT INTO visits (preview, at, who, address, method, path, status, micros)
			SELECT $1, $2, $3, $4, $5, $6, $7, $8 WHERE EXISTS (SELECT 1 FROM previews WHERE id = $1)`)
		if err != nil {
			return err
		}
		defer stmt.Close()
		for _, v := range all {
			if _, err := stmt.ExecContext(ctx, v.Preview, millis(v.At), v.Who, v.Address, v.Method, v.Path, v.Status, v.Latency.Microseconds()); err != nil {
				return err
			}
		}
		return nil
	}))
}

// Visits are the last visits of a preview; the newest come first.
func (s *Store) Visits(ctx context.Context, preview string, limit int) ([]Visited, error) {
	return query(ctx, s.db, func(r row) (v Visited, err error) {
		var at, micros int64
		err = r.Scan(&v.Preview, &at, &v.Who, &v.Address, &v.Method, &v.Path, &v.Status, &micros)
		v.At, v.Latency = timeOf(at), time.Duration(micros)*time.Microsecond
		return v, err
	}, "SELECT preview, at, who, address, method, path, status, micros FROM visits WHERE preview = $1 ORDER BY at DESC LIMIT $2", preview, limit)
}

// Audited is something that somebody did.
type Audited struct {
	At                  time.Time
	Who, Action, Detail string
}

// Audit stores what somebody did.
func (s *Store) Audit(ctx context.Context, a Audited) error {
	_, err := s.db.ExecContext(ctx, "INSERT INTO audit (at, who, action, detail) VALUES ($1, $2, $3, $4)", millis(a.At), a.Who, a.Action, a.Detail)
	return err
}
