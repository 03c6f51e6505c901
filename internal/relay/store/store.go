// Package store owns what the relay remembers: people, teams, clusters, previews, tokens and visits, in an SQL database.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"sync"
	"time"

	_ "modernc.org/sqlite" // registers the driver; only this package knows it
)

// ErrNotFound says that there is no such row.
var ErrNotFound = errors.New("not found")

// ErrTaken says that there is such a row already.
var ErrTaken = errors.New("there is one already")

// ErrTeamTaken is ErrTaken of a team, where an account is made as well.
var ErrTeamTaken = errors.New("there is a team of that name")

// Patience bounds how long those wait for the database who hold up others meanwhile: one that hangs is as good as one that fails.
const Patience = 2 * time.Second

// Store is the database: a file (SQLite), or PostgreSQL, which several relays may share. Its SQL is what both understand; times are milliseconds of Unix
// time, 0 is never.
type Store struct {
	db     *sql.DB
	listen *listener // of the changes that other relays make; nil: there are no others

	rights, relays signal
	news           signal // anything that people are shown
}

// signal wakes those who wait for news.
type signal struct {
	mu sync.Mutex
	// guarded by mu
	next chan struct{} // closed at the next news; nil: nobody waits
}

func (s *signal) wait() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.next = make(chan struct{})
	}
	return s.next
}

func (s *signal) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next != nil {
		close(s.next)
		s.next = nil
	}
}

// Open opens the database, a postgres:// URL or a file, which it makes if need be, and brings its tables up to date.
func Open(ctx context.Context, source string) (*Store, error) {
	s := &Store{}
	var err error
	if name := Name(source); IsPostgres(source) {
		err = s.openPostgres(ctx, source)
		if err != nil {
			return nil, fmt.Errorf("database %s: %w", name, err)
		}
		return s, nil
	}
	if s.db, err = openFile(source); err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	if err := s.migrate(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", source, err), s.db.Close())
	}
	return s, nil
}

func openFile(file string) (*sql.DB, error) {
	// SQLite's would be everybody's to read; what it puts beside is as this one. One that is there is not opened: closing it would end SQLite's locks
	// in this process (fcntl(2)).
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if errors.Is(err, fs.ErrExist) {
		if err := closeToOthers(file); err != nil {
			return nil, err
		}
	}
	pragmas := url.Values{"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)"}, "_txlock": {"immediate"}}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Opaque: file, RawQuery: pragmas.Encode()}).String())
	if err == nil {
		db.SetMaxOpenConns(4)
	}
	return db, err
}

// closeToOthers makes a database that everybody may read, as older relays made theirs, its owner's alone, with what SQLite has put beside it. Another mode
// is as somebody wants it.
func closeToOthers(file string) error {
	for _, f := range []string{file, file + "-wal", file + "-shm"} {
		info, err := os.Stat(f)
		if err == nil && info.Mode().Perm()&0o007 != 0 {
			err = os.Chmod(f, 0o600)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) { // its owner alone can
			return err
		}
	}
	return nil
}

// Close writes what is left into the one file, or leaves the server.
func (s *Store) Close() error {
	if s.listen != nil {
		s.listen.close()
	}
	return s.db.Close()
}

// Backup writes a copy of the database in a file, as it is, into a new one of its owner's alone, while a relay runs or not.
func Backup(ctx context.Context, source, file string) (err error) {
	if IsPostgres(source) {
		return errors.New("the database is PostgreSQL's: use pg_dump")
	}
	if _, err := os.Stat(source); err != nil { // SQLite would make it
		return fmt.Errorf("backup: there is no database: %w", err)
	}
	to, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL, 0o600) // SQLite's would be everybody's to read
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	db, err := openFile(source)
	if err == nil {
		_, err = db.ExecContext(ctx, "VACUUM INTO $1", file)
		err = errors.Join(err, db.Close())
	}
	if err = errors.Join(err, to.Close()); err != nil {
		return fmt.Errorf("backup: %w", errors.Join(err, os.Remove(file)))
	}
	return nil
}

// Changed is closed when something changes that decides who may see or do what. Get it before looking.
func (s *Store) Changed() <-chan struct{} { return s.rights.wait() }

// RelaysChanged is closed when another relay comes or has news of its clusters. Get it before looking.
func (s *Store) RelaysChanged() <-chan struct{} { return s.relays.wait() }

// News is closed when anything changes that people are shown, as far as this relay knows. Get it before looking.
func (s *Store) News() <-chan struct{} { return s.news.wait() }

// Revision counts the changes that decide who may see or do what, of all relays that share the database.
func (s *Store) Revision(ctx context.Context) (n int64, err error) {
	err = s.db.QueryRowContext(ctx, "SELECT value FROM counters WHERE name = 'revision'").Scan(&n)
	return n, err
}

// change runs fn in a transaction after which everybody's rights are looked at again.
func (s *Store) change(ctx context.Context, fn func(tx *sql.Tx) error) error {
	err := s.tx(ctx, func(tx *sql.Tx) error {
		// In PostgreSQL this row's lock is what lets one change follow the other; SQLite has no other way.
		if _, err := tx.ExecContext(ctx, "UPDATE counters SET value = value + 1 WHERE name = 'revision'"); err != nil {
			return err
		}
		if err := fn(tx); err != nil {
			return err
		}
		return s.notify(ctx, tx, aboutRights)
	})
	if err == nil {
		s.rights.tell()
		s.news.tell()
	}
	return err
}

// inTurn runs fn in a transaction that no change is made beside: what fn looks at is as the last one has left it, and the next one sees what fn makes.
func (s *Store) inTurn(ctx context.Context, fn func(tx *sql.Tx) error) error {
	return s.told(s.tx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE counters SET value = value WHERE name = 'revision'"); err != nil { // as change
			return err
		}
		return fn(tx)
	}))
}

// told passes an error on, and that there is news if there is none.
func (s *Store) told(err error) error {
	if err == nil {
		s.news.tell()
	}
	return err
}

func (s *Store) tx(ctx context.Context, fn func(tx *sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}

// one is the answer of a statement that has to concern exactly one row.
func one(r sql.Result, err error) error {
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); err != nil || n == 1 {
		return err
	}
	return ErrNotFound
}

// query runs a query and reads each row with scan.
func query[T any](ctx context.Context, q querier, scan func(row) (T, error), text string, args ...any) ([]T, error) {
	rows, err := q.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := []T{}
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

type row interface{ Scan(dest ...any) error }

// found turns the absence of a row into ErrNotFound.
func found[T any](v T, err error) (T, error) {
	if errors.Is(err, sql.ErrNoRows) {
		return v, ErrNotFound
	}
	return v, err
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func timeOf(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
