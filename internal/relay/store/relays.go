package store

import (
	"context"
	"database/sql"
)

// Relay is one of several relays that share the database.
type Relay struct {
	ID      string
	Address string // HOST:PORT as the others reach it
	Key     string // hash of the key by which it is known
	Links   string // what it knows of the clusters that it holds; JSON
	Laptops string // the same of laptops
	Beat    int64  // goes up while it is there
}

// PutRelay says that a relay is there. The others are told at once if there is news.
func (s *Store) PutRelay(ctx context.Context, r Relay, news bool) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO relays (id, address, key, links, laptops, beat) VALUES ($1, $2, $3, $4, $5, $6)
			ON CONFLICT (id) DO UPDATE SET address = excluded.address, key = excluded.key, links = excluded.links, laptops = excluded.laptops, beat = excluded.beat`,
			r.ID, r.Address, r.Key, r.Links, r.Laptops, r.Beat)
		if err == nil && news {
			err = s.notify(ctx, tx, aboutRelays)
		}
		return err
	})
}

// RemoveRelay says that a relay is gone.
func (s *Store) RemoveRelay(ctx context.Context, id string) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM relays WHERE id = $1", id); err != nil {
			return err
		}
		return s.notify(ctx, tx, aboutRelays)
	})
}

// Relays are all that share the database.
func (s *Store) Relays(ctx context.Context) ([]Relay, error) {
	return query(ctx, s.db, func(r row) (o Relay, err error) {
		return o, r.Scan(&o.ID, &o.Address, &o.Key, &o.Links, &o.Laptops, &o.Beat)
	},
		"SELECT id, address, key, links, laptops, beat FROM relays ORDER BY id")
}
