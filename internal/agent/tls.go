package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/flow"
)

// tlsTimeout bounds a TLS handshake, with the app's inside the client's.
const tlsTimeout = 10 * time.Second

// firstFor is how long the connection to the app that was made for a client's handshake waits for the first request. Nobody watches it, and apps give up
// connections on which nothing comes: a request on one of these would be lost.
const firstFor = time.Second

// splitProtos are the application protocols (ALPN, RFC 7301) that can be split by request.
var splitProtos = []string{"h2", "http/1.1"}

// keys are the contents of a TLS secret as it is mounted. They are read for each connection, as a renewed secret appears in the files.
type keys struct {
	cert tls.Certificate
	ca   *x509.CertPool // nil: the secret has no ca.crt
}

func readKeys(dir string) (keys, error) {
	var k keys
	var err error
	if k.cert, err = tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")); err != nil {
		return k, err
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if errors.Is(err, os.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return k, err
	}
	k.ca = x509.NewCertPool()
	if !k.ca.AppendCertsFromPEM(ca) {
		return k, fmt.Errorf("%s has no certificate", filepath.Join(dir, "ca.crt"))
	}
	return k, nil
}

// unsplit is why a TLS connection is passed on as it is.
type unsplit struct {
	why  string // ours
	said string // what client or app have said about it; anything may be in it
}

func (e *unsplit) Error() string { return e.why + e.detail() }

// maxSaid is how much of what others have said is passed on: people and their terminals read it.
const maxSaid = 100

func (e *unsplit) detail() string {
	if e.said == "" {
		return ""
	}
	return fmt.Sprintf(": %q", e.said[:min(len(e.said), maxSaid)])
}

// tlsSplit is one client's connection to a TLS port whose requests are looked at: TLS ends here, and another begins to the app.
type tlsSplit struct {
	p      *port
	server keys
	client *keys // what the agent shows to the app; nil: nothing
	name   string
	protos []string // what was agreed on with the client

	mu sync.Mutex
	// guarded by mu
	first *tls.Conn // the connection to the app that the handshake made, until it is used or given up
}

// byRequestTLS splits the requests in a TLS connection. What cannot be split is passed to the app untouched.
func (p *port) byRequestTLS(ctx context.Context, a *Agent, c *net.TCPConn, client flow.Stream) {
	raw := &helloConn{streamConn: streamConn{client}}
	s := &tlsSplit{p: p}
	defer s.drop()
	hctx, cancel := context.WithTimeout(ctx, tlsTimeout)
	conn := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		cfg, err := s.greet(hctx, h)
		raw.done(err)
		return cfg, err
	}})
	err := conn.HandshakeContext(hctx)
	cancel()
	var no *unsplit
	switch {
	case raw.isPlain():
		a.up.decisions.note(p.cfg, addrPort(c.RemoteAddr()), nil, "", "it is not TLS")
		p.passOn(ctx, a, raw)
		return
	case errors.As(err, &no):
		a.note(p, fmt.Sprintf("TLS connections to port %d go to the app as they are: %s", p.cfg.ContainerPort, no.why), no.detail())
		a.up.decisions.note(p.cfg, addrPort(c.RemoteAddr()), nil, "", no.Error())
		p.passOn(ctx, a, raw)
		return
	case err != nil:
		a.cfg.Log.Debug("TLS handshake failed", "port", p.cfg.ContainerPort, "err", err)
		_ = client.Close()
		return
	}
	p.split(ctx, a, c, &tlsStream{conn, client}, splitting{app: s.app, whole: s.whole})
}

// greet decides, from a client's hello, how TLS goes on: as the app does, which is asked first.
func (s *tlsSplit) greet(ctx context.Context, h *tls.ClientHelloInfo) (*tls.Config, error) {
	var err error
	if s.server, err = readKeys(s.p.cfg.TLS.Dir); err != nil {
		return nil, &unsplit{why: "the secret that " + agentcfg.AnnotationTLS + " names cannot be used: " + err.Error()}
	}
	if dir := s.p.cfg.TLS.ClientDir; dir != "" {
		k, err := readKeys(dir)
		if err != nil {
			return nil, &unsplit{why: "the secret that " + agentcfg.AnnotationTLSClient + " names cannot be used: " + err.Error()}
		}
		s.client = &k
	}
	var offers []string
	for _, o := range h.SupportedProtos {
		if slices.Contains(splitProtos, o) {
			offers = append(offers, o)
		}
	}
	if len(h.SupportedProtos) > 0 && len(offers) == 0 {
		return nil, &unsplit{"they speak another protocol than HTTP", strings.Join(h.SupportedProtos, ", ")}
	}
	if err := servable(h, &s.server.cert); err != nil {
		return nil, &unsplit{"they offer what the agent does not speak", err.Error()}
	}
	s.name = h.ServerName
	app, err := s.dial(ctx, offers)
	var no *unsplit
	switch {
	case errors.As(err, &no):
		return nil, no
	case err != nil: // it is down; laptops may answer all the same
		s.protos = slices.DeleteFunc(offers, func(o string) bool { return o == "h2" })
	default:
		if proto := app.ConnectionState().NegotiatedProtocol; proto != "" {
			s.protos = []string{proto}
		}
		s.mu.Lock()
		s.first = app
		s.mu.Unlock()
		time.AfterFunc(firstFor, s.drop)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{s.server.cert}, MinVersion: tls.VersionTLS12, NextProtos: s.protos}
	if s.client != nil && s.client.ca != nil { // the app lets in whom we let in: so we ask for what it would ask for
		cfg.ClientAuth, cfg.ClientCAs = tls.RequireAndVerifyClientCert, s.client.ca
	}
	return cfg, nil
}

// earlyData is the extension of clients that send requests with their hello (RFC 8446, section 4.2.10), which crypto/tls refuses.
const earlyData = 42

// servable says why crypto/tls would refuse a client.
func servable(h *tls.ClientHelloInfo, cert *tls.Certificate) error {
	if slices.Contains(h.Extensions, earlyData) {
		return errors.New("early data")
	}
	nameless := *h // the name is the client's to judge
	nameless.ServerName = ""
	if err := nameless.SupportsCertificate(cert); err != nil {
		return err
	}
	if slices.Contains(h.SupportedVersions, tls.VersionTLS13) && !slices.ContainsFunc(tls.CipherSuites(), func(c *tls.CipherSuite) bool {
		return slices.Contains(c.SupportedVersions, tls.VersionTLS13) && slices.Contains(h.CipherSuites, c.ID)
	}) {
		return errors.New("other cipher suites")
	}
	return nil
}

// app returns a connection to the app for plain requests.
func (s *tlsSplit) app(ctx context.Context) (flow.Stream, error) {
	s.mu.Lock()
	c := s.first
	s.first = nil
	s.mu.Unlock()
	if c != nil && !unused(c) {
		_ = c.Close()
		c = nil
	}
	if c == nil {
		var err error
		if c, err = s.dial(ctx, s.protos); err != nil {
			return nil, err
		}
	}
	return &tlsStream{c, flow.FromTCP(c.NetConn().(*net.TCPConn))}, nil
}

// ticketTime is what there is for reading tickets that have come.
const ticketTime = time.Millisecond

// unused says whether an app has neither ended a connection nor said anything, a 408 say, that would be taken for an answer. What TLS says does
// not count: OpenSSL sends tickets unasked. In HTTP/2 servers speak first, and say which requests they have not looked at.
func unused(c *tls.Conn) bool {
	raw := c.NetConn().(*net.TCPConn)
	if c.ConnectionState().NegotiatedProtocol == "h2" || !pending(raw) {
		return true
	}
	_ = c.SetReadDeadline(time.Now().Add(ticketTime))
	_, err := c.Read(make([]byte, 1))
	_ = c.SetReadDeadline(time.Time{})
	return errors.Is(err, os.ErrDeadlineExceeded) && !pending(raw)
}

// drop gives the first connection up if nobody uses it.
func (s *tlsSplit) drop() {
	s.mu.Lock()
	c := s.first
	s.first = nil
	s.mu.Unlock()
	if c != nil {
		_ = c.Close()
	}
}

// dial connects to the app by TLS, as the client would.
func (s *tlsSplit) dial(ctx context.Context, protos []string) (*tls.Conn, error) {
	raw, err := s.p.dialApp(ctx)
	if err != nil {
		return nil, err
	}
	asked := false
	c := tls.Client(raw, &tls.Config{
		ServerName: s.name, NextProtos: protos, MinVersion: tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does, by the secret
		VerifyConnection:   s.verify,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			if s.client == nil {
				return &tls.Certificate{}, nil
			}
			return &s.client.cert, nil
		},
	})
	hctx, cancel := context.WithTimeout(ctx, appDialTimeout)
	defer cancel()
	err = c.HandshakeContext(hctx)
	if asked && s.client == nil {
		err = &unsplit{why: "the app asks for a certificate of its client, which cannot be passed on; name one for the agent with " + agentcfg.AnnotationTLSClient}
	}
	if err != nil {
		_ = raw.Close()
		return nil, refused(err)
	}
	return c, nil
}

// refused is what a failed handshake with the app means: it is there, and speaks TLS with its clients in a way of its own. An app that says nothing, or
// goes away, is as one that is down: it may be starting anew.
func refused(err error) error {
	var no *unsplit
	if errors.As(err, &no) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return err
	}
	return &unsplit{"the app does not speak TLS with the agent", err.Error()}
}

// verify accepts the app if it shows the secret's own certificate, or one of the secret's authority.
func (s *tlsSplit) verify(cs tls.ConnectionState) error {
	leaf := cs.PeerCertificates[0]
	if bytes.Equal(leaf.Raw, s.server.cert.Certificate[0]) {
		return nil
	}
	if s.server.ca == nil {
		return &unsplit{why: "the app shows another certificate than the secret has, which has no ca.crt to know it by"}
	}
	rest := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		rest.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: s.server.ca, Intermediates: rest, DNSName: s.name}); err != nil {
		return &unsplit{"the app's certificate is not one of the secret's ca.crt", err.Error()}
	}
	if s.name != "" { // the client is shown the secret's, while the app may have one for each name
		if err := s.server.cert.Leaf.VerifyHostname(s.name); err != nil {
			return &unsplit{"the app shows a certificate for the client's name, and the secret's is for another one", err.Error()}
		}
	}
	return nil
}

// whole is what an intercept of all connections gets, which speaks TLS as the app does. Whose certificate its laptop shows nobody can know here.
func (s *tlsSplit) whole(ctx context.Context, st flow.Stream) (flow.Stream, error) {
	c := tls.Client(streamConn{st}, &tls.Config{ServerName: s.name, NextProtos: s.protos, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}) //nolint:gosec // see above
	hctx, cancel := context.WithTimeout(ctx, acceptTimeout)
	defer cancel()
	if err := c.HandshakeContext(hctx); err != nil {
		st.Reset()
		return nil, err
	}
	return &tlsStream{c, st}, nil
}

// passOn gives the app a connection of which something has been read.
func (p *port) passOn(ctx context.Context, a *Agent, c *helloConn) {
	p.toApp(ctx, a, &lateStream{Stream: c.Stream, early: c.came()})
}

// helloConn remembers what a client has sent until it is decided what becomes of the connection, and says nothing to a client that is not ours.
type helloConn struct {
	streamConn

	mu sync.Mutex
	// guarded by mu
	got     []byte
	decided bool
	mute    bool // another one answers: an alert would be in its way
}

func (c *helloConn) Read(p []byte) (int, error) {
	n, err := c.Stream.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.decided {
		c.got = append(c.got, p[:n]...)
		c.mute = c.mute || len(c.got) > 0 && c.got[0] != recordHandshake
	}
	return n, err
}

func (c *helloConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	mute := c.mute
	c.mu.Unlock()
	if mute {
		return len(p), nil
	}
	return c.Stream.Write(p)
}

// done notes what was decided.
func (c *helloConn) done(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decided, c.mute = true, err != nil
	if err == nil {
		c.got = nil
	}
}

func (c *helloConn) came() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got
}

// isPlain says whether what came is no TLS.
func (c *helloConn) isPlain() bool {
	b := c.came()
	return len(b) > 0 && b[0] != recordHandshake
}

// recordHandshake is how a TLS connection begins (RFC 8446, section 5.1).
const recordHandshake = 0x16

// lateStream is a stream of which something has been read.
type lateStream struct {
	flow.Stream
	early []byte
}

func (s *lateStream) Read(p []byte) (int, error) {
	if len(s.early) > 0 {
		n := copy(p, s.early)
		s.early = s.early[n:]
		return n, nil
	}
	return s.Stream.Read(p)
}

// tlsStream is a TLS connection as a flow.
type tlsStream struct {
	*tls.Conn
	below flow.Stream
}

// CloseWrite ends this direction in TLS and below it.
func (s *tlsStream) CloseWrite() error { return errors.Join(s.Conn.CloseWrite(), s.below.CloseWrite()) }

func (s *tlsStream) Reset()     { s.below.Reset() }
func (s *tlsStream) Over() bool { return flow.Over(s.below) }

// streamConn is a flow as a connection for TLS; only the handshake has a deadline, which closes it.
type streamConn struct{ flow.Stream }

func (streamConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (streamConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (streamConn) SetDeadline(time.Time) error      { return nil }
func (streamConn) SetReadDeadline(time.Time) error  { return nil }
func (streamConn) SetWriteDeadline(time.Time) error { return nil }
