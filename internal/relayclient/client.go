// Package relayclient owns what a laptop knows of relays: its logins, and calls of their API.
package relayclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// callTimeout bounds one call of the API.
const callTimeout = 15 * time.Second

// maxAnswer bounds an answer in bytes.
const maxAnswer = 8 << 20

// Client calls the API of one relay.
type Client struct {
	url   string
	token string
	http  *http.Client
}

// New returns a client for the relay of a login; the token may be empty.
func New(l Login) (*Client, error) {
	var roots *x509.CertPool
	if l.CA != "" {
		var err error
		if roots, err = x509.SystemCertPool(); err != nil {
			roots = x509.NewCertPool()
		}
		if !roots.AppendCertsFromPEM([]byte(l.CA)) {
			return nil, uerr.New(uerr.Usage, "give the file ca.pem of the relay", "the relay's authority is no certificate in PEM")
		}
	}
	tr := &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	return &Client{url: l.URL, token: l.Token, http: &http.Client{Transport: tr, Timeout: callTimeout, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // a token goes to the relay alone
	}}}, nil
}

// Call calls the API.
func (c *Client) Call(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &unknown):
		return uerr.Wrap(err, uerr.Usage, "if the relay has an authority of its own: doppel login "+c.url+" --ca-file ca.pem", "the relay's certificate is not trusted")
	case err != nil:
		return uerr.Wrap(err, uerr.Cluster, "is the address right, and is the relay reached from here?", "relay %s", c.url)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return uerr.Wrap(err, uerr.Cluster, "try again", "relay %s", c.url)
	}
	if resp.StatusCode != http.StatusOK {
		return c.problem(resp.StatusCode, answer)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return uerr.Wrap(err, uerr.Cluster, "is that the address of a doppel relay?", "relay %s", c.url)
	}
	return nil
}

// join opens the connection on which the relay asks and this machine answers.
func (c *Client) join(ctx context.Context) (net.Conn, error) {
	req, err := http.NewRequest(http.MethodGet, c.url+relayapi.LaptopPath, nil) //nolint:noctx // UpgradeTo sets it
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	rt := c.http.Transport.(*http.Transport).Clone()
	rt.TLSClientConfig.NextProtos = []string{"http/1.1"}
	return tunnel.UpgradeTo(ctx, rt, req, tunnel.UpgradeProtocol)
}

// problem is an answer that is no success, for people.
func (c *Client) problem(status int, answer []byte) error {
	var p relayapi.Problem
	if json.Unmarshal(answer, &p) != nil || p.Error == "" {
		p.Error = fmt.Sprintf("HTTP %d", status)
	}
	kind, hint := uerr.Cluster, "try again later, or ask who runs the relay"
	switch status {
	case http.StatusUnauthorized:
		kind, hint = uerr.Denied, "log in with: doppel login "+c.url
	case http.StatusForbidden:
		kind, hint = uerr.Denied, "ask an admin of the team"
	case http.StatusNotFound:
		kind, hint = uerr.NotFound, "see what there is with: doppel preview list"
	case http.StatusConflict:
		kind, hint = uerr.Conflict, "" // the relay says what to do
	case http.StatusBadRequest:
		kind, hint = uerr.Usage, ""
	case http.StatusTooManyRequests:
		hint = "wait a little and try again"
	}
	return uerr.New(kind, hint, "relay %s: %s", c.url, p.Error)
}
