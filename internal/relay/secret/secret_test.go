package secret

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
)

func hash(t testing.TB, p *Passwords, password string) string {
	t.Helper()
	h, err := p.Hash(t.Context(), password)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func verify(t testing.TB, p *Passwords, password, hash string) bool {
	t.Helper()
	right, err := p.Verify(t.Context(), password, hash)
	if err != nil {
		t.Fatal(err)
	}
	return right
}

func TestPassword(t *testing.T) {
	if h := hash(t, NewPasswords(0), "correct horse"); !strings.HasPrefix(h, "$argon2id$v=19$m=65536,t=3,p=2$") {
		t.Errorf("%s", h)
	}
	p := NewPasswords(64) // what follows is the same with little memory, and with the race detector much faster
	h := hash(t, p, "correct horse")
	if h == hash(t, p, "correct horse") {
		t.Error("no salt")
	}
	for word, want := range map[string]bool{"correct horse": true, "Correct horse": false, "": false, strings.Repeat("x", MaxPassword+1): false} {
		if verify(t, p, word, h) != want {
			t.Errorf("%.20q: %v", word, !want)
		}
	}
	for _, broken := range []string{"", "x", "$argon2id$v=19$m=x$a$b", "$argon2id$v=19$m=65536,t=3,p=2$!$!", "$2a$10$abc"} {
		if verify(t, p, "nobody", broken) {
			t.Errorf("%q lets somebody in", broken)
		}
	}
	if CheckPassword("short") == nil || CheckPassword(strings.Repeat("x", 201)) == nil || CheckPassword("long enough") != nil {
		t.Error("lengths")
	}
}

// However many passwords are guessed, so many wait and no more, and none for somebody who has gone.
func TestBusy(t *testing.T) {
	p := NewPasswords(64)
	for range cap(computing) {
		computing <- struct{}{}
	}
	ctx, gone := context.WithCancel(t.Context())
	results := make(chan error)
	for range cap(waiting) {
		go func() {
			_, err := p.Verify(ctx, "guess", "")
			results <- err
		}()
	}
	for len(waiting) < cap(waiting) {
		runtime.Gosched()
	}
	if _, err := p.Verify(t.Context(), "guess", ""); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	gone()
	for range cap(waiting) {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	for range cap(computing) {
		<-computing
	}
	if right, err := p.Verify(t.Context(), "guess", ""); right || err != nil {
		t.Error(right, err)
	}
}

// RFC 7636, appendix B.
func TestCode(t *testing.T) {
	code := Code()
	for typed, want := range map[string]string{
		code: code, strings.ToLower(code): code, " bcdf ghjk\n": "BCDF-GHJK", "": "", "BCDF-GHJ": "", "BCDF-GHJA": "", "BCDF-GHJKL": "", "ÄBCDFGHJ": "",
	} {
		if got := ReadCode(typed); got != want {
			t.Errorf("%q: %q, want %q", typed, got, want)
		}
	}
	if Code() == code {
		t.Error("the same code twice")
	}
}

func TestChallenge(t *testing.T) {
	if got := Challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"); got != "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM" {
		t.Error(got)
	}
}

func BenchmarkVerify(b *testing.B) {
	p := NewPasswords(0)
	h := hash(b, p, "correct horse")
	for b.Loop() {
		verify(b, p, "correct horse", h)
	}
}
