package store

import (
	"context"
	"errors"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// Attempt counts an attempt for all relays that share the database, and says whether it may be: so many at once, and then one each time. A relay that
// shares its database with nobody counts for itself, and everything may be here.
func (s *Store) Attempt(ctx context.Context, key string, burst int, every time.Duration) (bool, error) {
	if s.listen == nil {
		return true, nil
	}
	// The time at which the next one would be due if they came one each time (GCRA): it may be so much ahead.
	now := time.Now()
	err := one(s.db.ExecContext(ctx, `INSERT INTO attempts (key, next) VALUES ($1, $2)
		ON CONFLICT (key) DO UPDATE SET next = CASE WHEN attempts.next > $3 THEN attempts.next + $4 ELSE $2 END WHERE attempts.next <= $5`,
		secret.Hash(key), now.Add(every).UnixMilli(), now.UnixMilli(), every.Milliseconds(), now.Add(time.Duration(burst-1)*every).UnixMilli()))
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}
