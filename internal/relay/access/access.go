// Package access owns who may see a preview.
package access

import (
	"context"
	"errors"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// Visitor is who asks for a preview; the zero value is a stranger.
type Visitor struct {
	Person   store.Person // zero: nobody that we know
	Password string       // hash of the password that they have given, as it was then
	Until    time.Time    // when the visit ends; zero: it does not
}

// Name is how the list of visitors calls them.
func (v Visitor) Name() string { return v.Person.Email }

// Access decides.
type Access struct{ Store *store.Store }

// Visitor is who has a token for a preview; a token that does not count makes a stranger.
func (a Access) Visitor(ctx context.Context, preview, token string) (Visitor, error) {
	if token == "" {
		return Visitor{}, nil
	}
	t, err := a.Store.Token(ctx, store.Visit, token)
	if errors.Is(err, store.ErrNotFound) || err == nil && t.Subject != preview {
		return Visitor{}, nil
	}
	if err != nil {
		return Visitor{}, err
	}
	v := Visitor{Password: t.Data, Until: t.Expires}
	if t.Person != "" {
		v.Person, err = a.Store.Person(ctx, t.Person)
	}
	return v, err
}

// May says whether a visitor may see a preview now: the members of its cluster's team, those it is shared with, and if it is published
// everybody who has the link, and knows the password if there is one.
func (a Access) May(ctx context.Context, p store.Preview, v Visitor) (bool, error) {
	if p.Open(time.Now()) && (p.Password == "" || secret.Equal(p.Password, v.Password)) {
		return true, nil
	}
	if v.Person.ID == "" || v.Person.Disabled {
		return false, nil
	}
	role, err := a.Store.RoleOf(ctx, p.Team, v.Person.ID)
	if err != nil || role != "" {
		return err == nil, err
	}
	return a.Store.SharedWith(ctx, p.ID, v.Person.Email)
}

// MayChange says whether a person may publish, share or delete a preview: its owner, as long as they are in the team, and the team's admins.
func (a Access) MayChange(ctx context.Context, p store.Preview, person string) (bool, error) {
	role, err := a.Store.RoleOf(ctx, p.Team, person)
	return err == nil && (role == store.Admin || role != "" && p.Owner == person), err
}
