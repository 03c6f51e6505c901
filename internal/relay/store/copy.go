package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
)

// copied are the tables whose rows are worth keeping, in an order in which each refers to those before it. The others belong to relays that run.
var copied = []string{"people", "identities", "teams", "members", "clusters", "previews", "shares", "tokens", "visits", "audit", "files"}

// ErrNotEmpty says that a database has something already.
var ErrNotEmpty = errors.New("it is not empty")

// Import copies all that another database knows, of a relay that does not run, into this one, which has to be empty: all of it or nothing.
func (s *Store) Import(ctx context.Context, source string) error {
	if !IsPostgres(source) {
		if _, err := os.Stat(source); err != nil { // Open would make it
			return err
		}
	}
	from, err := Open(ctx, source)
	if err != nil {
		return err
	}
	err = s.tx(ctx, func(tx *sql.Tx) error {
		if err := s.alone(ctx, tx); err != nil {
			return err
		}
		for _, table := range copied {
			var n int
			if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM "+table).Scan(&n); err != nil {
				return err
			}
			if n > 0 && table != "tokens" && table != "audit" { // a relay that was started has made its setup link
				return ErrNotEmpty
			}
			if _, err := tx.ExecContext(ctx, "DELETE FROM "+table); err != nil {
				return err
			}
		}
		for _, table := range copied {
			if err := copyTable(ctx, from.db, tx, table); err != nil {
				return fmt.Errorf("%s: %w", table, err)
			}
		}
		var revision int64
		if err := from.db.QueryRowContext(ctx, "SELECT value FROM counters WHERE name = 'revision'").Scan(&revision); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "UPDATE counters SET value = $1 WHERE name = 'revision'", revision+1)
		return err
	})
	return errors.Join(err, from.Close())
}

func copyTable(ctx context.Context, from *sql.DB, to *sql.Tx, table string) error {
	rows, err := from.QueryContext(ctx, "SELECT * FROM "+table)
	if err != nil {
		return err
	}
	defer rows.Close()
	types, err := rows.ColumnTypes()
	if err != nil {
		return err
	}
	columns, places := make([]string, len(types)), make([]string, len(types))
	values, into := make([]any, len(types)), make([]any, len(types))
	for i, c := range types {
		columns[i], places[i], into[i] = c.Name(), fmt.Sprintf("$%d", i+1), &values[i]
	}
	stmt, err := to.PrepareContext(ctx, "INSERT INTO "+table+" ("+strings.Join(columns, ", ")+") VALUES ("+strings.Join(places, ", ")+")")
	if err != nil {
		return err
	}
	defer stmt.Close()
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return err
		}
		for i, v := range values {
			if n, ok := v.(int64); ok && types[i].DatabaseTypeName() == "BOOLEAN" { // SQLite has no other
				values[i] = n != 0
			}
		}
		if _, err := stmt.ExecContext(ctx, values...); err != nil {
			return err
		}
	}
	return rows.Err()
}
