package mux

import (
	"errors"
	"net"
	"testing"
	"time"
)

// A loss is told before another connection can be taken: told later it would end that one.
func TestDetachWaitsForLoss(t *testing.T) {
	conn, peer := net.Pipe()
	defer peer.Close()
	c := newCarrier(conn, 1<<10)
	telling, told := make(chan struct{}), make(chan struct{})
	c.lost = func(error) { close(telling); <-told }
	go c.fail(conn, errors.New("reset"))
	<-telling
	detached := make(chan bool)
	go func() {
		_, _, ok := c.detach(errReplaced)
		detached <- ok
	}()
	select {
	case <-detached:
		t.Error("detached while the loss was being told")
	case <-time.After(20 * time.Millisecond): // to see that nothing comes
	}
	close(told)
	if !<-detached {
		t.Error("not detached")
	}
}
