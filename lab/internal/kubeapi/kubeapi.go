// Package kubeapi is the little of a Kubernetes client that the lab needs, without client-go.
package kubeapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// Client talks to one API server as one user.
type Client struct {
	base string
	http *http.Client
}

// Config names the server and the files that prove who is who.
type Config struct {
	Server, CAFile, CertFile, KeyFile string
}

// New returns a client.
func New(cfg Config) (*Client, error) {
	pair, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("client certificate: %w", err)
	}
	ca, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &Client{base: cfg.Server, http: &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			// No proxy of the environment: the server is on this machine.
			Proxy:           nil,
			TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, MinVersion: tls.VersionTLS12},
		},
	}}, nil
}

// StatusError is an answer other than 2xx.
type StatusError struct {
	Code int
	Body string
}

func (e *StatusError) Error() string { return fmt.Sprintf("HTTP %d: %s", e.Code, e.Body) }

// Get reads the object at path into v.
func (c *Client) Get(ctx context.Context, path string, v any) error {
	b, err := c.GetRaw(ctx, path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// GetRaw returns what the path answers.
func (c *Client) GetRaw(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodGet, path, "", nil)
}

// Apply makes the object at path be as written in YAML or JSON, by server-side apply.
func (c *Client) Apply(ctx context.Context, path string, object []byte) error {
	_, err := c.do(ctx, http.MethodPatch, path+"?fieldManager=doppel-lab&force=true", "application/apply-patch+yaml", object)
	return err
}

func (c *Client) do(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %w", method, path, &StatusError{resp.StatusCode, strings.TrimSpace(string(b))})
	}
	return b, nil
}

// Poll calls check until it returns nil, ctx ends or alive returns an error; the error then names the last failure.
func Poll(ctx context.Context, every time.Duration, alive, check func(context.Context) error) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		last := check(ctx)
		if last == nil {
			return nil
		}
		if err := alive(ctx); err != nil {
			return errors.Join(err, last)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), last)
		}
	}
}
