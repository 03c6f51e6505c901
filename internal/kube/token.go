package kube

import (
	"net/http"
	"os"
	"strings"
)

// tokenTransport sends a request that the API server did not accept again, if the kubeconfig's token file has another token by now.
// client-go reads the file once a minute, and a token may have expired when it is replaced: after sleep, for one.
type tokenTransport struct {
	rt   http.RoundTripper
	file string
}

// RoundTrip implements http.RoundTripper.
func (t *tokenTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.rt.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	again := t.renewed(req)
	if again == nil {
		return resp, nil
	}
	_ = resp.Body.Close()
	return t.rt.RoundTrip(again)
}

// renewed is the request with the token that is in the file now; nil if that is the same, or the request cannot be sent twice.
func (t *tokenTransport) renewed(req *http.Request) *http.Request {
	b, err := os.ReadFile(t.file)
	bearer := "Bearer " + strings.TrimSpace(string(b))
	if err != nil || len(b) == 0 || bearer == req.Header.Get("Authorization") {
		return nil
	}
	again := req.Clone(req.Context())
	again.Header.Set("Authorization", bearer)
	if req.Body == nil || req.Body == http.NoBody {
		return again
	}
	if req.GetBody == nil {
		return nil
	}
	if again.Body, err = req.GetBody(); err != nil {
		return nil
	}
	return again
}

// WrappedRoundTripper lets CloseIdle find the transport below.
func (t *tokenTransport) WrappedRoundTripper() http.RoundTripper { return t.rt }
