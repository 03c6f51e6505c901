package manager

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// claims are what an API server writes into a projected token.
type claims struct {
	jwt.Claims
	Kubernetes map[string]any `json:"kubernetes.io"`
}

// token is a good agent's; pod "" is bound to none.
func token(ns, pod string) claims {
	c := claims{
		Claims: jwt.Claims{
			Issuer: "https://kubernetes.default.svc.cluster.test", Subject: "system:serviceaccount:" + ns + ":default",
			Audience: jwt.Audience{agentcfg.Audience}, Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour)), NotBefore: jwt.NewNumericDate(time.Now().Add(-time.Minute)),
		},
		Kubernetes: map[string]any{"namespace": ns, "serviceaccount": map[string]any{"name": "default", "uid": "u"}},
	}
	if pod != "" {
		c.Kubernetes["pod"] = map[string]any{"name": pod, "uid": pod}
	}
	return c
}

// signKey is what the fake API server signs with.
var signKey = sync.OnceValue(func() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		panic(err)
	}
	return k
})

func sign(t testing.TB, alg jose.SignatureAlgorithm, key any, id string, c claims) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", id))
	if err != nil {
		t.Fatal(err)
	}
	out, err := jwt.Signed(s).Claims(c).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// jwks are the keys that the fake API server publishes.
func jwks(id string, k *ecdsa.PrivateKey) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: k.Public(), KeyID: id, Algorithm: "ES256", Use: "sig"}}})
	}
}

func TestTokens(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := token("shop", "web-1")
	for name, tt := range map[string]struct {
		token string
		ok    bool
	}{
		"good":               {sign(t, jose.ES256, signKey(), "k", good), true},
		"of another key":     {sign(t, jose.ES256, other, "k", good), false},
		"of an unknown key":  {sign(t, jose.ES256, other, "other", good), false},
		"signed with a text": {sign(t, jose.HS256, []byte("0123456789abcdef0123456789abcdef"), "k", good), false},
		"no token":           {"nonsense", false},
		"not signed":         {"eyJhbGciOiJub25lIn0.e30.", false},
		"of another audience": {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) {
			c.Audience = jwt.Audience{"https://kubernetes.default.svc"}
		})), false},
		"without audience": {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) { c.Audience = nil })), false},
		"expired":          {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) { c.Expiry = jwt.NewNumericDate(time.Now().Add(-time.Second)) })), false},
		"for ever":         {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) { c.Expiry = nil })), false},
		"not yet":          {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) { c.NotBefore = jwt.NewNumericDate(time.Now().Add(time.Minute)) })), false},
		"of a person":      {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) { c.Subject = "ada" })), false},
		"of another namespace's account": {sign(t, jose.ES256, signKey(), "k", change(good, func(c *claims) {
			c.Subject = "system:serviceaccount:shopping:default"
		})), false},
		"bound to no pod": {sign(t, jose.ES256, signKey(), "k", token("shop", "")), false},
	} {
		t.Run(name, func(t *testing.T) {
			v := &tokens{clock: new(clock), fetch: jwks("k", signKey())}
			got, err := v.pod(t.Context(), tt.token)
			if tt.ok && (err != nil || got != (boundPod{"shop", "web-1", "web-1"})) || !tt.ok && !errors.Is(err, errToken) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

// A token's times are the API server's, whatever the clock of this machine says.
func TestTokensOfAnotherClock(t *testing.T) {
	for _, off := range []time.Duration{3 * time.Hour, -3 * time.Hour} {
		c := clockOff(off)
		v := &tokens{clock: c, fetch: jwks("k", signKey())}
		made := func(ago time.Duration) string {
			now := c.now().Add(-ago)
			return sign(t, jose.ES256, signKey(), "k", change(token("shop", "web-1"), func(c *claims) {
				c.IssuedAt, c.NotBefore, c.Expiry = jwt.NewNumericDate(now), jwt.NewNumericDate(now), jwt.NewNumericDate(now.Add(time.Hour))
			}))
		}
		if _, err := v.pod(t.Context(), made(10*time.Minute)); err != nil {
			t.Errorf("clock off by %v: %v", off, err)
		}
		if _, err := v.pod(t.Context(), made(2*time.Hour)); !errors.Is(err, errToken) {
			t.Errorf("clock off by %v: one that has expired: %v", off, err)
		}
	}
}

// Nothing but what the API server has signed, for us, is a token: a good one of which anything is changed is none. (No fuzz target: those have all that a
// package imports compiled once more, and this one imports most of Kubernetes' client.)
func TestTokensChanged(t *testing.T) {
	good := sign(t, jose.ES256, signKey(), "k", token("shop", "web-1"))
	v := &tokens{clock: new(clock), fetch: jwks("k", signKey())}
	if _, err := v.pod(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=.{}\"\x00\n\xff"
	for range 5000 {
		b := []byte(good)
		for range 1 + r.IntN(3) {
			at := r.IntN(len(b))
			switch r.IntN(4) {
			case 0:
				b = slices.Delete(b, at, min(len(b), at+1+r.IntN(20)))
			case 1:
				b = slices.Insert(b, at, b[r.IntN(at+1):at]...)
			case 2:
				b[at] = letters[r.IntN(len(letters))]
			case 3:
				parts := strings.Split(string(b), ".")
				r.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
				b = []byte(strings.Join(parts, "."))
			}
			if len(b) == 0 {
				break
			}
		}
		// The last letter of a signature has bits that mean nothing (RFC 4648, section 3.5).
		if s := string(b); s != good && (len(s) != len(good) || s[:len(s)-1] != good[:len(s)-1]) {
			if p, err := v.pod(t.Context(), s); !errors.Is(err, errToken) {
				t.Fatalf("%q: %+v, %v", s, p, err)
			}
		}
	}
}

// An API server's keys are asked for when one is needed, and old ones serve while it does not answer.
func TestTokenKeys(t *testing.T) {
	asked := 0
	down := errors.New("down")
	var answer error
	v := &tokens{clock: new(clock)}
	v.fetch = func(ctx context.Context) ([]byte, error) {
		asked++
		if answer != nil {
			return nil, answer
		}
		return jwks("k", signKey())(ctx)
	}
	good := sign(t, jose.ES256, signKey(), "k", token("shop", "web-1"))
	for range 3 {
		if _, err := v.pod(t.Context(), good); err != nil {
			t.Fatal(err)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times for three tokens", asked)
	}
	for range 3 { // strangers cannot have the API server asked all the time
		_, _ = v.pod(t.Context(), sign(t, jose.ES256, signKey(), "unknown", token("shop", "web-1")))
	}
	if asked != 1 {
		t.Errorf("asked %d times within a second", asked)
	}
	v.at, answer = time.Now().Add(-time.Hour), down
	if _, err := v.pod(t.Context(), good); err != nil || asked != 2 {
		t.Errorf("with old keys and an API server that is down: %v, asked %d times", err, asked)
	}
	if _, err := v.pod(t.Context(), sign(t, jose.ES256, signKey(), "new", token("shop", "web-1"))); !errors.Is(err, down) {
		t.Errorf("with an unknown key and an API server that is down: %v", err)
	}
}
