package store

import (
	"context"
	"database/sql"
	"errors"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// Person is somebody with an account.
type Person struct {
	ID       string
	Email    string // lower case
	Name     string
	Password string // its hash; "": has none
	Disabled bool
	Created  time.Time
}

// Role is what a member may do in a team.
type Role string

// The roles.
const (
	Member Role = "member"
	Admin  Role = "admin"
)

// Team is who shares clusters.
type Team struct{ ID, Name string }

// Membership is a person's place in a team.
type Membership struct {
	Team Team
	Role Role
}

// Email is an address in the form in which addresses are compared.
func Email(s string) string { return strings.ToLower(strings.TrimSpace(s)) }

const personColumns = "people.id, people.email, people.name, people.password, people.disabled, people.created"

func scanPerson(r row) (p Person, err error) {
	var created int64
	err = r.Scan(&p.ID, &p.Email, &p.Name, &p.Password, &p.Disabled, &created)
	p.Created = timeOf(created)
	return p, err
}

// PersonByEmail finds a person.
func (s *Store) PersonByEmail(ctx context.Context, email string) (Person, error) {
	return found(scanPerson(s.db.QueryRowContext(ctx, "SELECT "+personColumns+" FROM people WHERE email = $1", Email(email))))
}

// Person finds a person by their ID.
func (s *Store) Person(ctx context.Context, id string) (Person, error) {
	return found(scanPerson(s.db.QueryRowContext(ctx, "SELECT "+personColumns+" FROM people WHERE id = $1", id)))
}

// Empty says that nobody is an admin of a team yet.
func (s *Store) Empty(ctx context.Context) (bool, error) {
	var n int
	err := s.db.QueryRowContext(ctx, "SELECT COUNT(*) FROM members WHERE role = $1", Admin).Scan(&n)
	return n == 0, err
}

// First makes the first team and its admin, who gets an account unless they have one, by a setup link (its token's hash is used up).
func (s *Store) First(ctx context.Context, p Person, team, setup string) (Person, error) {
	err := s.change(ctx, func(tx *sql.Tx) error {
		if err := useLink(ctx, tx, setup); err != nil {
			return err
		}
		t, err := addTeam(ctx, tx, team)
		if errors.Is(err, ErrTaken) {
			return ErrTeamTaken
		}
		if err == nil && p.ID == "" {
			p, err = addPerson(ctx, tx, p)
		}
		if err == nil {
			err = addMember(ctx, tx, t.ID, p.ID, Admin)
		}
		return err
	})
	return p, err
}

// AddPerson makes an account, by an invitation (its token's hash is used up) and into a team, if they are given.
func (s *Store) AddPerson(ctx context.Context, p Person, team string, role Role, invitation string) (Person, error) {
	err := s.change(ctx, func(tx *sql.Tx) error {
		if err := useLink(ctx, tx, invitation); err != nil {
			return err
		}
		var err error
		if p, err = addPerson(ctx, tx, p); err == nil && team != "" {
			err = addMember(ctx, tx, team, p.ID, role)
		}
		return err
	})
	return p, err
}

// useLink uses a setup or invitation link up, if one is given. All setup links end with the first that is used.
func useLink(ctx context.Context, tx *sql.Tx, hash string) error {
	if hash == "" {
		return nil
	}
	var kind Kind
	err := tx.QueryRowContext(ctx, "DELETE FROM tokens WHERE hash = $1 RETURNING kind", hash).Scan(&kind)
	if err == nil && kind == Setup {
		_, err = tx.ExecContext(ctx, "DELETE FROM tokens WHERE kind = $1", Setup)
	}
	_, err = found(kind, err)
	return err
}

func addPerson(ctx context.Context, tx *sql.Tx, p Person) (Person, error) {
	p.ID, p.Email, p.Created = secret.ID(), Email(p.Email), time.Now()
	var n int
	if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM people WHERE email = $1", p.Email).Scan(&n); err != nil {
		return p, err
	}
	if n > 0 {
		return p, ErrTaken
	}
	_, err := tx.ExecContext(ctx, "INSERT INTO people (id, email, name, password, created) VALUES ($1, $2, $3, $4, $5)", p.ID, p.Email, p.Name, p.Password, millis(p.Created))
	return p, err
}

func addMember(ctx context.Context, tx *sql.Tx, team, person string, role Role) error {
	_, err := tx.ExecContext(ctx, "INSERT INTO members (team, person, role) VALUES ($1, $2, $3)", team, person, role)
	return err
}

// PersonByIdentity finds a person by who an identity provider says they are.
func (s *Store) PersonByIdentity(ctx context.Context, issuer, subject string) (Person, error) {
	return found(scanPerson(s.db.QueryRowContext(ctx, "SELECT "+personColumns+" FROM people JOIN identities ON identities.person = people.id WHERE identities.issuer = $1 AND identities.subject = $2", issuer, subject)))
}

// HasIdentity says whether an identity provider knows a person already.
func (s *Store) HasIdentity(ctx context.Context, issuer, person string) (bool, error) {
	var n int
	err := s.db.QueryRowContext(ctx, "SELECT COUNT(*) FROM identities WHERE issuer = $1 AND person = $2", issuer, person).Scan(&n)
	return n > 0, err
}

// AddIdentity says who a person is to an identity provider.
func (s *Store) AddIdentity(ctx context.Context, issuer, subject, person string) error {
	_, err := s.db.ExecContext(ctx, "INSERT INTO identities (issuer, subject, person) VALUES ($1, $2, $3)", issuer, subject, person)
	return err
}

// Join gives a person who has an account a place in a team by an invitation (its token's hash is used up), if one is given. A place that they have
// is not taken away for a lower one.
func (s *Store) Join(ctx context.Context, team, person string, role Role, invitation string) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		if err := useLink(ctx, tx, invitation); err != nil {
			return err
		}
		if role != Admin {
			var n int
			if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM members WHERE team = $1 AND person = $2", team, person).Scan(&n); err != nil || n > 0 {
				return err
			}
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM members WHERE team = $1 AND person = $2", team, person); err != nil {
			return err
		}
		return addMember(ctx, tx, team, person, role)
	})
}

// Team finds a team.
func (s *Store) Team(ctx context.Context, id string) (t Team, err error) {
	err = s.db.QueryRowContext(ctx, "SELECT id, name FROM teams WHERE id = $1", id).Scan(&t.ID, &t.Name)
	return found(t, err)
}

// TeamByName finds a team.
func (s *Store) TeamByName(ctx context.Context, name string) (t Team, err error) {
	err = s.db.QueryRowContext(ctx, "SELECT id, name FROM teams WHERE name = $1", name).Scan(&t.ID, &t.Name)
	return found(t, err)
}

// ErrLastAdmin says that a team would be left without an admin whose account counts.
var ErrLastAdmin = errors.New("the team would have no admin")

// keepAdmins runs fn, which must not leave a team that had one without an admin.
func keepAdmins(ctx context.Context, tx *sql.Tx, fn func() error) error {
	without := func() (n int, err error) {
		err = tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM teams WHERE NOT EXISTS (SELECT 1 FROM members JOIN people ON people.id = members.person
			WHERE members.team = teams.id AND members.role = $1 AND NOT people.disabled)`, Admin).Scan(&n)
		return n, err
	}
	before, err := without()
	if err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	after, err := without()
	if err == nil && after > before {
		err = ErrLastAdmin
	}
	return err
}

// SetDisabled changes whether an account is disabled. A disabled person's tokens are gone, and the invitations that they gave out.
func (s *Store) SetDisabled(ctx context.Context, person string, disabled bool) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		return keepAdmins(ctx, tx, func() error {
			if err := one(tx.ExecContext(ctx, "UPDATE people SET disabled = $1 WHERE id = $2", disabled, person)); err != nil || !disabled {
				return err
			}
			_, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE person = $1", person)
			return err
		})
	})
}

// SetPassword changes a password's hash, if it is still what it was. The person's tokens are gone, and the invitations that they gave out: who changes it may do so because somebody else knew it.
func (s *Store) SetPassword(ctx context.Context, person, was, hash string) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		if err := one(tx.ExecContext(ctx, "UPDATE people SET password = $1 WHERE id = $2 AND password = $3", hash, person, was)); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE person = $1", person)
		return err
	})
}

// AddTeam makes a team.
func (s *Store) AddTeam(ctx context.Context, name string) (t Team, err error) {
	err = s.change(ctx, func(tx *sql.Tx) error {
		t, err = addTeam(ctx, tx, name)
		return err
	})
	return t, err
}

func addTeam(ctx context.Context, tx *sql.Tx, name string) (Team, error) {
	t := Team{ID: secret.ID(), Name: name}
	var n int
	if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM teams WHERE name = $1", name).Scan(&n); err != nil {
		return t, err
	}
	if n > 0 {
		return t, ErrTaken
	}
	_, err := tx.ExecContext(ctx, "INSERT INTO teams (id, name) VALUES ($1, $2)", t.ID, t.Name)
	return t, err
}

// Teams are all teams.
func (s *Store) Teams(ctx context.Context) ([]Team, error) {
	return query(ctx, s.db, func(r row) (t Team, err error) { return t, r.Scan(&t.ID, &t.Name) }, "SELECT id, name FROM teams ORDER BY name")
}

// SetMember gives a person a place in a team; role "" takes it away. Who is no admin has given out no invitations.
func (s *Store) SetMember(ctx context.Context, team, person string, role Role) error {
	return s.change(ctx, func(tx *sql.Tx) error {
		return keepAdmins(ctx, tx, func() error {
			if role != Admin {
				if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE kind = $1 AND subject = $2 AND person = $3", Invite, team, person); err != nil {
					return err
				}
			}
			if _, err := tx.ExecContext(ctx, "DELETE FROM members WHERE team = $1 AND person = $2", team, person); err != nil || role == "" {
				return err
			}
			return addMember(ctx, tx, team, person, role)
		})
	})
}

// Memberships are the teams of a person.
func (s *Store) Memberships(ctx context.Context, person string) ([]Membership, error) {
	return query(ctx, s.db, func(r row) (m Membership, err error) { return m, r.Scan(&m.Team.ID, &m.Team.Name, &m.Role) },
		"SELECT teams.id, teams.name, members.role FROM members JOIN teams ON teams.id = members.team WHERE members.person = $1 ORDER BY teams.name", person)
}

// RoleOf is a person's role in a team; "": none.
func (s *Store) RoleOf(ctx context.Context, team, person string) (role Role, err error) {
	err = s.db.QueryRowContext(ctx, "SELECT role FROM members WHERE team = $1 AND person = $2", team, person).Scan(&role)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return role, err
}

// TeamMember is a person in a team.
type TeamMember struct {
	Person
	Role Role
}

// Members are the people of a team.
func (s *Store) Members(ctx context.Context, team string) ([]TeamMember, error) {
	return query(ctx, s.db, func(r row) (m TeamMember, err error) {
		var created int64
		err = r.Scan(&m.ID, &m.Email, &m.Name, &m.Password, &m.Disabled, &created, &m.Role)
		m.Created = timeOf(created)
		return m, err
	}, "SELECT "+personColumns+", members.role FROM members JOIN people ON people.id = members.person WHERE members.team = $1 ORDER BY people.email", team)
}

// Teamless are the people who are in no team.
func (s *Store) Teamless(ctx context.Context) ([]Person, error) {
	return query(ctx, s.db, scanPerson, "SELECT "+personColumns+" FROM people WHERE NOT EXISTS (SELECT 1 FROM members WHERE members.person = people.id) ORDER BY people.email")
}
