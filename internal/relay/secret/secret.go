// Package secret owns what the relay knows of secrets: random tokens of which only hashes are kept, and passwords.
package secret

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"unicode"

	"golang.org/x/crypto/argon2"
)

// Token returns a new random token of 130 bits. The prefix tells people, and scanners of repositories, what it is.
func Token(kind string) string { return "doppel_" + kind + "_" + rand.Text() }

// ID returns a new random identifier of 130 bits.
func ID() string { return strings.ToLower(rand.Text()) }

// codeLetters have no vowels, so that no code is a word, and none that are taken for others (RFC 8628, section 6.1).
const codeLetters = "BCDFGHJKLMNPQRSTVWXZ"

// Code returns a new code of 34 bits, for people to read and type: BCDF-GHJK.
func Code() string {
	b := make([]byte, 0, 9)
	for len(b) < cap(b) {
		if len(b) == 4 {
			b = append(b, '-')
		}
		n, _ := rand.Int(rand.Reader, big.NewInt(int64(len(codeLetters)))) // never fails
		b = append(b, codeLetters[n.Int64()])
	}
	return string(b)
}

// ReadCode is a code in its one form, from what a person typed; "" if it is none.
func ReadCode(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == '-' || unicode.IsSpace(r) {
			return -1
		}
		return unicode.ToUpper(r)
	}, s)
	if len(s) != 8 || strings.Trim(s, codeLetters) != "" {
		return ""
	}
	return s[:4] + "-" + s[4:]
}

// Hash is what is kept of a token. As a token is random, and long, that needs no salt and no slowness.
func Hash(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
}

// Challenge is the S256 challenge of a verifier (RFC 7636, section 4.2).
func Challenge(verifier string) string {
	h := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(h[:])
}

// Equal compares without telling by its time where the difference is.
func Equal(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// Parameters of argon2id: the second recommended option of RFC 9106, section 4, with fewer lanes, so that a login takes some 100 ms.
const (
	argonTime    = 3
	argonMemory  = 64 << 10 // KiB
	argonThreads = 2
	argonKey     = 32
	argonSalt    = 16
)

// MinPassword and MaxPassword bound a password's length in bytes.
const (
	MinPassword = 10
	MaxPassword = 200
)

// CheckPassword says what is wrong with a password that somebody wants.
func CheckPassword(p string) error {
	switch {
	case len(p) < MinPassword:
		return fmt.Errorf("the password has fewer than %d characters", MinPassword)
	case len(p) > MaxPassword:
		return fmt.Errorf("the password is longer than %d characters", MaxPassword)
	}
	return nil
}

// Passwords hashes and verifies passwords.
type Passwords struct {
	memory uint32 // KiB
	// nobody is a hash that no password has: with it a login with an unknown name takes as long as one with a wrong password.
	nobody string
}

// NewPasswords returns one that takes so much memory for each hash, in KiB; 0: 64 MiB.
func NewPasswords(memory uint32) *Passwords {
	p := &Passwords{memory: cmp.Or(memory, argonMemory)}
	p.nobody = p.text(random(argonSalt), random(argonKey))
	return p
}

// ErrBusy says that too many passwords wait to be hashed.
var ErrBusy = errors.New("too many passwords are looked at; try again in a moment")

// maxWaiting bounds how many passwords wait to be hashed: a login takes a few seconds at the longest, and is refused then.
const maxWaiting = 32

// computing bounds how many passwords are hashed at once, and so the memory that guessing takes; waiting, how many are hashed or wait for that.
var (
	computing = make(chan struct{}, 2)
	waiting   = make(chan struct{}, cap(computing)+maxWaiting)
)

func derive(ctx context.Context, password string, salt []byte, time, memory uint32, threads uint8) ([]byte, error) {
	select {
	case waiting <- struct{}{}:
		defer func() { <-waiting }()
	default:
		return nil, ErrBusy
	}
	select {
	case computing <- struct{}{}:
		defer func() { <-computing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return argon2.IDKey([]byte(password), salt, time, memory, threads, argonKey), nil
}

// Hash returns the password's hash in the usual form ($argon2id$v=19$m=…,t=…,p=…$salt$hash).
func (p *Passwords) Hash(ctx context.Context, password string) (string, error) {
	salt := random(argonSalt)
	key, err := derive(ctx, password, salt, argonTime, p.memory, argonThreads)
	if err != nil {
		return "", err
	}
	return p.text(salt, key), nil
}

func (p *Passwords) text(salt, key []byte) string {
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, p.memory, argonTime, argonThreads, b64.EncodeToString(salt), b64.EncodeToString(key))
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// Verify says whether it is the password of a hash; "" is the hash of nobody's.
func (p *Passwords) Verify(ctx context.Context, password, hash string) (bool, error) {
	known := hash != ""
	if !known {
		hash = p.nobody
	}
	salt, want, time, memory, threads, err := parse(hash)
	if err != nil || len(password) > MaxPassword {
		return false, nil
	}
	got, err := derive(ctx, password, salt, time, memory, threads)
	return err == nil && subtle.ConstantTimeCompare(got, want) == 1 && known, err
}

func parse(hash string) (salt, key []byte, time, memory uint32, threads uint8, err error) {
	parts := strings.Split(hash, "$")
	if len(parts) != 6 || parts[1] != "argon2id" {
		return nil, nil, 0, 0, 0, errors.New("not an argon2id hash")
	}
	if _, err = fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &memory, &time, &threads); err != nil {
		return nil, nil, 0, 0, 0, fmt.Errorf("parameters of a hash: %w", err)
	}
	if salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err == nil {
		key, err = base64.RawStdEncoding.DecodeString(parts[5])
	}
	return salt, key, time, memory, threads, err
}
