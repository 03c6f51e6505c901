package secret

import (
	"strings"
	"testing"
)

func TestPassword(t *testing.T) {
	if h := NewPasswords(0).Hash("correct horse"); !strings.HasPrefix(h, "$argon2id$v=19$m=65536,t=3,p=2$") {
		t.Errorf("%s", h)
	}
	p := NewPasswords(64) // what follows is the same with little memory, and with the race detector much faster
	h := p.Hash("correct horse")
	if h == p.Hash("correct horse") {
		t.Error("no salt")
	}
	for word, want := range map[string]bool{"correct horse": true, "Correct horse": false, "": false, strings.Repeat("x", MaxPassword+1): false} {
		if p.Verify(word, h) != want {
			t.Errorf("%.20q: %v", word, !want)
		}
	}
	for _, broken := range []string{"", "x", "$argon2id$v=19$m=x$a$b", "$argon2id$v=19$m=65536,t=3,p=2$!$!", "$2a$10$abc"} {
		if p.Verify("nobody", broken) {
			t.Errorf("%q lets somebody in", broken)
		}
	}
	if CheckPassword("short") == nil || CheckPassword(strings.Repeat("x", 201)) == nil || CheckPassword("long enough") != nil {
		t.Error("lengths")
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
	h := p.Hash("correct horse")
	for b.Loop() {
		p.Verify("correct horse", h)
	}
}
