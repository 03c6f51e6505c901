package store

import (
	"context"
	"database/sql"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// Kind is what a token is for.
type Kind string

// The kinds of tokens, with what their fields mean.
const (
	Setup  Kind = "setup"  // makes the first admin
	Invite Kind = "invite" // makes an account: Subject is the team, Data the role, Person who has invited
	Reset  Kind = "reset"  // one time: gives Person another password
	Web    Kind = "web"    // a browser is logged in as Person
	Laptop Kind = "laptop" // a laptop is logged in as Person: Data is its name
	API    Kind = "api"    // a program acts as Person: Data is the token's name
	Link   Kind = "link"   // a traffic-manager joins as the cluster Subject
	Device Kind = "device" // a machine waits to be logged in as Person, who allows it. Subject is the code that people see, Data what is known of it
	Code   Kind = "code"   // one time: a laptop gets a token for Person. Subject is the challenge, Data the laptop's name
	Ticket Kind = "ticket" // one time: a browser gets a Visit. Subject is the preview, Data the state that the browser has to show
	Visit  Kind = "visit"  // a browser visits the preview Subject, as Person or as one who knows the password (Data is its hash)
	OIDC   Kind = "oidc"   // one time: a login at an identity provider is under way. Data is what is to be found again
)

// Token is something that its bearer may do. Only its hash is stored.
type Token struct {
	Hash    string
	Kind    Kind
	Person  string
	Subject string
	Parent  string // hash of the token that this one ends with
	Data    string
	Created time.Time
	Expires time.Time // zero: never
	Used    time.Time // of API tokens, give or take usedEvery; zero: never
}

const tokenColumns = "hash, kind, person, subject, parent, data, created, expires, used"

func scanToken(r row) (t Token, err error) {
	var created, expires, used int64
	err = r.Scan(&t.Hash, &t.Kind, &t.Person, &t.Subject, &t.Parent, &t.Data, &created, &expires, &used)
	t.Created, t.Expires, t.Used = timeOf(created), timeOf(expires), timeOf(used)
	return t, err
}

// AddToken stores a new token that lives for a time (0: for ever), or as long as it says if that is shorter, and returns its secret.
func (s *Store) AddToken(ctx context.Context, t Token, life time.Duration) (string, error) {
	token, err := addToken(ctx, s.db, t, life)
	return token, s.told(err)
}

// AddLogin is AddToken for who has proved to be the person, unless the password has another hash than this by now or the account is disabled (ErrNotFound).
func (s *Store) AddLogin(ctx context.Context, t Token, life time.Duration, password string) (string, error) {
	return s.addWhere(ctx, t, life, "people WHERE id = $1 AND password = $2 AND NOT disabled", t.Person, password)
}

// AddTokenBy is AddToken for the bearer of another token, unless that one was taken away meanwhile (ErrNotFound): whoever takes away all that a person has
// is to miss none.
func (s *Store) AddTokenBy(ctx context.Context, by string, t Token, life time.Duration) (string, error) {
	return s.addWhere(ctx, t, life, "tokens WHERE hash = $1", by)
}

// addWhere adds a token if there is such a row (ErrNotFound).
func (s *Store) addWhere(ctx context.Context, t Token, life time.Duration, from string, args ...any) (token string, err error) {
	err = s.inTurn(ctx, func(tx *sql.Tx) error {
		if err := exists(ctx, tx, from, args...); err != nil {
			return err
		}
		token, err = addToken(ctx, tx, t, life)
		return err
	})
	return token, err
}

// Exchange is AddTokenBy for one that counts once, and is used up.
func (s *Store) Exchange(ctx context.Context, by string, t Token, life time.Duration) (token string, err error) {
	err = s.inTurn(ctx, func(tx *sql.Tx) error {
		if err := one(tx.ExecContext(ctx, "DELETE FROM tokens WHERE hash = $1", by)); err != nil {
			return err
		}
		token, err = addToken(ctx, tx, t, life)
		return err
	})
	return token, err
}

// exists looks for a row.
func exists(ctx context.Context, tx *sql.Tx, from string, args ...any) error {
	var n int
	err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM "+from, args...).Scan(&n)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	return err
}

// ReplaceTokens is AddToken for one that takes the place of all of its kind that are for its subject.
func (s *Store) ReplaceTokens(ctx context.Context, t Token, life time.Duration) (token string, err error) {
	err = s.change(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE kind = $1 AND subject = $2", t.Kind, t.Subject); err != nil {
			return err
		}
		token, err = addToken(ctx, tx, t, life)
		return err
	})
	return token, err
}

func addToken(ctx context.Context, db execer, t Token, life time.Duration) (string, error) {
	token := secret.Token(string(t.Kind))
	now := time.Now()
	if end := now.Add(life); life > 0 && (t.Expires.IsZero() || end.Before(t.Expires)) {
		t.Expires = end
	}
	_, err := db.ExecContext(ctx, "INSERT INTO tokens ("+tokenColumns+") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0)",
		secret.Hash(token), t.Kind, t.Person, t.Subject, t.Parent, t.Data, millis(now), millis(t.Expires))
	return token, err
}

// valid is the condition on a token to count: it has not expired, nor has the one that it ends with, and its person is not disabled.
const valid = `(tokens.expires = 0 OR tokens.expires > $3)
	AND (tokens.parent = '' OR EXISTS (SELECT 1 FROM tokens AS p WHERE p.hash = tokens.parent AND (p.expires = 0 OR p.expires > $3)))
	AND (tokens.person = '' OR EXISTS (SELECT 1 FROM people WHERE people.id = tokens.person AND NOT people.disabled))`

// Token finds a valid token of a kind by its secret.
func (s *Store) Token(ctx context.Context, kind Kind, token string) (Token, error) {
	return s.TokenByHash(ctx, kind, secret.Hash(token))
}

// TokenByHash is Token for those who have kept the hash.
func (s *Store) TokenByHash(ctx context.Context, kind Kind, hash string) (Token, error) {
	return found(scanToken(s.db.QueryRowContext(ctx, "SELECT "+tokenColumns+" FROM tokens WHERE hash = $1 AND kind = $2 AND "+valid, hash, kind, millis(time.Now()))))
}

// Redeem finds a valid token and uses it up.
func (s *Store) Redeem(ctx context.Context, kind Kind, token string) (Token, error) {
	return found(scanToken(s.db.QueryRowContext(ctx, "DELETE FROM tokens WHERE hash = $1 AND kind = $2 AND "+valid+" RETURNING "+tokenColumns, secret.Hash(token), kind, millis(time.Now()))))
}

// usedEvery is how exactly it is known when a token was used: not each call is worth a write.
const usedEvery = time.Minute

// Use notes that a token is being used.
func (s *Store) Use(ctx context.Context, t Token) error {
	now := time.Now()
	if now.Sub(t.Used) < usedEvery {
		return nil
	}
	_, err := s.db.ExecContext(ctx, "UPDATE tokens SET used = $2 WHERE hash = $1", t.Hash, millis(now))
	return err
}

// Allow says, as AddTokenBy, that a device is to be logged in as a person; that can be said once.
func (s *Store) Allow(ctx context.Context, by, hash, person string) error {
	return s.inTurn(ctx, func(tx *sql.Tx) error {
		if err := exists(ctx, tx, "tokens WHERE hash = $1", by); err != nil {
			return err
		}
		return one(tx.ExecContext(ctx, "UPDATE tokens SET person = $3 WHERE hash = $1 AND kind = $2 AND person = ''", hash, Device, person))
	})
}

// Revoke takes a token away, and those that end with it.
func (s *Store) Revoke(ctx context.Context, hash string) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE hash = $1 OR parent = $1", hash)
		return err
	})
}

// Tokens lists the valid tokens of a kind that are for a subject, or of a person.
func (s *Store) Tokens(ctx context.Context, kind Kind, subject, person string) ([]Token, error) {
	return query(ctx, s.db, scanToken, "SELECT "+tokenColumns+" FROM tokens WHERE kind = $1 AND ($2 = '' OR subject = $2) AND ($4 = '' OR person = $4) AND "+valid+" ORDER BY created",
		kind, subject, millis(time.Now()), person)
}

// maxVisits is how many visits of a preview are kept: a link that many follow must not fill the disk.
const maxVisits = 10_000

// Sweep removes what has expired, visits before a time, and of each preview those beyond the newest maxVisits.
func (s *Store) Sweep(ctx context.Context, visitsBefore time.Time) error {
	many, err := query(ctx, s.db, func(r row) (id string, err error) { return id, r.Scan(&id) },
		"SELECT preview FROM visits GROUP BY preview HAVING COUNT(*) > $1", maxVisits)
	if err != nil {
		return err
	}
	for _, id := range many {
		_, err := s.db.ExecContext(ctx, `DELETE FROM visits WHERE preview = $1 AND at <= (SELECT at FROM visits WHERE preview = $1 ORDER BY at DESC LIMIT 1 OFFSET $2)`, id, maxVisits)
		if err != nil {
			return err
		}
	}
	return s.tx(ctx, func(tx *sql.Tx) error {
		if err := s.alone(ctx, tx); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE expires > 0 AND expires < $1", millis(time.Now())); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE parent <> '' AND parent NOT IN (SELECT hash FROM tokens)"); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM attempts WHERE next < $1", millis(time.Now())); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "DELETE FROM visits WHERE at < $1", millis(visitsBefore))
		return err
	})
}
