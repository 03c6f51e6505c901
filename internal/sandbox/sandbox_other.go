//go:build !linux

package sandbox

import (
	"context"
	"net/netip"
	"os/exec"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

var errUnsupported = uerr.New(uerr.Usage, "use: doppel connect", "network namespaces are Linux's")

// Box cannot be made here.
type Box struct{}

// Start says that it is not possible here.
func Start(Config) (*Box, error) { return nil, errUnsupported }

// Become says that it is not possible here.
func Become([]string) error { return errUnsupported }

// WithVolumes does nothing here: the volumes are below their root only.
func WithVolumes(*exec.Cmd, []string, string, []string) {}

// BecomeWithVolumes says that it is not possible here.
func BecomeWithVolumes([]string, func(error)) error { return errUnsupported }

// Root is never called here.
func (b *Box) Root(context.Context, rootapi.Options) (*rootapi.Client, error) {
	return nil, errUnsupported
}

// DialTCP is never called here.
func (b *Box) DialTCP(context.Context, netip.AddrPort) (flow.Stream, bool, error) {
	return nil, true, errUnsupported
}

// DialUDP is never called here.
func (b *Box) DialUDP(context.Context, netip.AddrPort) (flow.Packets, bool, error) {
	return nil, true, errUnsupported
}

// Go is never called here.
func (b *Box) Go() error { return errUnsupported }

// Cmd is never called here.
func (b *Box) Cmd() *exec.Cmd { return nil }

// Close is never called here.
func (b *Box) Close() {}
