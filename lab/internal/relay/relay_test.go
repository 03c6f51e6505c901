package relay

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// pipe is a port whose packets come from in and go to out.
type pipe struct {
	in, out chan []byte
}

func newPipe() pipe { return pipe{make(chan []byte, 100), make(chan []byte, 100)} }

func (p pipe) ReadPacket(b []byte) (int, error) {
	data, ok := <-p.in
	if !ok {
		return 0, io.EOF
	}
	return copy(b, data), nil
}

func (p pipe) WritePacket(b []byte) error {
	p.out <- b
	return nil
}

func TestRelayDelaysBothDirections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPipe(), newPipe()
		done := make(chan error, 1)
		r := New(a, b, Config{Delay: 30 * time.Millisecond})
		go func() { done <- r.Run(context.Background()) }()
		start := time.Now()
		a.in <- []byte("ping")
		if got := string(<-b.out); got != "ping" {
			t.Errorf("got %q", got)
		}
		b.in <- []byte("pong")
		if got := string(<-a.out); got != "pong" {
			t.Errorf("got %q", got)
		}
		if took := time.Since(start); took != 60*time.Millisecond {
			t.Errorf("a round trip took %s, want 60ms", took)
		}
		r.Set(Config{})
		start = time.Now()
		a.in <- []byte("x")
		<-b.out
		if took := time.Since(start); took != 0 {
			t.Errorf("a perfect line took %s", took)
		}
		close(a.in)
		close(b.in)
		if err := <-done; err == nil {
			t.Error("Run ended without an error though its ports were closed")
		}
	})
}

func TestRelayKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPipe(), newPipe()
		r := New(a, b, Config{Delay: time.Second})
		done := make(chan error, 1)
		go func() { done <- r.Run(context.Background()) }()
		for i := range byte(50) {
			a.in <- []byte{i}
		}
		for i := range byte(50) {
			if got := <-b.out; got[0] != i {
				t.Fatalf("packet %d came as number %d", got[0], i)
			}
		}
		close(a.in)
		close(b.in)
		<-done
	})
}

func TestRelayLosesItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPipe(), newPipe()
		r := New(a, b, Config{Loss: 0.25})
		draws := 0
		r.rand = func() float64 { draws++; return float64(draws%4) / 4 } // 0 every fourth time
		done := make(chan error, 1)
		go func() { done <- r.Run(context.Background()) }()
		for range 100 {
			a.in <- []byte("x")
		}
		synctest.Wait()
		if got := len(b.out); got != 75 {
			t.Errorf("%d of 100 packets came through, want 75", got)
		}
		close(a.in)
		close(b.in)
		<-done
	})
}

func TestConfigValidate(t *testing.T) {
	for _, c := range []Config{{Delay: -1}, {Delay: time.Minute}, {Loss: -0.1}, {Loss: 1.1}} {
		if c.Validate() == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	if err := (Config{Delay: 30 * time.Millisecond, Loss: 0.001}).Validate(); err != nil {
		t.Error(err)
	}
}
