package store

import (
	"context"
	"database/sql"
	"strings"
	"time"
)

// PutFile keeps a value under a name, whose parts are separated by slashes.
func (s *Store) PutFile(ctx context.Context, name string, value []byte) error {
	_, err := s.db.ExecContext(ctx, `INSERT INTO files (name, value, modified) VALUES ($1, $2, $3)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value, modified = excluded.modified`, name, value, millis(time.Now()))
	return err
}

// File finds what is kept under a name, and since when.
func (s *Store) File(ctx context.Context, name string) (value []byte, modified time.Time, err error) {
	var at int64
	err = s.db.QueryRowContext(ctx, "SELECT value, modified FROM files WHERE name = $1", name).Scan(&value, &at)
	value, err = found(value, err)
	return value, timeOf(at), err
}

// RemoveFiles removes what is kept under a name, and all below it.
func (s *Store) RemoveFiles(ctx context.Context, name string) error {
	names, err := s.Files(ctx, name)
	if err != nil {
		return err
	}
	return s.tx(ctx, func(tx *sql.Tx) error {
		for _, n := range append(names, name) {
			if _, err := tx.ExecContext(ctx, "DELETE FROM files WHERE name = $1", n); err != nil {
				return err
			}
		}
		return nil
	})
}

// Files lists the names below one; "" is that of all.
func (s *Store) Files(ctx context.Context, name string) ([]string, error) {
	all, err := query(ctx, s.db, func(r row) (n string, err error) { return n, r.Scan(&n) }, "SELECT name FROM files")
	if name == "" {
		return all, err
	}
	var out []string // there are few, and databases sort and compare names in ways of their own
	for _, n := range all {
		if strings.HasPrefix(n, name+"/") {
			out = append(out, n)
		}
	}
	return out, err
}
