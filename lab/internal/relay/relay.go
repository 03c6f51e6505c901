// Package relay carries packets between two ports with delay and loss, as a long or bad line would.
package relay

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Config is how the line is. The zero value is a perfect one.
type Config struct {
	// Delay is added in each direction, so a round trip takes twice as long.
	Delay time.Duration
	// Loss is the share of packets lost in each direction, from 0 to 1.
	Loss float64
}

// Validate says what of c is out of range.
func (c Config) Validate() error {
	if c.Delay < 0 || c.Delay > 10*time.Second {
		return fmt.Errorf("a delay of %s is not within 0 and 10 s", c.Delay)
	}
	if !(c.Loss >= 0 && c.Loss <= 1) {
		return fmt.Errorf("a loss of %g%% is not within 0%% and 100%%", c.Loss*100)
	}
	return nil
}

// Port is one end of the line. ReadPacket ends with an error once the port is closed.
type Port interface {
	ReadPacket(b []byte) (int, error)
	WritePacket(b []byte) error
}

const (
	// maxPacket is the largest packet: an Ethernet header and 64 KiB.
	maxPacket = 1<<16 + 18
	// queueLength bounds the packets on the way in one direction: 12 MB in packets of 1,500 bytes.
	queueLength = 8192
)

// Relay is a line between two ports.
type Relay struct {
	a, b Port
	rand func() float64

	cfg atomic.Pointer[Config]
}

// New returns a line that carries nothing before Run.
func New(a, b Port, cfg Config) *Relay {
	r := &Relay{a: a, b: b, rand: rand.Float64}
	r.Set(cfg)
	return r
}

// Set changes the line; packets already on the way keep their delay.
func (r *Relay) Set(cfg Config) { r.cfg.Store(&cfg) }

// Run carries packets until a port is closed or ctx ends; the caller closes the ports.
func (r *Relay) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	for _, direction := range [][2]Port{{r.a, r.b}, {r.b, r.a}} {
		queue := make(chan packet, queueLength)
		group.Go(func() { cancel(r.receive(direction[0], queue)) })
		group.Go(func() { cancel(send(ctx, direction[1], queue)) })
	}
	group.Wait()
	return context.Cause(ctx)
}

type packet struct {
	due  time.Time
	data []byte
}

// receive puts packets on the line. A full line drops them, as any router does.
func (r *Relay) receive(from Port, queue chan<- packet) error {
	defer close(queue)
	buf := make([]byte, maxPacket)
	for {
		n, err := from.ReadPacket(buf)
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		cfg := r.cfg.Load()
		if cfg.Loss > 0 && r.rand() < cfg.Loss {
			continue
		}
		select {
		case queue <- packet{time.Now().Add(cfg.Delay), append([]byte(nil), buf[:n]...)}:
		default:
		}
	}
}

// send takes packets off the line when they are due, in their order.
func send(ctx context.Context, to Port, queue <-chan packet) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for p := range queue {
		if wait := time.Until(p.due); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				drain(queue)
				return context.Cause(ctx)
			}
		}
		if err := to.WritePacket(p.data); err != nil {
			drain(queue)
			return fmt.Errorf("send: %w", err)
		}
	}
	return errors.New("the other end was closed")
}

// drain keeps the receiver from waiting until its port is closed.
func drain(queue <-chan packet) {
	for range queue {
	}
}
