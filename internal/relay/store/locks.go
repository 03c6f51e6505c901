package store

import (
	"context"
	"database/sql"
	"errors"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// Times of locks: how often a holder says that it is there, how often those who wait look, and how long a holder is silent that is gone. That is
// measured by who waits: nobody else's clock counts.
const (
	lockBeat    = 3 * time.Second
	lockLook    = 500 * time.Millisecond
	lockSilence = 15 * time.Second
)

// Lock waits until it has the lock of a name, which one of all that share the database has at a time. It is for what takes long and does no harm when
// it is done twice: a relay that stands still for lockSilence and goes on has lost it without knowing.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(context.Context) error, err error) {
	return s.lock(ctx, name, lockSilence)
}

func (s *Store) lock(ctx context.Context, name string, silence time.Duration) (unlock func(context.Context) error, err error) {
	me := secret.ID()
	if err := s.takeLock(ctx, name, me, silence); err != nil {
		ectx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockBeat)
		defer cancel()
		return nil, errors.Join(err, s.dropLock(ectx, name, me)) // it may have been taken all the same
	}
	bctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(lockBeat)
		defer tick.Stop()
		for {
			select {
			case <-bctx.Done():
				return
			case <-tick.C: // one that fails is followed by others
				_, _ = s.db.ExecContext(bctx, "UPDATE locks SET beat = beat + 1 WHERE name = $1 AND holder = $2", name, me)
			}
		}
	})
	return func(ctx context.Context) error {
		stop()
		wg.Wait()
		return s.dropLock(ctx, name, me)
	}, nil
}

func (s *Store) dropLock(ctx context.Context, name, me string) error {
	_, err := s.db.ExecContext(ctx, "DELETE FROM locks WHERE name = $1 AND holder = $2", name, me)
	return err
}

func (s *Store) takeLock(ctx context.Context, name, me string, silence time.Duration) error {
	tick := time.NewTicker(lockLook)
	defer tick.Stop()
	type holding struct {
		holder string
		beat   int64
	}
	var last, silent holding
	var heard time.Time
	for {
		// It is free, or its holder is silent: in one statement, so that only one of those who wait gets it.
		r, err := s.db.ExecContext(ctx, `INSERT INTO locks (name, holder, beat) VALUES ($1, $2, 0)
			ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, beat = 0 WHERE locks.holder = $3 AND locks.beat = $4`, name, me, silent.holder, silent.beat)
		if err = one(r, err); !errors.Is(err, ErrNotFound) {
			return err
		}
		var now holding
		err = s.db.QueryRowContext(ctx, "SELECT holder, beat FROM locks WHERE name = $1", name).Scan(&now.holder, &now.beat)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if now != last {
			last, heard = now, time.Now()
		}
		if time.Since(heard) >= silence {
			silent = last
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
