package store

import (
	"context"
	"database/sql"
	"fmt"
)

// migrations make the tables. One that was released is never changed: what is wanted then is a further one.
var migrations = []string{
	`CREATE TABLE counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
	INSERT INTO counters (name, value) VALUES ('revision', 0);
	CREATE TABLE people (
		id TEXT PRIMARY KEY, email TEXT NOT NULL UNIQUE, name TEXT NOT NULL, password TEXT NOT NULL, disabled BOOLEAN NOT NULL DEFAULT FALSE, created BIGINT NOT NULL);
	CREATE TABLE identities (
		issuer TEXT NOT NULL, subject TEXT NOT NULL, person TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE, PRIMARY KEY (issuer, subject));
	CREATE TABLE teams (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE);
	CREATE TABLE members (
		team TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE, person TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE, role TEXT NOT NULL,
		PRIMARY KEY (team, person));
	CREATE TABLE clusters (
		id TEXT PRIMARY KEY, team TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE, name TEXT NOT NULL, created BIGINT NOT NULL, UNIQUE (team, name));
	CREATE TABLE previews (
		id TEXT PRIMARY KEY, host TEXT NOT NULL UNIQUE, cluster TEXT NOT NULL REFERENCES clusters (id) ON DELETE CASCADE,
		owner TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE, name TEXT NOT NULL, namespace TEXT NOT NULL, workload TEXT NOT NULL, authority TEXT NOT NULL,
		created BIGINT NOT NULL, public BOOLEAN NOT NULL DEFAULT FALSE, expires BIGINT NOT NULL DEFAULT 0, password TEXT NOT NULL DEFAULT '');
	CREATE TABLE shares (
		preview TEXT NOT NULL REFERENCES previews (id) ON DELETE CASCADE, email TEXT NOT NULL, PRIMARY KEY (preview, email));
	CREATE TABLE tokens (
		hash TEXT PRIMARY KEY, kind TEXT NOT NULL, person TEXT NOT NULL, subject TEXT NOT NULL, parent TEXT NOT NULL, data TEXT NOT NULL,
		created BIGINT NOT NULL, expires BIGINT NOT NULL);
	CREATE INDEX tokens_subject ON tokens (kind, subject);
	CREATE INDEX tokens_person ON tokens (person);
	CREATE INDEX tokens_parent ON tokens (parent);
	CREATE TABLE visits (
		preview TEXT NOT NULL REFERENCES previews (id) ON DELETE CASCADE, at BIGINT NOT NULL, who TEXT NOT NULL, address TEXT NOT NULL, method TEXT NOT NULL,
		path TEXT NOT NULL, status BIGINT NOT NULL, micros BIGINT NOT NULL);
	CREATE INDEX visits_preview ON visits (preview, at);
	CREATE TABLE audit (at BIGINT NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL, detail TEXT NOT NULL);
	CREATE INDEX audit_at ON audit (at);`,
	`ALTER TABLE tokens ADD COLUMN used BIGINT NOT NULL DEFAULT 0;`,
	`CREATE TABLE relays (id TEXT PRIMARY KEY, address TEXT NOT NULL, key TEXT NOT NULL, links TEXT NOT NULL, beat BIGINT NOT NULL);`,
	// A blob is a BYTEA in SQLite, too: a column's type is no more than a hint there.
	`CREATE TABLE files (name TEXT PRIMARY KEY, value BYTEA NOT NULL, modified BIGINT NOT NULL);
	CREATE TABLE locks (name TEXT PRIMARY KEY, holder TEXT NOT NULL, beat BIGINT NOT NULL);`,
	`ALTER TABLE relays ADD COLUMN laptops TEXT NOT NULL DEFAULT '[]';`,
	`CREATE TABLE attempts (key TEXT PRIMARY KEY, next BIGINT NOT NULL);`,
	`ALTER TABLE previews ADD COLUMN propagate TEXT NOT NULL DEFAULT '';`,
}

func (s *Store) migrate(ctx context.Context) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		if err := s.alone(ctx, tx); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS migrations (number BIGINT PRIMARY KEY)"); err != nil {
			return err
		}
		var done int
		if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM migrations").Scan(&done); err != nil {
			return err
		}
		if done > len(migrations) {
			return fmt.Errorf("it is of a newer doppel-relay (format %d, this one knows %d)", done, len(migrations))
		}
		for i := done; i < len(migrations); i++ {
			if _, err := tx.ExecContext(ctx, migrations[i]); err != nil {
				return fmt.Errorf("migration %d: %w", i+1, err)
			}
			if _, err := tx.ExecContext(ctx, "INSERT INTO migrations (number) VALUES ($1)", i+1); err != nil {
				return err
			}
		}
		return nil
	})
}
