package store

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
)

func TestImport(t *testing.T) { storetest.Both(t, testImport) }

func testImport(t *testing.T, source func(*testing.T) string) {
	ctx := t.Context()
	file := filepath.Join(t.TempDir(), "old.db")
	old, now := open(t, file), open(t, source(t))
	p := preview(t, old)
	link, err := old.AddToken(ctx, Token{Kind: Link, Subject: p.Cluster}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		old.Publish(ctx, p.ID, true, time.Time{}, new("hash")),
		old.Share(ctx, p.ID, "bob@example.com", false),
		old.AddVisits(ctx, []Visited{{Preview: p.ID, At: time.Now(), Path: "/x", Status: 200, Latency: time.Millisecond}}),
		old.Audit(ctx, Audited{At: time.Now(), Who: "ann", Action: "x"}),
		old.PutFile(ctx, "acme/a", []byte{0, 0xff}),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := now.AddToken(ctx, Token{Kind: Setup}, time.Hour); err != nil { // it was started once
		t.Fatal(err)
	}
	missing := filepath.Join(t.TempDir(), "none.db")
	if err := now.Import(ctx, missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := now.Import(ctx, file); err != nil {
		t.Fatal(err)
	}
	type all struct {
		Preview  Preview
		Visits   []Visited
		Shares   []string
		Tokens   []Token
		File     []byte
		Revision int64
	}
	read := func(s *Store) (a all) {
		t.Helper()
		var errs [6]error
		a.Preview, errs[0] = s.PreviewByHost(ctx, p.Host)
		a.Visits, errs[1] = s.Visits(ctx, p.ID, 10)
		a.Shares, errs[2] = s.Shares(ctx, p.ID)
		a.Tokens, errs[3] = s.Tokens(ctx, Link, "", "")
		a.File, _, errs[4] = s.File(ctx, "acme/a")
		a.Revision, errs[5] = s.Revision(ctx)
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatal(err)
		}
		return a
	}
	want := read(old)
	want.Revision++
	if diff := cmp.Diff(want, read(now)); diff != "" {
		t.Error(diff)
	}
	if _, err := now.Token(ctx, Link, link); err != nil {
		t.Errorf("a cluster's token: %v", err)
	}
	if _, err := now.Tokens(ctx, Setup, "", ""); err != nil {
		t.Error(err)
	}
	// Nothing is mixed with what is there, and nothing is lost by trying.
	if err := now.Import(ctx, file); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("again: %v", err)
	}
	if diff := cmp.Diff(want, read(now)); diff != "" {
		t.Error(diff)
	}
}
