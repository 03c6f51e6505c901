package store

import (
	"context"
	"database/sql"
	"errors"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver; only this package knows it
)

// Limits of a relay's connections to PostgreSQL.
const (
	pgConns      = 16
	pgIdle       = 5 * time.Minute
	pgListenWait = time.Second // between attempts to listen
)

// pgLock is the advisory lock for what one relay does at a time. Any number does that nothing else in the database uses.
const pgLock = 0x646f7070656c

// The channel on which relays tell each other of changes, and what about.
const (
	pgChannel   = "doppel_relay"
	aboutRights = "rights"
	aboutRelays = "relays"
)

// IsPostgres says whether a database's name is that of PostgreSQL, and not of a file.
func IsPostgres(source string) bool {
	return strings.HasPrefix(source, "postgres://") || strings.HasPrefix(source, "postgresql://")
}

// Name is a database's name without its password.
func Name(source string) string {
	if u, err := url.Parse(source); err == nil && IsPostgres(source) {
		return u.Redacted()
	}
	if IsPostgres(source) {
		return "PostgreSQL" // what cannot be read is not repeated
	}
	return source
}

func (s *Store) openPostgres(ctx context.Context, source string) (err error) {
	if s.db, err = sql.Open("pgx", source); err != nil {
		return err
	}
	s.db.SetMaxOpenConns(pgConns)
	s.db.SetMaxIdleConns(pgConns)
	s.db.SetConnMaxIdleTime(pgIdle)
	s.listen = newListener(source, s)
	if err := s.migrate(ctx); err != nil {
		s.listen.close()
		return errors.Join(err, s.db.Close())
	}
	return nil
}

// alone has a transaction wait until it is the only one that has called this. SQLite's are alone anyway.
func (s *Store) alone(ctx context.Context, tx *sql.Tx) error {
	if s.listen == nil {
		return nil
	}
	_, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", pgLock)
	return err
}

// notify tells other relays of a change when the transaction is committed.
func (s *Store) notify(ctx context.Context, tx *sql.Tx, about string) error {
	if s.listen == nil {
		return nil
	}
	_, err := tx.ExecContext(ctx, "SELECT pg_notify($1, $2)", pgChannel, about)
	return err
}

// listener hears of the changes that other relays make, on a connection of its own.
type listener struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func newListener(source string, s *Store) *listener {
	ctx, cancel := context.WithCancel(context.Background())
	l := &listener{cancel: cancel, done: make(chan struct{})}
	go func() { // ends with close
		defer close(l.done)
		for ctx.Err() == nil {
			_ = l.hear(ctx, source, s) // those who ask for the revision from time to time learn of it as well
			s.rights.tell()            // something may have been missed
			s.news.tell()
			s.relays.tell()
			select {
			case <-ctx.Done():
			case <-time.After(pgListenWait):
			}
		}
	}()
	return l
}

func (l *listener) close() {
	l.cancel()
	<-l.done
}

func (l *listener) hear(ctx context.Context, source string, s *Store) error {
	conn, err := pgx.Connect(ctx, source)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if _, err := conn.Exec(ctx, "LISTEN "+pgChannel); err != nil {
		return err
	}
	s.rights.tell()
	s.news.tell()
	s.relays.tell()
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		switch n.Payload {
		case aboutRights:
			s.rights.tell()
			s.news.tell()
		case aboutRelays:
			s.relays.tell()
		}
	}
}
