package tunnel

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/rawio"
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
	// Direct says that nothing but this connection lies between the two ends: there is no preface, and TLS comes first, with ServerName (if it
	// is no address) by which an ingress may find the way without looking inside.
	Direct     bool
	ServerName string
	// Resume is the tunnel that is to go on over this connection, if the server still has it; nil: none.
	Resume *mux.Session
	Mux    mux.Config // Initiator, ID and Resume are set by Client
	Proved func()     // the server has shown its key; nil: nobody cares
}

// Client makes a tunnel over raw, which it owns from now on: preface, TLS 1.3, Hello, session. It returns cfg.Resume if that
// goes on, else a new session. A server that says no gives a *mux.RejectError with its message.
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
	if !cfg.Direct {
		if _, err := io.WriteString(raw, wire.Preface); err != nil {
			return nil, reply, fmt.Errorf("send preface: %w", err)
		}
	}
	under := newCork(rawio.New(raw))
	tc := tls.Client(under, clientTLS(cfg))
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, reply, fmt.Errorf("TLS: %w", err)
	}
	if cfg.Proved != nil {
		cfg.Proved()
	}
	c := &conn{tc, under}
	cfg.Hello.Resume = &wire.Resume{}
	var old mux.Handover
	if cfg.Resume != nil {
		var err error
		if old, err = cfg.Resume.Detach(); err == nil {
			cfg.Hello.Resume = &wire.Resume{Mux: cfg.Resume.ID(), Received: old.Received()}
		}
	}
	reply, err := sendHello(c, cfg.Hello)
	if err != nil {
		return nil, wire.HelloReply{}, err
	}
	r := reply.Resume
	if want := cfg.Hello.Resume.Mux; r != nil && want != "" && r.Mux == want {
		if err := old.Attach(c, r.Received); err != nil {
			return nil, reply, err
		}
		return cfg.Resume, reply, nil
	}
	cfg.Mux.Initiator = true
	if r != nil && r.Seconds > 0 {
		cfg.Mux.ID, cfg.Mux.Resume = r.Mux, time.Duration(r.Seconds)*time.Second
	}
	s, err := mux.New(c, cfg.Mux)
	return s, reply, err
}

// clientTLS checks nothing but the key's fingerprint: names, dates and authorities mean nothing between two pinned keys.
func clientTLS(cfg ClientConfig) *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{alpn},
		ServerName:         cfg.ServerName,
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
	Direct   bool      // as ClientConfig.Direct
	// Authorize judges who dialled: their Hello and the fingerprint of the key that the TLS handshake proved ("" if they
	// showed none). Its error goes to the client: the code and text of a *mux.RejectError, else wire.CodeDenied and the error's text.
	Authorize func(ctx context.Context, h wire.Hello, peerFingerprint string) (wire.HelloReply, error)
	// Resume is how long a tunnel outlives its connection, in whole seconds; 0: not at all.
	Resume time.Duration
	// Find returns the tunnel of that ID of the client that Authorize has just accepted, or nil. Required with Resume.
	Find func(id string) *mux.Session
	// HandshakeTimeout bounds everything up to the answer to Hello; 0: DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration
	Mux              mux.Config // Initiator, ID and Resume are set by Server
}

// Server answers a tunnel that was dialled over raw, which it owns from now on. Nothing but Hello is looked at before
// Authorize has said yes. The session that it returns is one that Find returned if that goes on, else a new one.
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
	if cfg.Identity == nil || cfg.Authorize == nil || cfg.Resume > 0 && cfg.Find == nil {
		return nil, h, errors.New("server config without Identity, Authorize or Find")
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	_ = Tune(raw) // a wish
	if !cfg.Direct {
		var preface [len(wire.Preface)]byte
		if _, err := io.ReadFull(raw, preface[:]); err != nil {
			return nil, h, fmt.Errorf("read preface: %w", err)
		}
		if string(preface[:]) != wire.Preface {
			return nil, h, ErrNotTunnel
		}
	}
	under := newCork(rawio.New(raw))
	tc := tls.Server(under, serverTLS(cfg.Identity))
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, h, fmt.Errorf("TLS: %w", err)
	}
	c := &conn{tc, under}
	stream, h, err := readHello(c)
	var reply wire.HelloReply
	if err == nil {
		reply, err = authorize(ctx, h, cfg, peerFingerprint(tc.ConnectionState().PeerCertificates))
	}
	if err != nil {
		refuse(c, stream, err)
		return nil, h, fmt.Errorf("hello: %w", err)
	}
	s, err := welcome(c, stream, h, reply, cfg)
	return s, h, err
}

// authorize judges Hello.
func authorize(ctx context.Context, h wire.Hello, cfg ServerConfig, fingerprint string) (wire.HelloReply, error) {
	if h.Version != wire.Version {
		return wire.HelloReply{}, &mux.RejectError{Code: wire.CodeVersion, Msg: fmt.Sprintf("the server speaks protocol %d, you %d", wire.Version, h.Version)}
	}
	reply, err := cfg.Authorize(ctx, h, fingerprint)
	if err != nil {
		return reply, err
	}
	if reply.Version == 0 {
		reply.Version = wire.Version
	}
	if reply.Product == "" {
		reply.Product = "doppel/" + buildinfo.Version
	}
	return reply, nil
}

// welcome says yes, and lets the tunnel that is to go on do so, or makes a new one.
func welcome(c *conn, stream uint32, h wire.Hello, reply wire.HelloReply, cfg ServerConfig) (*mux.Session, error) {
	cfg.Mux.Initiator = false
	var old *mux.Session
	var at mux.Handover
	if seconds := int(cfg.Resume / time.Second); h.Resume != nil && seconds > 0 {
		old, at = find(h.Resume, cfg)
		cfg.Mux.Resume = time.Duration(seconds) * time.Second
		cfg.Mux.ID = rand.Text()
		if old != nil {
			cfg.Mux.ID = old.ID()
		}
		reply.Resume = &wire.Resume{Mux: cfg.Mux.ID, Received: at.Received(), Seconds: seconds}
	}
	p, err := wire.MarshalHelloReply(reply)
	if err != nil {
		return nil, err
	}
	hdr := wire.Header{Type: wire.TypeOK, Flags: wire.FlagFin, Stream: stream}
	if err := writeFrame(c, hdr, p); err != nil {
		return nil, fmt.Errorf("answer hello: %w", err)
	}
	if old != nil {
		return old, at.Attach(c, h.Resume.Received)
	}
	return mux.New(c, cfg.Mux)
}

// find returns the tunnel that the client wants to go on with, taken from its connection, if that is possible.
func find(r *wire.Resume, cfg ServerConfig) (*mux.Session, mux.Handover) {
	if r.Mux == "" {
		return nil, mux.Handover{}
	}
	s := cfg.Find(r.Mux)
	if s == nil || s.ID() != r.Mux {
		return nil, mux.Handover{}
	}
	at, err := s.Detach()
	if err != nil || !at.Keeps(r.Received) {
		return nil, mux.Handover{}
	}
	return s, at
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
		case uerr.NotFound, uerr.NoManager:
			code = wire.CodeNotFound
		case uerr.Conflict:
			code = wire.CodeBusy
		case uerr.Canceled:
			code = wire.CodeCanceled
		case uerr.Internal, uerr.Usage, uerr.NotConnected, uerr.Cluster, uerr.LeftBehind:
		}
	} else if c := wire.CodeOf(err); c != wire.CodeInternal {
		code = c
	}
	return code, err.Error()
}
