package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	storetest.Stop()
	os.Exit(code)
}

func open(t *testing.T, source string) *Store {
	t.Helper()
	s, err := Open(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// a preview, and what it needs.
func preview(t *testing.T, s *Store) Preview {
	t.Helper()
	ctx := t.Context()
	team, err := s.AddTeam(ctx, "crew")
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.AddPerson(ctx, Person{Email: "Ann@Example.com"}, team.ID, Admin, "")
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.AddCluster(ctx, team.ID, "prod")
	if err != nil {
		t.Fatal(err)
	}
	v, made, err := s.AddPreview(ctx, Preview{Cluster: c.ID, Owner: p.ID, Name: "web", Namespace: "shop", Workload: "web"})
	if err != nil || !made {
		t.Fatal(made, err)
	}
	return v
}

// A database is its owner's alone, also in a directory that was there and is everybody's to look into; one that is there stays as it is.
func TestFileMode(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "relay.db")
	preview(t, open(t, file))
	for _, want := range []os.FileMode{0o600, 0o640} {
		if want != 0o600 { // as somebody else wants it
			if err := os.Chmod(file, want); err != nil {
				t.Fatal(err)
			}
			if _, err := open(t, file).Teams(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != want {
			t.Errorf("%v %v, want %v", info, err, want)
		}
	}
	files, err := filepath.Glob(file + "-*")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, info, err)
		}
	}
}

// One that an older relay has made for everybody to read is its owner's alone from the next start on, with what a crash has left beside it.
func TestFileModeOfBefore(t *testing.T) {
	file := filepath.Join(t.TempDir(), "relay.db")
	preview(t, open(t, file))
	copied := filepath.Join(t.TempDir(), "relay.db")
	for _, end := range []string{"", "-wal", "-shm"} { // as if the relay had crashed
		b, err := os.ReadFile(file + end)
		if err == nil {
			err = os.WriteFile(copied+end, b, 0o600)
		}
		if err == nil {
			err = os.Chmod(copied+end, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if teams, err := open(t, copied).Teams(t.Context()); err != nil || len(teams) != 1 {
		t.Errorf("%v %v", teams, err)
	}
	for _, end := range []string{"", "-wal", "-shm"} {
		if info, err := os.Stat(copied + end); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%q: %v %v", end, info, err)
		}
	}
}

// Of a person whose tokens are taken away none is left that was made at the same time by another one, or by the password that was.
func TestTokensInTurn(t *testing.T) { storetest.Both(t, testTokensInTurn) }

func testTokensInTurn(t *testing.T, source func(*testing.T) string) {
	s, ctx := open(t, source(t)), t.Context()
	p, err := s.PersonByEmail(ctx, func() string { preview(t, s); return "ann@example.com" }())
	if err != nil {
		t.Fatal(err)
	}
	add := func(kind Kind, person string) string {
		token, err := s.AddToken(ctx, Token{Kind: kind, Person: person}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return secret.Hash(token)
	}
	for range 100 {
		login, code, device := add(Web, p.ID), add(Code, p.ID), add(Device, "")
		var makers sync.WaitGroup
		for _, fn := range []func() error{
			func() error {
				_, err := s.AddLogin(ctx, Token{Kind: Web, Person: p.ID}, time.Hour, p.Password)
				return err
			},
			func() error {
				_, err := s.AddTokenBy(ctx, login, Token{Kind: API, Person: p.ID}, time.Hour)
				return err
			},
			func() error {
				_, err := s.Exchange(ctx, code, Token{Kind: Laptop, Person: p.ID}, time.Hour)
				return err
			},
			func() error { return s.Allow(ctx, login, device, p.ID) },
		} {
			makers.Go(func() {
				if err := fn(); err != nil && !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
			})
		}
		hash := secret.ID()
		if err := s.SetPassword(ctx, p.ID, p.Password, hash); err != nil {
			t.Fatal(err)
		}
		makers.Wait()
		p.Password = hash
		for _, kind := range []Kind{Web, API, Laptop, Code, Device} {
			if left, err := s.Tokens(ctx, kind, "", p.ID); err != nil || len(left) > 0 {
				t.Fatalf("of kind %s %v is left, %v", kind, left, err)
			}
		}
	}
	// When nothing is taken away, each comes about, and one for one that counts once no more than once.
	login, code := add(Web, p.ID), add(Code, p.ID)
	_, lerr := s.AddLogin(ctx, Token{Kind: Web, Person: p.ID}, time.Hour, p.Password)
	_, terr := s.AddTokenBy(ctx, login, Token{Kind: API, Person: p.ID}, time.Hour)
	_, eerr := s.Exchange(ctx, code, Token{Kind: Laptop, Person: p.ID}, time.Hour)
	if err := errors.Join(lerr, terr, eerr, s.Allow(ctx, login, add(Device, ""), p.ID)); err != nil {
		t.Error(err)
	}
	if _, err := s.Exchange(ctx, code, Token{Kind: Laptop, Person: p.ID}, time.Hour); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

func TestSweep(t *testing.T) { storetest.Both(t, testSweep) }

func testSweep(t *testing.T, source func(*testing.T) string) {
	s := open(t, source(t))
	p := preview(t, s)
	now := time.Now()
	var all []Visited
	for i := range maxVisits + 5 {
		all = append(all, Visited{Preview: p.ID, At: now.Add(time.Duration(i) * time.Millisecond), Path: "/"})
	}
	all = append(all, Visited{Preview: "gone", At: now}) // its preview was deleted meanwhile
	if err := s.AddVisits(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	old, err := s.AddToken(t.Context(), Token{Kind: Visit, Subject: p.ID}, time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Sweep(t.Context(), now.Add(10*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	got, err := s.Visits(t.Context(), p.ID, 2*maxVisits)
	if err != nil || len(got) != maxVisits-5 || got[0].At.Before(got[1].At) {
		t.Errorf("%d visits, %v", len(got), err)
	}
	var n int
	if err := s.db.QueryRow("SELECT COUNT(*) FROM tokens WHERE hash = $1", secret.Hash(old)).Scan(&n); err != nil || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
}

func TestMigrate(t *testing.T) { storetest.Both(t, testMigrate) }

func testMigrate(t *testing.T, source func(*testing.T) string) {
	file := source(t)
	s := open(t, file)
	p := preview(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, file)
	if got, err := s.PreviewByHost(t.Context(), p.Host); err != nil || got != p {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.db.Exec("INSERT INTO migrations (number) VALUES ($1)", len(migrations)+1); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), file); err == nil || !strings.Contains(err.Error(), "newer doppel-relay") {
		t.Errorf("%v", err)
	}
}

// A token ends with what it hangs on, and a one-time token with its use.
func TestTokens(t *testing.T) { storetest.Both(t, testTokens) }

func testTokens(t *testing.T, source func(*testing.T) string) {
	s := open(t, source(t))
	p := preview(t, s)
	ctx := t.Context()
	add := func(tok Token, life time.Duration) string {
		t.Helper()
		secret, err := s.AddToken(ctx, tok, life)
		if err != nil {
			t.Fatal(err)
		}
		return secret
	}
	counts := func(kind Kind, token string) bool {
		t.Helper()
		_, err := s.Token(ctx, kind, token)
		return err == nil
	}
	web := add(Token{Kind: Web, Person: p.Owner}, time.Hour)
	visit := add(Token{Kind: Visit, Person: p.Owner, Subject: p.ID, Parent: secret.Hash(web)}, time.Hour)
	code := add(Token{Kind: Code, Person: p.Owner}, time.Hour)
	if !counts(Web, web) || !counts(Visit, visit) || counts(Laptop, web) || counts(Web, "") {
		t.Error("kinds")
	}
	if _, err := s.Redeem(ctx, Code, code); err != nil {
		t.Error(err)
	}
	if _, err := s.Redeem(ctx, Code, code); err == nil {
		t.Error("twice")
	}
	before, err := s.Revision(ctx)
	if err != nil {
		t.Fatal(err)
	}
	changed := s.Changed()
	if err := s.Revoke(ctx, secret.Hash(web)); err != nil {
		t.Fatal(err)
	}
	<-changed
	if after, err := s.Revision(ctx); err != nil || after != before+1 || counts(Visit, visit) {
		t.Error(after, err)
	}
	link := add(Token{Kind: Link, Subject: p.Cluster}, 0)
	last := add(Token{Kind: Laptop, Person: p.Owner}, 0)
	invite := add(Token{Kind: Invite, Person: p.Owner, Subject: p.Team}, 0)
	if err := s.SetDisabled(ctx, p.Owner, true); !errors.Is(err, ErrLastAdmin) || !counts(Laptop, last) {
		t.Errorf("the last admin: %v", err)
	}
	if _, err := s.AddPerson(ctx, Person{Email: "bob@example.com"}, p.Team, Admin, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.SetDisabled(ctx, p.Owner, true); err != nil {
		t.Fatal(err)
	}
	if counts(Laptop, last) || counts(Invite, invite) || !counts(Link, link) {
		t.Error("disabled")
	}
	if err := s.DeleteCluster(ctx, p.Cluster); err != nil || counts(Link, link) {
		t.Error(err)
	}
	if _, err := s.PreviewByHost(ctx, p.Host); err == nil {
		t.Error("the preview of a cluster that is gone")
	}
}

// Relays that start at once on a new database make its tables once, and what one changes the others hear of.
func TestShared(t *testing.T) {
	source := storetest.Postgres(t)
	stores := make([]*Store, 4)
	var wg sync.WaitGroup
	for i := range stores {
		wg.Go(func() {
			var err error
			if stores[i], err = Open(t.Context(), source); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, s := range stores {
		t.Cleanup(func() { s.Close() })
	}
	p := preview(t, stores[0])
	// Each way of news, after those of the beginning.
	for name, tell := range map[string]func() error{
		"rights": func() error { return stores[0].Publish(t.Context(), p.ID, true, time.Time{}, nil) },
		"relays": func() error { return stores[0].PutRelay(t.Context(), Relay{ID: "r", Links: "{}", Laptops: "[]"}, true) },
	} {
		next := stores[1].Changed
		if name == "relays" {
			next = stores[1].RelaysChanged
		}
		end := time.After(5 * time.Second)
		for quiet := false; !quiet; {
			select {
			case <-next():
			case <-time.After(300 * time.Millisecond):
				quiet = true
			}
		}
		news := next()
		if err := tell(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-news:
		case <-end:
			t.Errorf("nobody hears of %s", name)
		}
	}
	// The same preview is made once, however many ask at once.
	hosts := make([]string, 8)
	for i := range hosts {
		wg.Go(func() {
			v, _, err := stores[i%len(stores)].AddPreview(t.Context(), Preview{Cluster: p.Cluster, Owner: p.Owner, Name: "api", Namespace: "shop", Workload: "api"})
			if err != nil {
				t.Error(err)
			}
			hosts[i] = v.Host
		})
	}
	wg.Wait()
	if len(slices.Compact(hosts)) != 1 {
		t.Errorf("%q", hosts)
	}
}

func TestFiles(t *testing.T) { storetest.Both(t, testFiles) }

func testFiles(t *testing.T, source func(*testing.T) string) {
	s := open(t, source(t))
	ctx := t.Context()
	value := []byte{0, 0xff, '\n'}
	for _, name := range []string{"a/b", "a/b-c", "a/b/c/d", "ab"} {
		for range 2 {
			if err := s.PutFile(ctx, name, value); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, at, err := s.File(ctx, "a/b"); err != nil || !slices.Equal(got, value) || time.Since(at) > time.Minute {
		t.Errorf("%v %v %v", got, at, err)
	}
	if err := s.RemoveFiles(ctx, "a/b"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.File(ctx, "a/b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	got, err := s.Files(ctx, "")
	slices.Sort(got)
	if want := []string{"a/b-c", "ab"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func TestLock(t *testing.T) { storetest.Both(t, testLock) }

func testLock(t *testing.T, source func(*testing.T) string) {
	file := source(t)
	a, b := open(t, file), open(t, file)
	ctx := t.Context()
	unlock, err := a.Lock(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := b.Lock(short, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a lock that another has: %v", err)
	}
	if err := unlock(ctx); err != nil {
		t.Fatal(err)
	}
	// One of those who wait gets it at a time.
	var holders, most atomic.Int32
	var wg sync.WaitGroup
	for _, s := range []*Store{a, b, a, b} {
		wg.Go(func() {
			unlock, err := s.Lock(ctx, "x")
			if err != nil {
				t.Error(err)
				return
			}
			if n := holders.Add(1); n > most.Load() {
				most.Store(n)
			}
			_, _, _ = s.File(ctx, "none") // takes its time
			holders.Add(-1)
			if err := unlock(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d at once", most.Load())
	}
	// A holder that is gone loses it after its silence, to one of those who wait.
	if err := a.takeLock(ctx, "x", "gone", time.Hour); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if unlock, err = b.lock(ctx, "x", time.Second); err != nil || time.Since(start) < time.Second {
		t.Fatalf("after %v: %v", time.Since(start), err)
	}
	if err := unlock(ctx); err != nil {
		t.Fatal(err)
	}
}
