package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/doppel-dev/doppel/internal/wire"
)

// Probe says whether an end with this fingerprint answers on raw, which it closes. It goes as far as TLS and opens no session.
func Probe(ctx context.Context, raw net.Conn, peer string) error {
	defer raw.Close()
	if peer == "" {
		return errors.New("no fingerprint of the server")
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	if _, err := io.WriteString(raw, wire.Preface); err != nil {
		return fmt.Errorf("send preface: %w", err)
	}
	if err := tls.Client(raw, clientTLS(ClientConfig{Peer: peer})).HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	return nil
}
