package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// jwksPath is where an API server publishes the keys that it signs tokens of service accounts with (KEP-1393). Every service account may read
// it (role system:service-account-issuer-discovery), where a TokenReview would need a right in the whole cluster.
const jwksPath = "/openid/v1/jwks"

// keysAge is how long keys are believed without having been asked for again, and keysPause how often a token of an unknown key may cause that.
const (
	keysAge   = 10 * time.Minute
	keysPause = time.Second
)

// tokenAlgorithms are what API servers sign tokens with. Symmetric ones and "none" are not among them: a public key is no secret.
var tokenAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512}

// tokens verifies agents' tokens with the API server's public keys. It says what the token says; whether the pod that it is bound to still
// lives is for the caller to ask.
type tokens struct {
	fetch func(context.Context) ([]byte, error) // a JSON Web Key Set
	clock *clock

	mu sync.Mutex
	// guarded by mu
	keys jose.JSONWebKeySet
	at   time.Time
}

// newTokens reads the keys with a client of the API server.
func newTokens(c *http.Client, host string, clock *clock) *tokens {
	return &tokens{clock: clock, fetch: func(ctx context.Context) ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(host, "/")+jwksPath, nil)
		if err != nil {
			return nil, err
		}
		resp, err := c.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("GET %s: %s", jwksPath, resp.Status)
		}
		return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	}}
}

// boundPod is the pod that a token is bound to (KEP-1205).
type boundPod struct {
	namespace, name, uid string
}

var errToken = errors.New("the agent's token is not valid")

// pod verifies a token and returns its pod.
func (t *tokens) pod(ctx context.Context, token string) (boundPod, error) {
	tok, err := jwt.ParseSigned(token, tokenAlgorithms)
	if err != nil || len(tok.Headers) != 1 {
		return boundPod{}, errToken
	}
	var std jwt.Claims
	var private struct {
		Kubernetes struct {
			Namespace string `json:"namespace"`
			Pod       struct {
				Name string `json:"name"`
				UID  string `json:"uid"`
			} `json:"pod"`
		} `json:"kubernetes.io"`
	}
	keys, err := t.find(ctx, tok.Headers[0].KeyID)
	if err != nil {
		return boundPod{}, fmt.Errorf("keys of service accounts' tokens: %w", err)
	}
	verified := false
	for _, k := range keys {
		if tok.Claims(k.Key, &std, &private) == nil {
			verified = true
			break
		}
	}
	k := private.Kubernetes
	switch {
	case !verified, std.Expiry == nil, k.Namespace == "", k.Pod.Name == "", k.Pod.UID == "":
		return boundPod{}, errToken
	case !strings.HasPrefix(std.Subject, "system:serviceaccount:"+k.Namespace+":"):
		return boundPod{}, errToken
	case std.ValidateWithLeeway(jwt.Expected{AnyAudience: jwt.Audience{agentcfg.Audience}, Time: t.clock.now()}, 0) != nil:
		return boundPod{}, errToken
	}
	return boundPod{k.Namespace, k.Pod.Name, k.Pod.UID}, nil
}

// find returns the keys of an ID. One that is not known may be new.
func (t *tokens) find(ctx context.Context, id string) ([]jose.JSONWebKey, error) {
	t.mu.Lock()
	found, age := t.keys.Key(id), time.Since(t.at)
	t.mu.Unlock()
	if len(found) > 0 && age < keysAge || len(found) == 0 && age < keysPause {
		return found, nil
	}
	b, err := t.fetch(ctx)
	var keys jose.JSONWebKeySet
	if err == nil {
		err = json.Unmarshal(b, &keys)
	}
	if err != nil && len(found) > 0 {
		return found, nil // the API server is busy; keys live for months
	}
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys, t.at = keys, time.Now()
	return t.keys.Key(id), nil
}
