// Package netstack owns the userspace TCP/IP stack that ends the laptop's connections and turns each into a flow; it is the only importer of gVisor.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/tundev"
)

// Device is where packets come from and go to; *tundev.Device and the ends of tuntest.Pair are such.
type Device interface {
	// ReadPacket waits for a packet and puts it into p. One goroutine calls it.
	ReadPacket(p []byte) (int, tundev.Header, error)
	// WritePacket sends one packet given in parts, and keeps none of them. Any number of goroutines call it.
	WritePacket(h tundev.Header, parts [][]byte) error
	// Splits says that it takes super packets, which the kernel splits if anybody must.
	Splits() bool
	// Close makes a blocked ReadPacket return.
	Close() error
}

// Config says where packets and flows go. Zero values of the limits mean their defaults.
type Config struct {
	// Device carries the packets; Run closes it.
	Device Device
	// MTU of the device in bytes, 1280 to 65535; default 1500.
	MTU int

	// DialTCP opens the flow for a connection from the application at src to dst. The application's SYN is answered when it
	// returns. On an error that errors.Is
	//   - syscall.ECONNREFUSED or syscall.ECONNRESET: the application gets a RST;
	//   - syscall.EHOSTUNREACH, syscall.ENETUNREACH: it gets that error by ICMP;
	//   - anything else (syscall.ETIMEDOUT): it gets nothing, and asks again by itself (retransmitted SYN).
	DialTCP func(ctx context.Context, src, dst netip.AddrPort) (flow.Stream, error)
	// DialUDP opens the flow for the datagrams from src to dst; nil drops UDP. Errors as for DialTCP, with an ICMP port
	// unreachable in the place of the RST.
	DialUDP func(ctx context.Context, src, dst netip.AddrPort) (flow.Packets, error)

	// DialEcho opens the flow for the ICMP echo requests (ping) from src to dst; each message is one of wire.KindEcho. Nil drops them.
	// EHOSTUNREACH and ENETUNREACH are told to the application, by this and by the flow; other errors are silence.
	DialEcho func(ctx context.Context, src, dst netip.Addr) (flow.Packets, error)

	// Log gets what a flow ends with at level debug, and defects; default: none.
	Log *slog.Logger

	// MaxConnecting bounds the TCP connections whose dial or handshake runs; more SYNs are dropped, so that the application
	// retransmits them. Default 4096.
	MaxConnecting int
	// MaxUDP bounds the UDP conversations; the first datagrams of more are dropped. Default 4096.
	MaxUDP int
	// MaxEcho bounds the ICMP echo conversations (one for each running ping); requests of more are dropped. Default 256.
	MaxEcho int
	// DialTimeout bounds one dial. Default 2 minutes, about what an application's kernel waits (tcp_syn_retries 6: 127 s).
	DialTimeout time.Duration
	// UDPIdle ends a UDP conversation without datagrams in either direction; DNSIdle does where the port is 53. Defaults 2 min
	// (RFC 4787, REQ-5), 5 s.
	UDPIdle, DNSIdle time.Duration
	// EchoIdle ends an ICMP echo conversation without requests and replies. Default 30 s.
	EchoIdle time.Duration
	// BufferMax bounds the bytes that one TCP connection queues in each direction; default 4 MiB. Connections that begin while many
	// are open get less: see BufferBudget.
	BufferMax int
	// BufferBudget is what all connections together should queue; default 32 MiB. A connection's share shrinks with the number of
	// open connections, down to 64 KiB.
	BufferBudget int
}

const (
	defaultMaxConnecting = 4096
	defaultMaxUDP        = 4096
	defaultMaxEcho       = 256
	defaultDialTimeout   = 2 * time.Minute
	defaultUDPIdle       = 2 * time.Minute
	defaultEchoIdle      = 30 * time.Second
	defaultDNSIdle       = 5 * time.Second
	defaultBufferMax     = 4 << 20
	defaultBufferBudget  = 32 << 20
	bufferInitial        = 1 << 20 // what a connection starts with, where its share is larger
	bufferMin            = 64 << 10
)

// withDefaults checks c and fills in what is zero.
func (c Config) withDefaults() (Config, error) {
	var errs []error
	if c.Device == nil {
		errs = append(errs, errors.New("no device"))
	}
	if c.DialTCP == nil {
		errs = append(errs, errors.New("no DialTCP"))
	}
	if c.MTU == 0 {
		c.MTU = tundev.DefaultMTU
	}
	if c.MTU < 1280 || c.MTU > tundev.MaxPacket {
		errs = append(errs, fmt.Errorf("mtu %d: want 1280 to %d", c.MTU, tundev.MaxPacket))
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	errs = append(errs,
		orDefault("MaxConnecting", &c.MaxConnecting, defaultMaxConnecting),
		orDefault("MaxUDP", &c.MaxUDP, defaultMaxUDP),
		orDefault("MaxEcho", &c.MaxEcho, defaultMaxEcho),
		orDefault("DialTimeout", &c.DialTimeout, defaultDialTimeout),
		orDefault("UDPIdle", &c.UDPIdle, defaultUDPIdle),
		orDefault("DNSIdle", &c.DNSIdle, defaultDNSIdle),
		orDefault("EchoIdle", &c.EchoIdle, defaultEchoIdle),
		orDefault("BufferMax", &c.BufferMax, defaultBufferMax),
		orDefault("BufferBudget", &c.BufferBudget, defaultBufferBudget),
	)
	c.BufferMax = max(c.BufferMax, bufferMin)
	return c, errors.Join(errs...)
}

func orDefault[T int | time.Duration](name string, v *T, def T) error {
	if *v < 0 {
		return fmt.Errorf("%s is negative", name)
	}
	if *v == 0 {
		*v = def
	}
	return nil
}

// bufferShare is how many bytes each direction of a connection may queue when open connections share the budget.
func bufferShare(budget, limit, open int) int {
	return max(bufferMin, min(limit, budget/(2*max(open, 1))))
}
