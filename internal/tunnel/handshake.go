package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// alpn is the tunnel's name in the TLS handshake (RFC 7301): no other protocol's bytes can be played into a tunnel.
const alpn = "doppel"

// DefaultHandshakeTimeout bounds a handshake in ServerConfig.
const DefaultHandshakeTimeout = 10 * time.Second

// Errors of the handshake that callers branch on.
var (
	// ErrPin means that the other end's key is not the pinned one.
	ErrPin = errors.New("the other end has another key than expected")
	// ErrNotTunnel means that what dialled is not a tunnel.
	ErrNotTunnel = errors.New("not a doppel tunnel")
)

// ClientConfig is what the dialling end of a tunnel needs.
type ClientConfig struct {
	Identity *Identity // shown to the server; nil: none (agents prove themselves by a token)
	Peer     string    // the server's fingerprint; required
	Hello    wire.Hello
	Mux      mux.Config // Initiator is set by Client
}

// Client makes a tunnel over raw, which it owns from now on: preface, TLS 1.3, session, Hello. A server that says no gives a
// *mux.RejectError with its message.
func Client(ctx context.Context, raw net.Conn, cfg ClientConfig) (*mux.Session, wire.HelloReply, error) {
	s, reply, err := client(ctx, raw, cfg)
	if err != nil {
		_ = raw.Close()
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return nil, wire.HelloReply{}, fmt.Errorf("tunnel handshake: %w", err)
	}
	return s, reply, nil
}

func client(ctx context.Context, raw net.Conn, cfg ClientConfig) (*mux.Session, wire.HelloReply, error) {
	var reply wire.HelloReply
	if cfg.Peer == "" {
		return nil, reply, errors.New("no fingerprint of the server")
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	_ = Tune(raw) // a wish
	if _, err := io.WriteString(raw, wire.Preface); err != nil {
		return nil, reply, fmt.Errorf("send preface: %w", err)
	}
	under := &cork{Conn: raw}
	tc := tls.Client(under, clientTLS(cfg))
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, reply, fmt.Errorf("TLS: %w", err)
	}
	cfg.Mux.Initiator = true
	s, err := mux.New(&conn{tc, under}, cfg.Mux)
	if err != nil {
		return nil, reply, err
	}
	reply, err = hello(ctx, s, cfg.Hello)
	if err != nil {
		_ = s.Close()
		return nil, wire.HelloReply{}, err
	}
	return s, reply, nil
}

func hello(ctx context.Context, s *mux.Session, h wire.Hello) (wire.HelloReply, error) {
	if h.Version == 0 {
		h.Version = wire.Version
	}
	if h.Product == "" {
		h.Product = "doppel/" + buildinfo.Version
	}
	var reply wire.HelloReply
	hdr, err := wire.AppendHello(nil, h)
	if err != nil {
		return reply, err
	}
	p, err := s.Call(ctx, hdr)
	if err != nil {
		return reply, err
	}
	if reply, err = wire.ParseHelloReply(p); err != nil {
		return reply, err
	}
	if reply.Version != h.Version {
		return reply, &mux.RejectError{Code: wire.CodeVersion, Msg: fmt.Sprintf("the server speaks protocol %d, this end %d", reply.Version, h.Version)}
	}
	return reply, nil
}

// clientTLS checks nothing but the key's fingerprint: names, dates and authorities mean nothing between two pinned keys.
func clientTLS(cfg ClientConfig) *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{alpn},
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection compares the pinned key
		VerifyConnection: func(cs tls.ConnectionState) error {
			if got := peerFingerprint(cs.PeerCertificates); got != cfg.Peer {
				return fmt.Errorf("%w: want %s, got %s", ErrPin, cfg.Peer, got)
			}
			return nil
		},
		// A full frame is four full records; starting small would cut the first ones (go doc tls.Config).
		DynamicRecordSizingDisabled: true,
	}
	if cfg.Identity != nil {
		c.Certificates = []tls.Certificate{cfg.Identity.cert}
	}
	return c
}

func serverTLS(id *Identity) *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{alpn},
		Certificates:                []tls.Certificate{id.cert},
		ClientAuth:                  tls.RequestClientCert, // the handshake proves the key, Authorize judges it
		SessionTicketsDisabled:      true,                  // a resumed session would not prove the key again
		DynamicRecordSizingDisabled: true,
	}
}

func peerFingerprint(certs []*x509.Certificate) string {
	if len(certs) == 0 {
		return ""
	}
	return Fingerprint(certs[0])
}

// ServerConfig is what the answering end of a tunnel needs.
type ServerConfig struct {
	Identity *Identity // required
	// Authorize judges who dialled: their Hello and the fingerprint of the key that the TLS handshake proved ("" if they
	// showed none). Its error goes to the client: the code and text of a *mux.RejectError, else wire.CodeDenied and the error's text.
	Authorize func(ctx context.Context, h wire.Hello, peerFingerprint string) (wire.HelloReply, error)
	// HandshakeTimeout bounds everything up to the answer to Hello; 0: DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration
	Mux              mux.Config // Initiator and Hold are set by Server
}

// Server answers a tunnel that was dialled over raw, which it owns from now on. Nothing but Hello is looked at before
// Authorize has said yes.
func Server(ctx context.Context, raw net.Conn, cfg ServerConfig) (*mux.Session, wire.Hello, error) {
	timeout := cfg.HandshakeTimeout
	if timeout == 0 {
		timeout = DefaultHandshakeTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	s, h, err := server(ctx, raw, cfg)
	if err != nil {
		_ = raw.Close()
		return nil, h, fmt.Errorf("tunnel handshake: %w", err)
	}
	return s, h, nil
}

func server(ctx context.Context, raw net.Conn, cfg ServerConfig) (*mux.Session, wire.Hello, error) {
	var h wire.Hello
	if cfg.Identity == nil || cfg.Authorize == nil {
		return nil, h, errors.New("server config without Identity or Authorize")
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	_ = Tune(raw) // a wish
	var preface [len(wire.Preface)]byte
	if _, err := io.ReadFull(raw, preface[:]); err != nil {
		return nil, h, fmt.Errorf("read preface: %w", err)
	}
	if string(preface[:]) != wire.Preface {
		return nil, h, ErrNotTunnel
	}
	under := &cork{Conn: raw}
	tc := tls.Server(under, serverTLS(cfg.Identity))
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, h, fmt.Errorf("TLS: %w", err)
	}
	cfg.Mux.Initiator, cfg.Mux.Hold = false, true // until we know who it is, one stream is enough
	s, err := mux.New(&conn{tc, under}, cfg.Mux)
	if err != nil {
		return nil, h, err
	}
	h, err = authorize(ctx, s, cfg, peerFingerprint(tc.ConnectionState().PeerCertificates))
	if err != nil {
		waitForPeer(ctx, s) // let the refusal arrive
		_ = s.Close()
		return nil, h, err
	}
	return s, h, nil
}

// authorize judges the session's first stream, Hello, and releases the session if it may go on.
func authorize(ctx context.Context, s *mux.Session, cfg ServerConfig, fingerprint string) (wire.Hello, error) {
	req, err := s.Accept(ctx)
	if err != nil {
		return wire.Hello{}, err
	}
	h, err := wire.ParseHello(req.Header())
	if err != nil {
		return h, errors.Join(err, req.Reject(wire.CodeProtocol, "the first stream must be Hello"))
	}
	if h.Version != wire.Version {
		e := &mux.RejectError{Code: wire.CodeVersion, Msg: fmt.Sprintf("the server speaks protocol %d, you %d", wire.Version, h.Version)}
		return h, errors.Join(e, req.Reject(e.Code, e.Msg))
	}
	reply, err := cfg.Authorize(ctx, h, fingerprint)
	if err != nil {
		code, msg := rejection(err, wire.CodeDenied)
		return h, errors.Join(fmt.Errorf("authorize: %w", err), req.Reject(code, msg))
	}
	if reply.Version == 0 {
		reply.Version = wire.Version
	}
	if reply.Product == "" {
		reply.Product = "doppel/" + buildinfo.Version
	}
	p, err := wire.MarshalHelloReply(reply)
	if err != nil {
		return h, errors.Join(err, req.Reject(wire.CodeInternal, "no answer"))
	}
	s.Release() // before the client can know
	return h, req.Reply(p)
}

// waitForPeer waits, for a second, until the refused client has hung up.
func waitForPeer(ctx context.Context, s *mux.Session) {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-s.Done():
	case <-ctx.Done():
	case <-t.C:
	}
}

// rejection returns what the other end is told about err.
func rejection(err error, fallback wire.Code) (wire.Code, string) {
	var rej *mux.RejectError
	if errors.As(err, &rej) {
		return rej.Code, rej.Msg
	}
	code := fallback
	var u *uerr.Error
	if errors.As(err, &u) {
		switch u.Kind {
		case uerr.Denied:
			code = wire.CodeDenied
		case uerr.NotFound:
			code = wire.CodeNotFound
		case uerr.Conflict:
			code = wire.CodeBusy
		case uerr.Canceled:
			code = wire.CodeCanceled
		case uerr.Internal, uerr.Usage, uerr.NotConnected, uerr.Cluster:
		}
	} else if c := wire.CodeOf(err); c != wire.CodeInternal {
		code = c
	}
	return code, err.Error()
}
